"""Text for people: durations, counts, plurals, short lists and progress. Standard library only."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence

LIST_LIMIT = 4
"""Names that `first_few` shows."""
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
"""Terminal escape sequences for colours."""
LINE_SECONDS = 5.0
"""Shortest time between two lines of progress."""


def duration(seconds: float) -> str:
    """Return a duration in its two largest units: "2 h 05 min", "3 min 09 s", "7 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def count(value: float) -> str:
    """Return a count in units of k, M and B: "36.7M", "1.23e+12"."""
    for limit, unit in ((1e3, ""), (1e6, "k"), (1e9, "M"), (1e12, "B")):
        if value < limit:
            return f"{value * 1e3 / limit:.4g}{unit}"
    return f"{value:.3g}"


def flops(value: float) -> str:
    """Return FLOPs with three digits: "2.15e18"."""
    mantissa, _, power = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(power)}"


def plural(number: float, noun: str) -> str:
    """Return a number with its noun: "1 run", "2 runs"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def first_few(words: Sequence[str], limit: int = LIST_LIMIT) -> str:
    """Join the first words with commas; an ellipsis stands for the others."""
    return ", ".join(words[:limit]) + (", …" if len(words) > limit else "")


def one_line(text: str) -> str:
    """Return a text without line ends, colours and unprintable characters."""
    text = COLOURS.sub("", text)
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def progress_lines(unit: str, write: Callable[[str], None]) -> Callable[[int, int], None]:
    """Return a function to report how many of all units are done.

    It writes a line with the time left, at most every LINE_SECONDS; time counts from the last
    report of 0 done.
    """
    began = written = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal began, written
        now = time.monotonic()
        if done == 0:
            began = now
        elif now - written > LINE_SECONDS:
            written = now
            remaining = duration((now - began) / done * (total - done))
            write(f"{done:,} of {total:,} {unit}, {remaining} left")

    return report
