"""The conductor: plans -> attempts, several at once, until every run is done or says why not."""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from slm.files import hold_lock, lock_holder
from slm.hardware.slot import MicroBatch, Slot
from slm.monitor.follow import Follower, View
from slm.plan import Plan
from slm.run import (
    CANCELLED,
    CHECKPOINT_SECONDS,
    attempt_slot,
    checkpoint_step,
    is_cancelled,
    is_done,
    last_attempt,
    make_attempt,
    read_attempt,
    read_exit,
    retry_requested,
)
from slm.sweep.interrupt import InterruptibleSleep
from slm.sweep.launcher import Launcher, Waiting, Working

FRUITLESS_ATTEMPTS = 3
"""Attempts in a row without a new checkpoint after which a run has failed."""
RESULTS = ("diverged", "cancelled")
"""Ends that no sweep tries again."""
KNOWN = (*RESULTS, "interrupted")
"""Ends that are no failures."""
FINAL_REASONS = (*RESULTS, "data")
"""Ends that another attempt of this sweep would only repeat."""
ALIKE = 3
"""Runs that fail in the same words, none having advanced, after which a sweep starts no more."""
NUMBER = re.compile(r"[0-9a-f]{12}|\d+")
"""What differs between the words of failures that are alike."""
HEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGHUP)
POLL_SECONDS = 1.0
TELL_SECONDS = 10.0
"""Pause between two requests to the same process."""
PLACE_SECONDS = 30.0
"""Pause between two schedules while nothing changes but what is left to do."""
COMPLAINT_SECONDS = 300.0
"""Pause between two complaints about a full disk."""
INGEST_SECONDS = 10.0
INGEST_SHARE = 0.002
LONGEST_INGEST_SECONDS = 60.0
"""Ingests take this share of the time, with pauses of INGEST_SECONDS at least and of this at most."""


@dataclass(frozen=True)
class Outcome:
    """What became of each run, by run_id, cheapest first."""

    already_done: list[str]
    """Finished before this sweep."""
    trained: list[str]
    """Finished by this sweep."""
    not_finished: dict[str, str]
    """The others, with the reason."""


@dataclass
class _Run:
    """One plan on its way to done.json."""

    plan: Plan
    follower: Follower
    at_work: bool = False
    slot: Slot | None = None
    """Where its newest attempt is."""
    fruitless: int = 0
    """Attempts in a row without a new checkpoint."""
    finished: bool = False
    already: bool = False
    """Whether it was finished before this sweep."""
    left: tuple[str, str] | None = None
    """Reason and message of a run that this sweep leaves unfinished."""

    @property
    def waits(self) -> bool:
        """Whether it is to be started."""
        return not (self.at_work or self.finished or self.left)


