"""Rows into the database, on an open connection of the only process that writes a home."""

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

from store import paths, schema
from store.documents import File, Row, Rows
from store.paths import VERSION
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
"""Rows per INSERT: one statement of many rows is ten times as fast as many statements."""
BATCH = 64 * 2**20
"""Bytes of files per transaction, to bound memory; the last file may add as many again."""

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
FROM (
  SELECT home, run_id, attempt, event, time, step, unnest(map_entries(line)) AS field FROM staged
)
WHERE field.key NOT IN ('@run', '@attempt', 'event', 'time', 'step')
  AND step IS NOT NULL
  AND TRY_CAST(CAST(field.value AS VARCHAR) AS DOUBLE) IS NOT NULL
"""
"""Rows of the numbers of each line, NaN and infinities included; texts and nulls give none."""
STAGE_EXAMPLES = """
CREATE OR REPLACE TEMP TABLE examples AS
SELECT ? AS home, run_id, parse_filename(filename, true) AS evaluation,
       unnest(map_entries(tasks)) AS task
FROM read_json(?, format = 'unstructured', filename = true, maximum_object_size = ?,
               columns = {run_id: 'VARCHAR', tasks: 'MAP(VARCHAR, STRUCT("each" STRUCT(
                 correct BOOLEAN[], choice BIGINT[], tie BOOLEAN[], gold_nats DOUBLE[],
                 gold_tokens BIGINT[], gold_greedy BIGINT[], gold_bytes BIGINT[],
                 gold_probability DOUBLE[])))'})
