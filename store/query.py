"""SQL in, DataFrames out, from the published snapshot: no reader ever stops the writer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from store import places
from store.places import QueryError, StoreError

if TYPE_CHECKING:
    import duckdb
    import pandas

Parameters = Sequence[Any] | Mapping[str, Any]


def sql(query: str, params: Parameters | None = None, home: Path | None = None) -> pandas.DataFrame:
    """The rows of a query over the tables and views of README.md; parameters are `?` or `$name`, bound.

    Raises QueryError, one line, for SQL that is wrong or would write; StoreError when there is nothing to read yet.
    """
    with _attached(home or places.home()) as connection:
        return _run(connection, query, params)


def results(experiment: str | None = None, home: Path | None = None) -> pandas.DataFrame:
    """The view `results`, a row a run, cheapest first: of one experiment, or of all runs. Raises as `sql` does."""
    with _attached(home or places.home()) as connection:
        if experiment is None:
            return _run(connection, "SELECT * FROM results ORDER BY flops_planned, recipe, depth, seed, run_id")
        _check_experiment(connection, experiment)
        query = """SELECT results.* FROM results JOIN memberships USING (run_id) WHERE experiment = ?
                   ORDER BY flops_planned, position"""
        return _run(connection, query, [experiment])


def curves(experiment: str | None = None, home: Path | None = None, run: str | None = None) -> pandas.DataFrame:
    """The view `curves`, a row a step: of one experiment, of one run, or of all runs. Raises as `sql` does."""
    with _attached(home or places.home()) as connection:
        if experiment is not None:
            _check_experiment(connection, experiment)
        query = """SELECT * FROM curves
                   WHERE (CAST($run AS text) IS NULL OR run_id = $run)
                     AND (CAST($experiment AS text) IS NULL
                          OR run_id IN (SELECT run_id FROM memberships WHERE experiment = $experiment))
                   ORDER BY depth, run_id, step"""
        return _run(connection, query, {"run": run, "experiment": experiment})


@contextmanager
def _attached(home: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection that sees the snapshot and nothing else of this machine.

    Attached, because DuckDB would hand a second connection of one process the file it had open before.
    """
    import duckdb

    path = places.snapshot(home)
    if not path.exists():
        raise StoreError(f"{home}: no results yet: `slm sweep` makes some, `slm store rebuild` reads old ones")
    with duckdb.connect(":memory:") as connection:
        try:
            quoted = str(path).replace("'", "''")
            connection.execute(f"ATTACH '{quoted}' AS snapshot (READ_ONLY)")
            connection.execute("USE snapshot; SET enable_external_access = false; SET lock_configuration = true")
        except duckdb.Error as error:
            raise places.damaged(path, error) from None
        yield connection


def _run(connection: duckdb.DuckDBPyConnection, query: str, params: Parameters | None = None) -> pandas.DataFrame:
    import duckdb

    reading = (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN)
    try:
        statements = duckdb.extract_statements(query)
        if not statements or statements[-1].type not in reading:
            raise QueryError(f"not a query: {places.first_line(query)!r}; the database is read-only")
        return connection.execute(query, params).df()
    except (duckdb.IOException, duckdb.FatalException, duckdb.InternalException) as error:
        raise places.damaged(Path("results.duckdb"), error) from None
    except duckdb.Error as error:
        raise QueryError(places.first_line(error)) from None


def _check_experiment(connection: duckdb.DuckDBPyConnection, name: str) -> None:
    names = [found for (found,) in connection.execute("SELECT name FROM experiments ORDER BY name").fetchall()]
    if name not in names:
        raise QueryError(f"no experiment {name!r}; there are {', '.join(names) or 'none'}")
