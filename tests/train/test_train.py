"""The trainer in sweeps, on real rows, and through torchrun where processes are killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors import safe_open

from slm import events
from slm.data import PreparedDataset
from slm.experiment import Experiment
from slm.files import lock_holder
from slm.hardware.runtime import RuntimeModel
from slm.hardware.slot import MicroBatch
from slm.plan import Plan
from slm.recipe import Recipe, pocket
from slm.run import make_attempt, read_exit, run_holder
from slm.sweep.local import Local, Machine
from slm.sweep.micro_batch import MicroBatches
from slm.sweep.orchestrator import Orchestrator, Outcome, Sweep
from slm.sweep.planning import Planner, plans_of, record
from tests import forked

ONE = Machine("cpu", "test", ("0",), None)
TWO = Machine("cpu", "test", ("0", "1"), None)
Listener = Callable[[Path, dict[str, Any]], None]


class Watcher:
    """A view of a sweep that records events and lets a test act on them."""

    def __init__(self, act: Listener = lambda folder, event: None) -> None:
        self.events: list[dict[str, Any]] = []
        self.outcomes: list[tuple[str, str | None]] = []
        self.notes: list[str] = []
        self._act = act
        self._attempt = Path()

    def run_started(self, plan, attempt: Path, adopted: bool) -> None:
        self._attempt = attempt

    def event(self, plan, event: dict[str, Any]) -> None:
        self.events.append(event)
        self._act(self._attempt, event)

    def run_ended(self, plan, outcome: str, message: str | None) -> None:
        self.outcomes.append((outcome, message))

    def note(self, line: str) -> None:
        self.notes.append(line)

    def refresh(self) -> None:
        pass


def train(
    home: Path,
    machine: Machine,
    watcher: Watcher,
    recipe: Recipe = pocket,
    depth: int = 2,
    steps: int = 70,
    checkpoint_seconds: float = 1e9,
    launch: AbstractContextManager[None] | None = None,
) -> tuple[Path, Outcome]:
    """Train one run in a home; return its folder and the sweep's outcome."""
    experiment = Experiment("test", (recipe,), (depth,), steps=steps)
    planner = Planner(experiment, home)
    plans = plans_of(planner.prepare())
    record(experiment, plans, home)
    return home / plans[0].run_id, orchestrate(
        plans, planner, home, machine, watcher, checkpoint_seconds, launch=launch
    )


def orchestrate(
    plans: list[Plan],
    planner: Planner,
    home: Path,
    machine: Machine,
    watcher: Watcher,
    checkpoint_seconds: float = 1e9,
    size: int | None = None,
    launch: AbstractContextManager[None] | None = None,
) -> Outcome:
    """Train plans on a machine, each on `size` of its cores, or on all of them.

    Supervisors are started within `launch`; by default they are forked.
    """
    launcher = Local(machine, (size or len(machine.ids),), RuntimeModel(home), MicroBatches())
    sweep = Sweep(
        plans,
        home,
        planner.dataset,
        checkpoint_seconds=checkpoint_seconds,
        poll_seconds=0.05,
    )
    with launch or forked.supervisors():
        return Orchestrator(sweep, launcher, watcher, ingest=lambda home: []).run()


def events_of(watcher: Watcher, kind: str) -> list[dict[str, Any]]:
    return [event for event in watcher.events if event["event"] == kind]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, prepared: PreparedDataset) -> Path:
    """Train a run on two ranks, undisturbed; return its folder."""
    home = tmp_path_factory.mktemp("undisturbed")
    (home / "data").symlink_to(prepared.folder.parent)
    folder, _ = train(home, TWO, Watcher(), checkpoint_seconds=0)
    return folder


@pytest.mark.soak
def test_two_ranks_train_like_one(home: Path, undisturbed: Path) -> None:
    watcher = Watcher()
    train(home, ONE, watcher)
    both = list(events.Reader(undisturbed / "attempts" / "001" / "events.jsonl").new())
    one, two = (
        [event["loss"] for event in log if event["event"] == "train"]
        for log in (watcher.events, both)
    )
    [evaluation_one], [evaluation_two] = (
        [e for e in log if e["event"] == "eval"] for log in (watcher.events, both)
    )
    assert pocket(2, steps=70).batch_rows >= 2
    assert both[0]["ranks"] == 2
    assert two[:10] == pytest.approx(one[:10], rel=1e-5)
    assert evaluation_one["rows"] == evaluation_two["rows"] == pocket(2).validation_rows
    assert evaluation_two["val_bpb"] == pytest.approx(
        evaluation_one["val_bpb"], abs=0.01
    )  # the noise of seeds


