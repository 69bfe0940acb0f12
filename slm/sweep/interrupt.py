"""Signals: a sleep that they end, and the stop requests of a sweep. Standard library only."""

from __future__ import annotations

import os
import select
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGHUP)


class InterruptibleSleep:
    """A sleep that returns early when a signal with a Python handler arrives.

    For the main thread, one at a time. Python's C handler writes a byte into a socket pair as soon
    as a signal arrives, and the byte stays until `wait` reads it: a signal between two waits ends
    the next one at once.
    """

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._previous = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)

    def __enter__(self) -> InterruptibleSleep:
        return self

    def __exit__(self, *error: object) -> None:
        signal.set_wakeup_fd(self._previous)
        self._reader.close()
        self._writer.close()

    def wait(self, seconds: float) -> None:
        """Sleep, or return as soon as a signal has arrived since the last wait."""
        if select.select([self._reader], [], [], seconds)[0]:
            self._reader.recv(4096)


class Signals:
    """Count SIGINT and SIGTERM instead of raising KeyboardInterrupt.

    SIGHUP does not end a sweep: its terminal is closed then, and further output goes to `log`.
    """

    def __init__(self, log: Path) -> None:
        self.stops = 0
        """Number of stop requests so far."""
        self._log = log

    @contextmanager
    def handled(self) -> Iterator[InterruptibleSleep]:
        """Handle signals in this block; yield a sleep that any of them ends, SIGCHLD included."""
        terminals = [output for output in (1, 2) if os.isatty(output)]  # false once it is closed

        def handle(number: int, frame: FrameType | None) -> None:
            self.stops += number in (signal.SIGINT, signal.SIGTERM)
            if number == signal.SIGHUP and terminals:
                with self._log.open("ab") as log:
                    for output in terminals:
                        os.dup2(log.fileno(), output)

        with InterruptibleSleep() as sleep:
            previous = {number: signal.signal(number, handle) for number in HANDLED}
            try:
                yield sleep
            finally:
                for number, handler in previous.items():
                    signal.signal(number, handler)
