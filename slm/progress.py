"""What a sweep shows while it runs: bars in a terminal, plain lines elsewhere; always on standard error."""

from __future__ import annotations

import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from slm.plan import Plan

LINE_SECONDS = 15.0
"""Pause between two lines about a run where there is no terminal."""
RATE_STEPS = 20
"""Logged steps over which speed is averaged."""


class Display:
    """Shows the runs of a sweep (sweep.View): step, loss, tokens/s, time left of the run and of the sweep."""

    def __init__(self, plans: list[Plan], done: set[str]) -> None:
        self._left = {plan.run_id: plan.hyperparameters.flops for plan in plans if plan.run_id not in done}
        self._total = sum(self._left.values())
        self._order = {plan.run_id: number for number, plan in enumerate(plans, 1)}
        self._recent: deque[dict[str, Any]] = deque(maxlen=RATE_STEPS)
        self._flops_per_second = 0.0
        self._last_line = 0.0
        console = Console(stderr=True)
        columns = [
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(ratio=1, max_width=30)),
            TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True)),
        ]
        self._bars = Progress(*columns, console=console, expand=True) if console.is_terminal else None
        self._sweep_bar = self._run_bar = TaskID(0)

    def __enter__(self) -> Display:
        if self._bars:
            self._bars.start()
            self._sweep_bar = self._bars.add_task("sweep", total=self._total, note="")
            self._run_bar = self._bars.add_task("", total=1, note="", visible=False)
        return self

    def __exit__(self, *error: object) -> None:
        if self._bars:
            self._bars.stop()

    def run_started(self, plan: Plan, attempt: Path, adopted: bool) -> None:
        """A run goes on in an attempt: a new one, or one that lived already."""
        self._recent.clear()
        how = "goes on in a trainer that is alive already" if adopted else f"attempt {int(attempt.name)}"
        if self._bars:
            given = plan.hyperparameters
            label = f"d{given.depth} seed {plan.seed}"
            self._bars.update(
                self._run_bar, description=label, total=given.steps, completed=0, note="starting", visible=True
            )
        else:
            self._say(f"{_label(plan)} ({self._order[plan.run_id]} of {len(self._order)}): {how}")

    def event(self, plan: Plan, event: dict[str, Any]) -> None:
        """A trainer wrote an event."""
        if event["event"] == "train":
            self._recent.append(event)
            self._left[plan.run_id] = plan.hyperparameters.flops - event["flops"]
            self._measure()
            self._show(plan, event)
        elif event["event"] == "started" and event["resumed_from"]:
            self._say(f"{_label(plan)}: resumed from step {event['resumed_from']}")
        elif event["event"] == "warning":
            self._say(f"{_label(plan)}: {event['message']}")

    def run_ended(self, plan: Plan, outcome: str, message: str | None) -> None:
        """A run ended: finished, failed, diverged or interrupted."""
        self._left[plan.run_id] = 0
        if self._bars:
            self._bars.update(self._run_bar, visible=False)
            self._bars.update(self._sweep_bar, completed=self._total - sum(self._left.values()))
        self._say(f"{_label(plan)}: {outcome}" + (f" ({message})" if message else ""))

    def note(self, line: str) -> None:
        """Something about the sweep as a whole."""
        self._say(line)

    def refresh(self) -> None:
        """A moment passed."""

    def _measure(self) -> None:
        first, last = self._recent[0], self._recent[-1]
        seconds = last["time"] - first["time"]
        if seconds > 0:
            self._flops_per_second = (last["flops"] - first["flops"]) / seconds

    def _show(self, plan: Plan, event: dict[str, Any]) -> None:
        rate = self._flops_per_second
        run_left = f"{duration(self._left[plan.run_id] / rate)} left" if rate else ""
        sweep_left = f"{duration(sum(self._left.values()) / rate)} left" if rate else ""
        speed = f"{rate / plan.hyperparameters.flops_per_token:,.0f} tok/s" if rate else ""
        note = "  ".join((f"step {event['step']:,}", f"loss {event['loss']:.3f}", speed, run_left))
        if self._bars:
            self._bars.update(self._run_bar, completed=event["step"], note=note)
            self._bars.update(self._sweep_bar, completed=self._total - sum(self._left.values()), note=sweep_left)
        elif time.monotonic() - self._last_line > LINE_SECONDS:
            self._say(f"{_label(plan)}: {note}; sweep {sweep_left}")

    def _say(self, line: str) -> None:
        self._last_line = time.monotonic()
        if self._bars:
            self._bars.console.print(line, highlight=False, markup=False)
        else:
            print(line, file=sys.stderr, flush=True)  # noqa: T201


def _label(plan: Plan) -> str:
    horizon = "" if plan.horizon == "compute-optimal" else f" {plan.horizon}"
    return f"{plan.run_id} {plan.recipe} d{plan.hyperparameters.depth}{horizon} seed {plan.seed}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, the two largest."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
