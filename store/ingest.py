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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from store import paths as places
from store.documents import File, rows_of, scan
from store.paths import StoreError

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
    """Files that could not become rows, a line each; they are tried again at the next ingest. And a line where the
    database was made anew, being an older version's or another home's."""


def ingest(home: Path, patience: float = PATIENCE) -> Counts:
    """Bring the database of a home up to date with its files, and publish it if anything changed.

    Whatever the moment at which it is killed, the next one loses nothing and counts nothing twice. Raises StoreError
    when another process writes for longer than `patience` seconds, the disk is full, or the database needs a rebuild.
    """
    with _alone(home, patience) as deadline:
        places.identified(home)
        files = _files(home)
        return Counts(0, 0, 0, 0, []) if _are_read(home, files) else _ingest(home, files, deadline)


def is_current(home: Path) -> bool:
    """Whether the database of a home holds its files as they are, and an ingest would do nothing."""
    return _are_read(home, _files(home))


def rebuild(home: Path, patience: float = PATIENCE) -> Counts:
    """Make the database anew from the files, whatever state it is in; on a server, this home's rows alone.

    Raises StoreError as `ingest` does.
    """
    with _alone(home, patience) as deadline:
        places.identified(home)
        return _ingest(home, _files(home), deadline, anew=True)


@contextmanager
def _alone(home: Path, patience: float) -> Iterator[float]:
    """Hold the home's store.lock, which ends with its process; gives the end of patience, in monotonic seconds."""
    if not home.is_dir():
        raise StoreError(
            f"{home}: there is no such folder; `slm sweep` makes it, SLM_HOME names another"
        )
    deadline = time.monotonic() + patience
    with (home / "store.lock").open("a+", encoding="utf-8") as file:
        while not _try_lock(file.fileno()):
            file.seek(0)
            _wait(
                deadline,
                f"{home}: process {file.read()} is writing the database; try again when it has ended",
            )
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
    """Of the files as they were when looked at, of the databases, and of the schema's sources."""
    schema = [Path(__file__).with_name(name) for name in ("paths.py", "schema.py", "views.sql")]
    paths = [path for path in (places.live(home), places.snapshot(home), *schema) if path.exists()]
    found = [f"{path.name} {path.stat().st_size}:{path.stat().st_mtime_ns}" for path in paths]
    lines = [
        places.server() or "",
        *found,
        *(f"{file.name} {file.state}" for file in files.values()),
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _ingest(home: Path, files: dict[str, File], deadline: float, anew: bool = False) -> Counts:
    """Open, write what is new, close, publish. A database that someone opened by hand is waited for."""
    import duckdb
    from sqlalchemy.exc import DBAPIError

    from store.writer import Outdated

    said: list[str] = []
    while True:
        try:
            if anew and not places.server():
                _remove(home)
            counts = _write(home, files, anew)
            if not places.server():
                _publish(home)
            if not counts.problems:
                places.seen(home).write_text(_fingerprint(home, files))
            return replace(counts, problems=said + counts.problems)
        except Outdated as error:
            said, anew = [str(error)], True
        except BlockingIOError as error:
            _wait(deadline, str(error))
        except (DBAPIError, duckdb.Error, OSError) as error:
            why = places.first_line(error.orig if isinstance(error, DBAPIError) else error)
            raise StoreError(
                f"{home}: the database could not be written, its last snapshot stays: {why}"
            ) from None


def _remove(home: Path) -> None:
    """The database that only an ingest opens; what readers see stays until the next is published."""
    live = places.live(home)
    for path in (live, live.with_name(f"{live.name}.wal")):
        path.unlink(missing_ok=True)


def _write(home: Path, files: dict[str, File], anew: bool) -> Counts:
    from store import writer

    with writer.opened(home, places.identified(home)) as target:
        known = {} if anew else writer.cursors(target)
        lost = {
            writer.owner(name)
            for name, cursor in known.items()
            if _is_lost(files.get(name), *cursor)
        }
        known = {name: cursor for name, cursor in known.items() if writer.owner(name) not in lost}
        changes, unreadable = _changes(files, known)
        counted, refused = Counter[str](), list[str]()
        if changes or lost or anew:
            counted, refused = writer.write(target, changes, None if anew else lost)
    return Counts(
        counted["plan"],
        counted["done"],
        counted["lines"],
        counted["metrics"],
        [*unreadable, *refused],
    )


def _is_lost(file: File | None, size: int, state: str) -> bool:
    """Whether rows were read that their file does not hold any more: files of events only grow."""
    if file is None:
        return True
    if file.kind == "events":
        return file.size < size
    return file.kind in ("experiment", "evaluation", "import") and file.state != state


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
