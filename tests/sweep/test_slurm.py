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

from slm.data import PreparedDataset
from slm.experiment import Experiment
from slm.files import hold_lock, lock_holder
from slm.hardware.runtime import RuntimeModel
from slm.plan import Plan
from slm.recipe import pocket
from slm.run import add_attempt, cancel_run, read_attempt, record_exit, retry_run, run_state
from slm.sweep.launcher import WaitingRun
from slm.sweep.micro_batch import MicroBatches
from slm.sweep.orchestrator import Orchestrator, Outcome, Sweep
from slm.sweep.planning import Planner, plans_of, record
from slm.sweep.slurm import Cluster, Slurm, SlurmJob, begin, job_script, queue
from tests import slurm
from tests.attempts import log, make_attempt, plan_of
from tests.forked import train

ONE = Cluster(device_name="test")
TWO = replace(ONE, nodes=2)


@pytest.fixture(scope="module")
def daemons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Start a Slurm of two nodes with a core each."""
    if why := slurm.why_not():
        pytest.skip(why)
    with slurm.cluster(tmp_path_factory.mktemp("slurm") / "cluster"):
        yield


@pytest.fixture
def nodes(daemons: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Resume both nodes after the test."""
    monkeypatch.setattr("slm.sweep.slurm.QUEUE_SECONDS", 0.5)
    yield
    for node in ("n1", "n2"):  # fails for a node that is not drained
        subprocess.run(
            ["scontrol", "update", f"NodeName={node}", "State=RESUME"],
            capture_output=True,
            check=False,
        )


@pytest.fixture
def odd_home(tmp_path: Path, prepared: PreparedDataset) -> Path:
    """Return a home whose name needs quoting in a shell."""
    home = tmp_path / "it's a $HOME, 100%j"
    home.mkdir()
    (home / "data").symlink_to(prepared.folder.parent)
    return home


class Watcher:
    """View that records how runs end and which states they pass, and calls `act` on every event."""

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
    """Train runs of depth 2 on a cluster, one per seed; return their folders and the outcome."""
    experiment = Experiment("test", (pocket,), (2,), steps=steps, seeds=tuple(seeds))
    planner = Planner(experiment, home)
    plans = plans_of(planner.prepare())
    record(experiment, plans, home)
    launcher = Slurm(cluster, RuntimeModel(home), MicroBatches(), watcher.note)
    work = Sweep(plans, home, planner.dataset, checkpoint_seconds=pause)
    orchestrator = Orchestrator(work, launcher, watcher, ingest=lambda home: [])
    return [home / plan.run_id for plan in plans], orchestrator.run()


def one_job(home: Path) -> Slurm:
    return Slurm(ONE, RuntimeModel(home), MicroBatches(), print)


def run(*command: str) -> str:
    """Return the output of a Slurm command."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def job_of(attempt: Path) -> str:
    """Return the number of an attempt's job."""
    return str(json.loads((attempt / "job.json").read_text())["job"])


def node_of(attempt: Path) -> str:
    """Return the nodes of an attempt's job."""
    return run(
        "squeue", "--states=all", "--noheader", "--format=%N", "--jobs", job_of(attempt)
    ).strip()


def drain(node: str) -> None:
    """Let a node start no more jobs."""
    run("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test")


def ends(folder: Path) -> list[str | None]:
    """Return the reason of each attempt of a run; None for a finished one."""
    return [
        json.loads(path.read_text())["reason"]
        for path in sorted(folder.glob("attempts/*/exit.json"))
    ]


def resumed(folder: Path) -> list[int | None]:
    """Return the step that each attempt resumed from."""
    return [
        log(attempt, "started")[0]["resumed_from"] for attempt in sorted(folder.glob("attempts/*"))
    ]


