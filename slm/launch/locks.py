"""Locks that die with their process: whoever holds one is alive, whatever process numbers say."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import TextIO


def hold(path: Path) -> TextIO | None:
    """The lock, held until the file is closed or the process ends and noted with its number; None if another has it."""
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    file.seek(0)
    file.truncate()
    file.write(str(os.getpid()))
    file.flush()
    return file


def holder(path: Path) -> int | None:
    """Process number of the one who holds the lock, None when it is free."""
    if not path.exists():
        return None
    with path.open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(file.read() or 0)
    return None
