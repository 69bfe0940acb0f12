"""SQL in, DataFrames out, from the snapshot or the server: readers never block the writer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from store import paths
from store.paths import VERSION, Parameters, QueryError, RunQuery

if TYPE_CHECKING:
    import duckdb
    import pandas


def sql(query: str, params: Parameters | None = None, home: Path | None = None) -> pandas.DataFrame:
    """Run a query over the tables and views of README.md, its parameters (`?` or `$name`) bound.

    Raises QueryError, one line, for SQL that is wrong or would write; StoreError while there are no
    results yet.
    """
    with _open_for_reading(home or paths.home()) as run_query:
        return run_query(query, params)


def results(experiment: str | None = None, home: Path | None = None) -> pandas.DataFrame:
    """Return the view `results`, one row per run, cheapest first: of one experiment, or of all runs
    of the home.

    On a server with several homes, the home's own experiment comes before the only one of that name
    elsewhere. Raises as `sql` does.
    """
    home = home or paths.home()
    with _open_for_reading(home) as run_query:
        if experiment is None:
            condition, params = _home_condition(home)
            order = "coalesce(flops_planned, flops), recipe, depth, seed, run_id"
            query = f"SELECT * FROM results{condition} ORDER BY {order}"  # noqa: S608
            return run_query(query, params)
        query = """SELECT results.* FROM results
                   JOIN memberships m ON m.home = results.home AND m.run_id = results.run_id
                   WHERE m.home = ? AND m.experiment = ?
                   ORDER BY coalesce(flops_planned, flops), position, results.run_id"""
        return run_query(query, [_experiment_home(run_query, experiment, home), experiment])


def curves(
    experiment: str | None = None, home: Path | None = None, run: str | None = None
) -> pandas.DataFrame:
    """Return the view `curves`, one row per logged step: of one experiment, one run, or all runs of
    the home.

    Raises as `sql` does.
    """
    home = home or paths.home()
    with _open_for_reading(home) as run_query:
        condition, params = _home_condition(home)
        runs = [run] if run else []
        if experiment is not None:
            owner = _experiment_home(run_query, experiment, home)
            condition = " WHERE home = ?"
            params = [owner]
            members = _members(run_query, experiment, owner)
            runs = [member for member in members if run in (None, member)]
        if experiment is not None or run is not None:
            marks = ", ".join("?" * len(runs)) or "NULL"
            condition += f" {'AND' if condition else 'WHERE'} run_id IN ({marks})"
            params = [*params, *runs]
        query = f"SELECT * FROM curves{condition} ORDER BY depth, run_id, step"  # noqa: S608
        return run_query(query, params)


def _members(run_query: RunQuery, experiment: str, owner: str) -> list[str]:
    """Return the runs of an experiment; a query that names them reads no other run's metrics."""
    query = "SELECT run_id FROM memberships WHERE home = ? AND experiment = ? ORDER BY position"
    return run_query(query, [owner, experiment])["run_id"].tolist()


def experiment_home(experiment: str, home: Path | None = None) -> str:
    """Return the id of the home that an experiment belongs to: this home, else the only other one
    with that name.

    Raises QueryError for an unknown name or one in several other homes, StoreError as `sql` does.
    """
    home = home or paths.home()
    with _open_for_reading(home) as run_query:
        return _experiment_home(run_query, experiment, home)


def _home_condition(home: Path) -> tuple[str, list[Any]]:
    """Return the condition that selects the home's own rows on a server, and its parameters."""
    home_id = paths.home_id(home) if paths.server_url() else None
    return (" WHERE home = ?", [home_id]) if home_id else ("", [])


def _experiment_home(run_query: RunQuery, experiment: str, home: Path) -> str:
    experiments = run_query("SELECT name, home FROM experiments ORDER BY name, home", None)
    owners = [str(owner) for owner in experiments[experiments["name"] == experiment]["home"]]
    home_id = paths.home_id(home)
    if home_id in owners:
        return home_id
    if len(owners) == 1:
        return owners[0]
    if not owners:
        names = ", ".join(dict.fromkeys(experiments["name"])) or "none"
        raise QueryError(f"no experiment {experiment!r}; there are {names}")
    homes = run_query("SELECT home, name FROM homes ORDER BY home", None).to_dict("records")
    owner_names = ", ".join(
        f"{row['home']} ({row['name']})" for row in homes if row["home"] in owners
    )
    raise QueryError(
        f"{experiment!r} is an experiment of {owner_names}: choose one in SQL, "
        f"`where home = '{owners[0]}'`"
    )


@contextmanager
def _open_for_reading(home: Path) -> Iterator[RunQuery]:
    """Yield a function that runs queries; all of them see the rows of the same moment."""
    url = paths.server_url()
    if url:
        from store import server

        with server.open_for_reading(url) as run_query:
            yield run_query
    else:
        with attach_snapshot(home) as connection:
            yield lambda query, params: _run(connection, query, params)


@contextmanager
def attach_snapshot(home: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """Yield a connection that sees the snapshot and no other file of this machine.

    The snapshot is attached rather than opened: DuckDB hands a second connection of one process the
    file that the first one opened, even after it was replaced.
    """
    import duckdb

    path = paths.snapshot(home)
    if not path.exists():
        raise paths.no_results(home)
    with duckdb.connect(":memory:") as connection:
        try:
            connection.execute(f"ATTACH '{paths.escape(path)}' AS snapshot (READ_ONLY)")
            connection.execute(
                "USE snapshot; SET enable_external_access = false; SET lock_configuration = true"
            )
            version = connection.execute("SELECT max(version) FROM schema_version").fetchone()
        except duckdb.Error as error:
            raise paths.damaged(path, error) from None
        if version != (VERSION,):
            raise paths.damaged(path, f"made by another version of the store, this is {VERSION}")
        yield connection


def _run(
    connection: duckdb.DuckDBPyConnection, query: str, params: Parameters | None
) -> pandas.DataFrame:
    with translate_errors():
        return execute(connection, query, params).df()


def execute(
    connection: duckdb.DuckDBPyConnection, query: str, params: Parameters | None
) -> duckdb.DuckDBPyConnection:
    """Execute a query, and return the connection to fetch its rows from.

    Raises QueryError if it would write.
    """
    import duckdb

    reading = (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN)
    statements = duckdb.extract_statements(query)
    if not statements or statements[-1].type not in reading:
        raise QueryError(f"not a query: {paths.first_line(query)!r}; the database is read-only")
    return connection.execute(query, params or None)


@contextmanager
def translate_errors() -> Iterator[None]:
    """Raise DuckDB's errors as QueryError or StoreError, one line each."""
    import duckdb

    try:
        yield
    except (duckdb.IOException, duckdb.FatalException, duckdb.InternalException) as error:
        raise paths.damaged(Path("results.duckdb"), error) from None
    except duckdb.Error as error:
        raise QueryError(paths.first_line(error)) from None
