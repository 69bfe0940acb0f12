"""Progress and speed of runs and of a sweep, from the events of their attempts."""

from __future__ import annotations

import json
import math
import os
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm.hardware import devices
from slm.text import duration

if TYPE_CHECKING:
    from slm.plan import Plan
    from slm.run import AttemptDocument

Event = dict[str, Any]
"""A line of an attempt's events.jsonl."""
RATE_EVENTS = 20
"""Logged steps over which speed is averaged, with the checkpoints and evaluations between them."""
CURVE_POINTS = 64
"""Minimum number of points of a loss curve once it is thinned."""
LEVELS = "▁▂▃▄▅▆▇█"
ACTIVITIES = {
    "compilation": "compiling",
    "checkpoint": "checkpoint",
    "evaluation": "evaluating",
    "core": "CORE",
}
"""Text for the `what` of a `working` event."""
TAIL_BYTES = 2**14
"""Bytes at the end of events.jsonl that hold its last RATE_EVENTS events."""


class RunProgress:
    """Progress of one run. Events of a later attempt continue from the checkpoint it resumed."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        """Steps of the whole run."""
        self.step = 0
        self.loss: float | None = None
        """Last training loss, nats a token."""
        self.memory_bytes: int | None = None
        """Peak of the attempt."""
        self.activity: str | None = "starting"
        """Text for what the trainer does; None while it trains."""
        self.finished: Event | None = None
        """The `finished` event."""
        self.core: Event | None = None
        """The last `core` event."""
        self._working_on: str | None = None
        self._shares: list[tuple[float, float]] = []
        """Time and share done, from each event of the activity."""
        self._recent: deque[tuple[float, float]] = deque(maxlen=RATE_EVENTS)
        """Time and step of the last logged steps."""
        self._curve: list[tuple[float, float]] = []

    def update(self, event: Event) -> None:
        """Take the next event into account."""
        kind = event["event"]
        if event.get("what") != self._working_on:
            self._working_on = event.get("what")
            self._shares = []
        if kind == "train":
            self._train(event)
        elif kind == "working":
            share = event.get("share")
            self.activity = ACTIVITIES[event["what"]]
            if share is not None:
                self.activity += f" {share:.0%}"
                self._shares.append((event["time"], share))
        elif kind == "started":
            self.step = event["step"]
            self.activity = "starting"
            self._recent.clear()
            self._curve = [(step, loss) for step, loss in self._curve if step <= self.step]
        elif kind in ("checkpoint", "eval", "core"):
            self._reach(event["step"])
            if kind == "core":
                self.core = event
        elif kind == "finished":
            self.step = event["step"]
            self.finished = event

    def _reach(self, step: int) -> None:
        self.step = step
        self.activity = "ending" if step == self.steps else None

    def _train(self, event: Event) -> None:
        self._reach(event["step"])
        self.loss = event["loss"]
        self.memory_bytes = event.get("memory_bytes")
        self._recent.append((event["time"], self.step))
        if math.isfinite(event["loss"]):
            self._curve.append((self.step, event["loss"]))
        if len(self._curve) == 2 * CURVE_POINTS:
            pairs = zip(self._curve[::2], self._curve[1::2])
            self._curve = [_middle(*pair) for pair in pairs]

    @property
    def activity_seconds_left(self) -> float | None:
        """Seconds left of the activity at its rate so far; None if unknown."""
        rate = _rate(self._shares)
        return (1 - self._shares[-1][1]) / rate if rate else None

    @property
    def steps_per_second(self) -> float | None:
        """Steps per second over the last RATE_EVENTS logged steps; None before two of them."""
        return _rate(self._recent)

    @property
    def seconds_left(self) -> float | None:
        """Seconds left at the present rate; None if unknown."""
        rate = self.steps_per_second
        return (self.steps - self.step) / rate if rate else None

    @property
    def share(self) -> float:
        """Share of the steps that is done."""
        return self.step / self.steps

    def sparkline(self, width: int) -> str:
        """Return the loss over the steps so far, as `width` characters of LEVELS."""
        if not self._curve:
            return ""
        first, _ = self._curve[0]
        last, _ = self._curve[-1]
        bins: defaultdict[int, list[float]] = defaultdict(list)
        for step, loss in self._curve:
            share = (step - first) / (last - first + 1)
            bins[int(share * width)].append(loss)
        heights = []
        losses = bins[0]
        for column in range(width):
            losses = bins.get(column, losses)
            heights.append(sum(losses) / len(losses))
        low = min(heights)
        span = (max(heights) - low) or 1.0
        top = len(LEVELS) - 1
        levels = [round((height - low) / span * top) for height in heights]
        return "".join(LEVELS[level] for level in levels)


def _rate(values: Sequence[tuple[float, float]]) -> float | None:
    """Return the increase per second over pairs of time and value; None if nothing increased."""
    if len(values) < 2:
        return None
    first_time, first = values[0]
    last_time, last = values[-1]
    if last_time <= first_time or last <= first:
        return None
    return (last - first) / (last_time - first_time)


def _middle(one: tuple[float, float], two: tuple[float, float]) -> tuple[float, float]:
    return (one[0] + two[0]) / 2, (one[1] + two[1]) / 2


def last_events(path: Path, size: int = TAIL_BYTES) -> list[Event]:
    """Return the events in the last `size` bytes of an events.jsonl; [] without one.

    Only whole lines of JSON count.
    """
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - size))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return []
    parsed = []
    for line in lines[end > size : -1]:
        with suppress(ValueError):
            parsed.append(json.loads(line))
    return parsed


@dataclass
class ActiveRun:
    """A run that is training, with its speed."""

    plan: Plan
    progress: RunProgress
    attempt: AttemptDocument
    reported: float = 0.0
    """Monotonic time of its last plain line, seconds."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second at the present rate; 0 if unknown."""
        return (self.progress.steps_per_second or 0.0) * self.plan.hyperparameters.batch_tokens

    @property
    def flops_per_second(self) -> float:
        """FLOPs per second at the present rate; 0 if unknown."""
        return self.tokens_per_second * self.plan.hyperparameters.flops_per_token

    @property
    def device(self) -> str:
        """Name of its devices."""
        return self.attempt["device_name"] or self.attempt["device"]

    @property
    def figures(self) -> dict[str, str]:
        """Texts for step, loss, tokens per second, MFU, memory and time left; "" if unknown.

        MFU is missing where the devices' peak is unknown.
        """
        progress = self.progress
        rate = self.tokens_per_second
        seconds = progress.activity_seconds_left if progress.activity else progress.seconds_left
        figures = {
            "step": f"{progress.step:,}/{progress.steps:,}",
            "loss": "" if progress.loss is None else f"{progress.loss:.3f}",
            "tok/s": f"{rate:,.0f}" if rate else "",
        }
        if devices.peak_flops(self.device):
            mfu = devices.mfu(self.flops_per_second, self.device, self.attempt["ranks"])
            figures["MFU"] = f"{mfu:.1%}" if mfu else ""
        memory = progress.memory_bytes
        figures["GB"] = f"{memory / 1e9:.2f}" if memory else ""
        figures["left"] = "" if seconds is None else duration(seconds)
        return figures


