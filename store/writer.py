"""Rows into the database: every function works on an open connection of the one process that writes a home."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import duckdb
from sqlalchemy import (
    ColumnElement,
    Connection,
    NullPool,
    and_,
    create_engine,
    delete,
    func,
    insert,
    literal,
    literal_column,
    select,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import aggregate_order_by
from sqlalchemy.exc import DBAPIError, InternalError, OperationalError

from store import paths as places
from store import schema
from store.documents import File, Row, Rows
from store.paths import VERSION, quoted
from store.schema import (
    Attempt,
    Base,
    Cursor,
    Evaluation,
    EvaluationExample,
    EvaluationTask,
    Experiment,
    Finished,
    Fit,
    Home,
    Import,
    Imported,
    Membership,
    Metric,
    Run,
    SchemaVersion,
)

CHUNK = 200
"""Rows of one INSERT: one statement of many rows is ten times as fast as many statements."""
BATCH = 64 * 2**20
"""Bytes of files in one transaction, so that memory does not grow with the home; the last may bring as many again."""

STAGE = """
CREATE OR REPLACE TEMP TABLE staged AS
SELECT ? AS home, line['@run'] ->> '$' AS run_id, CAST(line['@attempt'] AS BIGINT) AS attempt,
       line['event'] ->> '$' AS event, TRY_CAST(line['time'] AS DOUBLE) AS time,
       TRY_CAST(line['step'] AS BIGINT) AS step, line
FROM read_json(?, format = 'newline_delimited', records = false, ignore_errors = true,
               columns = {line: 'MAP(VARCHAR, JSON)'})
WHERE line['@run'] IS NOT NULL AND line['event'] IS NOT NULL
"""
UNPIVOT = """
SELECT home, run_id, attempt, event, time, step, field.key AS name,
       TRY_CAST(CAST(field.value AS VARCHAR) AS DOUBLE) AS value
FROM (SELECT home, run_id, attempt, event, time, step, unnest(map_entries(line)) AS field FROM staged)
WHERE field.key NOT IN ('@run', '@attempt', 'event', 'time', 'step')
  AND step IS NOT NULL
  AND TRY_CAST(CAST(field.value AS VARCHAR) AS DOUBLE) IS NOT NULL
"""
"""Every number of a line becomes a row, NaN and infinities as they are; texts and nulls become none."""
STAGE_EXAMPLES = """
CREATE OR REPLACE TEMP TABLE examples AS
SELECT ? AS home, run_id, parse_filename(filename, true) AS evaluation, unnest(map_entries(tasks)) AS task
FROM read_json(?, format = 'unstructured', filename = true, maximum_object_size = ?,
               columns = {run_id: 'VARCHAR', tasks: 'MAP(VARCHAR, STRUCT("each" STRUCT(
                 correct BOOLEAN[], choice BIGINT[], tie BOOLEAN[], gold_nats DOUBLE[], gold_tokens BIGINT[],
                 gold_greedy BIGINT[], gold_bytes BIGINT[], gold_probability DOUBLE[])))'})
"""
EXAMPLES = """
SELECT * FROM (
  SELECT home, run_id, evaluation, task, unnest(range(len(own.correct))) AS example, unnest(own.correct) AS correct,
         unnest(own.choice) AS choice, unnest(own.tie) AS tie, unnest(own.gold_nats) AS gold_nats,
         unnest(own.gold_tokens) AS gold_tokens, unnest(own.gold_greedy) AS gold_greedy,
         unnest(own.gold_bytes) AS gold_bytes, unnest(own.gold_probability) AS gold_probability
  FROM (SELECT home, run_id, evaluation, task.key AS task, task.value."each" AS own FROM examples)
) WHERE correct IS NOT NULL
"""
"""A row an example; one that was skipped has none."""

Cursors = dict[str, tuple[int, str]]
"""Bytes read of each file, and what tells a changed document."""


class Outdated(Exception):
    """The database is of an older version, or of another home: it holds nothing that the files do not."""


@dataclass(frozen=True)
class Change:
    """A file with something new in it."""

    file: File
    """Which."""
    start: int = 0
    """Bytes of an events file that were read before."""
    rows: Rows = field(default_factory=list)
    """What a document becomes; an events file, or an evaluation's examples, are read when they are written."""