def test_a_finished_run_has_final_weights_and_no_checkpoint(undisturbed: Path) -> None:
    with safe_open(undisturbed / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"run_id": undisturbed.name}
        sizes = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert sizes == pocket(2).parameters.total
    assert not list((undisturbed / "checkpoints").iterdir())


def test_a_killed_run_ends_with_the_results_of_an_undisturbed_one(
    home: Path, undisturbed: Path
) -> None:
    killed: list[int] = []
    launch = ExitStack()  # the second attempt is forked

    def kill_trainers(attempt: Path, event: dict[str, Any]) -> None:
        if event["event"] == "checkpoint" and event["step"] >= 10 and not killed:
            supervisor = lock_holder(attempt.parent.parent / "lock")
            assert supervisor is not None
            workers = [
                process.pid for process in psutil.Process(supervisor).children(recursive=True)
            ]
            killed.extend(workers)
            for pid in workers:
                with suppress(ProcessLookupError):  # ended because torchrun is gone
                    os.kill(pid, signal.SIGKILL)
            launch.enter_context(forked.supervisors())

    watcher = Watcher(kill_trainers)
    folder, outcome = train(home, TWO, watcher, checkpoint_seconds=0, launch=launch)
    done, quiet = (json.loads((path / "done.json").read_text()) for path in (folder, undisturbed))
    first, second = events_of(watcher, "started")
    assert len(killed) >= 3
    assert first["resumed_from"] is None
    assert second["resumed_from"] >= 10
    assert outcome.trained == [folder.name]
    same = ("run_id", "val_bpb", "val_loss", "train_loss", "tokens", "flops", "weights_sha256")
    assert {key: done[key] for key in same} == {key: quiet[key] for key in same}


@pytest.mark.soak
def test_a_killed_torchrun_leaves_no_worker_and_frees_the_run(home: Path) -> None:
    workers: list[psutil.Process] = []
    launch = ExitStack()  # the second attempt is forked

    def kill_torchrun(attempt: Path, event: dict[str, Any]) -> None:
        if event["event"] == "train" and not workers:
            supervisor = lock_holder(attempt.parent.parent / "lock")
            assert supervisor is not None
            [torchrun] = psutil.Process(supervisor).children()
            workers.extend(torchrun.children(recursive=True))
            torchrun.kill()
            psutil.wait_procs(workers, timeout=300)
            assert not any(worker.is_running() for worker in workers)
            launch.enter_context(forked.supervisors())

    watcher = Watcher(kill_torchrun)
    folder, outcome = train(home, TWO, watcher, steps=200, launch=launch)
    assert len(workers) == 2
    ended = read_exit(folder / "attempts" / "001")
    assert ended is not None
    assert "SIGKILL" in ended["message"]
    assert outcome.trained == [folder.name]


