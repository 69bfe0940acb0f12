"""Atomic writes, JSON documents, SHA-256, processes, and locks that end with their process."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

LOCK_RETRY_SECONDS = 0.3
"""Retry window of `hold_lock`, since `lock_holder` takes the lock for a moment."""
NO_HOLDER = 0
"""Process number in a lock being handed over; `lock_holder` waits for the real one."""
PID_DIGITS = 10
"""Width of the process number in a lock file."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` when the block ends, unless it raises."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, document: Any) -> None:
    """Write a JSON document atomically, and sync it to disk."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        json.dump(document, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> Any:
    """Read a JSON document. Raises ValueError naming the file when it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(content: str | bytes, digits: int = 16) -> str:
    """Return the first hex digits of the SHA-256 of a text or of bytes."""
    data = content.encode() if isinstance(content, str) else content
    return hashlib.sha256(data).hexdigest()[:digits]


def start_session(
    arguments: Sequence[str], log: Path, inherited: Sequence[int] = ()
) -> subprocess.Popen[bytes]:
    """Start Python with arguments in a session of its own, which appends its output to a log.

    It outlives this process, and inherits these file descriptors.
    """
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-P", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            pass_fds=inherited,
        )


def hold_lock(path: Path, process: int | None = None) -> TextIO | None:
    """Take a lock, held until the file is closed or the process ends; None if it is taken.

    The lock file names this process, or `process`: NO_HOLDER for a lock to be handed over.
    """
    path.touch()
    file = path.open("r+", encoding="utf-8")
    deadline = time.monotonic() + LOCK_RETRY_SECONDS
    while not _try_lock(file, fcntl.LOCK_EX):
        if time.monotonic() > deadline:
            file.close()
            return None
        time.sleep(0.01)
    _write_pid(file, os.getpid() if process is None else process)
    return file


def hand_over_lock(file: TextIO, process: int) -> None:
    """Name the process that inherited the open lock file, and close it; the lock stays held."""
    _write_pid(file, process)
    file.close()


def inherit_lock(descriptor: int) -> TextIO:
    """Return the lock whose open file was inherited from the process that took it."""
    file = os.fdopen(descriptor, "r+", encoding="utf-8")
    _write_pid(file, os.getpid())
    return file


def lock_holder(path: Path) -> int | None:
    """Return the process that holds a lock, None when it is free."""
    if not path.exists():
        return None
    with path.open(encoding="utf-8") as file:
        while not _try_lock(file, fcntl.LOCK_SH):
            pid = int(os.pread(file.fileno(), PID_DIGITS, 0) or NO_HOLDER)
            if pid != NO_HOLDER:
                return pid
            time.sleep(0.001)
    return None


def _write_pid(file: TextIO, process: int) -> None:
    # One write over the old bytes: two processes may write at once, and a full disk has the space.
    os.pwrite(file.fileno(), f"{process:<{PID_DIGITS}}".encode(), 0)


def _try_lock(file: TextIO, mode: int) -> bool:
    try:
        fcntl.flock(file, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
