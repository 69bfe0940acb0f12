"""What is shown of runs at work: a live block in a terminal, plain lines elsewhere; always on standard error."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from slm.hardware import devices
from slm.monitor.run_progress import RunProgress
from slm.monitor.screen import DIM, GREEN, Screen
from slm.plan import Plan
from slm.run import read_attempt
from slm.text import duration

LINE_SECONDS = 15.0
"""Pause between two plain lines about runs at work; they take turns."""
COLUMNS = ("run", "", "step", "loss", "curve", "tok/s", "MFU", "GB", "left")
"""Of the block; the one without a name is the bar."""
DROPPED = ("GB", "MFU", "tok/s", "curve", "", "loss", "step")
"""Columns that a narrow terminal does not show, in the order in which they go."""
STRETCHED = ("", "curve")
"""Columns that share what room is left."""
NARROWEST, WIDEST = 8, 40
"""Characters of a stretched column."""
LEAST = {"loss": 5, "tok/s": 7, "MFU": 5, "GB": 5, "left": 11}
"""Characters of other columns, so that they stay where they are."""
OTHER_LINES = 4
"""Of a terminal: the heading, the sweep, the cursor, and one for what is typed."""
GAP = "  "
Cells = dict[str, str]
"""What a line of the block says, by column."""


@dataclass
class _AtWork:
    """A run at work."""

    plan: Plan
    track: RunProgress
    began: float
    """When the attempt was made, unix seconds."""
    device: str
    """The device's name."""
    ranks: int
    told: float = 0.0
    """When a plain line was last about it, monotonic seconds."""

    @property
    def tokens_per_second(self) -> float | None:
        """At the present rate."""
        rate = self.track.steps_per_second
        return rate and rate * self.plan.hyperparameters.batch_tokens

    @property
    def flops_per_second(self) -> float | None:
        """At the present rate."""
        rate = self.tokens_per_second
        return rate and rate * self.plan.hyperparameters.flops_per_token

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation, where the devices' peak is known."""
        return devices.mfu(self.flops_per_second, self.device, self.ranks)


