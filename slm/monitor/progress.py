"""Progress of long commands on standard error: bars in a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from slm.text import progress_lines

if TYPE_CHECKING:  # rich loads where there is a terminal
    from rich.progress import Progress, TaskID

Report = Callable[[int, int], None]
"""Called with the number of units done and the number of all."""

DRAW_SECONDS = 0.1
"""Shortest time between two drawings of the bars."""


def no_report(done: int, total: int) -> None:
    """Report nothing."""


class ProgressBars:
    """Progress bars while the context is open, each with the time left.

    with ProgressBars() as bars:
        merge(folder, home, bars.add("files"))
    """

    def __init__(self) -> None:
        self._bars: Progress | None = None
        if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            self._bars = _rich_progress()

    def __enter__(self) -> ProgressBars:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bars:
            self._bars.stop()

    def add(self, unit: str) -> Report:
        """Return a function to report how many of these units are done."""
        return _bar(self._bars, unit) if self._bars else progress_lines(unit, report_line)


def _rich_progress() -> Progress:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from slm.monitor.console import error_console

    return Progress(
        TextColumn("{task.completed:,} of {task.total:,} {task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        console=error_console(),
        auto_refresh=False,
        transient=True,
        redirect_stdout=False,
    )


def _bar(bars: Progress, unit: str) -> Report:
    task: TaskID | None = None  # added by the first report, so that idle bars are not shown
    drawn = 0.0

    def report(done: int, total: int) -> None:
        nonlocal task, drawn
        if task is None:
            task = bars.add_task(unit, total=total)
        bars.update(task, completed=done, total=total)
        if done == total or time.monotonic() - drawn > DRAW_SECONDS:
            drawn = time.monotonic()
            bars.refresh()

    return report


def report_line(line: str) -> None:
    """Print a line of progress on standard error."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
