"""Progress and speed of runs and of a sweep, from the events of their attempts."""

from __future__ import annotations

import json
import math
import os
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm.hardware import devices
from slm.text import duration

if TYPE_CHECKING:
    from slm.plan import Plan
    from slm.run import AttemptDocument

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
        self.finished: dict[str, Any] | None = None
        """The `finished` event."""
        self.core: dict[str, Any] | None = None
        """The last `core` event."""
        self._working: list[dict[str, Any]] = []
        self._recent: deque[tuple[float, int]] = deque(maxlen=RATE_EVENTS)
        self._curve: list[tuple[float, float]] = []

    def update(self, event: dict[str, Any]) -> None:
        """Take the next event into account."""
        kind = event["event"]
        if kind != "working":
            self._working = []
        if kind == "train":
            self._train(event)
        elif kind == "working":
            self._work(event)
        elif kind == "started":
            self.step = event["step"]
            self.activity = "starting"
            self._recent.clear()
            self._curve = [(step, loss) for step, loss in self._curve if step <= self.step]
        elif kind in ("checkpoint", "eval", "core"):
            if kind == "core":
                self.core = event
            self._reach(event["step"])
        elif kind == "finished":
            self.step = event["step"]
            self.finished = event

    def _reach(self, step: int) -> None:
        self.step = step
        self.activity = "ending" if step == self.steps else None

    def _train(self, event: dict[str, Any]) -> None:
        self._reach(event["step"])
        self.loss = event["loss"]
        self.memory_bytes = event.get("memory_bytes")
        self._recent.append((event["time"], self.step))
        if math.isfinite(event["loss"]):
            self._curve.append((self.step, event["loss"]))
        if len(self._curve) == 2 * CURVE_POINTS:
            self._curve = [_mean(*pair) for pair in pairwise(self._curve)][::2]

    def _work(self, event: dict[str, Any]) -> None:
        share = event.get("share")
        same = self._working and self._working[0]["what"] == event["what"] and share is not None
        self._working = [self._working[0], event] if same else [event]
        self.activity = ACTIVITIES[event["what"]] + ("" if share is None else f" {share:.0%}")

    @property
    def activity_seconds_left(self) -> float | None:
        """Seconds left of the activity at its rate so far; None if unknown."""
        if len(self._working) < 2:
            return None
        first, last = self._working
        if first["share"] is None or last["share"] <= first["share"]:
            return None
        seconds = last["time"] - first["time"]
        return (1 - last["share"]) * seconds / (last["share"] - first["share"])

    @property
    def steps_per_second(self) -> float | None:
        """Steps per second over the last RATE_EVENTS logged steps; None before two of them."""
        if len(self._recent) < 2:
            return None
        (first_time, first_step), (last_time, last_step) = self._recent[0], self._recent[-1]
        if last_time <= first_time or last_step <= first_step:
            return None
        return (last_step - first_step) / (last_time - first_time)

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
        first, last = self._curve[0][0], self._curve[-1][0]
        bins: list[list[float]] = [[] for _ in range(width)]
        for step, loss in self._curve:
            bins[int((step - first) / (last - first + 1) * width)].append(loss)
        heights: list[float] = []
        for losses in bins:
            heights.append(sum(losses) / len(losses) if losses else heights[-1])
        low = min(heights)
        span = (max(heights) - low) or 1.0
        top = len(LEVELS) - 1
        return "".join(LEVELS[round((height - low) / span * top)] for height in heights)


def _mean(one: tuple[float, float], two: tuple[float, float]) -> tuple[float, float]:
    return (one[0] + two[0]) / 2, (one[1] + two[1]) / 2


