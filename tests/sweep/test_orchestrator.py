"""Orchestrator: several runs at once, signals, requests, and sweeps whose processes are killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from slm.data import PreparedDataset
from slm.files import NO_HOLDER, hold_lock, lock_holder, read_json
from slm.hardware.runtime import RuntimeModel
from slm.recipe import pocket
from slm.run import cancel_run, read_attempt, read_exit, retry_run
from slm.sweep.interrupt import InterruptibleSleep
from slm.sweep.launcher import RunningRun, WaitingRun
from slm.sweep.local import Local
from slm.sweep.micro_batch import MicroBatches
from slm.sweep.orchestrator import Outcome
from tests import chaos, forked
from tests.attempts import log, make_attempt, plan_of
from tests.chaos import TWO, Question
from tests.train.test_train import ONE, Watcher
from tests.train.test_train import orchestrate as train

TWINS = Question(depths=(1,), seeds=2, steps=600)
LONG = Question(depths=(1,), seeds=2, steps=5000)


def sweep_undisturbed(home: Path, question: Question) -> None:
    """Sweep two runs at once in a home."""
    with forked.supervisors():
        assert chaos.run_sweep(home, question).not_finished == {}


def wait_for(condition: Callable[[], object], seconds: float = 300.0) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_two_runs_at_once_get_one_core_and_one_thread_each(home: Path) -> None:
    sweep_undisturbed(home, replace(TWINS, steps=5))
    first, second = attempts(home)
    documents = [read_attempt(attempt) for attempt in (first, second)]
    assert sorted(document["ids"] for document in documents) == [["0"], ["1"]]
    assert [(document["ranks"], document["threads"]) for document in documents] == [(1, 1)] * 2
    assert all(log(attempt, "started")[0]["threads"] == 1 for attempt in (first, second))
    assert documents[0]["created"] < read_json(second / "exit.json")["time"]
    assert documents[1]["created"] < read_json(first / "exit.json")["time"]


@pytest.mark.soak
def test_a_sweep_whose_processes_are_killed_ends_with_the_same_results(
    home: Path, prepared: PreparedDataset, tmp_path: Path
) -> None:
    quiet = tmp_path / "quiet"
    quiet.mkdir()
    (quiet / "data").symlink_to(prepared.folder.parent)
    sweep_undisturbed(quiet, TWINS)
    draw = random.Random(4)
    kinds = ["supervisor", "orchestrator", "trainer", "orchestrator", "torchrun"]
    tally = chaos.disturb(home, TWINS, kinds, draw, pause=1.0, patience=900.0)
    assert tally.kills.total() == len(kinds)
    assert tally.starts >= 3
    assert chaos.results(home) == chaos.results(quiet)
    assert chaos.check_events(home)
    assert chaos.check_attempts(home) >= 3
    chaos.check_no_process_left(home)


@pytest.fixture
def disturbed(home: Path) -> Iterator[Path]:
    """Yield a home; end what still works on it after the test."""
    yield home
    chaos.kill_all(home)


@pytest.mark.soak
def test_trainers_outlive_their_orchestrator_and_obey_the_next_one(disturbed: Path) -> None:
    home = disturbed
    first = chaos.start(home, LONG)
    wait_for(lambda: sum(bool(log(attempt, "checkpoint")) for attempt in attempts(home)) == 2)
    first.kill()
    first.wait()
    second = chaos.start(home, LONG)
    wait_for(lambda: count_in_log(home, "adopted") == 2)
    second.send_signal(signal.SIGHUP)
    before = [len(log(attempt, "train")) for attempt in attempts(home)]
    wait_for(
        lambda: all(len(log(attempt, "train")) > n for attempt, n in zip(attempts(home), before))
    )
    assert lock_holder(home / "sweep.lock") == second.pid
    second.send_signal(signal.SIGTERM)
    assert second.wait(300) == INTERRUPTED
    chaos.check_no_process_left(home)
    assert [attempt.name for attempt in attempts(home)] == ["001", "001"]
    stopped = {attempt.parent: log(attempt, "checkpoint")[-1]["step"] for attempt in attempts(home)}
    assert all(
        count_in_log(home, f"stopped on request at step {step} of 5000")
        for step in stopped.values()
    )

    third = chaos.start(home, LONG)
    wait_for(lambda: sum(bool(log(attempt, "train")) for attempt in attempts(home)) == 4)
    resumed = {
        attempt.parent: log(attempt, "started")[0]["resumed_from"]
        for attempt in attempts(home)[1::2]
    }
    assert resumed == stopped
    for trainer in chaos.alive(home)["trainer"]:
        trainer.suspend()  # it cannot handle a stop request
    third.send_signal(signal.SIGINT)
    wait_for(lambda: count_in_log(home, "stopping after a checkpoint") == 2)
    third.send_signal(signal.SIGINT)
    assert third.wait(300) == INTERRUPTED
    chaos.check_no_process_left(home)
    ended = [read_exit(attempt) or {} for attempt in attempts(home)[1::2]]
    assert [end["message"] for end in ended] == ["stopped at once on request"] * 2


INTERRUPTED = -signal.SIGINT
"""Exit code of Python after KeyboardInterrupt."""


def attempts(home: Path) -> list[Path]:
    return sorted(home.glob("*/attempts/[0-9]*"))


def count_in_log(home: Path, words: str) -> int:
    return home.with_name(f"{home.name}.log").read_text().count(words)


def test_runs_that_are_stopped_and_retried_finish_in_the_same_sweep(home: Path) -> None:
    question = replace(TWINS, steps=60)
    planner, plans = question.plans(home)
    chaos.record(question.experiment(), plans, home)

    class User(Watcher):
        def event(self, plan, event) -> None:
            if event["event"] == "train" and not of_kind(self, "train"):
                for each in plans:
                    cancel_run(home / each.run_id)
            super().event(plan, event)

        def run_ended(self, plan, outcome: str, message: str | None) -> None:
            super().run_ended(plan, outcome, message)
            if len(self.outcomes) == 2:
                for each in plans:
                    retry_run(home / each.run_id)

    user = User()
    outcome = train(plans, planner, home, ONE, user)
    assert [how for how, _ in user.outcomes] == ["cancelled", "cancelled", "finished", "finished"]
    assert sorted(outcome.trained) == sorted(plan.run_id for plan in plans)


def of_kind(watcher: Watcher, kind: str) -> list[dict]:
    return [event for event in watcher.events if event["event"] == kind]


def test_a_stop_before_the_supervisor_starts_is_obeyed(
    home: Path, prepared: PreparedDataset
) -> None:
    plan = plan_of(pocket(1, steps=5000), prepared)
    attempt = make_attempt(home, plan, prepared)
    cancel_run(home / plan.run_id)
    command = [sys.executable, "-m", "slm.sweep.supervisor", str(attempt)]
    assert subprocess.run(command, timeout=300, check=False).returncode == 1
    assert (read_exit(attempt) or {})["reason"] == "cancelled"
    assert not log(attempt, "train")


def test_the_holder_of_a_lock_that_is_handed_over_is_the_process_that_inherits_it(
    tmp_path: Path,
) -> None:
    path = tmp_path / "lock"
    path.write_text("99999999")  # a process that ended long ago
    lock = hold_lock(path, NO_HOLDER)
    assert lock is not None
    program = """