@dataclass(frozen=True)
class Written:
    """What became of changes."""

    counts: Counter[str] = field(default_factory=Counter)
    """Documents by kind, lines of events, and metrics."""
    problems: list[str] = field(default_factory=list)
    """Files that the database refused, and lines that are no events."""
    left: list[Change] = field(default_factory=list)
    """Rests of events files that are longer than a BATCH."""


@dataclass(frozen=True)
class Target:
    """The database while a home is written into it."""

    connection: Connection
    """Open."""
    staging: Connection
    """A DuckDB that reads JSON: the same, or one in memory."""
    folder: Path
    """The home."""
    home: str
    """What its rows are known by."""


@contextmanager
def opened(folder: Path, home: str) -> Iterator[Target]:
    """The database of a home, made first where there is none; closed, it holds everything.

    Raises BlockingIOError while another process writes it, Outdated, StoreError when it is newer than this or
    unreadable.
    """
    url, path = places.server(), places.live(folder)
    with ExitStack() as stack:
        if url:
            from store import server

            connection = stack.enter_context(server.opened(url, home))
            staging = stack.enter_context(_connected(Path(":memory:")))
            staging.execution_options(isolation_level="AUTOCOMMIT")
        else:
            if not path.exists():
                _create(path)
            connection = staging = stack.enter_context(_connected(path))
            with connection.begin():
                _check(connection, path, home)
        yield Target(connection, staging, folder, home)


@contextmanager
def _connected(path: Path) -> Iterator[Connection]:
    try:
        connection = create_engine(f"duckdb:///{path}", poolclass=NullPool).connect()
    except DBAPIError as error:
        if "Could not set lock" in str(error.orig):
            raise BlockingIOError(f"{places.first_line(error.orig)}: close it there") from None
        raise places.damaged(path, error.orig) from None
    with connection:
        yield connection


def _create(path: Path) -> None:
    """Under a temporary name, so that there is never a database without its tables."""
    temporary = path.with_name(f"{path.name}.new")
    for left in (temporary, path.with_name(f"{path.name}.wal")):
        left.unlink(missing_ok=True)
    with _connected(temporary) as connection, connection.begin():
        schema.create(connection)
    temporary.replace(path)


def _check(connection: Connection, path: Path, home: str) -> None:
    """Raises Outdated for what an older version made, or another home; StoreError for a newer one, and for none."""
    try:
        version = connection.execute(select(SchemaVersion.version)).scalar()
    except DBAPIError as error:
        raise places.damaged(path, error.orig) from None
    if version is None or version > VERSION:
        raise places.damaged(
            path, f"it was made by a newer version of the store ({version}, this one is {VERSION})"
        )
    if version < VERSION:
        raise Outdated(
            f"{path}: made anew from the run folders, it was of version {version} of the store"
        )
    if {*connection.execute(select(Home.home)).scalars()} - {home}:
        raise Outdated(f"{path}: made anew from the run folders, it was another home's")


def cursors(to: Target) -> Cursors:
    """What has been read, by file."""
    with to.connection.begin():
        query = select(Cursor.file, Cursor.offset, Cursor.state).where(Cursor.home == to.home)
        return {file: (offset, state) for file, offset, state in to.connection.execute(query).all()}


def owner(name: str) -> str:
    """What a file is part of: a whole run, a whole import, or itself."""
    folder, slash, rest = name.partition("/")
    if folder == "imports":
        return f"imports/{rest.partition('/')[0]}/"
    return name if folder in ("experiments", "fits") else folder + slash


def write(
    to: Target, changes: Sequence[Change], lost: Collection[str] | None = ()
) -> tuple[Counter[str], list[str]]:
    """Forget the rows of lost owners, or with None all of the home, and write changes; counts, and problems.

    A transaction takes a BATCH, and the first forgets.
    """
    counts: Counter[str] = Counter()
    problems: list[str] = []
    first = True
    while changes or first:
        batch, changes = _split(changes)
        written = _write_or_halve(to, batch, lost if first else ())
        counts += written.counts
        problems += written.problems
        changes, first = [*written.left, *changes], False
    return counts, problems