def last_events(path: Path, size: int = TAIL_BYTES) -> list[dict[str, Any]]:
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
    def tokens_per_second(self) -> float | None:
        """Tokens per second at the present rate."""
        rate = self.progress.steps_per_second
        return rate and rate * self.plan.hyperparameters.batch_tokens

    @property
    def flops_per_second(self) -> float | None:
        """FLOPs per second at the present rate."""
        rate = self.tokens_per_second
        return rate and rate * self.plan.hyperparameters.flops_per_token

    @property
    def device(self) -> str:
        """Name of its devices."""
        return self.attempt["device_name"] or self.attempt["device"]

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation; None if the speed or the devices' peak is unknown."""
        return devices.mfu(self.flops_per_second, self.device, self.attempt["ranks"])

    @property
    def figures(self) -> dict[str, str]:
        """Texts for step, loss, tokens per second, MFU, memory and time left; "" if unknown.

        MFU is missing where the devices' peak is unknown.
        """
        progress = self.progress
        rate = self.tokens_per_second
        seconds = progress.activity_seconds_left if progress.activity else progress.seconds_left
        mfu = self.mfu
        figures = {
            "step": f"{progress.step:,}/{progress.steps:,}",
            "loss": "" if progress.loss is None else f"{progress.loss:.3f}",
            "tok/s": f"{rate:,.0f}" if rate else "",
            "MFU": f"{mfu:.1%}" if mfu else "",
            "GB": f"{progress.memory_bytes / 1e9:.2f}" if progress.memory_bytes else "",
            "left": "" if seconds is None else duration(seconds),
        }
        if devices.peak_flops(self.device) is None:
            del figures["MFU"]
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
        self._flops_left = {
            run_id: 0.0 if run_id in done else flops for run_id, flops in self.flops.items()
        }
        self._progress: dict[str, RunProgress] = {}
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

    def update(self, plan: Plan, event: dict[str, Any]) -> None:
        """Take an event of an active run into account."""
        run = self.active.get(plan.run_id)
        if run is None:
            return
        run.progress.update(event)
        if plan.run_id in self._flops_left:
            self._flops_left[plan.run_id] = plan.hyperparameters.flops * (1 - run.progress.share)

    def end(self, plan: Plan, outcome: str) -> ActiveRun | None:
        """Remove a run that ended; its FLOPs count as done unless it will be trained further."""
        if outcome not in ("retried", "interrupted") and plan.run_id in self._flops_left:
            self.outcomes[plan.run_id] = outcome
            self._flops_left[plan.run_id] = 0.0
        return self.active.pop(plan.run_id, None)

    @property
    def share(self) -> float:
        """Share of the FLOPs that is done or given up."""
        if not self.flops:
            return 1.0
        return 1 - sum(self._flops_left.values()) / sum(self.flops.values())

    def seconds_left(self) -> float | None:
        """Return the FLOPs left over the sum of the present rates; None if unknown.

        An active run without a rate counts with the mean of the others. While no run has a rate,
        the last sum holds. Runs of other sweeps do not count.
        """
        active = [run for run_id, run in self.active.items() if run_id in self.flops]
        rates = [run.flops_per_second for run in active]
        known = [rate for rate in rates if rate]
        if known:
            self._flops_per_second = sum(known) * len(active) / len(known)
        flops_left = sum(self._flops_left.values())
        return (
            flops_left / self._flops_per_second if self._flops_per_second and flops_left else None
        )

    def counts(self) -> str:
        """Return the number of finished runs: "2/6 runs done"."""
        finished = Counter(self.outcomes.values())["finished"]
        return f"{finished}/{len(self.flops)} runs done"

    def summary(self, now: float) -> str:
        """Return FLOPs done, time left, outcomes and time elapsed at a unix time, as text."""
        parts = [f"{self.share:.0%} of FLOPs"]
        seconds = self.seconds_left()
        if seconds is not None:
            parts.append(f"{duration(seconds)} left")
        outcomes = Counter(self.outcomes.values())
        parts += [f"{n} {outcome}" for outcome, n in outcomes.items() if outcome != "finished"]
        parts.append(f"{duration(now - self.began)} elapsed")
        return ", ".join(parts)
