"""Runs of a sweep on standard error: a live block in a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.constrain import Constrain
from rich.control import Control
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import ControlType, Segment
from rich.table import Table
from rich.text import Text

from slm.monitor.console import error_console, is_live
from slm.monitor.run_progress import ActiveRun, Event, RunProgress, SweepProgress
from slm.plan import Plan
from slm.run import read_attempt, run_label
from slm.text import duration, one_line

LINE_SECONDS = 15.0
"""Seconds between plain lines about active runs, which are reported in turn."""
COLUMNS = {
    "run": 3,
    "bar": 8,
    "step": 4,
    "loss": 5,
    "curve": 8,
    "tok/s": 7,
    "MFU": 5,
    "GB": 5,
    "left": 11,
}
"""Columns in their order, and the characters that each takes at least, so that it does not jump."""
DROPPED = ("GB", "MFU", "tok/s", "curve", "bar", "loss", "step")
"""Columns that a narrow terminal does not show, the first to go first."""
STRETCHED = ("bar", "curve")
"""Columns that share the rest of the width."""
GAP = 2
"""Characters between columns."""
OTHER_LINES = 4
"""Lines of a terminal beside the runs: heading, sweep, cursor, and one for typing."""
DEFAULT_SIZE = os.terminal_size((80, 24))
"""Size of a terminal that does not report one."""


class Display:
    """View of the runs of a sweep (`follow.View`). It draws in `refresh` and needs no thread."""

    def __init__(self, plans: Sequence[Plan], done: set[str], file: TextIO | None = None) -> None:
        """Show the runs of `plans`, of which `done` are finished, on standard error or `file`."""
        self._progress = SweepProgress(plans, done, time.time())
        self._last_line = 0.0
        self._console = error_console(file)
        self._live = Live(console=self._console, auto_refresh=False, redirect_stdout=False)

    def __enter__(self) -> Display:
        if is_live(self._console):
            self._live.start()
            self._console.show_cursor()  # a killed sweep must not leave it hidden
        return self

    def __exit__(self, *error: object) -> None:
        self._check_terminal()
        self._live.stop()

    @property
    def active(self) -> int:
        """Number of runs that are training."""
        return len(self._progress.active)

    def run_started(self, plan: Plan, attempt: Path, adopted: bool) -> None:
        """Show that a run trains in an attempt, a new one or one that was `adopted` alive."""
        document = read_attempt(attempt)
        run = self._progress.start(plan, document)
        if is_live(self._console):
            return
        line = f"attempt {document['attempt']}"
        if adopted:
            line += ", already running,"
        line += f" on {document['ranks']} x {run.device}"
        sweep = list(self._progress.flops)
        if plan.run_id in sweep:
            line += f" (run {sweep.index(plan.run_id) + 1} of {len(sweep)})"
        self._print(plan, line)

    def event(self, plan: Plan, event: Event) -> None:
        """Show an event of a trainer."""
        self._progress.update(plan, event)
        if event["event"] == "started" and event["resumed_from"]:
            self._print(plan, f"resumed from step {event['resumed_from']:,}")
        elif event["event"] == "warning":
            self._print(plan, event["message"])

    def run_ended(self, plan: Plan, outcome: str, message: str | None) -> None:
        """Show how a run ended, above the block."""
        run = self._progress.end(plan, outcome)
        self._print(plan, _ending(run, outcome, message))

    def note(self, line: str) -> None:
        """Print a message about the sweep, above the block."""
        self._check_terminal()
        self._console.print(Text(one_line(line)), soft_wrap=True)

    def refresh(self) -> None:
        """Redraw the block, or print a line about the run that was reported longest ago."""
        self._check_terminal()
        if self._live.is_started:
            self._resize()
            self._live.update(self._block(), refresh=True)
        elif self.active and time.monotonic() - self._last_line > LINE_SECONDS:
            run = min(self._progress.active.values(), key=lambda run: run.reported)
            run.reported = time.monotonic()
            sweep = f"{self._progress.counts()}, {self._progress.summary(time.time())}"
            self._print(run.plan, f"{_describe(run)}; sweep {sweep}")

    def _print(self, plan: Plan, line: str) -> None:
        self._last_line = time.monotonic()
        self.note(f"{plan.run_id} {run_label(plan.document())}: {line}")

    def _check_terminal(self) -> None:
        """Stop drawing once the terminal is closed: standard error may be a log file by now."""
        if self._live.is_started and not is_live(self._console):
            output = self._console.file
            self._console.file = io.StringIO()
            self._live.stop()
            self._console.file = output

    def _resize(self) -> None:
        """Adopt the terminal's size; clear the rows that a narrower window wrapped."""
        size = _terminal_size(self._console)
        if size.columns < self._console.width:
            lines = self._console.render_lines(self._live.renderable, pad=False)
            widths = [max(1, Segment.get_line_length(line)) for line in lines]
            wrapped = sum((width - 1) // size.columns for width in widths)
            erase = (ControlType.ERASE_IN_LINE, 2)
            erase_above = ((ControlType.CURSOR_UP, 1), erase)
            self._console.control(Control(erase, *erase_above * wrapped))
        self._console.size = size

    def _block(self) -> RenderableType:
        """Return a line for each active run that fits, and one for the sweep."""
        runs = list(self._progress.active.values())
        room = max(1, self._console.height - OTHER_LINES)
        visible = runs if len(runs) <= room else runs[: max(1, room - 1)]
        width = self._console.width - 1
        lines: list[RenderableType] = []
        if visible:
            lines.append(_run_table(visible, width))
        if len(visible) < len(runs):
            lines.append(Text(f"… and {len(runs) - len(visible)} more"))
        lines.append(self._sweep_line())
        return Constrain(Group(*lines), width)

    def _sweep_line(self) -> Table:
        line = Table.grid(padding=(0, GAP))
        for _ in range(2):
            line.add_column(no_wrap=True)
        line.add_column()
        width = min(20, self._console.width // 5)
        bar = _bar(self._progress.share, width)
        summary = self._progress.summary(time.time())
        text = Text(summary, no_wrap=True, overflow="ellipsis")
        line.add_row(self._progress.counts(), bar, text)
        return line


@dataclass
class _Sparkline:
    """A loss curve as wide as its column."""

    progress: RunProgress

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.progress.sparkline(options.max_width))


def _run_table(runs: Sequence[ActiveRun], width: int) -> Table:
    """Return a table of runs with the columns that fit into `width` characters."""
    rows = [_cells(run) for run in runs]
    names = _columns(rows, width)
    table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="dim")
    for name in names:
        is_stretched = name in STRETCHED
        table.expand = table.expand or is_stretched
        table.add_column(
            "" if name == "bar" else name,
            justify="left" if is_stretched or name == "run" else "right",
            ratio=1 if is_stretched else None,
            min_width=COLUMNS[name],
            no_wrap=True,
        )
    for run, texts in zip(runs, rows):
        cells: dict[str, RenderableType] = {**texts}
        cells["bar"] = _bar(run.progress.share)
        cells["curve"] = _Sparkline(run.progress)
        table.add_row(*(cells.get(name, "") for name in names))
    return table