def _split(changes: Sequence[Change]) -> tuple[Sequence[Change], Sequence[Change]]:
    """The next BATCH, and the others."""
    ends = accumulate(change.file.size - change.start for change in changes)
    taken = next((number for number, end in enumerate(ends, 1) if end >= BATCH), len(changes))
    return changes[:taken], changes[taken:]


def _write_or_halve(
    to: Target, changes: Sequence[Change], lost: Collection[str] | None = ()
) -> Written:
    """Forget and write in one transaction.

    Where the database refuses, each half is written on its own, down to the one file that is to blame.
    """
    try:
        with to.connection.begin():
            _forget(to, lost)
            return _write(to, changes)
    except (OperationalError, InternalError):
        raise
    except DBAPIError as error:
        if isinstance(error.orig, duckdb.FatalException):
            raise
        if len(changes) == 1 and not lost and lost is not None:
            return Written(problems=[f"{changes[0].file.path}: {places.first_line(error.orig)}"])
    with to.connection.begin():
        _forget(to, lost)
    middle = (len(changes) + 1) // 2
    first, second = (_write_or_halve(to, half) for half in (changes[:middle], changes[middle:]))
    return Written(
        first.counts + second.counts, first.problems + second.problems, first.left + second.left
    )


def _forget(to: Target, owners: Collection[str] | None) -> None:
    """Drop the rows and cursors of owners, None being the whole home, as though their files had never been read."""
    if owners is None:
        for table in Base.metadata.sorted_tables:
            if "home" in table.c:
                to.connection.execute(delete(table).where(table.c.home == to.home))
        return
    for name in sorted(owners):
        for model, condition in _rows_of(name, to.home):
            to.connection.execute(delete(model).where(model.home == to.home, condition))
    if any(name.startswith(("experiments/", "imports/")) for name in owners):
        _name_experiments(to)


def _rows_of(owner: str, home: str) -> Iterator[tuple[type[Any], ColumnElement[bool]]]:
    """Where the rows of an owner are: tables, each with a condition."""
    folder, _, rest = owner.partition("/")
    name = rest.removesuffix("/").removesuffix(".json")
    imported = select(Imported.run_id).where(Imported.home == home)
    if folder == "imports":
        own = imported.where(Imported.hash == name)
        yield Metric, Metric.run_id.in_(own)
        yield Membership, Membership.run_id.in_(own)
        yield Imported, Imported.hash == name
        yield Import, Import.hash == name
    elif folder == "experiments":
        yield Membership, and_(Membership.experiment == name, Membership.run_id.not_in(imported))
    elif folder == "fits":
        yield Fit, Fit.hash == name
    else:
        for model in (
            Run,
            Attempt,
            Metric,
            Finished,
            Evaluation,
            EvaluationTask,
            EvaluationExample,
        ):
            yield model, model.run_id == folder
    yield Cursor, Cursor.file.startswith(owner, autoescape=True)


def _name_experiments(to: Target) -> None:
    """Keep the experiments that have a file, and make those that are imports alone: several may be of one name."""
    read = select(Cursor.file).where(Cursor.home == to.home)
    swept, imported = (
        literal("experiments/") + name + ".json" for name in (Experiment.name, Import.experiment)
    )
    to.connection.execute(delete(Experiment).where(Experiment.home == to.home, swept.not_in(read)))
    sources = func.string_agg(
        Import.source, aggregate_order_by(literal_column("', '"), Import.source)
    )
    columns = (
        literal(to.home),
        Import.experiment,
        literal("imported from ") + sources,
        func.min(Import.created),
    )
    there = (
        select(*columns)
        .where(Import.home == to.home, imported.not_in(read))
        .group_by(Import.experiment)
    )
    to.connection.execute(
        insert(Experiment).from_select(["home", "name", "question", "created"], there)
    )