import sys, time
from slm.files import inherit_lock
time.sleep(0.2)
held = inherit_lock(int(sys.argv[1]))
sys.stdin.read()
"""
    command = [sys.executable, "-c", program, str(lock.fileno())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[lock.fileno()]) as process:
        lock.close()  # as if the process that hands it over were killed
        assert lock_holder(path) == process.pid
        process.communicate()
    assert lock_holder(path) is None


def test_output_after_the_terminal_closed_goes_to_the_log(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from slm.sweep.interrupt import Signals
with Signals(Path(sys.argv[1])).handled() as sleep:
    print("ready", flush=True)
    sleep.wait(3600)
    print("still running", flush=True)
"""
    log = tmp_path / "sweep.log"
    terminal, terminal_of_process = os.openpty()
    command = [sys.executable, "-c", program, str(log)]
    with subprocess.Popen(command, stdout=terminal_of_process) as process:
        os.close(terminal_of_process)
        output = b""
        while b"\n" not in output:  # the process has written its line when the newline is here
            output += os.read(terminal, 100)
        os.close(terminal)
        process.send_signal(signal.SIGHUP)
    assert process.returncode == 0
    assert log.read_text() == "still running\n"


def test_a_signal_between_two_waits_ends_the_next_one() -> None:
    received: list[int] = []
    previous = signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    try:
        with InterruptibleSleep() as sleep:
            signal.raise_signal(signal.SIGUSR1)
            sleep.wait(3600)
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert received == [signal.SIGUSR1]


