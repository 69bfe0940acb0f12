"""Who follows what runs write, and who is shown it: those who conduct, and those who watch what others train."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from slm import events
from slm.plan import Plan
from slm.run import is_done, last_attempt, run_state

WATCH_SECONDS = 2.0


class View(Protocol):
    """Who is shown what happens."""

    def run_started(self, plan: Plan, attempt: Path, adopted: bool) -> None:
        """A run goes on in an attempt: a new one, or one that lived already."""

    def event(self, plan: Plan, event: dict[str, Any]) -> None:
        """A trainer wrote an event."""

    def run_ended(self, plan: Plan, outcome: str, message: str | None) -> None:
        """A run is finished, failed, diverged, cancelled or interrupted; or (retried) will be tried again."""

    def note(self, line: str) -> None:
        """Something about the sweep as a whole."""

    def refresh(self) -> None:
        """A moment passed: time to draw anew what changed."""


class Follower:
    """Tells a view what the attempts of one run write, each from its beginning."""

    def __init__(self, plan: Plan, run_folder: Path, view: View) -> None:
        self.plan, self.folder = plan, run_folder
        self._view = view
        self.attempt = Path()
        """The newest attempt that was seen."""
        self.step = 0
        """Steps done, as far as events tell."""
        self.advanced = False
        """Whether the attempt wrote a checkpoint."""
        self.evaluating = False
        """Whether its last word, but for a failure, was that it evaluates."""

    def look(self, adopted: bool = True) -> None:
        """What is new."""
        newest = last_attempt(self.folder)
        if newest is None:
            return
        if newest != self.attempt:
            self.attempt, self._reader = newest, events.Reader(newest / "events.jsonl")
            self.advanced = self.evaluating = False
            self._view.run_started(self.plan, newest, adopted)
        for event in self._reader.new():
            self.step = max(self.step, event.get("step", 0))
            self.advanced |= event["event"] == "checkpoint"
            if event["event"] != "failed":
                self.evaluating = event["event"] == "working" and event["what"] in (
                    "evaluation",
                    "core",
                )
            self._view.event(self.plan, event)


def unfinished(home: Path) -> list[Plan]:
    """The plans of a home's runs that are not finished, as far as they can be read."""
    plans = []
    for path in sorted(home.glob("*/plan.json")):
        if not is_done(path.parent):
            with suppress(OSError, ValueError):
                plans.append(Plan.read(path))
    return plans


def watch(
    plans: Sequence[Plan],
    home: Path,
    view: View,
    until: Callable[[], bool],
    jobs: Callable[[], Mapping[str, str | None]] = dict,
) -> None:
    """Show what others train, until something is so, and how it then is; `jobs` is what a cluster says of runs, by
    run_id.
    """
    followers = [Follower(plan, home / plan.run_id, view) for plan in plans]
    running: set[str] = set()
    while True:
        over, told = until(), jobs()
        for follower in [*followers]:
            run_id = follower.folder.name
            state = run_state(follower.folder, told.get(run_id))
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
