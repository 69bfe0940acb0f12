"""Comparison of the database with the files, and removal of what is no longer needed."""

from __future__ import annotations

import filecmp
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from store import paths
from store.documents import scan
from store.ingest import PATIENCE, hold_store_lock, ingest, publish, rebuild
from store.paths import REBUILD_HINT, StoreError

if TYPE_CHECKING:
    import duckdb

STALE_SECONDS = 3600.0
"""Age at which a temporary file no longer belongs to a running process."""
TEMPORARY = re.compile(
    r"\..+\.\d+|\.unfinished-.+|\.check-.+|slm\.duckdb\.(new|events)|(results\.duckdb|home\.json)\.new"
)
"""Names of files and folders that are renamed when they are complete, or removed."""
TEMPORARY_PATTERNS = ("*", "*/*", "*/attempts/*", "*/attempts/*/*", "*/evals/*")
"""Folders of a home that may hold them."""
DOCUMENT_FOLDERS = ("experiments", "fits", "imports")
"""Folders of a home that are not runs."""
MAX_LINES = 5
"""Problems listed per table."""
CURRENT, FRESH = "current", "fresh"
"""Names under which the home's database and the rebuilt one are attached."""
SCHEMA_QUERIES = {
    "view": "SELECT view_name, sql FROM duckdb_views() WHERE NOT internal AND database_name = ?",
    "rule": "SELECT table_name, constraint_text FROM duckdb_constraints() WHERE database_name = ?",
}

Columns = dict[str, list[tuple[str, str]]]
"""Names and types of the columns of each table."""


@dataclass(frozen=True)
class CheckReport:
    """Result of a check."""

    rows: dict[str, int]
    """Rows of each table."""
    problems: list[str] = field(default_factory=list)
    """Lines that name the problem and the way out."""
    notes: list[str] = field(default_factory=list)
    """Remarks that are not problems."""


def check(home: Path, patience: float = PATIENCE) -> CheckReport:
    """Bring the database up to date, and compare it row by row with one rebuilt from the files.

    Takes the time of a rebuild and the disk space of two more databases. Raises StoreError when
    another process writes for longer than `patience` seconds, and when SLM_STORE names a server.
    """
    if paths.server_url():
        raise StoreError(
            "SLM_STORE names a server, but a check compares a home's own file: `slm store rebuild` "
            "rewrites the home's rows on the server; with SLM_STORE unset, `slm store check` makes "
            "a file and checks it"
        )
    began = time.time()
    database = paths.database(home)
    snapshot = paths.snapshot(home)
    try:
        ingest(home, patience)
    except StoreError as error:
        if not database.exists():
            raise
        return CheckReport({}, [str(error)])
    with (
        hold_store_lock(home, patience),
        _rebuilt(home) as (fresh, refused),
        _attached({CURRENT: database, FRESH: fresh}) as connection,
    ):
        current_tables = _tables(connection, CURRENT)
        fresh_tables = _tables(connection, FRESH)
        report = CheckReport({name: _count(connection, name) for name in current_tables})
        report.problems.extend(f"{line}: repair or remove it" for line in refused)
        report.problems.extend(_schema_differences(connection, current_tables, fresh_tables))
        changed = _changed_since(home, connection, began)
        for table, columns in fresh_tables.items():
            if current_tables.get(table) == columns:
                report.problems.extend(_row_differences(connection, table, columns, changed))
        if changed:
            report.notes.append(
                f"changed during the check, not compared: {', '.join(sorted(changed))}"
            )
        if not filecmp.cmp(database, snapshot, shallow=False):
            report.problems.append(f"{snapshot} differs from {database.name}: {REBUILD_HINT}")
    report.notes.extend(_torn_lines(home))
    return report


