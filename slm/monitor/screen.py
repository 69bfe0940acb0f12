"""Standard error: lines that scroll and, in a terminal, a block below them that is drawn anew."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Sequence
from typing import TextIO

PAINT = re.compile(r"\x1b\[[0-9;]*m")
"""What colours a text and takes no room."""
SIZE = os.terminal_size((80, 24))
"""Of a terminal that does not tell its own."""
GREEN, DIM = "32", "2"


class Screen:
    """Where a sweep is shown. A terminal that was closed ends nothing: what is written leads nowhere from then on."""

    def __init__(self, file: TextIO | None = None) -> None:
        self._file = file or sys.stderr
        self._draws = os.environ.get("TERM") != "dumb"
        self._painted = self.live and not os.environ.get("NO_COLOR")
        self._block: Sequence[str] = ()
        self._redirected = contextlib.ExitStack()

    def __enter__(self) -> Screen:
        if self.live:
            self._redirected.enter_context(contextlib.redirect_stderr(_Above(self)))
        return self

    def __exit__(self, *error: object) -> None:
        self._redirected.close()

    @property
    def live(self) -> bool:
        """Whether there is a terminal that can draw anew, and still is."""
        return self._draws and self._file.isatty()

    def size(self) -> os.terminal_size:
        """Columns and lines, as they are now."""
        try:
            found = os.get_terminal_size(self._file.fileno())
        except (OSError, ValueError):
            return SIZE
        return found if found.columns and found.lines else SIZE

    def say(self, line: str) -> None:
        """A line that stays, above the block."""
        if not self.live:
            self._block = ()
        self._write(f"{self._home()}{one_line(line)}\n{_joined(self._block)}")

    def draw(self, block: Sequence[str]) -> None:
        """The block in place of the one before."""
        home, self._block = self._home(), block
        self._write(home + _joined(block))

    def paint(self, text: str, code: str) -> str:
        """A text in a colour, where there are colours."""
        return f"\x1b[{code}m{text}\x1b[m" if self._painted and text else text

    def _home(self) -> str:
        """To the block's beginning, and nothing after it. A window made narrower has wrapped its lines."""
        columns = self.size().columns if self._block else 1
        rows = sum(max(1, -(-len(PAINT.sub("", line)) // columns)) for line in self._block)
        return f"\x1b[{rows}F\x1b[J" if rows else ""

    def _write(self, text: str) -> None:
        try:
            self._file.write(text)
            self._file.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._file.fileno())
            os.close(nowhere)


class _Above(io.TextIOBase):
    """What others write to standard error while a block is shown: whole lines go above it."""

    def __init__(self, screen: Screen) -> None:
        self._screen, self._begun = screen, ""

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            self._screen.say(line)
        return len(text)

    def close(self) -> None:
        if self._begun:
            self._screen.say(self._begun)
        super().close()


def one_line(text: str) -> str:
    """A text without line ends, colours and what else cannot be printed."""
    return " ".join(
        "".join(letter if letter.isprintable() else " " for letter in PAINT.sub("", text)).split()
    )


def _joined(lines: Sequence[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
