"""Files into rows: one short-lived writer at a time, then a snapshot for all readers.

Importing this module loads no database library.
"""

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

from store import paths
from store.documents import File, rows_of, scan
from store.paths import StoreError

if TYPE_CHECKING:
    from store.writer import Change, Cursors

PATIENCE = 30.0
"""Seconds to wait for another writer."""


@dataclass(frozen=True)
class Counts:
    """Rows that an ingest wrote, and its problems."""

    runs: int
    """Plans, new or changed."""
    finished: int
    """Runs with a result, new or changed."""
    events: int
    """New lines of events files."""
    metrics: int
    """Numbers in these lines."""
    problems: list[str]
    """A line for each file that was refused (the next ingest tries it again), and one when the
    database was rebuilt because it belonged to an older version or another home."""


def ingest(home: Path, patience: float = PATIENCE) -> Counts:
    """Bring the database of a home up to date with its files, and publish it if anything changed.

    An ingest may be killed at any moment: the next one loses nothing and counts nothing twice.
    Raises StoreError when another process writes for longer than `patience` seconds, the disk is
    full, or the database needs a rebuild.
    """
    with hold_store_lock(home, patience) as deadline:
        paths.ensure_home_id(home)
        files = _files(home)
        if _is_up_to_date(home, files):
            return Counts(0, 0, 0, 0, [])
        return _ingest(home, files, deadline)


def is_current(home: Path) -> bool:
    """Whether the database of a home is up to date, so that an ingest would do nothing."""
    return _is_up_to_date(home, _files(home))


def rebuild(home: Path, patience: float = PATIENCE) -> Counts:
    """Recreate the database from the files, whatever state it is in; on a server, only this home's
    rows.

    Raises StoreError as `ingest` does.
    """
    with hold_store_lock(home, patience) as deadline:
        paths.ensure_home_id(home)
        return _ingest(home, _files(home), deadline, from_scratch=True)


@contextmanager
def hold_store_lock(home: Path, patience: float) -> Iterator[float]:
    """Hold the home's store.lock, which a dying process releases; yield the deadline in monotonic
    seconds.

    Raises StoreError when there is no such home, or another process holds the lock for longer than
    `patience`.
    """
    if not home.is_dir():
        raise StoreError(f"{home}: no such folder; `slm sweep` makes it, SLM_HOME names another")
    deadline = time.monotonic() + patience
    with (home / "store.lock").open("a+", encoding="utf-8") as file:
        while not _try_lock(file.fileno()):
            file.seek(0)
            process = file.read()
            _wait(
                deadline,
                f"{home}: process {process} is writing the database; try again when it has ended",
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


def _wait(deadline: float, message: str) -> None:
    if time.monotonic() > deadline:
        raise StoreError(message)
    time.sleep(random.uniform(0.05, 0.25))


def _files(home: Path) -> dict[str, File]:
    return {file.name: file for file in scan(home)}


def _is_up_to_date(home: Path, files: dict[str, File]) -> bool:
    """Whether the last ingest read exactly these files without a problem, and its databases are
    unchanged.

    This saves opening the database, whose libraries take longer to load than a thousand files to
    stat.
    """
    state = paths.ingest_state(home)
    return state.exists() and state.read_text() == _fingerprint(home, files)


def _fingerprint(home: Path, files: dict[str, File]) -> str:
    """Return a hash of the files' states, of the databases, and of the schema's sources."""
    sources = [Path(__file__).with_name(name) for name in ("paths.py", "schema.py", "views.sql")]
    lines = [paths.server_url() or ""]
    for path in (paths.database(home), paths.snapshot(home), *sources):
        if path.exists():
            stat = path.stat()
            lines.append(f"{path.name} {stat.st_size}:{stat.st_mtime_ns}")
    lines += [f"{file.name} {file.state}" for file in files.values()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _ingest(
    home: Path, files: dict[str, File], deadline: float, from_scratch: bool = False
) -> Counts:
    """Open, write what is new, close, publish. Waits while somebody has the database open."""
    import duckdb
    from sqlalchemy.exc import DBAPIError

    from store.writer import Outdated

    notes: list[str] = []
    while True:
        try:
            if from_scratch and not paths.server_url():
                _remove_database(home)
            counts = _write(home, files, from_scratch)
            if not paths.server_url():
                publish(home)
            if not counts.problems:
                paths.ingest_state(home).write_text(_fingerprint(home, files))
            return replace(counts, problems=notes + counts.problems)
        except Outdated as error:
            notes = [str(error)]
            from_scratch = True
        except BlockingIOError as error:
            _wait(deadline, str(error))
        except (DBAPIError, duckdb.Error, OSError) as error:
            reason = paths.first_line(error.orig if isinstance(error, DBAPIError) else error)
            raise StoreError(
                f"{home}: the database could not be written ({reason}); "
                "its last snapshot stays readable"
            ) from None


def _remove_database(home: Path) -> None:
    """Remove the database; readers keep its snapshot until the next one is published."""
    database = paths.database(home)
    for path in (database, database.with_name(f"{database.name}.wal")):
        path.unlink(missing_ok=True)


def _write(home: Path, files: dict[str, File], from_scratch: bool) -> Counts:
    from store import writer

    with writer.open_target(home, paths.ensure_home_id(home)) as target:
        # 1) see what was read before, and whose rows have lost their file
        cursors = {} if from_scratch else writer.read_cursors(target)
        lost = {
            writer.owner_of(name)
            for name, cursor in cursors.items()
            if _is_lost(files.get(name), *cursor)
        }
        cursors = {
            name: cursor for name, cursor in cursors.items() if writer.owner_of(name) not in lost
        }
        # 2) read what is new
        changes, unreadable = _changes(files, cursors)
        # 3) write it
        counts, refused = Counter[str](), list[str]()
        if changes or lost or from_scratch:
            counts, refused = writer.write(target, changes, None if from_scratch else lost)
    return Counts(
        counts["plan"],
        counts["done"],
        counts["lines"],
        counts["metrics"],
        [*unreadable, *refused],
    )


def _is_lost(file: File | None, size: int, state: str) -> bool:
    """Whether a file no longer holds the rows read from it: it is gone, shrunk, or replaced."""
    if file is None:
        return True
    if file.kind == "events":
        return file.size < size
    return file.kind in ("experiment", "evaluation", "import") and file.state != state


def _changes(files: dict[str, File], cursors: Cursors) -> tuple[list[Change], list[str]]:
    """Return files with new content, documents already read, and a line per unreadable document."""
    from store.writer import Change

    changes: list[Change] = []
    problems: list[str] = []
    for name, file in files.items():
        size, state = cursors.get(name, (0, ""))
        if file.kind == "events":
            if file.size > size:
                changes.append(Change(file, start=size))
        elif file.state != state:
            try:
                changes.append(Change(file, rows=rows_of(file)))
            except ValueError as error:
                problems.append(str(error))
    return changes, problems


def publish(home: Path) -> None:
    """Copy the closed database for readers; an open snapshot stays readable.

    The copy takes over size and modification time, so an equal one is recognised and not copied
    again.
    """
    database = paths.database(home)
    snapshot = paths.snapshot(home)
    source = database.stat()
    if snapshot.exists():
        copy = snapshot.stat()
        if (copy.st_size, copy.st_mtime_ns) == (source.st_size, source.st_mtime_ns):
            return
    temporary = snapshot.with_name(f"{snapshot.name}.new")
    shutil.copy2(database, temporary)
    temporary.replace(snapshot)