@contextmanager
def _rebuilt(home: Path) -> Iterator[tuple[Path, list[str]]]:
    """Rebuild in a temporary folder of links to the home's files; yield the path and problems."""
    skipped = (".", paths.database(home).name, paths.snapshot(home).name, "store.lock")
    with tempfile.TemporaryDirectory(prefix=".check-", dir=home) as name:
        folder = Path(name)
        for path in home.iterdir():
            if not path.name.startswith(skipped):
                (folder / path.name).symlink_to(path.resolve())
        problems = rebuild(folder).problems
        yield paths.database(folder), [line.replace(str(folder), str(home)) for line in problems]


@contextmanager
def _attached(databases: dict[str, Path]) -> Iterator[duckdb.DuckDBPyConnection]:
    """Yield a connection with some databases attached read-only, by name."""
    import duckdb

    with duckdb.connect(":memory:") as connection:
        for name, path in databases.items():
            try:
                connection.execute(f"ATTACH '{paths.escape(path)}' AS {name} (READ_ONLY)")
            except duckdb.Error as error:
                raise StoreError(
                    f"{path}: {paths.first_line(error)}: close it in that process"
                ) from None
        yield connection


def _tables(connection: duckdb.DuckDBPyConnection, database: str) -> Columns:
    tables: Columns = {}
    query = """SELECT c.table_name, column_name, data_type FROM duckdb_columns() c
               JOIN duckdb_tables() t USING (database_name, schema_name, table_name)
               WHERE database_name = ? ORDER BY c.table_name, column_index"""
    for table, column, kind in connection.execute(query, [database]).fetchall():
        tables.setdefault(table, []).append((column, kind))
    return tables


def _count(connection: duckdb.DuckDBPyConnection, table: str) -> int:
    query = f'SELECT count(*) FROM {CURRENT}."{table}"'  # noqa: S608 the table's name is our own
    return connection.execute(query).fetchall()[0][0]


def _schema_differences(
    connection: duckdb.DuckDBPyConnection, current: Columns, fresh: Columns
) -> Iterator[str]:
    """Yield the tables, views and rules that differ from those of this version."""
    for name, columns in fresh.items():
        if current.get(name) != columns:
            yield f"table {name} differs from this version's: {REBUILD_HINT}"
    for kind, query in SCHEMA_QUERIES.items():
        rows = [set(connection.execute(query, [name]).fetchall()) for name in (CURRENT, FRESH)]
        for name in sorted({name for name, _ in rows[0] ^ rows[1]}):
            yield f"a {kind} of {name} differs from this version's: {REBUILD_HINT}"


def _row_differences(
    connection: duckdb.DuckDBPyConnection,
    table: str,
    columns: list[tuple[str, str]],
    changed: set[str],
) -> list[str]:
    """Compare a table's rows, grouped by subject: their number, and the sum of their hashes."""
    names = [name for name, _ in columns]
    query = f"""SELECT subject, coalesce(c.n, 0), coalesce(f.n, 0)
                FROM ({_grouped(CURRENT, table, names)}) c
                FULL JOIN ({_grouped(FRESH, table, names)}) f USING (subject)
                WHERE c.n IS DISTINCT FROM f.n OR c.content IS DISTINCT FROM f.content
                ORDER BY subject"""  # noqa: S608
    lines = []
    for subject, current, fresh in connection.execute(query).fetchall():
        if {subject, *re.split("[ /.]", subject)} & changed:
            continue
        difference = f"the files give {fresh:,}"
        if current == fresh:
            difference = "but their content differs from the files"
        lines.append(
            f"{table} of {subject or 'this home'}: {current:,} rows, {difference}: {REBUILD_HINT}"
        )
    if len(lines) > MAX_LINES:
        lines[MAX_LINES:] = [f"{table}: {len(lines) - MAX_LINES} more like these"]
    return lines


def _grouped(database: str, table: str, columns: list[str]) -> str:
    """Return the query of the number and content of a table's rows about each subject."""
    subjects = ("file", "run_id", "experiment", "hash", "name")
    keys: list[str] = [name for name in subjects if name in columns][:1]
    keys += [name for name in columns if name == "attempt"]
    subject = " || ' ' || ".join(f'CAST("{key}" AS VARCHAR)' for key in keys) or "''"
    content = "sum(CAST(hash(t) AS HUGEINT))"
    return (
        f"SELECT {subject} AS subject, count(*) AS n, {content} AS content "  # noqa: S608
        f'FROM {database}."{table}" t GROUP BY subject'
    )


