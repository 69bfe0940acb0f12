"""Files into rows: one short-lived writer at a time, then a snapshot for everyone else. Light until it is called."""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from store import places
from store.files import File, rows_of, scan
from store.places import StoreError

if TYPE_CHECKING:
    from store.writer import Change, Cursors

PATIENCE = 30.0
"""Seconds to wait for another writer."""


@dataclass(frozen=True)
class Counts:
    """What an ingest wrote."""

    runs: int
    """Plans, new or changed."""
    finished: int
    """Runs with a result, new or changed."""
    events: int
    """New lines of events."""
    metrics: int
    """Numbers in them."""
    problems: list[str]
    """Files that could not become rows, a line each; they are tried again at the next ingest."""


def ingest(home: Path, patience: float = PATIENCE) -> Counts:
    """Bring the database of a home up to date with its files, and publish it if anything changed.

    Whatever the moment at which it is killed, the next one loses nothing and counts nothing twice. Raises StoreError
    when another process writes for longer than `patience` seconds, the disk is full, or the database needs a rebuild.
    """
    with _alone(home, patience) as deadline:
        files = _files(home)
        return Counts(0, 0, 0, 0, []) if _are_read(home, files) else _ingest(home, files, deadline)


def is_current(home: Path) -> bool:
    """Whether the database of a home holds its files as they are, and an ingest would do nothing."""
    return _are_read(home, _files(home))


def rebuild(home: Path, patience: float = PATIENCE) -> Counts:
    """Make the database anew from the files, whatever state it is in. Raises StoreError as `ingest` does."""
    with _alone(home, patience) as deadline:
        live = places.live(home)
        for path in (live, live.with_name(f"{live.name}.wal")):
            path.unlink(missing_ok=True)
        return _ingest(home, _files(home), deadline)


@contextmanager
def _alone(home: Path, patience: float) -> Iterator[float]:
    """Hold the home's store.lock, which ends with its process; gives the end of patience, in monotonic seconds."""
    if not home.is_dir():
        raise StoreError(f"{home}: there is no such folder; `slm sweep` makes it, SLM_HOME names another")
    deadline = time.monotonic() + patience
    with (home / "store.lock").open("a+", encoding="utf-8") as file:
        while not _try_lock(file.fileno()):
            file.seek(0)
            _wait(deadline, f"{home}: process {file.read()} is writing the database; try again when it has ended")
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield deadline


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wait(deadline: float, complaint: str) -> None:
    if time.monotonic() > deadline:
        raise StoreError(complaint)
    time.sleep(random.uniform(0.05, 0.25))


def _files(home: Path) -> dict[str, File]:
    return {file.name: file for file in scan(home)}


def _are_read(home: Path, files: dict[str, File]) -> bool:
    """Whether an ingest without a problem saw just these files, and its databases are there as it left them.

    It saves opening the database, whose libraries take longer to load than a thousand files to look at.
    """
    seen = places.seen(home)
    return seen.exists() and seen.read_text() == _fingerprint(home, files)


def _fingerprint(home: Path, files: dict[str, File]) -> str:
    """Of the files as they were when looked at, of the databases, and of the schema's source."""
    schema = Path(__file__).with_name("schema.py")
    paths = [path for path in (places.live(home), places.snapshot(home), schema) if path.exists()]
    found = [f"{path.name} {path.stat().st_size}:{path.stat().st_mtime_ns}" for path in paths]
    lines = [*found, *(f"{file.name} {file.state}" for file in files.values())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _ingest(home: Path, files: dict[str, File], deadline: float) -> Counts:
    """Open, write what is new, close, publish. A database that someone opened by hand is waited for."""
    import duckdb
    from sqlalchemy.exc import DBAPIError

    while True:
        try:
            counts = _write(home, files)
            _publish(home)
            if not counts.problems:
                places.seen(home).write_text(_fingerprint(home, files))
        except BlockingIOError as error:
            _wait(deadline, f"{error}: close it there")
        except (DBAPIError, duckdb.Error, OSError) as error:
            why = places.first_line(error.orig if isinstance(error, DBAPIError) else error)
            raise StoreError(f"{home}: the database could not be written, its last snapshot stays: {why}") from None
        else:
            return counts


def _write(home: Path, files: dict[str, File]) -> Counts:
    from store import writer

    with writer.opened(places.live(home)) as connection:
        known = writer.cursors(connection)
        lost = {name for name, (size, _) in known.items() if _is_lost(files.get(name), size)}
        if lost:
            owners = {writer.owner(name) for name in lost}
            writer.forget(connection, owners)
            known = {name: cursor for name, cursor in known.items() if writer.owner(name) not in owners}
        changes, unreadable = _changes(files, known)
        counted, refused = writer.write(connection, home, changes) if changes else (Counter[str](), [])
    return Counts(counted["plan"], counted["done"], counted["lines"], counted["metrics"], [*unreadable, *refused])


def _is_lost(file: File | None, size: int) -> bool:
    """Whether rows were read that their file does not hold any more: files of events only grow."""
    return file is None or (file.kind == "events" and file.size < size)


def _changes(files: dict[str, File], known: Cursors) -> tuple[list[Change], list[str]]:
    """What is new in files, documents read already; and the documents that cannot be read."""
    from store.writer import Change

    changes: list[Change] = []
    problems: list[str] = []
    for name, file in files.items():
        size, state = known.get(name, (0, ""))
        if file.kind == "events":
            if file.size > size:
                changes.append(Change(file, start=size))
        elif file.state != state:
            try:
                changes.append(Change(file, rows=rows_of(file)))
            except ValueError as error:
                problems.append(str(error))
    return changes, problems


def _publish(home: Path) -> None:
    """Copy the closed database for readers, who keep what they have open; a copy has the time of what it copies."""
    live, snapshot = places.live(home), places.snapshot(home)
    before, now = (path.stat() if path.exists() else None for path in (snapshot, live))
    assert now is not None
    if before is None or (before.st_size, before.st_mtime_ns) != (now.st_size, now.st_mtime_ns):
        temporary = snapshot.with_name(f"{snapshot.name}.new")
        shutil.copy2(live, temporary)
        temporary.replace(snapshot)
