"""Locks that die with their process: whoever holds one is alive, whatever process numbers say."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import TextIO

GLANCE_SECONDS = 0.3
"""How long a lock may seem held because somebody looks who holds it."""
NOBODY = 0
"""The number in a lock that is on its way to the process that will hold it: who looks waits."""
DIGITS = 10
"""Of a process number in a lock's file."""


def hold(path: Path, process: int | None = None) -> TextIO | None:
    """The lock, held until the file is closed or the process ends; None if another has it.

    It is noted with this process's number, or another: NOBODY until it is passed on.
    """
    path.touch()
    file = path.open("r+", encoding="utf-8")
    deadline = time.monotonic() + GLANCE_SECONDS
    while not _try(file, fcntl.LOCK_EX):
        if time.monotonic() > deadline:
            file.close()
            return None
        time.sleep(0.01)
    _sign(file, os.getpid() if process is None else process)
    return file


def pass_on(file: TextIO, process: int) -> None:
    """Note that a lock is held by a process that inherited its open file, and close it here: the lock stays held."""
    _sign(file, process)
    file.close()


def taken_over(descriptor: int) -> TextIO:
    """A lock that came with an open file from the process that took it."""
    file = os.fdopen(descriptor, "r+", encoding="utf-8")
    _sign(file, os.getpid())
    return file


def holder(path: Path) -> int | None:
    """Process number of the one who holds the lock, None when it is free."""
    if not path.exists():
        return None
    with path.open(encoding="utf-8") as file:
        while not _try(file, fcntl.LOCK_SH):
            if (number := int(os.pread(file.fileno(), DIGITS, 0) or NOBODY)) != NOBODY:
                return number
            time.sleep(0.001)
    return None


def _sign(file: TextIO, process: int) -> None:
    """In one write over what is there: two may sign for the same process, and a full disk has the space already."""
    os.pwrite(file.fileno(), f"{process:<{DIGITS}}".encode(), 0)


def _try(file: TextIO, mode: int) -> bool:
    try:
        fcntl.flock(file, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
