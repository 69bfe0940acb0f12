"""Rows into the live database: every function works on an open connection of the one process that holds the lock."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import duckdb
from sqlalchemy import Connection, NullPool, create_engine, delete, insert, select
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DBAPIError

from store import places
from store.files import File, Row, Rows
from store.schema import VERSION, VIEWS, Base, Cursor, SchemaVersion

CHUNK = 200
"""Rows of one INSERT: one statement of many rows is ten times as fast as many statements."""

STAGE = """
CREATE OR REPLACE TEMP TABLE staged AS
SELECT line['@run'] ->> '$' AS run_id, CAST(line['@attempt'] AS BIGINT) AS attempt, line['event'] ->> '$' AS event,
       TRY_CAST(line['time'] AS DOUBLE) AS time,
       TRY_CAST(line['step'] AS BIGINT) AS step, line
FROM read_json(?, format = 'newline_delimited', records = false, ignore_errors = true,
               columns = {line: 'MAP(VARCHAR, JSON)'})
WHERE line['@run'] IS NOT NULL AND line['event'] IS NOT NULL
"""
UNPIVOT = """
INSERT INTO metrics (run_id, attempt, event, time, step, name, value)
SELECT run_id, attempt, event, time, step, field.key, TRY_CAST(CAST(field.value AS VARCHAR) AS DOUBLE)
FROM (SELECT run_id, attempt, event, time, step, unnest(map_entries(line)) AS field FROM staged)
WHERE field.key NOT IN ('@run', '@attempt', 'event', 'time', 'step')
  AND step IS NOT NULL
  AND TRY_CAST(CAST(field.value AS VARCHAR) AS DOUBLE) IS NOT NULL
