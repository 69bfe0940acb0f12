"""Sweeps on a real Slurm of two nodes, which the tests start on this machine."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slm.data import Prepared
from slm.experiment import Experiment
from slm.files import hold_lock, lock_holder
from slm.hardware.runtime import RuntimeModel
from slm.plan import Plan
from slm.recipe import pocket
from slm.run import add_attempt, cancel_run, read_attempt, record_exit, retry_run, run_state
from slm.sweep.launcher import Waiting
from slm.sweep.micro_batch import MicroBatches
from slm.sweep.orchestrator import Orchestrator, Outcome
from slm.sweep.planning import Corpora, make_plans, record
from slm.sweep.slurm import Cluster, Job, Slurm, begin, queue, script_of
from tests import slurm
from tests.attempts import log, make_attempt, plan_of, train

ONE = Cluster(device_name="test")
TWO = replace(ONE, nodes=2)


@pytest.fixture(scope="module")
def daemons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Slurm of two nodes with a core each."""
    if why := slurm.why_not():
        pytest.skip(why)
    with slurm.cluster(tmp_path_factory.mktemp("slurm") / "cluster"):
        yield


@pytest.fixture
def nodes(daemons: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both nodes ready, before and after."""
    monkeypatch.setattr("slm.sweep.slurm.QUEUE_SECONDS", 0.5)
    yield
    for node in ("n1", "n2"):  # fails for one that is not drained
        subprocess.run(
            ["scontrol", "update", f"NodeName={node}", "State=RESUME"],
            capture_output=True,
            check=False,
        )


@pytest.fixture
def odd_home(tmp_path: Path, prepared: Prepared) -> Path:
    """A home whose name a shell would take apart."""
    home = tmp_path / "it's a $HOME, 100%j"
    home.mkdir()
    (home / "data").symlink_to(prepared.folder.parent)
    return home


class Watcher:
    """A sweep's view that remembers how runs end, and lets a test act on what happens and on each moment."""

    def __init__(
        self, act: Callable[[Path, dict[str, Any]], None] = lambda attempt, event: None
    ) -> None:
        self.ends: list[tuple[str, str, str | None]] = []
        self.notes: list[str] = []
        self.states: set[str] = set()
        self.attempts: dict[str, Path] = {}
        self._act = act

    def run_started(self, plan: Plan, attempt: Path, adopted: bool) -> None:
        self.attempts[plan.run_id] = attempt

    def event(self, plan: Plan, event: dict[str, Any]) -> None:
        self._act(self.attempts[plan.run_id], event)

    def run_ended(self, plan: Plan, outcome: str, message: str | None) -> None:
        self.ends.append((plan.run_id, outcome, message))
        self._act(self.attempts[plan.run_id], {"event": outcome, "message": message})

    def note(self, line: str) -> None:
        self.notes.append(line)

    def refresh(self) -> None:
        jobs = queue()
        for attempt in self.attempts.values():
            job = jobs.get(attempt.parent.parent.resolve())
            self.states.add(run_state(attempt.parent.parent, job and job.status).status)


def sweep(
    home: Path,
    watcher: Watcher,
    cluster: Cluster = ONE,
    seeds: Sequence[int] = (0,),
    steps: int = 20,
    pause: float = 0,
) -> tuple[list[Path], Outcome]:
    """Train runs of depth 2 that differ in their seeds, on a cluster; their folders and what became of them."""
    experiment = Experiment("test", (pocket,), (2,), steps=steps, seeds=tuple(seeds))
    corpora = Corpora(experiment, home)
    plans = make_plans(experiment, lambda asked: corpora.prepare(asked, lambda line: None))
    record(experiment, plans, home)
    launcher = Slurm(cluster, RuntimeModel(home), MicroBatches(), watcher.note)
    conductor = Orchestrator(
        plans, corpora.of, home, launcher, watcher, lambda: None, checkpoint_seconds=pause
    )
    return [home / plan.run_id for plan in plans], conductor.run()


def one_job(home: Path) -> Slurm:
    return Slurm(ONE, RuntimeModel(home), MicroBatches(), print)


def say(*command: str) -> str:
    """What a command of Slurm says."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def job_of(attempt: Path) -> str:
    """The number of an attempt's job."""
    return str(json.loads((attempt / "job.json").read_text())["job"])


def node_of(attempt: Path) -> str:
    """The nodes of an attempt's job."""
    return say(
        "squeue", "--states=all", "--noheader", "--format=%N", "--jobs", job_of(attempt)
    ).strip()


def drain(node: str) -> None:
    """Have a node take no more jobs."""
    say("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test")


def ends(folder: Path) -> list[str | None]:
    """Why each attempt of a run ended; None for a finished one."""
    return [
        json.loads(path.read_text())["reason"]
        for path in sorted(folder.glob("attempts/*/exit.json"))
    ]


def resumed(folder: Path) -> list[int | None]:
    """The step that each attempt went on from."""
    return [
        log(attempt, "started")[0]["resumed_from"] for attempt in sorted(folder.glob("attempts/*"))
    ]


@pytest.mark.soak
def test_runs_finish_though_a_node_is_drained_while_one_waits_and_a_trainer_is_killed(
    odd_home: Path, nodes: None
) -> None:
    killed: list[Path] = []

    def disturb(attempt: Path, event: dict[str, Any]) -> None:
        if event["event"] == "checkpoint" and not killed:
            trainer = lock_holder(attempt.parent.parent / "train.lock")
            assert trainer is not None
            os.kill(trainer, signal.SIGKILL)
            killed.append(attempt.parent.parent)
            drain(node_of(attempt))

    watcher = Watcher(disturb)
    folders, outcome = sweep(odd_home, watcher, seeds=range(3), steps=100)
    [hit] = killed
    assert sorted(outcome.trained) == sorted(folder.name for folder in folders)
    assert [ends(folder) for folder in folders] == [
        ["error", None] if folder == hit else [None] for folder in folders
    ]
    assert [step is not None for step in resumed(hit)] == [False, True]
    attempts = [attempt for folder in folders for attempt in folder.glob("attempts/*")]
    assert sorted(map(node_of, attempts)) in (["n1", "n1", "n1", "n2"], ["n1", "n2", "n2", "n2"])
    assert watcher.states >= {"queued", "running", "finished"}
    assert queue()[hit.resolve()] == Job(
        job_of(hit / "attempts/002"), f"slm-{hit.name}-002", "COMPLETED", "None"
    )


@pytest.mark.soak
def test_a_run_that_was_cancelled_by_hand_and_one_that_was_requeued_go_on(
    home: Path, nodes: None
) -> None:
    told: list[Path] = []

    def disturb(attempt: Path, event: dict[str, Any]) -> None:
        if event["event"] == "cancelled":
            retry_run(attempt.parent.parent)
        if event["event"] == "checkpoint" and attempt.name == "001" and attempt not in told:
            say(*(("scontrol", "requeue") if told else ("scancel",)), job_of(attempt))
            told.append(attempt)

    watcher = Watcher(disturb)
    folders, outcome = sweep(home, watcher, seeds=range(2), steps=100)
    cancelled, requeued = (attempt.parent.parent for attempt in told)
    assert sorted(outcome.trained) == sorted(folder.name for folder in folders)
    assert (ends(cancelled), ends(requeued)) == (["cancelled", None], ["interrupted", None])
    for folder, same_job in ((cancelled, False), (requeued, True)):
        assert [step is not None for step in resumed(folder)] == [False, True]
        assert (job_of(folder / "attempts/001") == job_of(folder / "attempts/002")) is same_job
    assert [end for run, end, _ in watcher.ends if run == requeued.name] == ["finished"]


def test_two_nodes_train_as_one_process_and_go_on_when_their_time_is_over(
    home: Path, tmp_path: Path, prepared: Prepared, nodes: None
) -> None:
    alone: list[Path] = []

    def disturb(attempt: Path, event: dict[str, Any]) -> None:
        if event["event"] == "started" and not event["resumed_from"]:
            say("scancel", "--signal=USR2", job_of(attempt))  # as Slurm does before a limit
        if event["event"] == "failed":  # its job waits
            alone.append(
                make_attempt(tmp_path / "alone", Plan.read(attempt / "../../plan.json"), prepared)
            )
            assert train(alone[0], 1).returncode == 0

    watcher = Watcher(disturb)
    [folder], outcome = sweep(home, watcher, TWO, steps=70)
    first, second = sorted(folder.glob("attempts/*"))
    assert outcome.trained == [folder.name]
    assert ends(folder) == ["interrupted", None]
    assert watcher.ends == [(folder.name, "finished", None)]
    assert job_of(first) == job_of(second)
    assert node_of(second) == "n[1-2]"
    assert log(first, "started")[0]["ranks"] == log(second, "started")[0]["ranks"] == 2
    losses = [event["loss"] for attempt in (first, second) for event in log(attempt, "train")]
    assert len(losses) == 70
    assert losses[:10] == pytest.approx(
        [event["loss"] for event in log(alone[0], "train")][:10], rel=1e-5
    )


def test_a_stopped_sweep_takes_its_jobs_from_the_queue(home: Path, nodes: None) -> None:
    class Impatient(Watcher):
        def refresh(self) -> None:
            super().refresh()
            signal.raise_signal(signal.SIGINT)

    drain("n[1-2]")
    watcher = Impatient()
    with pytest.raises(KeyboardInterrupt):
        sweep(home, watcher, seeds=range(2))
    assert [outcome for _, outcome, _ in watcher.ends] == ["interrupted"] * 2
    assert not any(job.lives for job in queue().values())


def test_what_sbatch_refuses_fails_in_its_words(home: Path, nodes: None) -> None:
    watcher = Watcher()
    [folder], outcome = sweep(home, watcher, replace(ONE, partition="nowhere"))
    assert outcome.not_finished == {
        folder.name: "error: not submitted: sbatch: error: invalid partition specified: nowhere"
    }
    assert [end for _, end, _ in watcher.ends] == ["retried", "retried", "failed"]


def test_a_job_whose_number_was_never_noted_is_known_by_its_folder(
    home: Path, prepared: Prepared, nodes: None
) -> None:
    drain("n[1-2]")
    first = make_attempt(home, plan_of(pocket(2, steps=5), prepared), prepared)
    one_job(home).start(first)
    (first / "job.json").unlink()
    reborn = one_job(home)
    reborn.check()
    assert reborn.living([first]) == {first}
    second = add_attempt(first.parent.parent, {})
    reborn.start(second)
    assert [job.name for job in queue().values() if job.lives] == [
        f"slm-{first.parent.parent.name}-001"
    ]
    say("scancel", "--me")
    wait_until(lambda: reborn.living([first]) == set())
    assert reborn.reap(first)["reason"] == "cancelled"
    assert reborn.reap(second)["reason"] == "interrupted"


def test_runs_live_on_while_slurm_does_not_answer(
    home: Path, prepared: Prepared, nodes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drain("n[1-2]")
    attempt = make_attempt(home, plan_of(pocket(2, steps=5), prepared), prepared)
    notes: list[str] = []
    launcher = Slurm(ONE, RuntimeModel(home), MicroBatches(), notes.append)
    launcher.start(attempt)
    plan = Plan.read(attempt / "../../plan.json")
    waiting = [Waiting(plan.run_id, plan.hyperparameters, None, 1.0)]
    wrong = tmp_path / "slurm.conf"
    text = Path(os.environ["SLURM_CONF"]).read_text()
    wrong.write_text(re.sub("SlurmctldPort=.*", "SlurmctldPort=1\nMessageTimeout=1", text))
    monkeypatch.setattr("slm.sweep.slurm.SILENT_SECONDS", 0)
    with monkeypatch.context() as silent:
        silent.setenv("SLURM_CONF", str(wrong))
        launcher._ask_again = 0
        for _ in range(3):
            assert launcher.living([attempt]) == {attempt}
        assert launcher.places(waiting, []) == []
    assert launcher.living([attempt]) == {attempt}
    assert len(launcher.places(waiting, [])) == 1
    assert len(notes) == 2
    assert notes[0].startswith(
        "Slurm does not answer (slurm_load_jobs error: Unable to contact slurm controller"
    )
    assert notes[1] == "Slurm answers again"
    launcher.stop(attempt)
    wait_until(lambda: launcher.living([attempt]) == set())
    assert launcher.reap(attempt)["reason"] == "interrupted"


def wait_until(what: Callable[[], bool]) -> None:
    """Until something is so."""
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_script_asks_for_what_a_run_needs(
    tmp_path: Path, prepared: Prepared, monkeypatch: Any
) -> None:
    monkeypatch.setattr("sys.executable", "/opt/my python")
    cluster = Cluster(
        2,
        8,
        partition="gpu",
        account="me",
        qos="low",
        time="4:00:00",
        options=("--mem=0", "--exclusive", "--constraint=a&b"),
    )
    home = tmp_path / "it's 100%"
    home.mkdir()
    slot = cluster.slot(replace(pocket(2), batch_tokens=12 * pocket.sequence_length))
    attempt = make_attempt(
        home, plan_of(pocket(2), prepared), prepared, **{**vars(slot), "ids": []}
    )
    quoted = str(attempt).replace("'", "'\"'\"'")
    assert script_of(attempt, cluster).splitlines() == [
        "#!/bin/sh",
        f"#SBATCH --job-name=slm-{attempt.parent.parent.name}-001",
        f"#SBATCH --output='{quoted.replace('%', '%%')}/job.log'",
        "#SBATCH --open-mode=append",
        "#SBATCH --requeue",
        "#SBATCH --signal=USR2@120",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --cpus-per-task=32",
        "#SBATCH --gpus-per-node=6",
        "#SBATCH --partition=gpu",
        "#SBATCH --account=me",
        "#SBATCH --qos=low",
        "#SBATCH --time=4:00:00",
        "#SBATCH --mem=0",
        "#SBATCH --exclusive",
        "#SBATCH --constraint='a&b'",
        f"attempt=$('/opt/my python' -P -m slm.sweep.slurm begin '{quoted}') || exit",
        "srun --mpi=none --nodes=2 --ntasks=2 --cpus-per-task=32 --kill-on-bad-exit=1 "
        "'/opt/my python' -P -m slm.sweep.supervisor \"$attempt\"",
        "'/opt/my python' -P -m slm.sweep.slurm end \"$attempt\"",
    ]


@pytest.mark.parametrize(
    ("cluster", "rows", "expected"),
    [
        (Cluster(), 8, (1, 1, 1)),
        (Cluster(cores_per_node=6), 8, (1, 6, 1)),
        (Cluster(cores_per_node=16), 64, (1, 8, 2)),
        (Cluster(cores_per_node=16), 3, (1, 3, 5)),
        (Cluster(nodes=2, cores_per_node=4), 7, (2, 6, 1)),
        (Cluster(nodes=4), 3, (3, 3, 1)),
        (Cluster(nodes=2, gpus_per_node=8), 512, (2, 16, 1)),
        (Cluster(nodes=2, gpus_per_node=8), 9, (2, 8, 1)),
    ],
)
def test_every_node_has_as_many_ranks_and_no_rank_lacks_a_row(
    cluster: Cluster, rows: int, expected: tuple[int, int, int]
) -> None:
    slot = cluster.slot(replace(pocket(2), batch_tokens=rows * pocket.sequence_length))
    assert (slot.nodes, slot.ranks, slot.threads) == expected


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"nodes": 0}, "--nodes 0: at least 1"),
        ({"gpus_per_node": -1}, "--gpus-per-node -1: at least 0"),
        ({"cores_per_node": 0}, "--cores-per-node 0: at least 1"),
        ({"options": ("--nodes=3",)}, "--sbatch --nodes=3: say it by --nodes"),
        ({"options": ("-Jmine",)}, "--sbatch -Jmine: a sweep says it itself"),
        ({"options": ("--mem", "64G")}, "write an option and its value as one word"),
        ({"partition": "a\nb"}, "over several lines"),
    ],
)
def test_a_request_that_cannot_be_is_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Cluster(**changes)