class Rescuer(Watcher):
    """View that frees a full disk when it is noted."""

    def __init__(self, ballast: Path) -> None:
        super().__init__()
        self._ballast = ballast

    def note(self, line: str) -> None:
        super().note(line)
        self._ballast.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def hopeless(
    tmp_path_factory: pytest.TempPathFactory, prepared: PreparedDataset
) -> Iterator[tuple[Path, Rescuer, Outcome]]:
    """Sweep six runs that were planned for other rows, starting on a full disk."""
    with chaos.small_disk(tmp_path_factory.mktemp("hopeless") / "disk", "1m") as disk:
        if disk is None:
            pytest.skip("mounting a small disk needs rights that this user does not have")
        home = disk / "runs"
        home.mkdir()
        (home / "data").symlink_to(prepared.folder.parent)
        question = replace(TWINS, seeds=6)
        planner, plans = question.plans(home)
        changed = [
            replace(plan, data=replace(plan.data, validation="0123456789abcdef")) for plan in plans
        ]
        chaos.record(question.experiment(), changed, home)
        with subprocess.Popen(
            ["dd", "if=/dev/zero", f"of={disk / 'ballast'}", "bs=4k"], stderr=subprocess.DEVNULL
        ):
            pass
        rescuer = Rescuer(disk / "ballast")
        yield home, rescuer, train(changed, planner, home, TWO, rescuer, size=1)


def test_a_sweep_waits_until_a_full_disk_has_space(hopeless: tuple[Path, Rescuer, Outcome]) -> None:
    home, rescuer, _ = hopeless
    assert [f"the disk is full at {home}" in note for note in rescuer.notes].count(True) == 1
    assert not list(home.glob("*/attempts/.*"))
    assert len(attempts(home)) >= 3


def test_no_more_runs_start_after_the_first_ones_failed_alike(
    hopeless: tuple[Path, Rescuer, Outcome],
) -> None:
    home, rescuer, outcome = hopeless
    assert len(attempts(home)) <= 4  # one may be running when the third fails
    [note] = [note for note in rescuer.notes if "failed alike" in note]
    assert "holds other rows than the plan was made for; " in note
    reasons = outcome.not_finished.values()
    assert sum("not started: the first 3 runs" in reason for reason in reasons) >= 2
    assert len(outcome.not_finished) == 6


def waiting(depth: int, devices: int | None = None, remaining: float = 1.0) -> WaitingRun:
    return WaitingRun(f"d{depth}", pocket(depth), devices, remaining)


def assigned(
    local: Local, waiting: list[WaitingRun], running: list[RunningRun]
) -> list[tuple[str, tuple[str, ...]]]:
    return [(name, slot.ids) for name, slot in local.assign(waiting, running)]


def test_the_longest_run_starts_first_on_the_first_free_core(tmp_path: Path) -> None:
    local = Local(TWO, (1,), RuntimeModel(tmp_path), MicroBatches())
    runs = [waiting(depth) for depth in (2, 3, 4, 5)]
    first, second = RunningRun(("0",), 5.0), RunningRun(("1",), 5.0)
    assert assigned(local, runs, []) == [("d5", ("0",)), ("d4", ("1",))]
    assert assigned(local, runs, [first]) == [("d5", ("1",))]
    assert assigned(local, runs, [first, second]) == []


def test_a_run_resumes_on_as_many_cores_as_it_began_on(tmp_path: Path) -> None:
    local = Local(TWO, (1, 2), RuntimeModel(tmp_path), MicroBatches())
    assert assigned(local, [waiting(4)], []) == [("d4", ("0", "1"))]
    resumed = waiting(4, devices=1, remaining=0.5)
    assert assigned(local, [resumed], []) == [("d4", ("0",))]
