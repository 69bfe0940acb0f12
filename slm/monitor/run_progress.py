"""How far a run is and how fast it goes, from the events that its attempts wrote. Standard library only."""

from __future__ import annotations

import json
import math
import os
from collections import deque
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

RATE_EVENTS = 20
"""Logged steps over which speed is averaged: checkpoints and evaluations between them count."""
CURVE_POINTS = 64
"""Points of a loss curve that are kept, at least."""
LEVELS = "▁▂▃▄▅▆▇█"
DOING = {
    "compilation": "compiling",
    "checkpoint": "checkpoint",
    "evaluation": "evaluating",
    "core": "CORE",
}
"""What a `working` event says, in a word."""
TAIL = 2**14
"""Bytes in which the last RATE_EVENTS events lie."""


class RunProgress:
    """One run, as its events tell; those of a later attempt go on from the checkpoint that it resumed from."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        """Of the whole run."""
        self.step = 0
        """Done."""
        self.loss: float | None = None
        """The last, nats a token."""
        self.memory_bytes: int | None = None
        """Peak of the attempt."""
        self.doing: str | None = "starting"
        """What it does instead of steps, in a word."""
        self.finished: dict[str, Any] | None = None
        """The event of that name, once there is one."""
        self.core: dict[str, Any] | None = None
        """The last event of that name."""
        self._works: list[dict[str, Any]] = []
        self._recent: deque[tuple[float, int]] = deque(maxlen=RATE_EVENTS)
        self._curve: list[tuple[float, float]] = []

    def take(self, event: dict[str, Any]) -> None:
        """The next event."""
        kind = event["event"]
        self._works = self._works if kind == "working" else []
        if kind == "train":
            self._stepped(event)
        elif kind == "working":
            self._work(event)
        elif kind == "started":
            self.step, self.doing = event["step"], "starting"
            self._recent.clear()
            self._curve = [(step, loss) for step, loss in self._curve if step <= self.step]
        elif kind in ("checkpoint", "eval", "core"):
            self.core = event if kind == "core" else self.core
            self.step, self.doing = event["step"], "ending" if event["step"] == self.steps else None
        elif kind == "finished":
            self.step, self.finished = event["step"], event

    def _stepped(self, event: dict[str, Any]) -> None:
        self.step, self.loss, self.memory_bytes = (
            event["step"],
            event["loss"],
            event.get("memory_bytes"),
        )
        self.doing = "ending" if self.step == self.steps else None
        self._recent.append((event["time"], self.step))
        if math.isfinite(event["loss"]):
            self._curve.append((self.step, event["loss"]))
        if len(self._curve) == 2 * CURVE_POINTS:
            self._curve = [_mean(pair) for pair in pairwise(self._curve)][::2]

    def _work(self, event: dict[str, Any]) -> None:
        share, self.doing = event.get("share"), DOING[event["what"]]
        same = bool(self._works) and self._works[0]["what"] == event["what"] and share is not None
        self._works = [self._works[0], event] if same else [event]
        if share is not None:
            self.doing += f" {share:.0%}"

    @property
    def work_left(self) -> float | None:
        """Seconds that what it does instead of steps will take at its rate so far; None where that is not known."""
        if len(self._works) < 2:
            return None
        (began, first), (now, last) = ((event["time"], event["share"]) for event in self._works)
        return (
            (1 - last) * (now - began) / (last - first)
            if first is not None and last > first
            else None
        )

    @property
    def steps_per_second(self) -> float | None:
        """The present rate; None before two logged steps."""
        if len(self._recent) < 2:
            return None
        (began, first), (now, last) = self._recent[0], self._recent[-1]
        return (last - first) / (now - began) if now > began and last > first else None

    @property
    def seconds_left(self) -> float | None:
        """At the present rate; None where that is not known."""
        rate = self.steps_per_second
        return (self.steps - self.step) / rate if rate else None

    def sparkline(self, width: int) -> str:
        """The loss over the steps so far, in so many characters between its least and its largest."""
        if not self._curve:
            return ""
        first, last = self._curve[0][0], self._curve[-1][0]
        parts: list[list[float]] = [[] for _ in range(width)]
        for step, loss in self._curve:
            parts[int((step - first) / (last - first + 1) * width)].append(loss)
        heights: list[float] = []
        for part in parts:
            heights.append(sum(part) / len(part) if part else heights[-1])
        low, span = min(heights), (max(heights) - min(heights)) or 1.0
        return "".join(
            LEVELS[round((height - low) / span * (len(LEVELS) - 1))] for height in heights
        )


def _mean(pair: tuple[tuple[float, float], tuple[float, float]]) -> tuple[float, float]:
    (first, one), (second, other) = pair
    return (first + second) / 2, (one + other) / 2


def last_events(path: Path, size: int = TAIL) -> list[dict[str, Any]]:
    """The events in the last bytes of an events.jsonl, whole lines of JSON alone; [] where there is none."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - size))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return []
    found = []
    for line in lines[end > size : -1]:
        with suppress(ValueError):
            found.append(json.loads(line))
    return found