def _write(to: Target, changes: Sequence[Change]) -> Written:
    documents = [change for change in changes if change.file.kind != "events"]
    _upsert(to, [row for change in documents for row in change.rows])
    _write_examples(to, [change.file for change in documents if change.file.kind == "evaluation"])
    counts: Counter[str] = Counter(change.file.kind for change in documents)
    ends = {change.file.name: (change.file.size, change.file.state) for change in documents}
    read, counted, problems = _write_events(
        to, [change for change in changes if change.file.kind == "events"]
    )
    rows = [
        {"file": name, "offset": at, "state": state} for name, (at, state) in (ends | read).items()
    ]
    _upsert(to, [("cursors", row) for row in rows])
    if counts["experiment"] or counts["import"]:
        _name_experiments(to)
    ends_of_events = [
        (change.file, read[change.file.name][0]) for change in changes if change.file.name in read
    ]
    return Written(
        counts + counted,
        problems,
        [Change(file, at) for file, at in ends_of_events if at < file.size],
    )


def _upsert(to: Target, rows: Rows) -> None:
    """Insert rows, or overwrite what the rows of the same key hold in the same columns."""
    alike: defaultdict[tuple[str, ...], list[Row]] = defaultdict(list)
    for name, row in rows:
        alike[name, *row].append({"home": to.home, **row})
    for (name, *columns), group in alike.items():
        table = Base.metadata.tables[name]
        for start in range(0, len(group), CHUNK):
            statement = postgresql.insert(table).values(group[start : start + CHUNK])
            values = {
                column: statement.excluded[column]
                for column in columns
                if not table.c[column].primary_key
            }
            to.connection.execute(
                statement.on_conflict_do_update(index_elements=table.primary_key, set_=values)
            )


def _write_examples(to: Target, files: Sequence[File]) -> None:
    """Append the examples of evaluations."""
    if files:
        largest = max(file.size for file in files)
        to.staging.exec_driver_sql(
            STAGE_EXAMPLES, (to.home, [str(file.path) for file in files], largest + 1)
        )
        _append(to, "evaluation_examples", EXAMPLES)


def _append(to: Target, table: str, query: str) -> int:
    """Append the rows of a query of what is staged to a table; how many they were."""
    columns = ", ".join(Base.metadata.tables[table].c.keys())
    if to.staging is to.connection:
        statement = f"INSERT INTO {table} ({columns}) SELECT {columns} FROM ({query})"
        return int(to.connection.exec_driver_sql(statement).scalar() or 0)
    from store import server

    path = to.folder / "slm.duckdb.copy"
    try:
        statement = (
            f"COPY (SELECT {columns} FROM ({query})) TO '{quoted(path)}' (FORMAT csv, HEADER false)"
        )
        copied = to.staging.exec_driver_sql(statement)
        server.copy(to.connection, f"COPY {table} ({columns}) FROM STDIN (FORMAT csv)", path)
        return int(copied.scalar() or 0)
    finally:
        path.unlink(missing_ok=True)


def _write_events(to: Target, changes: Sequence[Change]) -> tuple[Cursors, Counter[str], list[str]]:
    """Append the complete new lines of events files: how far each is read now, counts, problems."""
    staging = to.folder / "slm.duckdb.events"
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
        to.staging.exec_driver_sql(STAGE, (to.home, str(staging)))
        metrics = _append(to, "metrics", UNPIVOT)
    finally:
        staging.unlink(missing_ok=True)
    found = to.staging.exec_driver_sql(
        "SELECT run_id, attempt, count(*) FROM staged GROUP BY run_id, attempt"
    )
    good = {(run_id, attempt): count for run_id, attempt, count in found}
    bad = {file: count - good.get((file.owner, file.attempt), 0) for file, count in lines.items()}
    problems = [
        f"{file.path}: {n} of {lines[file]} new lines are no events" for file, n in bad.items() if n
    ]
    return read, Counter(lines=sum(good.values()), metrics=metrics), problems


def _complete_lines(change: Change) -> bytes:
    """What is new, a BATCH at most, up to the last line that has ended: the rest is still being written."""
    with change.file.path.open("rb") as file:
        file.seek(change.start)
        chunk = file.read(min(BATCH, change.file.size - change.start)) + file.readline()
    return chunk[: chunk.rfind(b"\n") + 1]


def _labelled(chunk: bytes, file: File) -> bytes:
    """The lines, each with the run and the attempt it belongs to."""
    label = b'\n{"@run":"%s","@attempt":%d,' % (file.owner.encode(), file.attempt)
    return (b"\n" + chunk).replace(b"\n{", label)[1:]