def test_a_machine_without_slurm_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match="no sbatch on this machine"):
        one_job(tmp_path).check()
    assert queue() == {}


def test_a_job_begins_the_attempt_that_it_was_submitted_for_and_later_new_ones(
    home: Path,
    prepared: Prepared,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    first = make_attempt(home, plan_of(pocket(2, steps=5), prepared), prepared)
    second, third = (first.with_name(name) for name in ("002", "003"))

    def begins(submitted: Path, attempt: Path) -> None:
        assert begin(submitted) == 0
        assert capsys.readouterr().out == f"{attempt}\n"
        assert job_of(attempt) == "7"

    begins(first, first)
    begins(first, first)  # its nodes were lost before anything was done
    (first / "log").touch()
    begins(first, second)
    assert ends(first.parent.parent) == ["interrupted"]
    record_exit(second, 1, "interrupted", "stopped, as asked")
    begins(first, third)
    told = [read_attempt(attempt) for attempt in (first, third)]
    assert [document.pop("attempt") for document in told] == [1, 3]
    assert [{**document, "created": 0} for document in told] == [{**told[0], "created": 0}] * 2
    lock = hold_lock(first.parent.parent / "lock")
    assert lock is not None
    with lock:
        assert begin(first) == 1
    cancel_run(first.parent.parent)
    assert begin(first) == 1
    assert capsys.readouterr().out == ""


@pytest.mark.soak
def test_six_runs_survive_a_drained_node_a_cancelled_job_and_the_conductor_s_death(
    home: Path, tmp_path: Path, prepared: Prepared, nodes: None
) -> None:
    class Dead(Exception):
        pass

    def die(attempt: Path, event: dict[str, Any]) -> None:
        if event["event"] == "checkpoint":
            raise Dead

    with pytest.raises(Dead):
        sweep(home, Watcher(die), seeds=range(6), steps=200)
    assert len([job for job in queue().values() if job.lives]) == 6
    told: list[Path] = []

    def disturb(attempt: Path, event: dict[str, Any]) -> None:
        if event["event"] == "cancelled":
            retry_run(attempt.parent.parent)
        if event["event"] == "checkpoint" and len(told) == 0:
            told.append(attempt)
            drain("n2")
        if (
            event["event"] == "checkpoint"
            and len(told) == 1
            and attempt != told[0]
            and node_of(attempt) == "n1"
        ):
            told.append(attempt)
            say("scancel", job_of(attempt))

    watcher = Watcher(disturb)
    folders, outcome = sweep(home, watcher, seeds=range(6), steps=200)
    cancelled = told[1].parent.parent
    assert sorted(outcome.trained) == sorted(folder.name for folder in folders)
    assert [ends(folder) for folder in folders] == [
        ["cancelled", None] if folder == cancelled else [None] for folder in folders
    ]
    assert [node_of(max(folder.glob("attempts/*"))) for folder in folders].count("n2") == 1
    alone = make_attempt(tmp_path / "alone", Plan.read(cancelled / "plan.json"), prepared)
    assert train(alone, 1).returncode == 0
    disturbed, quiet = (
        json.loads((run / "done.json").read_text()) for run in (cancelled, alone.parent.parent)
    )
    for key in ("val_bpb", "train_loss", "tokens", "flops", "weights_sha256"):
        assert disturbed[key] == quiet[key]


@pytest.mark.soak
def test_a_run_outlasts_the_time_limit_of_its_job_and_a_stop(
    home: Path, nodes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slm.sweep.slurm.WARNING_SECONDS", 45)

    def stop(attempt: Path, event: dict[str, Any]) -> None:
        if event["event"] == "checkpoint" and attempt.name == "002":
            signal.raise_signal(signal.SIGINT)

    cluster = replace(ONE, time="2")  # Slurm may warn a minute early
    with pytest.raises(KeyboardInterrupt):
        sweep(home, Watcher(stop), cluster, steps=5500, pause=5)
    [folder] = [path.parent for path in home.glob("*/plan.json")]
    assert ends(folder) == ["interrupted", "interrupted"]
    first, second = sorted(folder.glob("attempts/*"))
    assert job_of(first) == job_of(second)
    assert not any(job.lives for job in queue().values())
    _, outcome = sweep(home, Watcher(), replace(ONE, time="10"), steps=5500, pause=5)
    assert outcome.trained == [folder.name]
    assert ends(folder) == ["interrupted", "interrupted", None]