def _cells(run: ActiveRun) -> dict[str, str]:
    """Return the texts of a run's row; bar and curve are drawn later."""
    label = run_label(run.plan.document())
    cells = {"run": label, "bar": "", "curve": "", **run.figures}
    activity = run.progress.activity
    if activity:
        seconds = cells["left"]
        cells["left"] = f"{activity}, {seconds} left" if seconds else activity
    return cells


def _columns(rows: Sequence[Mapping[str, str]], width: int) -> list[str]:
    """Return the names of the columns that fit into `width` characters."""
    widths = {}
    for name, minimum in COLUMNS.items():
        lengths = [len(row[name]) for row in rows if name in row]
        if lengths:
            widths[name] = max(minimum, *lengths)
    for name in DROPPED:
        if sum(widths.values()) + GAP * (len(widths) - 1) > width:
            widths.pop(name, None)
    return list(widths)


def _bar(share: float, width: int | None = None) -> ProgressBar:
    return ProgressBar(1.0, share, width, style="dim", complete_style="green")


def _ending(run: ActiveRun | None, outcome: str, message: str | None) -> str:
    """Describe how a run ended."""
    if run and outcome == "finished" and (finished := run.progress.finished):
        seconds = duration(finished["wall_seconds"])
        return f"finished, val_bpb {finished['val_bpb']:.4f}{_core(run.progress)}, {seconds}"
    line = "will be retried" if outcome == "retried" else outcome
    if run:
        line += f" after {duration(time.time() - run.attempt['created'])}"
    return f"{line}: {message}" if message else line


def _core(progress: RunProgress) -> str:
    """Describe CORE of the final weights; "" without a value."""
    event = progress.core
    if event is None or event["core"] is None or event["step"] < progress.steps:
        return ""
    mode = "" if event["mode"] == "full" else f" ({event['mode']})"
    return f", {event['metric']}{mode} {event['core']:.4f}"


def _describe(run: ActiveRun) -> str:
    """Describe an active run in one line."""
    parts = [run.progress.activity] if run.progress.activity else []
    parts += [f"{name} {text}" for name, text in run.figures.items() if text]
    return ", ".join(parts)


def _terminal_size(console: Console) -> os.terminal_size:
    """Return the columns and lines of the terminal; rich would look at standard input first."""
    try:
        size = os.get_terminal_size(console.file.fileno())
    except (OSError, ValueError):
        return DEFAULT_SIZE
    return size if size.columns and size.lines else DEFAULT_SIZE
