"""Whether the database says what the files say, and what can be cleared away."""

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

from store import paths as places
from store.documents import scan
from store.ingest import PATIENCE, _alone, _publish, ingest, rebuild
from store.paths import StoreError

if TYPE_CHECKING:
    import duckdb

STALE_SECONDS = 3600.0
"""Age at which a temporary name is nobody's any more."""
AGAIN = "`slm store rebuild` makes it anew from the run folders"
TEMPORARY = re.compile(
    r"\..+\.\d+|\.unfinished-.+|\.check-.+|slm\.duckdb\.(new|events)|(results\.duckdb|home\.json)\.new"
)
"""What is renamed once it is whole, or removed."""
PLACES = ("*", "*/*", "*/attempts/*", "*/attempts/*/*", "*/evals/*")
"""Where that lies in a home."""
FOLDERS = ("experiments", "fits", "imports")
"""What lies in a home beside runs."""
MOST = 5
"""Lines of one table, at most."""


@dataclass(frozen=True)
class Checked:
    """What a check found."""

    rows: dict[str, int]
    """Rows of each table."""
    problems: list[str] = field(default_factory=list)
    """A line each, with the way out."""
    notes: list[str] = field(default_factory=list)
    """What is no fault, a line each."""


def check(home: Path, patience: float = PATIENCE) -> Checked:
    """Make the database again from the files, beside the one that is there, and compare them to the last row.

    What the files hold is read first, as by any command. It takes the time of a rebuild, and room for two more
    databases. Raises StoreError when another process writes for longer than `patience` seconds.
    """
    if places.server():
        raise StoreError(
            "SLM_STORE names a server, and a check is of a home's own file: `slm store rebuild` writes the home's "
            "rows anew there; with SLM_STORE unset, `slm store check` makes a file and checks it"
        )
    began = time.time()
    try:
        ingest(home, patience)
    except StoreError as error:
        if not places.live(home).exists():
            raise
        return Checked({}, [str(error)])
    with _alone(home, patience), _rebuilt(home) as (anew, refused), _both(home, anew) as connection:
        found = Checked(_counts(connection))
        found.problems.extend(f"{line}: mend or remove it" for line in refused)
        found.problems.extend(_shape(connection))
        _compare(connection, found, _moved(home, connection, began))
        if not filecmp.cmp(places.live(home), places.snapshot(home), shallow=False):
            found.problems.append(
                f"{places.snapshot(home)} is not what {places.live(home).name} holds: {AGAIN}"
            )
    found.notes.extend(_torn(home))
    return found


@contextmanager
def _rebuilt(home: Path) -> Iterator[tuple[Path, list[str]]]:
    """A database made from a home's files, and what its making complained of: of links to what the home holds."""
    with tempfile.TemporaryDirectory(prefix=".check-", dir=home) as name:
        folder = Path(name)
        for path in home.iterdir():
            if not path.name.startswith(
                (".", places.live(home).name, places.snapshot(home).name, "store.lock")
            ):
                (folder / path.name).symlink_to(path.resolve())
        problems = rebuild(folder).problems
        yield places.live(folder), [line.replace(str(folder), str(home)) for line in problems]


