"""Orchestrator: train the runs of a sweep, several at once, until each is finished or given up."""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from slm.files import hold_lock, lock_holder
from slm.hardware.slot import MicroBatch, Slot
from slm.monitor.follow import Follower, View, watch
from slm.plan import Plan
from slm.run import (
    CANCELLED,
    CHECKPOINT_SECONDS,
    attempt_slot,
    is_cancelled,
    is_done,
    last_attempt,
    make_attempt,
    read_attempt,
    read_exit,
    remove_checkpoints,
    retry_requested,
    unfinished_plans,
)
from slm.sweep.interrupt import Signals
from slm.sweep.launcher import Launcher, RunningRun, WaitingRun
from slm.sweep.out_of_memory import after_out_of_memory

if TYPE_CHECKING:
    from slm.data import PreparedDataset
    from slm.evaluate.request import CoreRequest

MAX_FRUITLESS = 3
"""Attempts in a row without a new checkpoint after which a run has failed."""
RESULTS = ("diverged", "cancelled")
"""Reasons that no sweep retries."""
NO_FAILURES = (*RESULTS, "interrupted")
FINAL_REASONS = (*RESULTS, "data")
"""Reasons that another attempt of this sweep would only repeat."""
MAX_ALIKE = 3
"""Runs that fail with the same message, none having advanced, after which a sweep starts no more.
"""
VARIABLE = re.compile(r"[0-9a-f]{12}|\d+")
"""Parts in which the messages of equal failures may differ: run_ids and numbers."""
POLL_SECONDS = 1.0
STOP_SECONDS = 10.0
"""Pause between two stop requests to the same process."""
SCHEDULE_SECONDS = 30.0
"""Pause between two schedules while no run ends."""
FULL_DISK_SECONDS = 300.0
"""Pause between two notes about a full disk."""
INGEST_SECONDS = 10.0
INGEST_SHARE = 0.002
MAX_INGEST_SECONDS = 60.0
"""Ingests take INGEST_SHARE of the time, with pauses between INGEST_SECONDS and this."""
INGEST_PATIENCE = 2.0
"""Seconds that an ingest waits for another writer; the next one catches up."""


@dataclass(frozen=True)
class Sweep:
    """Runs to train, and what their attempts need."""

    plans: Sequence[Plan]
    """Cheapest first."""
    home: Path
    dataset: Callable[[Plan], PreparedDataset]
    core: Mapping[str, CoreRequest] = field(default_factory=dict)
    """CORE request of a run, by run_id; a run without one measures val_bpb alone."""
    checkpoint_seconds: float = CHECKPOINT_SECONDS
    poll_seconds: float = POLL_SECONDS


@dataclass(frozen=True)
class Outcome:
    """Result of a sweep: run_ids, cheapest first."""

    already_done: list[str]
    """Finished before this sweep."""
    trained: list[str]
    """Finished by this sweep."""
    not_finished: dict[str, str]
    """Reason and message of every other run."""


def train(sweep: Sweep, launcher: Launcher, view: View) -> Outcome:
    """Train a sweep. While another one runs in its home, show its runs and wait for its end."""
    home = sweep.home
    while True:
        with sweep_lock(home) as acquired:
            if acquired:
                return Orchestrator(sweep, launcher, view).run()
        view.note(
            f"{home} is being swept by process {sweep_process(home)}: "
            "showing its runs; this sweep starts when it ends"
        )
        watch(unfinished_plans(home), home, view, until=lambda: sweep_process(home) is None)


def submit(sweep: Sweep, launcher: Launcher, view: View) -> list[str]:
    """Start the runs that a launcher takes now, and return the run_ids of those that wait.

    Raises RuntimeError if another sweep runs in the home.
    """
    with sweep_lock(sweep.home) as acquired:
        if not acquired:
            process = sweep_process(sweep.home)
            raise RuntimeError(
                f"{sweep.home} is being swept by process {process}: wait for it, or stop it"
            )
        return Orchestrator(sweep, launcher, view).submit()


@contextmanager
def sweep_lock(home: Path) -> Iterator[bool]:
    """Hold the home's sweep.lock in this block; yield False if another process holds it."""
    home.mkdir(parents=True, exist_ok=True)
    lock = hold_lock(home / "sweep.lock")
    if lock is None:
        yield False
        return
    with lock:
        yield True


def sweep_process(home: Path) -> int | None:
    """Return the process that sweeps a home, None without one."""
    return lock_holder(home / "sweep.lock")


def ingest(home: Path) -> list[str]:
    """Update the home's database and return its problems.

    Training does not depend on it: files hold everything.
    """
    import store

    try:
        return list(store.ingest(home, patience=INGEST_PATIENCE).problems)
    except (store.StoreError, OSError) as error:
        return [str(error)]


@dataclass
class _Run:
    """A plan on its way to done.json."""

    plan: Plan
    follower: Follower
    state: str = "waiting"
    """waiting, running, trained by this sweep, already_done before it, or not_finished by it."""
    slot: Slot | None = None
    """Slot of the newest attempt."""
    fruitless: int = 0
    """Attempts in a row without a new checkpoint."""
    end: tuple[str, str] = ("", "")
    """Reason and message of a run that is not_finished."""