"""
EXAMPLES = """
SELECT * FROM (
  SELECT home, run_id, evaluation, task,
         unnest(range(len(answers.correct))) AS example,
         unnest(answers.correct) AS correct,
         unnest(answers.choice) AS choice,
         unnest(answers.tie) AS tie,
         unnest(answers.gold_nats) AS gold_nats,
         unnest(answers.gold_tokens) AS gold_tokens,
         unnest(answers.gold_greedy) AS gold_greedy,
         unnest(answers.gold_bytes) AS gold_bytes,
         unnest(answers.gold_probability) AS gold_probability
  FROM (
    SELECT home, run_id, evaluation, task.key AS task, task.value."each" AS answers FROM examples
  )
) WHERE correct IS NOT NULL
"""
"""Rows of the examples; skipped ones give none."""

RUN_TABLES: tuple[Any, ...] = (
    Run,
    Attempt,
    Metric,
    Finished,
    Evaluation,
    EvaluationTask,
    EvaluationExample,
)
Cursors = dict[str, tuple[int, str]]
"""Bytes read and state of each file, by name."""


class Outdated(Exception):
    """Raised for a database of an older version or another home, which may be rebuilt safely."""


@dataclass(frozen=True)
class Change:
    """A file with something new in it."""

    file: File
    start: int = 0
    """Bytes of an events file that were read before."""
    rows: Rows = field(default_factory=list)
    """Rows of a document; events files and examples are read only when they are written."""


@dataclass(frozen=True)
class Written:
    """Result of writing some changes."""

    counts: Counter[str] = field(default_factory=Counter)
    """Documents by kind, lines of events, and metrics."""
    problems: list[str] = field(default_factory=list)
    """Files that the database refused, and lines that are not events."""
    remaining: list[Change] = field(default_factory=list)
    """Unread parts of events files that are longer than a BATCH."""


@dataclass(frozen=True)
class Target:
    """The database while a home is written into it."""

    connection: Connection
    staging: Connection
    """DuckDB connection that reads JSON: the same one, or one in memory next to a server."""
    folder: Path
    home: str
    """Id of the home, in all its rows."""


@contextmanager
def open_target(folder: Path, home: str) -> Iterator[Target]:
    """Open the database of a home, and create it if there is none; closing it completes the file.

    Raises BlockingIOError while another process writes it, Outdated, and StoreError when it is
    unreadable or made by a newer version.
    """
    url, path = paths.server_url(), paths.database(folder)
    with ExitStack() as stack:
        if url:
            from store import server

            connection = stack.enter_context(server.open_for_writing(url, home))
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
            raise BlockingIOError(
                f"{paths.first_line(error.orig)}: close it in that process"
            ) from None
        raise paths.damaged(path, error.orig) from None
    with connection:
        yield connection


def _create(path: Path) -> None:
    """Create a database under a temporary name, so that there is never one without its tables."""
    temporary = path.with_name(f"{path.name}.new")
    for leftover in (temporary, path.with_name(f"{path.name}.wal")):
        leftover.unlink(missing_ok=True)
    with _connected(temporary) as connection, connection.begin():
        schema.create(connection)
    temporary.replace(path)


def _check(connection: Connection, path: Path, home: str) -> None:
    """Raise Outdated for an older version or another home, StoreError if newer or unreadable."""
    try:
        version = connection.execute(select(SchemaVersion.version)).scalar()
    except DBAPIError as error:
        raise paths.damaged(path, error.orig) from None
    if version is None or version > VERSION:
        raise paths.damaged(
            path, f"made by a newer version of the store ({version}, this one is {VERSION})"
        )
    if version < VERSION:
        raise Outdated(
            f"{path}: rebuilt from the run folders, it was made by version {version} of the store"
        )
    if {*connection.execute(select(Home.home)).scalars()} - {home}:
        raise Outdated(f"{path}: rebuilt from the run folders, it belonged to another home")


def read_cursors(target: Target) -> Cursors:
    """Return how far each file has been read."""
    with target.connection.begin():
        query = select(Cursor.file, Cursor.offset, Cursor.state).where(Cursor.home == target.home)
        return {
            file: (offset, state) for file, offset, state in target.connection.execute(query).all()
        }


def owner_of(name: str) -> str:
    """Return what a file belongs to, whose rows are dropped together: run, import, or itself."""
    folder, slash, rest = name.partition("/")
    if folder == "imports":
        return f"imports/{rest.partition('/')[0]}/"
    return name if folder in ("experiments", "fits") else folder + slash


def write(
    target: Target, changes: Sequence[Change], lost: Collection[str] | None = ()
) -> tuple[Counter[str], list[str]]:
    """Drop the rows of lost owners (None: of the whole home), and write changes; return counts and
    problems.

    Each transaction writes a BATCH; the first also drops.
    """
    counts: Counter[str] = Counter()
    problems: list[str] = []
    first = True
    while changes or first:
        batch, changes = _split(changes)
        written = _write_or_halve(target, batch, lost if first else ())
        counts += written.counts
        problems += written.problems
        changes = [*written.remaining, *changes]
        first = False
    return counts, problems


def _split(changes: Sequence[Change]) -> tuple[Sequence[Change], Sequence[Change]]:
    """Split off the changes of the next BATCH."""
    ends = accumulate(change.file.size - change.start for change in changes)
    count = next((number for number, end in enumerate(ends, 1) if end >= BATCH), len(changes))
    return changes[:count], changes[count:]


def _write_or_halve(
    target: Target, changes: Sequence[Change], lost: Collection[str] | None = ()
) -> Written:
    """Drop and write in one transaction.

    If the database refuses the rows, each half is written on its own, down to the one file at
    fault.
    """
    try:
        with target.connection.begin():
            _drop(target, lost)
            return _write(target, changes)
    except (OperationalError, InternalError):
        raise
    except DBAPIError as error:
        if isinstance(error.orig, duckdb.FatalException):
            raise
        if len(changes) == 1 and not lost and lost is not None:
            return Written(problems=[f"{changes[0].file.path}: {paths.first_line(error.orig)}"])
    with target.connection.begin():
        _drop(target, lost)
    middle = (len(changes) + 1) // 2
    first = _write_or_halve(target, changes[:middle])
    second = _write_or_halve(target, changes[middle:])
    return Written(
        first.counts + second.counts,
        first.problems + second.problems,
        first.remaining + second.remaining,
    )


def _drop(target: Target, owners: Collection[str] | None) -> None:
    """Drop the rows and cursors of owners (None: of the whole home), as if never read."""
    if owners is None:
        for table in Base.metadata.sorted_tables:
            if "home" in table.c:
                target.connection.execute(delete(table).where(table.c.home == target.home))
        return
    for name in sorted(owners):
        for model, condition in _conditions(name, target.home):
            target.connection.execute(delete(model).where(model.home == target.home, condition))
    if any(name.startswith(("experiments/", "imports/")) for name in owners):
        _name_experiments(target)


def _conditions(owner: str, home: str) -> Iterator[tuple[type[Any], ColumnElement[bool]]]:
    """Yield the tables that hold rows of an owner, each with the condition that selects them."""
    folder, _, rest = owner.partition("/")
    name = rest.removesuffix("/").removesuffix(".json")
    imported = select(Imported.run_id).where(Imported.home == home)
    if folder == "imports":
        runs = imported.where(Imported.hash == name)
        yield Metric, Metric.run_id.in_(runs)
        yield Membership, Membership.run_id.in_(runs)
        yield Imported, Imported.hash == name
        yield Import, Import.hash == name
    elif folder == "experiments":
        yield Membership, and_(Membership.experiment == name, Membership.run_id.not_in(imported))
    elif folder == "fits":
        yield Fit, Fit.hash == name
    else:
        for model in RUN_TABLES:
            yield model, model.run_id == folder
    yield Cursor, Cursor.file.startswith(owner, autoescape=True)


def _name_experiments(target: Target) -> None:
    """Update the experiments that consist of imports alone; several imports may share a name."""
    read = select(Cursor.file).where(Cursor.home == target.home)
    swept = literal("experiments/") + Experiment.name + ".json"
    imported = literal("experiments/") + Import.experiment + ".json"
    sources = func.string_agg(
        Import.source, aggregate_order_by(literal_column("', '"), Import.source)
    )
    rows = (
        select(
            literal(target.home),
            Import.experiment,
            literal("imported from ") + sources,
            func.min(Import.created),
        )
        .where(Import.home == target.home, imported.not_in(read))
        .group_by(Import.experiment)
    )
    target.connection.execute(
        delete(Experiment).where(Experiment.home == target.home, swept.not_in(read))
    )
    target.connection.execute(
        insert(Experiment).from_select(["home", "name", "question", "created"], rows)
    )


def _write(target: Target, changes: Sequence[Change]) -> Written:
    events = [change for change in changes if change.file.kind == "events"]
    documents = [change for change in changes if change.file.kind != "events"]
    # 1) rows of documents, and the examples of evaluations
    _upsert(target, [row for change in documents for row in change.rows])
    _write_examples(
        target, [change.file for change in documents if change.file.kind == "evaluation"]
    )
    counts = Counter(change.file.kind for change in documents)
    cursors = {change.file.name: (change.file.size, change.file.state) for change in documents}
    # 2) new lines of events files
    read, event_counts, problems = _write_events(target, events)
    # 3) cursors, in the same transaction
    rows = [
        {"file": name, "offset": offset, "state": state}
        for name, (offset, state) in (cursors | read).items()
    ]
    _upsert(target, [("cursors", row) for row in rows])
    if counts["experiment"] or counts["import"]:
        _name_experiments(target)
    remaining = []
    for change in events:
        offset, _ = read.get(change.file.name, (change.file.size, ""))
        if offset < change.file.size:
            remaining.append(Change(change.file, offset))
    return Written(counts + event_counts, problems, remaining)


def _upsert(target: Target, rows: Rows) -> None:
    """Insert rows, or overwrite these columns of the rows with the same key."""
    groups: defaultdict[tuple[str, ...], list[Row]] = defaultdict(list)
    for name, row in rows:
        groups[name, *row].append({"home": target.home, **row})
    for (name, *columns), group in groups.items():
        table = Base.metadata.tables[name]
        for start in range(0, len(group), CHUNK):
            statement = postgresql.insert(table).values(group[start : start + CHUNK])
            values = {
                column: statement.excluded[column]
                for column in columns
                if not table.c[column].primary_key
            }
            target.connection.execute(
                statement.on_conflict_do_update(index_elements=table.primary_key, set_=values)
            )


def _write_examples(target: Target, files: Sequence[File]) -> None:
    """Append the examples of evaluations."""
    if files:
        largest = max(file.size for file in files)
        target.staging.exec_driver_sql(
            STAGE_EXAMPLES, (target.home, [str(file.path) for file in files], largest + 1)
        )
        _append(target, "evaluation_examples", EXAMPLES)


def _append(target: Target, table: str, query: str) -> int:
    """Append the rows of a query over the staged data to a table, and return their number."""
    columns = ", ".join(Base.metadata.tables[table].c.keys())
    rows = f"SELECT {columns} FROM ({query})"  # noqa: S608
    if target.staging is target.connection:
        statement = f"INSERT INTO {table} ({columns}) {rows}"
        return int(target.connection.exec_driver_sql(statement).scalar() or 0)
    from store import server

    path = target.folder / "slm.duckdb.copy"
    try:
        export = f"COPY ({rows}) TO '{paths.escape(path)}' (FORMAT csv, HEADER false)"
        count = target.staging.exec_driver_sql(export).scalar()
        statement = f"COPY {table} ({columns}) FROM STDIN (FORMAT csv)"
        server.copy_file(target.connection, statement, path)
        return int(count or 0)
    finally:
        path.unlink(missing_ok=True)


def _write_events(
    target: Target, changes: Sequence[Change]
) -> tuple[Cursors, Counter[str], list[str]]:
    """Append the complete new lines of events files; return new cursors, counts and problems."""
    staging = target.folder / "slm.duckdb.events"
    lines: dict[File, int] = {}
    read: Cursors = {}
    try:
        with staging.open("wb") as output:
            for change in changes:
                if chunk := _complete_lines(change):
                    lines[change.file] = chunk.count(b"\n")
                    read[change.file.name] = (change.start + len(chunk), "")
                    output.write(_labelled(chunk, change.file))
        if not lines:
            return {}, Counter(), []
        target.staging.exec_driver_sql(STAGE, (target.home, str(staging)))
        metrics = _append(target, "metrics", UNPIVOT)
    finally:
        staging.unlink(missing_ok=True)
    staged = target.staging.exec_driver_sql(
        "SELECT run_id, attempt, count(*) FROM staged GROUP BY run_id, attempt"
    )
    valid = {(run_id, attempt): count for run_id, attempt, count in staged}
    problems = []
    for file, count in lines.items():
        if invalid := count - valid.get((file.owner, file.attempt), 0):
            problems.append(f"{file.path}: {invalid} of {count} new lines are not events")
    return read, Counter(lines=sum(valid.values()), metrics=metrics), problems


def _complete_lines(change: Change) -> bytes:
    """Return what is new, at most a BATCH, without a last line that is still being written."""
    with change.file.path.open("rb") as file:
        file.seek(change.start)
        chunk = file.read(min(BATCH, change.file.size - change.start)) + file.readline()
    return chunk[: chunk.rfind(b"\n") + 1]


def _labelled(chunk: bytes, file: File) -> bytes:
    """Add the run and attempt to each line."""
    label = b'\n{"@run":"%s","@attempt":%d,' % (file.owner.encode(), file.attempt)
    return (b"\n" + chunk).replace(b"\n{", label)[1:]