class SweepProgress:
    """FLOPs, outcomes and time left of a sweep. Runs of other sweeps may be active, too."""

    def __init__(self, plans: Sequence[Plan], done: set[str], began: float) -> None:
        """`done`: run_ids that were finished before. `began`: start of the sweep, unix seconds."""
        self.flops = {plan.run_id: plan.hyperparameters.flops for plan in plans}
        self.outcomes = dict.fromkeys(done, "finished")
        """Outcomes of the runs that ended, by run_id."""
        self.active: dict[str, ActiveRun] = {}
        self.began = began
        self._progress = {plan.run_id: RunProgress(plan.hyperparameters.steps) for plan in plans}
        self._flops_per_second: float | None = None

    def start(self, plan: Plan, attempt: AttemptDocument) -> ActiveRun:
        """Add a run that trains in an attempt."""
        run_id = plan.run_id
        progress = self._progress.setdefault(run_id, RunProgress(plan.hyperparameters.steps))
        progress.activity = "starting"
        self.active[run_id] = ActiveRun(plan, progress, attempt)
        self.outcomes.pop(run_id, None)
        if run_id in self.flops:
            self.began = min(self.began, attempt["created"])
        return self.active[run_id]

    def update(self, plan: Plan, event: Event) -> None:
        """Take an event of an active run into account."""
        run = self.active.get(plan.run_id)
        if run:
            run.progress.update(event)

    def end(self, plan: Plan, outcome: str) -> ActiveRun | None:
        """Remove a run that ended; its FLOPs count as done unless it will be trained further."""
        if outcome not in ("retried", "interrupted") and plan.run_id in self.flops:
            self.outcomes[plan.run_id] = outcome
        return self.active.pop(plan.run_id, None)

    @property
    def flops_left(self) -> float:
        """FLOPs of the steps that are neither done nor given up."""
        return sum(
            flops * (1 - self._progress[run_id].share)
            for run_id, flops in self.flops.items()
            if run_id not in self.outcomes
        )

    @property
    def share(self) -> float:
        """Share of the FLOPs that is done or given up."""
        return 1 - self.flops_left / sum(self.flops.values()) if self.flops else 1.0

    def seconds_left(self) -> float | None:
        """Return the FLOPs left over the sum of the present rates; None if unknown.

        An active run without a rate counts with the mean of the others. While no run has a rate,
        the last sum holds. Runs of other sweeps do not count.
        """
        active = [run for run_id, run in self.active.items() if run_id in self.flops]
        known = [run.flops_per_second for run in active if run.flops_per_second]
        if known:
            self._flops_per_second = sum(known) * len(active) / len(known)
        flops_left = self.flops_left
        if not self._flops_per_second or not flops_left:
            return None
        return flops_left / self._flops_per_second

    def counts(self) -> str:
        """Return the number of finished runs: "2/6 runs done"."""
        finished = [*self.outcomes.values()].count("finished")
        return f"{finished}/{len(self.flops)} runs done"

    def summary(self, now: float) -> str:
        """Return FLOPs done, time left, outcomes and time elapsed at a unix time, as text."""
        parts = [f"{self.share:.0%} of FLOPs"]
        seconds = self.seconds_left()
        if seconds is not None:
            parts.append(f"{duration(seconds)} left")
        for outcome, count in Counter(self.outcomes.values()).items():
            if outcome != "finished":
                parts.append(f"{count} {outcome}")
        parts.append(f"{duration(now - self.began)} elapsed")
        return ", ".join(parts)
