"""Attempt: a rank of an attempt, its events, and its ways to end before the run does."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from slm import events
from slm.model.ranks import Ranks

HEARTBEAT_SECONDS = 10.0
"""Pause between two `working` events of an evaluation."""


class AttemptEnded(Exception):
    """The attempt ends before its run is finished; `reason` is one of events.REASONS."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        assert reason in events.REASONS
        self.reason = reason


class Attempt:
    """A rank of an attempt.

    SIGTERM sets `stop_requested`; the ranks then agree on a step to stop at.
    """

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.folder = folder
        self.run_folder = folder.parent.parent
        self.ranks = ranks
        self.stop_requested = False
        self._writer = events.Writer(folder / "events.jsonl")
        self._torchrun = os.getppid()
        self._last_heartbeat = 0.0
        signal.signal(signal.SIGTERM, self._request_stop)

    def _request_stop(self, *_: object) -> None:
        self.stop_requested = True

    def event(self, event: str, **fields: Any) -> None:
        """Write an event, on rank 0."""
        if self.ranks.is_first:
            self._writer.write(event, **fields)

    def heartbeat(self, step: int, what: str, share: float) -> None:
        """Write a `working` event, unless one was written less than HEARTBEAT_SECONDS ago."""
        if time.monotonic() - self._last_heartbeat > HEARTBEAT_SECONDS:
            self.event("working", step=step, what=what, share=share)
            self._last_heartbeat = time.monotonic()

    def reset_heartbeat(self) -> None:
        """Let the next heartbeat write its event at once."""
        self._last_heartbeat = 0.0

    def exit_if_orphaned(self) -> None:
        """Exit if torchrun is gone: nothing would stop this process."""
        if os.getppid() != self._torchrun:
            sys.exit("torchrun is gone")

    def interrupt(self, message: str) -> NoReturn:
        """End the attempt on request, once every rank has come to the same point."""
        self.ranks.barrier()
        raise AttemptEnded("interrupted", message)
