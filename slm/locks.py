"""Locks that die with their process: whoever holds one is alive, whatever process numbers say."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import TextIO

GLANCE_SECONDS = 0.3
"""How long a lock may seem held because somebody looks who holds it."""


def hold(path: Path) -> TextIO | None:
    """The lock, held until the file is closed or the process ends and noted with its number; None if another has it."""
    file = path.open("a+", encoding="utf-8")
    deadline = time.monotonic() + GLANCE_SECONDS
    while not _try(file, fcntl.LOCK_EX):
        if time.monotonic() > deadline:
            file.close()
            return None
        time.sleep(0.01)
    _sign(file, os.getpid())
    return file


def pass_on(file: TextIO, process: int) -> None:
    """Note that a lock is held by a process that inherited its open file, and close it here: the lock stays held."""
    _sign(file, process)
    file.close()


def taken_over(descriptor: int) -> TextIO:
    """A lock that came with an open file from the process that took it."""
    file = os.fdopen(descriptor, "a+", encoding="utf-8")
    _sign(file, os.getpid())
    return file


def holder(path: Path) -> int | None:
    """Process number of the one who holds the lock, None when it is free."""
    if not path.exists():
        return None
    with path.open(encoding="utf-8") as file:
        while not _try(file, fcntl.LOCK_SH):
            if number := file.read():
                return int(number)
            time.sleep(0.001)
    return None


def _sign(file: TextIO, process: int) -> None:
    file.seek(0)
    file.truncate()
    file.write(str(process))
    file.flush()


def _try(file: TextIO, mode: int) -> bool:
    try:
        fcntl.flock(file, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