"""
"""Every number of a line becomes a row, NaN and infinities as they are; texts and nulls become none."""

Cursors = dict[str, tuple[int, str]]
"""Bytes read of each file, and what tells a changed document."""


@dataclass(frozen=True)
class Change:
    """A file with something new in it."""

    file: File
    """Which."""
    start: int = 0
    """Bytes of an events file that were read before."""
    rows: Rows = field(default_factory=list)
    """What a document becomes; an events file is read when it is written."""


@contextmanager
def opened(path: Path) -> Iterator[Connection]:
    """A connection to the database, made first where there is none; closed, the file holds everything.

    Raises BlockingIOError while another process has it open, StoreError when it is of another version or unreadable.
    """
    if not path.exists():
        _create(path)
    with _connected(path) as connection:
        with connection.begin():
            _check_version(connection, path)
        yield connection


@contextmanager
def _connected(path: Path) -> Iterator[Connection]:
    try:
        connection = create_engine(f"duckdb:///{path}", poolclass=NullPool).connect()
    except DBAPIError as error:
        if "Could not set lock" in str(error.orig):
            raise BlockingIOError(places.first_line(error.orig)) from None
        raise places.damaged(path, error.orig) from None
    with connection:
        yield connection


def _create(path: Path) -> None:
    """Under a temporary name, so that there is never a database without its tables."""
    temporary = path.with_name(f"{path.name}.new")
    for left in (temporary, path.with_name(f"{path.name}.wal")):
        left.unlink(missing_ok=True)
    with _connected(temporary) as connection, connection.begin():
        Base.metadata.create_all(connection)
        for view in VIEWS.read_text(encoding="utf-8").split("\n---\n"):
            connection.exec_driver_sql(view)
        connection.execute(insert(SchemaVersion).values(version=VERSION))
    temporary.replace(path)


def _check_version(connection: Connection, path: Path) -> None:
    try:
        version = connection.execute(select(SchemaVersion.version)).scalar()
    except DBAPIError as error:
        raise places.damaged(path, error.orig) from None
    if version != VERSION:
        raise places.damaged(path, f"it was made by another version of the store ({version})")


def cursors(connection: Connection) -> Cursors:
    """What has been read, by file."""
    with connection.begin():
        found = connection.execute(select(Cursor.file, Cursor.offset, Cursor.state))
        return {file: (offset, state) for file, offset, state in found}


def owner(name: str) -> str:
    """What a file is part of: a whole run, or itself."""
    folder, slash, _ = name.partition("/")
    return name if folder in _KEYS else folder + slash


_KEYS = {"experiments": {"experiments": "name", "memberships": "experiment"}, "fits": {"fits": "hash"}}
_RUN_KEYS = dict.fromkeys(("runs", "attempts", "metrics", "finished"), "run_id")


def forget(connection: Connection, owners: set[str]) -> None:
    """Drop the rows and cursors of owners, as though their files had never been read."""
    with connection.begin():
        for prefix in sorted(owners):
            folder, _, rest = prefix.partition("/")
            for name, key in _KEYS.get(folder, _RUN_KEYS).items():
                table = Base.metadata.tables[name]
                connection.execute(delete(table).where(table.c[key] == (rest.removesuffix(".json") or folder)))
            connection.execute(delete(Cursor).where(Cursor.file.startswith(prefix, autoescape=True)))


def write(connection: Connection, home: Path, changes: list[Change]) -> tuple[Counter[str], list[str]]:
    """Write changes in one transaction; counts of what was written, and problems.

    Where the database refuses, each half is written on its own, down to the one file that is to blame.
    """
    try:
        with connection.begin():
            return _write(connection, home, changes)
    except DBAPIError as error:
        if isinstance(error.orig, duckdb.IOException | duckdb.FatalException | duckdb.InternalException):
            raise
        if len(changes) == 1:
            return Counter(), [f"{changes[0].file.path}: {places.first_line(error.orig)}"]
    middle = len(changes) // 2
    (first, problems), (second, more) = (write(connection, home, half) for half in (changes[:middle], changes[middle:]))
    return first + second, problems + more


def _write(connection: Connection, home: Path, changes: list[Change]) -> tuple[Counter[str], list[str]]:
    documents = [change for change in changes if change.file.kind != "events"]
    for change in documents:
        if change.file.kind == "experiment":
            members = Base.metadata.tables["memberships"]
            connection.execute(delete(members).where(members.c.experiment == change.file.owner))
    _upsert(connection, [row for change in documents for row in change.rows])
    counts: Counter[str] = Counter(change.file.kind for change in documents)
    ends = {change.file.name: (change.file.size, change.file.state) for change in documents}
    read, counted, problems = _write_events(connection, home, [c for c in changes if c.file.kind == "events"])
    rows = [{"file": name, "offset": at, "state": state} for name, (at, state) in (ends | read).items()]
    _upsert(connection, [("cursors", row) for row in rows])
    return counts + counted, problems


def _upsert(connection: Connection, rows: Rows) -> None:
    """Insert rows, or overwrite what the rows of the same key hold in the same columns."""
    alike: defaultdict[tuple[str, ...], list[Row]] = defaultdict(list)
    for name, row in rows:
        alike[name, *row].append(row)
    for (name, *columns), group in alike.items():
        table = Base.metadata.tables[name]
        for start in range(0, len(group), CHUNK):
            statement = postgresql.insert(table).values(group[start : start + CHUNK])
            values = {column: statement.excluded[column] for column in columns if not table.c[column].primary_key}
            connection.execute(statement.on_conflict_do_update(index_elements=table.primary_key, set_=values))


def _write_events(connection: Connection, home: Path, changes: list[Change]) -> tuple[Cursors, Counter[str], list[str]]:
    """Append the complete new lines of events files: how far each is read now, counts, problems."""
    staging = home / "slm.duckdb.events"
    lines: dict[File, int] = {}
    read: Cursors = {}
    try:
        with staging.open("wb") as file:
            for change in changes:
                chunk = _complete_lines(change)
                if chunk:
                    lines[change.file] = chunk.count(b"\n")
                    read[change.file.name] = (change.start + len(chunk), "")
                    file.write(_labelled(chunk, change.file))
        if not lines:
            return {}, Counter(), []
        connection.exec_driver_sql(STAGE, (str(staging),))
        metrics = int(connection.exec_driver_sql(UNPIVOT).scalar() or 0)
    finally:
        staging.unlink(missing_ok=True)
    found = connection.exec_driver_sql("SELECT run_id, attempt, count(*) FROM staged GROUP BY run_id, attempt")
    good = {(run_id, attempt): count for run_id, attempt, count in found}
    bad = {file: count - good.get((file.owner, file.attempt), 0) for file, count in lines.items()}
    problems = [f"{file.path}: {n} of {lines[file]} new lines are no events" for file, n in bad.items() if n]
    return read, Counter(lines=sum(good.values()), metrics=metrics), problems


def _complete_lines(change: Change) -> bytes:
    """What is new, up to the last line that has ended: the rest is still being written."""
    with change.file.path.open("rb") as file:
        file.seek(change.start)
        chunk = file.read()
    return chunk[: chunk.rfind(b"\n") + 1]


def _labelled(chunk: bytes, file: File) -> bytes:
    """The lines, each with the run and the attempt it belongs to."""
    label = b'\n{"@run":"%s","@attempt":%d,' % (file.owner.encode(), file.attempt)
    return (b"\n" + chunk).replace(b"\n{", label)[1:]
