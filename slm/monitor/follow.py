"""Tail the event files of runs and forward events to a view."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from slm import events
from slm.monitor.run_progress import Event
from slm.plan import Plan
from slm.run import last_attempt, run_state

WATCH_SECONDS = 2.0
"""Pause between two looks at the runs."""


class View(Protocol):
    """Receiver of what happens to runs: the terminal display, or a logger in front of it."""

    def run_started(self, plan: Plan, attempt: Path, adopted: bool) -> None:
        """Show that a run trains in an attempt, a new one or one that was `adopted` alive."""

    def event(self, plan: Plan, event: Event) -> None:
        """Show an event of a trainer."""

    def run_ended(self, plan: Plan, outcome: str, message: str | None) -> None:
        """Show how a run ended.

        `outcome` is finished, failed, diverged, cancelled, interrupted, or retried.
        """

    def note(self, line: str) -> None:
        """Show a message about the sweep."""

    def refresh(self) -> None:
        """Redraw what changed; called about once a second."""


class Follower:
    """Forwards the events of one run's attempts to a view, each attempt from its first event."""

    def __init__(self, plan: Plan, run_folder: Path, view: View) -> None:
        self.plan = plan
        self.folder = run_folder
        self.attempt = Path()
        """Newest attempt that was seen."""
        self.step = 0
        """Highest step of any event."""
        self.advanced = False
        """Whether the attempt wrote a checkpoint."""
        self.evaluating = False
        """Whether the last event before a failure announced an evaluation."""
        self._view = view
        self._reader = events.Reader(self.attempt)

    def look(self, adopted: bool = True) -> None:
        """Forward the events written since the last call."""
        newest = last_attempt(self.folder)
        if newest is None:
            return
        if newest != self.attempt:
            self.attempt = newest
            self._reader = events.Reader(newest / "events.jsonl")
            self.advanced = self.evaluating = False
            self._view.run_started(self.plan, newest, adopted)
        for event in self._reader.new():
            kind = event["event"]
            self.step = max(self.step, event.get("step", 0))
            self.advanced |= kind == "checkpoint"
            if kind != "failed":
                self.evaluating = event.get("what") in ("evaluation", "core")
            self._view.event(self.plan, event)


def watch(
    plans: Sequence[Plan],
    home: Path,
    view: View,
    until: Callable[[], bool],
    jobs: Callable[[], Mapping[str, str | None]] = dict,
) -> None:
    """Show runs that other processes train, until `until` is true and once after.

    `jobs` returns the states of Slurm jobs by run_id.
    """
    followers = [Follower(plan, home / plan.run_id, view) for plan in plans]
    running: set[str] = set()
    while True:
        over = until()
        job_states = jobs()
        for follower in [*followers]:
            run_id = follower.folder.name
            state = run_state(follower.folder, job_states.get(run_id))
            if state.status in ("running", "finished") or run_id in running:
                follower.look()
            if state.status == "running":
                running.add(run_id)
            elif state.status == "finished" or run_id in running:
                running.discard(run_id)
                view.run_ended(follower.plan, state.status, state.message)
            if state.status == "finished":
                followers.remove(follower)
        view.refresh()
        if over:
            return
        time.sleep(WATCH_SECONDS)