class Orchestrator:
    """Trains what is not done; a run that fails does not stop the others."""

    def __init__(
        self,
        plans: Sequence[Plan],
        data_folder: Callable[[Plan], Path],
        home: Path,
        launcher: Launcher,
        view: View,
        ingest: Callable[[], None],
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
        poll_seconds: float = POLL_SECONDS,
        cores: Mapping[str, dict[str, Any]] = {},
    ) -> None:
        """`cores`: by run_id what a run's trainer measures beside val_bpb, as attempt.json has it."""
        self._data_folder, self._home, self._launcher, self._view = (
            data_folder,
            home,
            launcher,
            view,
        )
        self._ingest_now, self._cores = ingest, cores
        self._checkpoint_seconds, self._poll_seconds = checkpoint_seconds, poll_seconds
        self._runs = {
            plan.run_id: _Run(plan, Follower(plan, home / plan.run_id, view)) for plan in plans
        }
        self._signals = Signals(home / "sweep.log")
        self._told, self._tell_again, self._complain_again = 0, 0.0, 0.0
        self._ingested, self._pause = time.monotonic(), INGEST_SECONDS
        self._changed, self._placed = True, 0.0
        """Whether a run ended or came back since places were given, and when they were."""

    def run(self) -> Outcome:
        """Train until every run is done or left.

        A first SIGINT or SIGTERM has what is at work checkpoint and end, a second one end at once: KeyboardInterrupt
        is raised when it has.
        """
        with self._signals.heard():
            self._take_in()
            while any(run.at_work for run in self._runs.values()) or self._to_start():
                self._changed &= not self._unless_full(self._start)
                self._signals.wait(self._poll_seconds)
                self._obey()
                self._unless_full(self._look)
                self._view.refresh()
                self._ingest()
        self._ingest_now()
        if self._signals.stops:
            raise KeyboardInterrupt
        return self._outcome()

    def _outcome(self) -> Outcome:
        finished = {run_id: run.already for run_id, run in self._runs.items() if run.finished}
        return Outcome(
            [run_id for run_id, already in finished.items() if already],
            [run_id for run_id, already in finished.items() if not already],
            {
                run_id: f"{run.left[0]}: {run.left[1]}"
                for run_id, run in self._runs.items()
                if run.left
            },
        )

    def submit(self) -> list[str]:
        """Start what has a place, and see to nothing more; the run_ids of those that still wait to be started."""
        self._take_in()
        self._start()
        self._look()
        return [run.plan.run_id for run in self._to_start()]

    def _take_in(self) -> None:
        """How every run stands before this sweep does anything."""
        last = {run_id: last_attempt(run.follower.folder) for run_id, run in self._runs.items()}
        living = self._launcher.living(filter(None, last.values()))
        for run_id, run in self._runs.items():
            attempt = last[run_id]
            self._take_in_run(run, attempt, attempt in living)

    def _take_in_run(self, run: _Run, attempt: Path | None, lives: bool) -> None:
        folder = run.follower.folder
        if is_done(folder):
            for left in (
                () if lives else (folder / "checkpoints").glob("*")
            ):  # by a trainer killed just after done.json
                left.unlink()
            run.finished = run.already = True
            return
        if attempt is None:
            return
        run.slot = attempt_slot(attempt)
        if lives:
            run.at_work = True
            run.follower.look()
        elif not read_exit(attempt):
            self._launcher.reap(attempt)
        ended = read_exit(attempt)
        if not run.at_work and ended and ended["reason"] in RESULTS and not retry_requested(folder):
            self._leave(run, ended["reason"], ended["message"])

    def _unless_full(self, step: Callable[[], None]) -> bool:
        """Do a step that writes; whether it was done. A full disk is complained of, and tried again the next time."""
        try:
            step()
            return True
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            if time.monotonic() > self._complain_again:
                self._view.note(
                    f"the disk is full at {self._home}: nothing starts until there is space"
                )
                self._complain_again = time.monotonic() + COMPLAINT_SECONDS
            return False

    def _to_start(self) -> list[_Run]:
        return [] if self._signals.stops else [run for run in self._runs.values() if run.waits]

    def _start(self) -> None:
        """Start the runs that have a place now."""
        for run in self._to_start():
            if is_cancelled(run.follower.folder):
                self._leave(run, *CANCELLED)
        waiting, soon = self._to_start(), time.monotonic() < self._placed + PLACE_SECONDS
        if not waiting or (soon and not self._changed):
            return
        self._placed = time.monotonic()
        at_work = [self._working(run) for run in self._runs.values() if run.at_work]
        for run_id, slot in self._launcher.places([self._waiting(run) for run in waiting], at_work):
            self._attempt(self._runs[run_id], slot)

    def _waiting(self, run: _Run) -> Waiting:
        left = 1 - checkpoint_step(run.follower.folder) / run.plan.hyperparameters.steps
        devices = len(run.slot.ids) if run.slot and run.slot.ids else None
        return Waiting(run.plan.run_id, run.plan.hyperparameters, devices, left)

    def _working(self, run: _Run) -> Working:
        assert run.slot is not None
        left = 1 - run.follower.step / run.plan.hyperparameters.steps
        return Working(
            run.slot.ids, left * self._launcher.seconds(run.plan.hyperparameters, run.slot)
        )

    def _attempt(self, run: _Run, slot: Slot) -> None:
        given = run.plan.hyperparameters
        attempt = make_attempt(
            run.plan,
            self._home,
            self._data_folder(run.plan),
            slot,
            self._launcher.memory.rows(given, slot),
            self._launcher.name,
            self._checkpoint_seconds,
            self._launcher.seconds(given, slot),
            self._cores.get(run.plan.run_id),
        )
        self._launcher.start(attempt)
        run.at_work, run.slot = True, slot
        run.follower.look(adopted=False)

    def _look(self) -> None:
        """What those at work wrote, and which of them ended. Who is alive is asked first: last words are heard."""
        at_work = [run for run in self._runs.values() if run.at_work]
        living = self._launcher.living([run.follower.attempt for run in at_work])
        for run in at_work:
            lives = run.follower.attempt in living
            run.follower.look()
            if not lives:
                self._ended(run)
        for run in self._runs.values():
            folder = run.follower.folder
            if run.left and retry_requested(folder) and not is_cancelled(folder):
                run.left, run.fruitless, self._changed = None, 0, True

    def _ended(self, run: _Run) -> None:
        """Finished, to be tried again, or left."""
        if is_done(run.follower.folder):
            run.at_work, run.finished, self._changed = False, True, True
            self._launcher.seconds.learn()
            self._view.run_ended(run.plan, "finished", None)
            return
        ended = read_exit(run.follower.attempt) or self._launcher.reap(run.follower.attempt)
        run.at_work, self._changed = False, True
        reason, message = ended["reason"] or "error", ended["message"] or "no word"
        run.fruitless = 0 if run.follower.advanced else run.fruitless + 1
        if reason == "oom":
            message = self._after_oom(run, message)
        if reason in FINAL_REASONS or self._signals.stops or run.fruitless >= FRUITLESS_ATTEMPTS:
            self._leave(run, reason, message)
        else:
            self._view.run_ended(run.plan, "retried", f"{reason}: {message}")

    def _after_oom(self, run: _Run, message: str) -> str:
        """Let the next attempt compute less at once, if it can; what is to be said of it."""
        assert run.slot is not None
        document = read_attempt(run.follower.attempt)
        rows = MicroBatch(document["micro_batch"], document["evaluation_tokens"])
        smaller = self._launcher.memory.halve(
            run.plan.hyperparameters, run.slot, rows, run.follower.evaluating
        )
        if smaller is None:
            run.fruitless = FRUITLESS_ATTEMPTS
            return f"{message}; a pass of one row is the smallest: take more memory a run, or a smaller depth"
        run.fruitless = 0
        return f"{message}; next with {smaller.training} rows and in evaluation {smaller.evaluation_tokens} tokens a pass"

    def _leave(self, run: _Run, reason: str, message: str) -> None:
        """Leave a run unfinished."""
        run.left = (reason, message)
        self._view.run_ended(run.plan, reason if reason in KNOWN else "failed", message)
        self._give_up_if_all_fail_alike()

    def _give_up_if_all_fail_alike(self) -> None:
        """Start no more when the first runs of this sweep all failed in the same words, and none got anywhere."""
        failures = [
            run.left for run in self._runs.values() if run.left and run.left[0] not in KNOWN
        ]
        words = {NUMBER.sub("#", f"{reason}: {message}") for reason, message in failures}
        waiting = [run for run in self._runs.values() if run.waits]
        hopeful = any(
            run.follower.step or (run.finished and not run.already) for run in self._runs.values()
        )
        if len(failures) < ALIKE or len(words) > 1 or hopeful or not waiting:
            return
        why = f"the first {len(failures)} runs all failed alike: {': '.join(failures[0])}"
        self._view.note(f"{why}; {len(waiting)} more are not started")
        for run in waiting:
            run.left = (failures[0][0], f"not started, for {why}")

    def _obey(self) -> None:
        """Pass on what the user asks for: those at work are told until they have ended."""
        stops = self._signals.stops
        if stops > self._told:
            self._view.note(
                "ending at once"
                if stops > 1
                else "stopping after a checkpoint; asked again, at once"
            )
        if stops > self._told or (stops and time.monotonic() > self._tell_again):
            self._told, self._tell_again = stops, time.monotonic() + TELL_SECONDS
            for run in self._runs.values():
                if run.at_work:
                    self._launcher.stop(run.follower.attempt, at_once=stops > 1)

    def _ingest(self) -> None:
        """Bring the database up to date now and then."""
        if time.monotonic() - self._ingested > self._pause:
            began = time.monotonic()
            self._ingest_now()
            self._ingested = time.monotonic()
            took = self._ingested - began
            self._pause = min(max(INGEST_SECONDS, took / INGEST_SHARE), LONGEST_INGEST_SECONDS)