class Display:
    """Shows the runs of a sweep (follow.View). It draws in `refresh`, and has no thread."""

    def __init__(self, plans: Sequence[Plan], done: set[str], file: TextIO | None = None) -> None:
        """The plans of a sweep and the run_ids of those that are finished; shown on standard error, or another file."""
        self._flops = {plan.run_id: plan.hyperparameters.flops for plan in plans}
        self._left = {
            run_id: 0.0 if run_id in done else flops for run_id, flops in self._flops.items()
        }
        self._ended = dict.fromkeys(done, "finished")
        self._tracks: dict[str, RunProgress] = {}
        self._at_work: dict[str, _AtWork] = {}
        self._flops_per_second: float | None = None
        self._began, self._last_line = time.time(), 0.0
        self._screen = Screen(file)

    def __enter__(self) -> Display:
        self._screen.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._screen.__exit__()

    @property
    def at_work(self) -> int:
        """Number of runs at work."""
        return len(self._at_work)

    def run_started(self, plan: Plan, attempt: Path, adopted: bool) -> None:
        """A run goes on in an attempt: a new one, or one that lived already."""
        document = read_attempt(attempt)
        device, ranks = document["device_name"] or document["device"], document["ranks"]
        track = self._tracks.setdefault(plan.run_id, RunProgress(plan.hyperparameters.steps))
        track.doing = "starting"
        self._at_work[plan.run_id] = _AtWork(plan, track, document["created"], device, ranks)
        if plan.run_id in self._flops:  # not another sweep's, which is watched
            self._began = min(self._began, document["created"])
        self._ended.pop(plan.run_id, None)
        if not self._screen.live:
            how = f"attempt {int(attempt.name)}{', at work already,' if adopted else ''} on {ranks} x {device}"
            if plan.run_id in self._flops:
                how += f" (run {[*self._flops].index(plan.run_id) + 1} of {len(self._flops)})"
            self._say(plan, how)

    def event(self, plan: Plan, event: dict[str, Any]) -> None:
        """A trainer wrote an event."""
        if run := self._at_work.get(plan.run_id):
            run.track.take(event)
            if plan.run_id in self._left:
                self._left[plan.run_id] = plan.hyperparameters.flops * (
                    1 - run.track.step / run.track.steps
                )
        if event["event"] == "started" and event["resumed_from"]:
            self._say(plan, f"resumed from step {event['resumed_from']:,}")
        elif event["event"] == "warning":
            self._say(plan, event["message"])

    def run_ended(self, plan: Plan, outcome: str, message: str | None) -> None:
        """A run is finished, failed, diverged, cancelled or interrupted; or (retried) will be tried again."""
        if outcome not in ("retried", "interrupted") and plan.run_id in self._left:
            self._ended[plan.run_id] = outcome
            self._left[plan.run_id] = 0.0
        self._say(plan, _ending(self._at_work.pop(plan.run_id, None), outcome, message))

    def note(self, line: str) -> None:
        """Something about the sweep as a whole."""
        self._screen.say(line)

    def refresh(self) -> None:
        """A moment passed: draw anew, or let one run speak."""
        if self._screen.live:
            self._screen.draw(self._block())
        elif self._at_work and time.monotonic() - self._last_line > LINE_SECONDS:
            run = min(self._at_work.values(), key=lambda run: run.told)
            run.told = time.monotonic()
            self._say(
                run.plan, f"{_in_words(run)}; sweep {self._counts()}, {', '.join(self._foot())}"
            )

    def _say(self, plan: Plan, line: str) -> None:
        self._last_line = time.monotonic()
        self._screen.say(f"{plan.run_id} {label(plan)}: {line}")

    def _block(self) -> list[str]:
        """A line for each run at work that there is room for, and one for the sweep."""
        size, runs = self._screen.size(), list(self._at_work.values())
        width, room = size.columns - 1, max(1, size.lines - OTHER_LINES)
        shown = runs if len(runs) <= room else runs[: max(1, room - 1)]
        rows = [_cells(run) for run in shown]
        widths = _widths([*rows, {"run": self._counts(), "": ""}], width if runs else width // 2)
        block = (
            [self._screen.paint(_line({name: name for name in widths}, widths)[:width], DIM)]
            if runs
            else []
        )
        for run, row in zip(shown, rows):
            row["curve"] = run.track.sparkline(widths.get("curve", NARROWEST))
            block.append(self._barred(row, widths, run.track.step / run.track.steps, [], width))
        if len(shown) < len(runs):
            block.append(f"… and {len(runs) - len(shown)} more")
        return [
            *block,
            self._barred({"run": self._counts()}, widths, self._share(), self._foot(), width),
        ]

    def _barred(
        self, row: Cells, widths: Mapping[str, int], share: float, more: list[str], room: int
    ) -> str:
        """A line with its bar in colours, and as much more at its end as there is room for."""
        length = widths.get("", 0)
        filled = int(share * length)
        bar = "━" * filled + "─" * (length - filled)
        start = _line(row | {"": bar}, widths)
        while more and len(GAP.join([start, *more])) > room:
            more = more[:-1]
        line = GAP.join([start, *more])[:room]
        painted = self._screen.paint(bar[:filled], GREEN) + self._screen.paint(bar[filled:], DIM)
        return line.replace(bar, painted, 1) if bar else line

    def _counts(self) -> str:
        return f"{Counter(self._ended.values())['finished']}/{len(self._flops)} runs done"

    def _foot(self) -> list[str]:
        """The sweep in words, the most important first."""
        left, others = self._seconds_left(), Counter(self._ended.values())
        del others["finished"]
        return [
            f"{self._share():.0%} of FLOPs",
            *([f"{duration(left)} left"] if left is not None else []),
            *(f"{count} {outcome}" for outcome, count in others.items()),
            f"{duration(time.time() - self._began)} elapsed",
        ]

    def _share(self) -> float:
        """Of the sweep's FLOPs, those that are done or given up."""
        return 1 - sum(self._left.values()) / sum(self._flops.values()) if self._flops else 1.0

    def _seconds_left(self) -> float | None:
        """The FLOPs left over the sum of the present rates; None where they are not known.

        A run at work without a rate yet counts with the mean of the others; while none has one, the last sum holds.
        Another sweep's runs, which are watched, say nothing about this one's.
        """
        own = [run for run in self._at_work.values() if run.plan.run_id in self._flops]
        rates = [rate for run in own if (rate := run.flops_per_second)]
        if rates:
            self._flops_per_second = sum(rates) * len(own) / len(rates)
        left = sum(self._left.values())
        return left / self._flops_per_second if self._flops_per_second and left else None


def label(plan: Plan) -> str:
    """A run's name for people."""
    horizon = "" if plan.horizon == "compute-optimal" else f" {plan.horizon}"
    return f"{plan.recipe} d{plan.hyperparameters.depth}{horizon} seed {plan.seed}"


def _ending(run: _AtWork | None, outcome: str, message: str | None) -> str:
    """How a run ended, in words."""
    if run and outcome == "finished" and (ended := run.track.finished):
        return f"finished, val_bpb {ended['val_bpb']:.4f}{_core(run.track)}, {duration(ended['wall_seconds'])}"
    after = f" after {duration(time.time() - run.began)}" if run else ""
    what = "to be tried again" if outcome == "retried" else outcome
    return f"{what}{after}{f': {message}' if message else ''}"


def _core(track: RunProgress) -> str:
    """CORE of the final weights, in words."""
    event = track.core
    if event is None or event["core"] is None or event["step"] < track.steps:
        return ""
    mode = "" if event["mode"] == "full" else f" ({event['mode']})"
    return f", {event['metric']}{mode} {event['core']:.4f}"


def _in_words(run: _AtWork) -> str:
    """How a run is, in words."""
    track = run.track
    told = [_doing(track)] if track.doing else []
    told.append(f"step {track.step:,} of {track.steps:,} ({track.step / track.steps:.0%})")
    if track.loss is not None:
        told.append(f"loss {track.loss:.3f}")
    if rate := run.tokens_per_second:
        told.append(f"{rate:,.0f} tokens/s")
    if mfu := run.mfu:
        told.append(f"MFU {mfu:.1%}")
    if track.memory_bytes:
        told.append(f"{track.memory_bytes / 1e9:.2f} GB")
    if (left := track.seconds_left) and not track.doing:
        told.append(f"{duration(left)} left")
    return ", ".join(told)


def _doing(track: RunProgress) -> str:
    """What a run does instead of steps, and how long yet."""
    left = track.work_left
    return f"{track.doing}{'' if left is None else f', {duration(left)} left'}"


def _cells(run: _AtWork) -> Cells:
    """A run's line in the block; MFU has a column where a device's peak is known."""
    track, rate, left = run.track, run.tokens_per_second, run.track.seconds_left
    mfu = run.mfu
    return {
        "run": label(run.plan),
        "": "",
        "step": f"{track.step:>{len(f'{track.steps:,}')},}/{track.steps:,}",
        "loss": "" if track.loss is None else f"{track.loss:.3f}",
        "curve": "",
        "tok/s": f"{rate:,.0f}" if rate else "",
        **({"MFU": f"{mfu:.1%}" if mfu else ""} if devices.peak_flops(run.device) else {}),
        "GB": f"{track.memory_bytes / 1e9:.2f}" if track.memory_bytes else "",
        "left": _doing(track) if track.doing else ("" if left is None else duration(left)),
    }


def _widths(rows: Sequence[Cells], room: int) -> dict[str, int]:
    """Widths of the columns that there is room for."""
    there = [name for name in COLUMNS if any(name in row for row in rows)]
    widths = {
        name: max(LEAST.get(name, 0), *(len(row.get(name, "")) for row in rows)) for name in there
    }
    widths |= {name: NARROWEST for name in STRETCHED if name in widths}
    for name in DROPPED:
        if _room(widths) > room:
            widths.pop(name, None)
    stretched = [name for name in STRETCHED if name in widths]
    spare = max(0, room - _room(widths))
    return widths | {name: min(WIDEST, NARROWEST + spare // len(stretched)) for name in stretched}


def _room(widths: Mapping[str, int]) -> int:
    """Characters of a line."""
    return sum(widths.values()) + len(GAP) * (len(widths) - 1)


def _line(row: Cells, widths: Mapping[str, int]) -> str:
    """The cells that are shown, numbers to the right; the end of a line is left open."""
    left = ("run", *STRETCHED)
    cells = (
        f"{row.get(name, ''):{'<' if name in left else '>'}{width}}"
        for name, width in widths.items()
    )
    return GAP.join(cells).rstrip()
