"""SQL in, DataFrames out, from the published snapshot or the server: no reader ever stops the writer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from store import paths as places
from store.paths import VERSION, Parameters, QueryError, Run, StoreError

if TYPE_CHECKING:
    import duckdb
    import pandas


def sql(query: str, params: Parameters | None = None, home: Path | None = None) -> pandas.DataFrame:
    """The rows of a query over the tables and views of README.md; parameters are `?` or `$name`, bound.

    Raises QueryError, one line, for SQL that is wrong or would write; StoreError when there is nothing to read yet.
    """
    with _reading(home or places.home()) as run:
        return run(query, params)


def results(experiment: str | None = None, home: Path | None = None) -> pandas.DataFrame:
    """The view `results`, a row a run, cheapest first: of one experiment, or of all runs of the home.

    Of several homes on a server the experiment is the home's own, else the only other's. Raises as `sql` does.
    """
    home = home or places.home()
    with _reading(home) as run:
        if experiment is None:
            where, params = _own(home)
            order = "coalesce(flops_planned, flops), recipe, depth, seed, run_id"
            return run(f"SELECT * FROM results{where} ORDER BY {order}", params)
        query = """SELECT results.* FROM results
                   JOIN memberships m ON m.home = results.home AND m.run_id = results.run_id
                   WHERE m.home = ? AND m.experiment = ?
                   ORDER BY coalesce(flops_planned, flops), position, results.run_id"""
        return run(query, [_home_of(run, experiment, home), experiment])


def curves(
    experiment: str | None = None, home: Path | None = None, run: str | None = None
) -> pandas.DataFrame:
    """The view `curves`, a row a step: of one experiment, of one run, or of all runs of the home. As `results` does."""
    home = home or places.home()
    with _reading(home) as ask:
        where, params = _own(home)
        runs = [run] if run else []
        if experiment is not None:
            own = _home_of(ask, experiment, home)
            where, params = " WHERE home = ?", [own]
            runs = [member for member in _members(ask, experiment, own) if run in (None, member)]
        if experiment is not None or run is not None:
            marks = ", ".join("?" * len(runs)) or "NULL"
            where, params = (
                f"{where} {'AND' if where else 'WHERE'} run_id IN ({marks})",
                [*params, *runs],
            )
        return ask(f"SELECT * FROM curves{where} ORDER BY depth, run_id, step", params)


def _members(ask: Run, experiment: str, home: str) -> list[str]:
    """The runs of an experiment: a query that names them reads no other's metrics."""
    query = "SELECT run_id FROM memberships WHERE home = ? AND experiment = ? ORDER BY position"
    return ask(query, [home, experiment])["run_id"].tolist()


def home_of(experiment: str, home: Path | None = None) -> str:
    """Which home's an experiment is: the home's own, else the only other's. Raises as `sql` does."""
    home = home or places.home()
    with _reading(home) as run:
        return _home_of(run, experiment, home)


def _own(home: Path) -> tuple[str, list[Any]]:
    """The condition of the home's own rows, where there are others'."""
    own = places.identity(home) if places.server() else None
    return (" WHERE home = ?", [own]) if own else ("", [])


def _home_of(run: Run, experiment: str, home: Path) -> str:
    names = run("SELECT name, home FROM experiments ORDER BY name, home", None)
    homes = [str(own) for own in names[names["name"] == experiment]["home"]]
    own = places.identity(home)
    if own in homes or len(homes) == 1:
        return own if own in homes else homes[0]
    if not homes:
        raise QueryError(
            f"no experiment {experiment!r}; there are {', '.join(dict.fromkeys(names['name'])) or 'none'}"
        )
    known = run("SELECT home, name FROM homes ORDER BY home", None)
    of = ", ".join(
        f"{row['home']} ({row['name']})" for row in known.to_dict("records") if row["home"] in homes
    )
    raise QueryError(
        f"{experiment!r} is an experiment of {of}: `store.sql` can say which, `where home = '{homes[0]}'`"
    )


@contextmanager
def _reading(home: Path) -> Iterator[Run]:
    """What runs queries, each of the same moment's rows."""
    url = places.server()
    if url:
        from store import server

        with server.reading(url) as run:
            yield run
    else:
        with _attached(home) as connection:
            yield lambda query, params: _run(connection, query, params)


@contextmanager
def _attached(home: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection that sees the snapshot and nothing else of this machine.

    Attached, because DuckDB would hand a second connection of one process the file it had open before.
    """
    import duckdb

    path = places.snapshot(home)
    if not path.exists():
        raise StoreError(
            f"{home}: no results yet: `slm sweep` makes some, `slm store rebuild` reads old ones"
        )
    with duckdb.connect(":memory:") as connection:
        try:
            connection.execute(f"ATTACH '{places.quoted(path)}' AS snapshot (READ_ONLY)")
            connection.execute(
                "USE snapshot; SET enable_external_access = false; SET lock_configuration = true"
            )
            version = connection.execute("SELECT max(version) FROM schema_version").fetchone()
        except duckdb.Error as error:
            raise places.damaged(path, error) from None
        if version != (VERSION,):
            raise places.damaged(
                path, f"it is of another version of the store than this one ({VERSION})"
            )
        yield connection


def _run(
    connection: duckdb.DuckDBPyConnection, query: str, params: Parameters | None
) -> pandas.DataFrame:
    with _told():
        return _executed(connection, query, params).df()


def _executed(
    connection: duckdb.DuckDBPyConnection, query: str, params: Parameters | None
) -> duckdb.DuckDBPyConnection:
    """A connection whose rows are a query's."""
    import duckdb

    reading = (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN)
    statements = duckdb.extract_statements(query)
    if not statements or statements[-1].type not in reading:
        raise QueryError(f"not a query: {places.first_line(query)!r}; the database is read-only")
    return connection.execute(query, params or None)


@contextmanager
def _told() -> Iterator[None]:
    """What DuckDB cannot do, as a line of ours."""
    import duckdb

    try:
        yield
    except (duckdb.IOException, duckdb.FatalException, duckdb.InternalException) as error:
        raise places.damaged(Path("results.duckdb"), error) from None
    except duckdb.Error as error:
        raise QueryError(places.first_line(error)) from None