def _changed_since(home: Path, connection: duckdb.DuckDBPyConnection, began: float) -> set[str]:
    """Return runs, and stems of other files, that changed after the check had begun."""
    query = f"""SELECT file FROM {CURRENT}.cursors c FULL JOIN {FRESH}.cursors f USING (file)
                WHERE c.offset IS DISTINCT FROM f.offset OR c.state IS DISTINCT FROM f.state"""  # noqa: S608
    files = {file.name: file for file in scan(home)}
    changed = set()
    for (name,) in connection.execute(query).fetchall():
        if name not in files or files[name].path.stat().st_mtime >= began:
            folder = name.partition("/")[0]
            changed.add(Path(name).stem if folder in DOCUMENT_FOLDERS else folder)
    return changed


def _torn_lines(home: Path) -> Iterator[str]:
    """Yield a note for each ended attempt whose events file ends within a line."""
    for file in scan(home):
        if file.kind == "events" and file.size and file.path.with_name("exit.json").exists():
            with file.path.open("rb") as content:
                content.seek(-1, 2)
                if content.read() != b"\n":
                    yield (
                        f"{file.path}: its last line is torn, as a killed trainer leaves it; "
                        "it is not counted"
                    )


@dataclass(frozen=True)
class VacuumReport:
    """Space that a vacuum freed."""

    database: int
    """Bytes of slm.duckdb; 0 when a server holds the rows."""
    leftovers: int
    """Bytes of files that nothing needs any more."""
    names: list[str]
    """Names of these files and folders, relative to the home."""


def vacuum(home: Path, patience: float = PATIENCE) -> VacuumReport:
    """Compact the database, publish it, and remove files that nothing needs any more.

    Raises StoreError when another process writes for longer than `patience` seconds, or has the
    database open.
    """
    with hold_store_lock(home, patience):
        names = sorted(_leftovers(home))
        leftovers = sum(_remove(home / name) for name in names)
        database = paths.database(home)
        if paths.server_url() or not database.exists():
            return VacuumReport(0, leftovers, names)
        before = database.stat().st_size
        _compact(database)
        publish(home)
        return VacuumReport(before - database.stat().st_size, leftovers, names)


def _compact(database: Path) -> None:
    import duckdb

    new = database.with_name(f"{database.name}.new")
    new.unlink(missing_ok=True)
    with duckdb.connect(":memory:") as connection:
        try:
            connection.execute(f"ATTACH '{paths.escape(database)}' AS old")
            connection.execute(f"ATTACH '{paths.escape(new)}' AS new")
            connection.execute("COPY FROM DATABASE old TO new; DETACH new; DETACH old")
        except duckdb.Error as error:
            new.unlink(missing_ok=True)
            raise StoreError(
                f"{database} could not be copied and is unchanged: {paths.first_line(error)}"
            ) from None
    new.replace(database)


def _leftovers(home: Path) -> Iterator[str]:
    """Yield the names of stale temporary files, and of parts of evaluations that are complete."""
    for pattern in TEMPORARY_PATTERNS:
        for path in home.glob(pattern):
            # Preparing data may take hours without touching its folder; the next preparation
            # removes what it left.
            stale = (
                time.time() - path.lstat().st_mtime > STALE_SECONDS and path.parent != home / "data"
            )
            complete = path.suffix == ".parts" and path.with_suffix(".json").exists()
            if complete or (stale and TEMPORARY.fullmatch(path.name)):
                yield path.relative_to(home).as_posix()


def _remove(path: Path) -> int:
    """Remove a file or folder, and return its bytes. Links are removed, not followed."""
    if path.is_symlink() or not path.is_dir():
        size = path.lstat().st_size
        path.unlink()
        return size
    size = sum(inner.lstat().st_size for inner in path.rglob("*") if not inner.is_dir())
    shutil.rmtree(path)
    return size