def test_a_stop_writes_a_checkpoint_and_the_next_sweep_resumes(home: Path) -> None:
    def interrupt(attempt: Path, event: dict[str, Any]) -> None:
        if event["event"] == "train" and event["step"] == 5:
            signal.raise_signal(signal.SIGINT)

    first = Watcher(interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(home, ONE, first, steps=500)
    assert first.outcomes[0][0] == "interrupted"
    [folder] = [path.parent for path in home.glob("*/plan.json")]
    ended = read_exit(folder / "attempts" / "001")
    assert ended is not None
    assert ended["reason"] == "interrupted"
    assert run_holder(folder) is None
    [checkpoint] = (folder / "checkpoints").iterdir()
    second = Watcher(interrupt_at(events_of(first, "train")[-1]["step"]))
    with pytest.raises(KeyboardInterrupt):
        train(home, ONE, second, steps=500)
    assert f"{events_of(second, 'started')[0]['resumed_from']:09d}" in checkpoint.name


def test_a_stop_before_the_first_step_ends_the_run(home: Path) -> None:
    class Impatient(Watcher):
        def run_started(self, plan, attempt: Path, adopted: bool) -> None:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(home, ONE, Impatient(), steps=5000, depth=1)
    [folder] = [path.parent for path in home.glob("*/plan.json")]
    assert run_holder(folder) is None
    assert not (folder / "done.json").exists()


def interrupt_at(step: int) -> Listener:
    def interrupt(attempt: Path, event: dict[str, Any]) -> None:
        if event["event"] == "train" and event["step"] > step:
            signal.raise_signal(signal.SIGINT)

    return interrupt


def test_a_diverged_run_is_a_result_and_is_not_retried(home: Path) -> None:
    wild = replace(pocket, name="wild", matrix_lr=1e30)
    watcher = Watcher()
    folder, outcome = train(home, ONE, watcher, recipe=wild, steps=10)
    assert watcher.outcomes[0][0] == "diverged"
    assert outcome.not_finished[folder.name].startswith("diverged: loss is nan")
    assert not (folder / "done.json").exists()
    again = Watcher()
    train(home, ONE, again, recipe=wild, steps=10)
    assert again.outcomes == watcher.outcomes
    assert len(list((folder / "attempts").iterdir())) == 1


def test_data_that_changed_after_planning_are_refused(tmp_path: Path, home: Path) -> None:
    experiment = Experiment("test", (pocket,), (2,), steps=5)
    planner = Planner(experiment, home)
    [plan] = plans_of(planner.prepare())
    other = replace(plan, data=replace(plan.data, validation="0123456789abcdef"))
    record(experiment, [other], home)
    watcher = Watcher()
    outcome = orchestrate([other], planner, home, ONE, watcher)
    assert "holds other rows than the plan was made for" in outcome.not_finished[other.run_id]


def test_rows_that_changed_on_disk_are_refused(tmp_path: Path, prepared: PreparedDataset) -> None:
    shutil.copytree(prepared.folder, tmp_path / "data" / prepared.folder.name)
    path = tmp_path / "data" / prepared.folder.name / "train-00000.bin"
    path.write_bytes(bytes(path.stat().st_size))
    folder, outcome = train(tmp_path, ONE, Watcher(), steps=2)
    assert "train-00000.bin was changed" in outcome.not_finished[folder.name]


def test_a_plan_of_another_trainer_is_refused(tmp_path: Path, home: Path) -> None:
    experiment = Experiment("test", (pocket,), (2,), steps=5)
    planner = Planner(experiment, home)
    [plan] = plans_of(planner.prepare())
    other = replace(plan, code="0123456789abcdef")
    record(experiment, [other], home)
    outcome = orchestrate([other], planner, home, ONE, Watcher())
    assert "sources changed" in outcome.not_finished[other.run_id]


def test_a_running_run_is_not_started_twice(home: Path) -> None:
    exit_codes: list[int] = []

    def start_again(attempt: Path, event: dict[str, Any]) -> None:
        if event["event"] == "started" and not exit_codes:
            plan = make_plan(home)
            second = make_attempt(plan, home, data_folder(home), ONE.slot([0]), MicroBatch(1))
            command = [sys.executable, "-m", "slm.sweep.supervisor", str(second)]
            holder = lock_holder(attempt.parent.parent / "train.lock")
            assert holder is not None
            trainer = psutil.Process(holder)
            trainer.suspend()  # it would finish before the other one starts
            try:
                result = subprocess.run(
                    command, capture_output=True, text=True, timeout=600, check=False
                )
            finally:
                trainer.resume()
            exit_codes.append(result.returncode)
            assert "is held by process" in result.stderr

    watcher = Watcher(start_again)
    folder, outcome = train(home, ONE, watcher, steps=60)
    assert exit_codes == [1]
    assert outcome.trained == [folder.name]


def make_plan(home: Path):
    experiment = Experiment("test", (pocket,), (2,), steps=60)
    return plans_of(Planner(experiment, home).prepare())[0]


def data_folder(home: Path) -> Path:
    return next((home / "data").glob("*/manifest.json")).parent


def test_a_torn_last_line_is_read_once_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    reader = events.Reader(path)
    assert list(reader.new()) == []
    path.write_text('{"event": "a"}\n{"event": ')
    assert [event["event"] for event in reader.new()] == ["a"]
    with path.open("a") as file:
        file.write('"b"}\n')
    assert [event["event"] for event in reader.new()] == ["b"]
