"""The conductor: several runs at once, what signals and users ask of it, and sweeps whose every part is killed."""

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

from slm.data import Prepared
from slm.files import NO_HOLDER, hold_lock, lock_holder, read_json
from slm.hardware.runtime import RuntimeModel
from slm.recipe import pocket
from slm.run import cancel_run, read_attempt, read_exit, retry_run
from slm.sweep import orchestrator as conduct
from slm.sweep.launcher import Waiting, Working
from slm.sweep.local import Local
from slm.sweep.micro_batch import MicroBatches
from tests import chaos
from tests.attempts import log, make_attempt, plan_of
from tests.chaos import TWO, Question
from tests.train.test_train import ONE, Watcher
from tests.train.test_train import conduct as train

TWINS = Question(depths=(1,), seeds=2, steps=600)
LONG = Question(depths=(1,), seeds=2, steps=5000)


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory, prepared: Prepared) -> Path:
    """A home where two runs were swept without a disturbance."""
    home = tmp_path_factory.mktemp("quiet")
    (home / "data").symlink_to(prepared.folder.parent)
    assert not chaos.conduct_sweep(home, TWINS).not_finished
    return home


def wait_for(what: Callable[[], object], seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_two_runs_at_once_have_a_core_and_a_thread_each(quiet: Path) -> None:
    first, second = (
        path / "attempts" / "001"
        for path in sorted(path.parent for path in quiet.glob("*/plan.json"))
    )
    documents = [read_attempt(attempt) for attempt in (first, second)]
    assert sorted(document["ids"] for document in documents) == [["0"], ["1"]]
    assert [(document["ranks"], document["threads"]) for document in documents] == [(1, 1)] * 2
    assert all(log(attempt, "started")[0]["threads"] == 1 for attempt in (first, second))
    assert log(first, "started")[0]["time"] < read_json(second / "exit.json")["time"]
    assert log(second, "started")[0]["time"] < read_json(first / "exit.json")["time"]


def test_a_sweep_whose_every_part_is_killed_ends_as_a_quiet_one(home: Path, quiet: Path) -> None:
    draw = random.Random(4)
    kinds = ["supervisor", "conductor", "trainer", "conductor", "torchrun"]
    tally = chaos.disturb(home, TWINS, kinds, draw, pause=1.0, patience=300.0)
    assert tally.kills.total() == len(kinds)
    assert tally.typed >= 3
    assert chaos.results(home) == chaos.results(quiet)
    assert chaos.check_events(home)
    assert chaos.check_attempts(home) >= 3
    chaos.check_nobody_left(home)


def test_trainers_outlive_their_conductor_and_obey_the_next_one(home: Path) -> None:
    first = chaos.start(home, LONG)
    wait_for(lambda: sum(bool(log(attempt, "checkpoint")) for attempt in attempts(home)) == 2)
    first.kill()
    first.wait()
    second = chaos.start(home, LONG)
    wait_for(lambda: said(home, "adopted") == 2)
    second.send_signal(signal.SIGHUP)
    before = [len(log(attempt, "train")) for attempt in attempts(home)]
    wait_for(
        lambda: all(len(log(attempt, "train")) > n for attempt, n in zip(attempts(home), before))
    )
    assert lock_holder(home / "sweep.lock") == second.pid
    second.send_signal(signal.SIGTERM)
    assert second.wait(120) == INTERRUPTED
    chaos.check_nobody_left(home)
    assert [attempt.name for attempt in attempts(home)] == ["001", "001"]
    stopped = {attempt.parent: log(attempt, "checkpoint")[-1]["step"] for attempt in attempts(home)}
    assert all(said(home, f"stopped at step {step} of 5000, as asked") for step in stopped.values())

    third = chaos.start(home, LONG)
    wait_for(lambda: sum(bool(log(attempt, "train")) for attempt in attempts(home)) == 4)
    resumed = {
        attempt.parent: log(attempt, "started")[0]["resumed_from"]
        for attempt in attempts(home)[1::2]
    }
    assert resumed == stopped
    for trainer in chaos.alive(home)["trainer"]:
        trainer.suspend()  # it does not hear what it is asked
    third.send_signal(signal.SIGINT)
    wait_for(lambda: said(home, "stopping after a checkpoint") == 2)
    third.send_signal(signal.SIGINT)
    assert third.wait(20) == INTERRUPTED
    chaos.check_nobody_left(home)
    ended = [read_exit(attempt) or {} for attempt in attempts(home)[1::2]]
    assert [end["message"] for end in ended] == ["ended at once, as asked"] * 2


INTERRUPTED = -signal.SIGINT
"""How Python ends by KeyboardInterrupt."""


def attempts(home: Path) -> list[Path]:
    return sorted(home.glob("*/attempts/[0-9]*"))


def said(home: Path, words: str) -> int:
    return home.with_name(f"{home.name}.log").read_text().count(words)


def test_runs_that_are_stopped_and_retried_finish_in_the_same_sweep(home: Path) -> None:
    question = replace(TWINS, steps=60)
    corpora, plans = question.plans(home)
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
    outcome = train(plans, corpora, home, ONE, user)
    assert [how for how, _ in user.outcomes] == ["cancelled", "cancelled", "finished", "finished"]
    assert sorted(outcome.trained) == sorted(plan.run_id for plan in plans)


def of_kind(watcher: Watcher, kind: str) -> list[dict]:
    return [event for event in watcher.events if event["event"] == kind]


def test_a_stop_said_before_the_supervisor_hears_is_obeyed(home: Path, prepared: Prepared) -> None:
    plan = plan_of(pocket(1, steps=5000), prepared)
    attempt = make_attempt(home, plan, prepared)
    cancel_run(home / plan.run_id)
    command = [sys.executable, "-m", "slm.sweep.supervisor", str(attempt)]
    assert subprocess.run(command, timeout=30, check=False).returncode == 1
    assert (read_exit(attempt) or {})["reason"] == "cancelled"
    assert not log(attempt, "train")


def test_who_asks_for_a_lock_on_its_way_gets_the_process_that_takes_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text("99999999")  # somebody long dead
    lock = hold_lock(path, NO_HOLDER)
    assert lock is not None
    taking = "import sys, time; from slm.files import inherit_lock; time.sleep(0.2); held = inherit_lock(int(sys.argv[1]))"
    command = [sys.executable, "-c", f"{taking}; sys.stdin.read()", str(lock.fileno())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[lock.fileno()]) as taker:
        lock.close()  # as when the one who passes it on is killed
        assert lock_holder(path) == taker.pid
        taker.communicate()
    assert lock_holder(path) is None


def test_what_is_said_after_the_terminal_closed_is_in_the_log(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from slm.sweep.orchestrator import Signals
signals = Signals(Path(sys.argv[1]))
with signals.heard():
    print("ready", flush=True)
    signals.wait(60)
    print("goes on", flush=True)
"""
    log = tmp_path / "sweep.log"
    ours, theirs = os.openpty()
    with subprocess.Popen([sys.executable, "-c", program, str(log)], stdout=theirs) as conductor:
        os.close(theirs)
        assert os.read(ours, 100).startswith(b"ready")
        os.close(ours)
        conductor.send_signal(signal.SIGHUP)
    assert conductor.returncode == 0
    assert log.read_text() == "goes on\n"


class Rescuer(Watcher):
    """Frees a full disk when it hears of it."""

    def __init__(self, ballast: Path) -> None:
        super().__init__()
        self._ballast = ballast

    def note(self, line: str) -> None:
        super().note(line)
        self._ballast.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def hopeless(
    tmp_path_factory: pytest.TempPathFactory, prepared: Prepared
) -> Iterator[tuple[Path, Rescuer, conduct.Outcome]]:
    """A home where a sweep of six runs began on a full disk, on other rows than they were planned for."""
    with chaos.small_disk(tmp_path_factory.mktemp("hopeless") / "disk", "1m") as disk:
        if disk is None:
            pytest.skip("mounting a small disk needs rights that this user does not have")
        home = disk / "runs"
        home.mkdir()
        (home / "data").symlink_to(prepared.folder.parent)
        question = replace(TWINS, seeds=6)
        corpora, plans = question.plans(home)
        other = [
            replace(plan, data=replace(plan.data, validation="0123456789abcdef")) for plan in plans
        ]
        chaos.record(question.experiment(), other, home)
        with subprocess.Popen(
            ["dd", "if=/dev/zero", f"of={disk / 'ballast'}", "bs=4k"], stderr=subprocess.DEVNULL
        ):
            pass
        rescuer = Rescuer(disk / "ballast")
        yield home, rescuer, train(other, corpora, home, TWO, rescuer, size=1)


def test_a_full_disk_is_waited_out(hopeless: tuple[Path, Rescuer, conduct.Outcome]) -> None:
    home, rescuer, _ = hopeless
    assert [f"the disk is full at {home}" in note for note in rescuer.notes].count(True) == 1
    assert not list(home.glob("*/attempts/.*"))
    assert len(attempts(home)) >= 3


def test_when_the_first_runs_fail_alike_the_others_are_not_started(
    hopeless: tuple[Path, Rescuer, conduct.Outcome],
) -> None:
    home, rescuer, outcome = hopeless
    assert len(attempts(home)) <= 4  # one may be at work when the third fails
    [said] = [note for note in rescuer.notes if "failed alike" in note]
    assert "holds other rows than the plan was made for; " in said
    assert (
        sum("not started, for the first 3 runs" in why for why in outcome.not_finished.values())
        >= 2
    )
    assert len(outcome.not_finished) == 6


def waiting(depth: int, devices: int | None = None, left: float = 1.0) -> Waiting:
    return Waiting(f"d{depth}", pocket(depth), devices, left)


def test_the_longest_run_is_first_on_the_first_free_core(tmp_path: Path) -> None:
    local = Local(TWO, (1,), RuntimeModel(tmp_path), MicroBatches())
    runs = [waiting(depth) for depth in (2, 3, 4, 5)]
    assert [(name, slot.ids) for name, slot in local.places(runs, [])] == [
        ("d5", ("0",)),
        ("d4", ("1",)),
    ]
    assert [(name, slot.ids) for name, slot in local.places(runs, [Working(("0",), 5.0)])] == [
        ("d5", ("1",))
    ]
    assert local.places(runs, [Working(("0",), 5.0), Working(("1",), 5.0)]) == []


def test_a_run_goes_on_with_as_many_cores_as_it_began_with(tmp_path: Path) -> None:
    local = Local(TWO, (1, 2), RuntimeModel(tmp_path), MicroBatches())
    (alone,) = local.places([waiting(4)], [])
    assert alone[1].ids == ("0", "1")
    (begun,) = local.places([waiting(4, devices=1, left=0.5)], [])
    assert begun[1].ids == ("0",)
