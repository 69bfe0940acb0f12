"""A rich console on standard error that outlives its terminal."""

from __future__ import annotations

import os
import sys
from typing import Any, TextIO

from rich.console import Console


class ErrorFile:
    """Text file that a closed terminal or pipe does not break: later output is discarded."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        """Write a text at once, or discard it."""
        try:
            self._file.write(text)
            self._file.flush()
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._file.fileno())
            os.close(null)
        return len(text)

    def flush(self) -> None:
        """Do nothing: `write` has flushed."""


def error_console(file: TextIO | None = None) -> Console:
    """Return a console on standard error, or on another text file."""
    output: Any = ErrorFile(file or sys.stderr)
    return Console(file=output, highlight=False, markup=False, emoji=False)


def is_live(console: Console) -> bool:
    """Whether the console is on an open terminal that can redraw lines."""
    return console.is_interactive and console.file.isatty()