@dataclass
class Orchestrator:
    """Train the runs of a sweep; a failed run does not stop the others."""

    sweep: Sweep
    launcher: Launcher
    view: View
    ingest: Callable[[Path], Sequence[str]] = ingest

    def __post_init__(self) -> None:
        home = self.sweep.home
        self._runs = {
            plan.run_id: _Run(plan, Follower(plan, home / plan.run_id, self.view))
            for plan in self.sweep.plans
        }
        self._signals = Signals(home / "sweep.log")
        self._forwarded = 0
        """Stop requests that were passed on."""
        self._next_stop = 0.0
        self._next_full_disk = 0.0
        self._next_ingest = time.monotonic() + INGEST_SECONDS
        self._next_schedule = 0.0
        """Monotonic seconds of the next schedule, unless a run ends or is retried earlier."""

    def run(self) -> Outcome:
        """Train until every run is finished or given up.

        The first SIGINT or SIGTERM makes all running attempts checkpoint and stop, the second one
        stops them at once; KeyboardInterrupt is raised when they have ended.
        """
        with self._signals.handled() as sleep:
            self._adopt_existing()
            while self._in_state("running") or self._waiting():
                self._unless_full(self._start_runs)
                sleep.wait(self.sweep.poll_seconds)
                self._forward_stop()
                self._unless_full(self._poll)
                self.view.refresh()
                if time.monotonic() > self._next_ingest:
                    self._update_store()
        self._update_store()
        if self._signals.stops:
            raise KeyboardInterrupt
        return self._outcome()

    def submit(self) -> list[str]:
        """Start what the launcher takes now, without following it; return the other run_ids."""
        self._adopt_existing()
        self._start_runs()
        self._poll()
        return [run.plan.run_id for run in self._waiting()]

    def _in_state(self, state: str) -> list[_Run]:
        return [run for run in self._runs.values() if run.state == state]

    def _waiting(self) -> list[_Run]:
        """Return the runs to be started: none after a stop request."""
        return [] if self._signals.stops else self._in_state("waiting")

    def _outcome(self) -> Outcome:
        return Outcome(
            [run.plan.run_id for run in self._in_state("already_done")],
            [run.plan.run_id for run in self._in_state("trained")],
            {run.plan.run_id: ": ".join(run.end) for run in self._in_state("not_finished")},
        )

    # Runs of earlier sweeps

    def _adopt_existing(self) -> None:
        """Learn the state of every run: finished, running since an earlier sweep, or ended."""
        attempts = {run_id: last_attempt(run.follower.folder) for run_id, run in self._runs.items()}
        alive = self.launcher.alive(filter(None, attempts.values()))
        for run_id, run in self._runs.items():
            attempt = attempts[run_id]
            folder = run.follower.folder
            if is_done(folder):
                run.state = "already_done"
                if attempt not in alive:  # a trainer killed after done.json leaves its checkpoints
                    remove_checkpoints(folder)
            elif attempt is not None:
                run.slot = attempt_slot(attempt)
                self._adopt_attempt(run, attempt, attempt in alive)

    def _adopt_attempt(self, run: _Run, attempt: Path, is_alive: bool) -> None:
        if is_alive:
            run.state = "running"
            run.follower.look()
            return
        ended = read_exit(attempt) or self.launcher.reap(attempt)
        if ended["reason"] in RESULTS and not retry_requested(run.follower.folder):
            self._give_up(run, ended["reason"], ended["message"] or "")

    # Starting runs

    def _start_runs(self) -> None:
        """Start the runs that have a slot now."""
        for run in self._waiting():
            if is_cancelled(run.follower.folder):
                self._give_up(run, *CANCELLED)
        waiting = self._waiting()
        if not waiting or time.monotonic() < self._next_schedule:
            return
        assigned = self.launcher.assign(
            [WaitingRun.read(run.follower.folder, run.plan.hyperparameters) for run in waiting],
            [self._running_run(run) for run in self._in_state("running")],
        )
        for run_id, slot in assigned:
            self._start(self._runs[run_id], slot)
        self._next_schedule = time.monotonic() + SCHEDULE_SECONDS

    def _running_run(self, run: _Run) -> RunningRun:
        assert run.slot is not None
        hp = run.plan.hyperparameters
        remaining = 1 - run.follower.step / hp.steps
        return RunningRun(run.slot.ids, remaining * self.launcher.runtime(hp, run.slot))

    def _start(self, run: _Run, slot: Slot) -> None:
        hp = run.plan.hyperparameters
        core = self.sweep.core.get(run.plan.run_id)
        attempt = make_attempt(
            run.plan,
            self.sweep.home,
            self.sweep.dataset(run.plan).folder,
            slot,
            self.launcher.micro_batches.choose(hp, slot),
            launcher=self.launcher.name,
            checkpoint_seconds=self.sweep.checkpoint_seconds,
            estimated_seconds=self.launcher.runtime(hp, slot),
            core=core.document() if core else None,
        )
        self.launcher.start(attempt)
        run.state = "running"
        run.slot = slot
        run.follower.look(adopted=False)

    def _unless_full(self, step: Callable[[], None]) -> None:
        """Do a step that writes. On a full disk note it, and leave the step to the next round."""
        try:
            step()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            if time.monotonic() > self._next_full_disk:
                self.view.note(
                    f"the disk is full at {self.sweep.home}: no run starts until there is space"
                )
                self._next_full_disk = time.monotonic() + FULL_DISK_SECONDS

    # Following runs

    def _poll(self) -> None:
        """Read new events, and settle the runs that ended or were retried."""
        running = self._in_state("running")
        # Ask who is alive before reading, so that no event of an ended run is missed.
        alive = self.launcher.alive([run.follower.attempt for run in running])
        for run in running:
            is_alive = run.follower.attempt in alive
            run.follower.look()
            if not is_alive:
                self._end_attempt(run)
        for run in self._in_state("not_finished"):
            folder = run.follower.folder
            if retry_requested(folder) and not is_cancelled(folder):
                run.state = "waiting"
                run.fruitless = 0
                self._next_schedule = 0.0

    def _end_attempt(self, run: _Run) -> None:
        """Finish a run whose attempt ended, let it wait for the next attempt, or give it up."""
        if is_done(run.follower.folder):
            run.state = "trained"
            self._next_schedule = 0.0
            self.launcher.runtime.learn()
            self.view.run_ended(run.plan, "finished", None)
            return
        ended = read_exit(run.follower.attempt) or self.launcher.reap(run.follower.attempt)
        run.state = "waiting"
        self._next_schedule = 0.0
        reason = ended["reason"] or "error"
        message = ended["message"] or "no message"
        run.fruitless = 0 if run.follower.advanced else run.fruitless + 1
        if reason == "oom":
            message = f"{message}; {self._halve_micro_batch(run)}"
        if reason in FINAL_REASONS or self._signals.stops or run.fruitless >= MAX_FRUITLESS:
            self._give_up(run, reason, message)
        else:
            self.view.run_ended(run.plan, "retried", f"{reason}: {message}")

    def _halve_micro_batch(self, run: _Run) -> str:
        """Reduce the micro-batch of the next attempt, if possible, and describe it."""
        assert run.slot is not None
        attempt = read_attempt(run.follower.attempt)
        smaller = self.launcher.micro_batches.halve(
            run.plan.hyperparameters,
            run.slot,
            MicroBatch(attempt["micro_batch"], attempt["evaluation_tokens"]),
            run.follower.evaluating,
        )
        run.fruitless = MAX_FRUITLESS if smaller is None else 0
        return after_out_of_memory(smaller)

    def _give_up(self, run: _Run, reason: str, message: str) -> None:
        """Leave a run unfinished."""
        run.state = "not_finished"
        run.end = (reason, message)
        self.view.run_ended(run.plan, reason if reason in NO_FAILURES else "failed", message)
        self._stop_if_all_fail_alike()

    def _stop_if_all_fail_alike(self) -> None:
        """Start no more runs if the first ones failed with one message and none made progress."""
        ends = [run.end for run in self._in_state("not_finished") if run.end[0] not in NO_FAILURES]
        messages = {VARIABLE.sub("#", f"{reason}: {message}") for reason, message in ends}
        waiting = self._in_state("waiting")
        if len(ends) < MAX_ALIKE or len(messages) > 1 or not waiting:
            return
        if self._in_state("trained") or any(run.follower.step for run in self._runs.values()):
            return
        why = f"the first {len(ends)} runs all failed alike: {': '.join(ends[0])}"
        self.view.note(f"{why}; {len(waiting)} more are not started")
        for run in waiting:
            run.state = "not_finished"
            run.end = (ends[0][0], f"not started: {why}")

    def _forward_stop(self) -> None:
        """Pass stop requests on to the running attempts, and repeat them until these have ended."""
        stops = self._signals.stops
        is_new = stops > self._forwarded
        if is_new and stops > 1:
            self.view.note("stopping at once")
        elif is_new:
            self.view.note("stopping after a checkpoint; interrupt again to stop at once")
        if is_new or (stops and time.monotonic() > self._next_stop):
            self._forwarded = stops
            self._next_stop = time.monotonic() + STOP_SECONDS
            for run in self._in_state("running"):
                self.launcher.stop(run.follower.attempt, at_once=stops > 1)

    def _update_store(self) -> None:
        """Ingest new files into the database, and set the time of the next ingest."""
        began = time.monotonic()
        for problem in self.ingest(self.sweep.home):
            self.view.note(problem)
        now = time.monotonic()
        pause = max(INGEST_SECONDS, (now - began) / INGEST_SHARE)
        self._next_ingest = now + min(pause, MAX_INGEST_SECONDS)
