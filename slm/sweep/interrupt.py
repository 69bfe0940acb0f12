"""Waits that a signal ends. Standard library only."""

from __future__ import annotations

import select
import signal
import socket


class InterruptibleSleep:
    """Ends a wait when a signal comes that this process has a handler for. For the main thread, one at a time."""

    def __init__(self) -> None:
        self._ours, self._pythons = socket.socketpair()
        for end in (self._ours, self._pythons):
            end.setblocking(False)
        self._before = signal.set_wakeup_fd(self._pythons.fileno(), warn_on_full_buffer=False)

    def __enter__(self) -> InterruptibleSleep:
        return self

    def __exit__(self, *error: object) -> None:
        signal.set_wakeup_fd(self._before)
        self._ours.close()
        self._pythons.close()

    def wait(self, seconds: float) -> None:
        """Until a signal comes, or so long."""
        if select.select([self._ours], [], [], seconds)[0]:
            self._ours.recv(4096)