@pytest.mark.soak
def test_runs_finish_although_a_node_is_drained_and_a_trainer_is_killed(
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
    assert queue()[hit.resolve()] == SlurmJob(
        job_of(hit / "attempts/002"), f"slm-{hit.name}-002", "COMPLETED", "None"
    )


@pytest.mark.soak
def test_a_job_cancelled_by_hand_and_a_requeued_one_resume(home: Path, nodes: None) -> None:
    hit_attempts: list[Path] = []

    def disturb(attempt: Path, event: dict[str, Any]) -> None:
        if event["event"] == "cancelled":
            retry_run(attempt.parent.parent)
        if event["event"] == "checkpoint" and attempt.name == "001" and attempt not in hit_attempts:
            run(*(("scontrol", "requeue") if hit_attempts else ("scancel",)), job_of(attempt))
            hit_attempts.append(attempt)

    watcher = Watcher(disturb)
    folders, outcome = sweep(home, watcher, seeds=range(2), steps=100)
    cancelled, requeued = (attempt.parent.parent for attempt in hit_attempts)
    assert sorted(outcome.trained) == sorted(folder.name for folder in folders)
    assert (ends(cancelled), ends(requeued)) == (["cancelled", None], ["interrupted", None])
    for folder, same_job in ((cancelled, False), (requeued, True)):
        assert [step is not None for step in resumed(folder)] == [False, True]
        assert (job_of(folder / "attempts/001") == job_of(folder / "attempts/002")) is same_job
    assert [end for run, end, _ in watcher.ends if run == requeued.name] == ["finished"]


@pytest.mark.soak
def test_two_nodes_train_as_one_process_and_resume_after_the_time_limit(
    home: Path, tmp_path: Path, prepared: PreparedDataset, nodes: None
) -> None:
    alone: list[Path] = []

    def disturb(attempt: Path, event: dict[str, Any]) -> None:
        if event["event"] == "started" and not event["resumed_from"]:
            run("scancel", "--signal=USR2", job_of(attempt))  # as Slurm does before a limit
        if event["event"] == "failed":  # its job is queued again
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
    assert not any(job.is_alive for job in queue().values())


def test_the_error_of_sbatch_is_the_message_of_the_run(home: Path, nodes: None) -> None:
    watcher = Watcher()
    [folder], outcome = sweep(home, watcher, replace(ONE, partition="nowhere"))
    assert outcome.not_finished == {
        folder.name: "error: not submitted: sbatch: error: invalid partition specified: nowhere"
    }
    assert [end for _, end, _ in watcher.ends] == ["retried", "retried", "failed"]


def test_a_job_without_a_recorded_number_is_found_by_its_folder(
    home: Path, prepared: PreparedDataset, nodes: None
) -> None:
    drain("n[1-2]")
    first = make_attempt(home, plan_of(pocket(2, steps=5), prepared), prepared)
    one_job(home).start(first)
    (first / "job.json").unlink()
    restarted = one_job(home)
    restarted.check()
    assert restarted.alive([first]) == {first}
    second = add_attempt(first.parent.parent, {})
    restarted.start(second)
    assert [job.name for job in queue().values() if job.is_alive] == [
        f"slm-{first.parent.parent.name}-001"
    ]
    run("scancel", "--me")
    wait_until(lambda: restarted.alive([first]) == set())
    assert restarted.reap(first)["reason"] == "cancelled"
    assert restarted.reap(second)["reason"] == "interrupted"


def test_runs_count_as_alive_while_slurm_does_not_answer(
    home: Path,
    prepared: PreparedDataset,
    nodes: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drain("n[1-2]")
    attempt = make_attempt(home, plan_of(pocket(2, steps=5), prepared), prepared)
    notes: list[str] = []
    launcher = Slurm(ONE, RuntimeModel(home), MicroBatches(), notes.append)
    launcher.start(attempt)
    plan = Plan.read(attempt / "../../plan.json")
    waiting = [WaitingRun(plan.run_id, plan.hyperparameters)]
    wrong = tmp_path / "slurm.conf"
    text = Path(os.environ["SLURM_CONF"]).read_text()
    wrong.write_text(re.sub("SlurmctldPort=.*", "SlurmctldPort=1\nMessageTimeout=1", text))
    monkeypatch.setattr("slm.sweep.slurm.RETRY_SECONDS", 0)
    with monkeypatch.context() as silent:
        silent.setenv("SLURM_CONF", str(wrong))
        launcher._next_query = 0
        for _ in range(3):
            assert launcher.alive([attempt]) == {attempt}
        assert launcher.assign(waiting, []) == []
    assert launcher.alive([attempt]) == {attempt}
    assert len(launcher.assign(waiting, [])) == 1
    assert len(notes) == 2
    assert notes[0].startswith(
        "Slurm does not answer (slurm_load_jobs error: Unable to contact slurm controller"
    )
    assert notes[1] == "Slurm answers again"
    launcher.stop(attempt)
    wait_until(lambda: launcher.alive([attempt]) == set())
    assert launcher.reap(attempt)["reason"] == "interrupted"


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_job_script_requests_the_resources_of_the_run(
    tmp_path: Path, prepared: PreparedDataset, monkeypatch: Any
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
    assert job_script(attempt, cluster).splitlines() == [
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
def test_nodes_have_equally_many_ranks_and_every_rank_has_a_row(
    cluster: Cluster, rows: int, expected: tuple[int, int, int]
) -> None:
    slot = cluster.slot(replace(pocket(2), batch_tokens=rows * pocket.sequence_length))
    assert (slot.nodes, slot.ranks, slot.threads) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodes": 0}, "--nodes 0: at least 1"),
        ({"gpus_per_node": -1}, "--gpus-per-node -1: at least 0"),
        ({"cores_per_node": 0}, "--cores-per-node 0: at least 1"),
        ({"options": ("--nodes=3",)}, "--sbatch --nodes=3: use --nodes"),
        ({"options": ("-Jmine",)}, "--sbatch -Jmine: slm sets it itself"),
        ({"options": ("--mem", "64G")}, "write an option and its value as one word"),
        ({"partition": "a\nb"}, "over several lines"),
    ],
)
def test_an_impossible_request_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cluster(**changes)


def test_a_machine_without_slurm_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match="no sbatch on this machine"):
        one_job(tmp_path).check()
    assert queue() == {}


def test_a_job_begins_the_attempt_it_was_submitted_for_and_then_new_ones(
    home: Path,
    prepared: PreparedDataset,
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
    begins(first, first)  # its nodes were lost before the supervisor started
    (first / "log").touch()
    begins(first, second)
    assert ends(first.parent.parent) == ["interrupted"]
    record_exit(second, 1, "interrupted", "stopped, as asked")
    begins(first, third)
    hit_attempts = [read_attempt(attempt) for attempt in (first, third)]
    assert [document.pop("attempt") for document in hit_attempts] == [1, 3]
    assert [{**document, "created": 0} for document in hit_attempts] == [
        {**hit_attempts[0], "created": 0}
    ] * 2
    lock = hold_lock(first.parent.parent / "lock")
    assert lock is not None
    with lock:
        assert begin(first) == 1
    cancel_run(first.parent.parent)
    assert begin(first) == 1
    assert capsys.readouterr().out == ""


@pytest.mark.soak
def test_six_runs_survive_a_drained_node_a_cancelled_job_and_a_dead_orchestrator(
    home: Path, tmp_path: Path, prepared: PreparedDataset, nodes: None
) -> None:
    class Dead(Exception):
        pass

    def die(attempt: Path, event: dict[str, Any]) -> None:
        if event["event"] == "checkpoint":
            raise Dead

    with pytest.raises(Dead):
        sweep(home, Watcher(die), seeds=range(6), steps=200)
    assert len([job for job in queue().values() if job.is_alive]) == 6
    hit_attempts: list[Path] = []

    def disturb(attempt: Path, event: dict[str, Any]) -> None:
        if event["event"] == "cancelled":
            retry_run(attempt.parent.parent)
        if event["event"] == "checkpoint" and len(hit_attempts) == 0:
            hit_attempts.append(attempt)
            drain("n2")
        if (
            event["event"] == "checkpoint"
            and len(hit_attempts) == 1
            and attempt != hit_attempts[0]
            and node_of(attempt) == "n1"
        ):
            hit_attempts.append(attempt)
            run("scancel", job_of(attempt))

    watcher = Watcher(disturb)
    folders, outcome = sweep(home, watcher, seeds=range(6), steps=200)
    cancelled = hit_attempts[1].parent.parent
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
    assert not any(job.is_alive for job in queue().values())
    # a limit that a busy machine does not reach
    _, outcome = sweep(home, Watcher(), replace(ONE, time="240"), steps=5500, pause=5)
    assert outcome.trained == [folder.name]
    assert ends(folder) == ["interrupted", "interrupted", None]