class Signals:
    """SIGINT and SIGTERM, counted instead of obeyed; any signal, a child's end too, ends a wait.

    After SIGHUP a sweep goes on: what it says to a terminal, which is closed then, goes to a log.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self.stops = 0
        """Times that the user asked to stop."""

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Signals are heard here, and then again by those who heard them before."""
        self._terminals = [
            output for output in (1, 2) if os.isatty(output)
        ]  # once closed, they are none
        with InterruptibleSleep() as self._waking:
            before = {number: signal.signal(number, self._note) for number in HEARD}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.stops += number in (signal.SIGINT, signal.SIGTERM)
        if number == signal.SIGHUP and self._terminals:
            with self._log.open("ab") as log:
                for output in self._terminals:
                    os.dup2(log.fileno(), output)

    def wait(self, seconds: float) -> None:
        """So long, or until a signal comes."""
        self._waking.wait(seconds)


@contextmanager
def sweep_lock(home: Path) -> Iterator[bool]:
    """Hold the home's sweep.lock if nobody does; whether it is held here."""
    home.mkdir(parents=True, exist_ok=True)
    lock = hold_lock(home / "sweep.lock")
    if lock is None:
        yield False
        return
    with lock:
        yield True


def conductor(home: Path) -> int | None:
    """Process that conducts the sweeps of a home."""
    return lock_holder(home / "sweep.lock")