@contextmanager
def _both(home: Path, anew: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection to the database of a home and to another, as `own` and `anew`."""
    import duckdb

    with duckdb.connect(":memory:") as connection:
        for name, path in (("own", places.live(home)), ("anew", anew)):
            try:
                connection.execute(f"ATTACH '{places.quoted(path)}' AS {name} (READ_ONLY)")
            except duckdb.Error as error:
                raise StoreError(f"{path}: {places.first_line(error)}: close it there") from None
        yield connection


def _tables(
    connection: duckdb.DuckDBPyConnection, database: str
) -> dict[str, list[tuple[str, str]]]:
    """The columns and types of every table."""
    found: dict[str, list[tuple[str, str]]] = {}
    query = """SELECT c.table_name, column_name, data_type FROM duckdb_columns() c
               JOIN duckdb_tables() t USING (database_name, schema_name, table_name)
               WHERE database_name = ? ORDER BY c.table_name, column_index"""
    for table, column, kind in connection.execute(query, [database]).fetchall():
        found.setdefault(table, []).append((column, kind))
    return found


def _counts(connection: duckdb.DuckDBPyConnection) -> dict[str, int]:
    names = _tables(connection, "own")
    return {
        name: connection.execute(f'SELECT count(*) FROM own."{name}"').fetchall()[0][0]
        for name in names
    }


def _shape(connection: duckdb.DuckDBPyConnection) -> list[str]:
    """Tables, views and rules that are not those of this version."""
    own, anew = _tables(connection, "own"), _tables(connection, "anew")
    lines = [
        f"table {name} is not that of this version: {AGAIN}"
        for name in anew
        if own.get(name) != anew[name]
    ]
    for what, query in (
        (
            "view",
            "SELECT view_name, sql FROM duckdb_views() WHERE NOT internal AND database_name = ?",
        ),
        (
            "rule",
            "SELECT table_name, constraint_text FROM duckdb_constraints() WHERE database_name = ?",
        ),
    ):
        here, there = (
            set(connection.execute(query, [name]).fetchall()) for name in ("own", "anew")
        )
        names = sorted({name for name, _ in here ^ there})
        lines += [f"a {what} of {name} is not that of this version: {AGAIN}" for name in names]
    return lines


def _compare(connection: duckdb.DuckDBPyConnection, found: Checked, moved: set[str]) -> None:
    """Every table's rows by what they are about: how many there are, and the sum of their hashes."""
    own = _tables(connection, "own")
    for table, columns in _tables(connection, "anew").items():
        if own.get(table) != columns:
            continue
        sides = [_grouped(side, table, [name for name, _ in columns]) for side in ("own", "anew")]
        query = f"""SELECT about, coalesce(o.n, 0), coalesce(a.n, 0)
                    FROM ({sides[0]}) o FULL JOIN ({sides[1]}) a USING (about)
                    WHERE o.n IS DISTINCT FROM a.n OR o.content IS DISTINCT FROM a.content ORDER BY about"""
        lines = []
        for about, here, there in connection.execute(query).fetchall():
            if not {about, *re.split("[ /.]", about)} & moved:
                words = (
                    "but not those of the files" if here == there else f"the files give {there:,}"
                )
                lines.append(f"{table} of {about or 'this home'}: {here:,} rows, {words}: {AGAIN}")
        found.problems.extend(lines[:MOST])
        found.problems.extend(
            [f"{table}: {len(lines) - MOST} more such"] if len(lines) > MOST else []
        )
    if moved:
        found.notes.append(f"changed meanwhile, not compared: {', '.join(sorted(moved))}")


def _grouped(database: str, table: str, columns: list[str]) -> str:
    """The query of how many rows a table has about each thing, and of what content."""
    known = ("file", "run_id", "experiment", "hash", "name")
    keys = [
        *[name for name in known if name in columns][:1],
        *(["attempt"] if "attempt" in columns else []),
    ]
    about = " || ' ' || ".join(f'CAST("{key}" AS VARCHAR)' for key in keys) or "''"
    content = "sum(CAST(hash(t) AS HUGEINT))"
    return f'SELECT {about} AS about, count(*) AS n, {content} AS content FROM {database}."{table}" t GROUP BY about'


def _moved(home: Path, connection: duckdb.DuckDBPyConnection, began: float) -> set[str]:
    """Runs and names of other files that changed after the check began, and after what it read first."""
    query = """SELECT file FROM own.cursors FULL JOIN anew.cursors a USING (file)
               WHERE own.cursors.offset IS DISTINCT FROM a.offset OR own.cursors.state IS DISTINCT FROM a.state"""
    names = [name for (name,) in connection.execute(query).fetchall()]
    files = {file.name: file for file in scan(home)}
    fresh = [
        name for name in names if name not in files or files[name].path.stat().st_mtime >= began
    ]
    return {
        Path(name).stem if name.partition("/")[0] in FOLDERS else name.partition("/")[0]
        for name in fresh
    }


def _torn(home: Path) -> list[str]:
    """Events files of attempts that ended within a line."""
    lines = []
    for file in scan(home):
        if file.kind == "events" and file.size and file.path.with_name("exit.json").exists():
            with file.path.open("rb") as content:
                content.seek(-1, 2)
                if content.read() != b"\n":
                    lines.append(
                        f"{file.path}: its last line is torn, as a killed trainer leaves it; it is not counted"
                    )
    return lines


@dataclass(frozen=True)
class Freed:
    """What a vacuum freed, in bytes."""

    database: int
    """Of slm.duckdb; none where a server holds the rows."""
    leftovers: int
    """Of files that belong to nothing any more."""
    names: list[str]
    """Those files and folders, below the home."""


def vacuum(home: Path, patience: float = PATIENCE) -> Freed:
    """Copy the database into a new, dense file, publish it, and remove what belongs to nothing any more.

    Raises StoreError when another process writes for longer than `patience` seconds, or has the database open.
    """
    with _alone(home, patience):
        names = sorted(_leftovers(home))
        leftovers = sum(_remove(home / name) for name in names)
        live = places.live(home)
        before = live.stat().st_size if live.exists() and not places.server() else 0
        if before:
            _make_dense(live)
            _publish(home)
        return Freed(before - live.stat().st_size if before else 0, leftovers, names)


def _make_dense(live: Path) -> None:
    import duckdb

    new = live.with_name(f"{live.name}.new")
    new.unlink(missing_ok=True)
    with duckdb.connect(":memory:") as connection:
        try:
            for name, path in (("own", live), ("new", new)):
                connection.execute(f"ATTACH '{places.quoted(path)}' AS {name}")
            connection.execute("COPY FROM DATABASE own TO new; DETACH new; DETACH own")
        except duckdb.Error as error:
            new.unlink(missing_ok=True)
            raise StoreError(
                f"{live} could not be copied, it stays as it is: {places.first_line(error)}"
            ) from None
    new.replace(live)


def _leftovers(home: Path) -> Iterator[str]:
    """Temporary names that are old, and parts of evaluations that are finished.

    Data may be prepared for hours without a change of its folder, and what is left of it goes with the next.
    """
    for place in PLACES:
        for path in home.glob(place):
            old = (
                time.time() - path.lstat().st_mtime > STALE_SECONDS and path.parent != home / "data"
            )
            finished = path.suffix == ".parts" and path.with_suffix(".json").exists()
            if finished or (old and TEMPORARY.fullmatch(path.name)):
                yield path.relative_to(home).as_posix()


def _remove(path: Path) -> int:
    """Remove a file or a folder; its bytes. A link is removed, not what it leads to."""
    if path.is_symlink() or not path.is_dir():
        size = path.lstat().st_size
        path.unlink()
        return size
    size = sum(inner.lstat().st_size for inner in path.rglob("*") if not inner.is_dir())
    shutil.rmtree(path)
    return size
