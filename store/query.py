"""Reading: every question attaches the published snapshot for a moment and never stops the writer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from store.ingest import SNAPSHOT, StoreError

if TYPE_CHECKING:
    import pandas


def home() -> Path:
    """$SLM_HOME, else ./runs."""
    return Path(os.environ.get("SLM_HOME", "runs"))


def sql(query: str, params: Sequence[Any] = (), home: Path | None = None) -> pandas.DataFrame:
    """Rows of a query over the tables and views of README.md; `?` stands for each of `params`.

    Raises StoreError when there is no snapshot, when it is damaged, or for a query that is wrong or would write.
    """
    import duckdb

    snapshot = (home or globals()["home"]()) / SNAPSHOT
    if not snapshot.exists():
        raise StoreError(
            f"{snapshot.parent} has no results yet: `slm sweep` makes some, `slm store rebuild` reads old ones"
        )
    connection = duckdb.connect()
    try:
        try:
            path = str(snapshot).replace("'", "''")
            connection.execute(f"attach '{path}' as snapshot (read_only)")
            connection.execute("use snapshot")
            connection.execute("set enable_external_access = false")
            connection.execute("set lock_configuration = true")
        except duckdb.Error as error:
            line = str(error).splitlines()[0]
            raise StoreError(f"{snapshot} cannot be read ({line}): `slm store rebuild` makes it anew") from None
        try:
            return connection.execute(query, params).df()
        except duckdb.Error as error:
            raise StoreError(str(error).splitlines()[0]) from None
    finally:
        connection.close()


def results(experiment: str | None = None, home: Path | None = None) -> pandas.DataFrame:
    """The view `results`, a row a run, cheapest first; of one experiment when it is named.

    Raises StoreError for an experiment that is not there.
    """
    return _of_experiment("results", "flops_planned, seed, run_id", experiment, home)


def curves(experiment: str | None = None, home: Path | None = None) -> pandas.DataFrame:
    """The view `curves`, a row a run and logged step; of one experiment when it is named.

    Raises StoreError for an experiment that is not there.
    """
    return _of_experiment("curves", "depth, run_id, step", experiment, home)


def _of_experiment(view: str, order: str, experiment: str | None, home: Path | None) -> pandas.DataFrame:
    if experiment is None:
        return sql(f"select * from {view} order by {order}", home=home)  # noqa: S608
    names = sql("select name from experiments order by name", home=home)["name"].tolist()
    if experiment not in names:
        raise StoreError(f"no experiment {experiment!r}: there are {', '.join(names) or 'none'}")
    members = "select run_id from memberships where experiment = ?"
    return sql(f"select * from {view} where run_id in ({members}) order by {order}", [experiment], home)  # noqa: S608
