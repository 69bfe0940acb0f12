"""Every table and view as Arrow and Parquet, exact to the last digit and one batch at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from store import paths, query

if TYPE_CHECKING:
    import pandas
    import pyarrow

    Read = Callable[[str, paths.Parameters | None], pyarrow.RecordBatchReader]

BATCH = 100_000
"""Rows in memory at a time."""
DICTIONARY = Path(__file__).parent / "README.md"
"""Document with the meaning of every column."""
KEY_COLUMNS = ("experiment", "hash", "run_id")
"""Columns that name a row's subject; a selection uses the first one that a table has."""
Report = Callable[[int, int], None]
"""Progress callback: parts done, and parts in all."""


@contextmanager
def reader(home: Path | None = None) -> Iterator[Read]:
    """Yield a function that runs queries and returns Arrow batches, all from the same moment.

    The batches of one query end when the next one is run. NULL and NaN stay distinct, whole numbers
    stay whole. Raises as `store.sql` does, while batches are read too.
    """
    if url := paths.server_url():
        from store import server

        with server.open_for_reading(url) as run_query:
            yield lambda sql, params: _as_arrow(run_query(sql, params))
    else:
        with query.attach_snapshot(home or paths.home()) as connection, query.translate_errors():
            yield lambda sql, params: query.execute(connection, sql, params).to_arrow_reader(BATCH)


def _as_arrow(rows: pandas.DataFrame) -> pyarrow.RecordBatchReader:
    """Convert the rows of a server, which arrive all at once and have NULL for NaN."""
    import pyarrow

    return pyarrow.Table.from_pandas(rows, preserve_index=False).to_reader(BATCH)


def write_parquet(rows: pyarrow.RecordBatchReader, file: Path | IO[bytes]) -> int:
    """Write rows as a Parquet file, and return their number."""
    from pyarrow import parquet

    count = 0
    with parquet.ParquetWriter(file, rows.schema, compression="zstd") as writer:
        for batch in rows:
            writer.write_batch(batch)
            count += batch.num_rows
    return count


def first(rows: pyarrow.RecordBatchReader, limit: int) -> pyarrow.RecordBatchReader:
    """Return the first `limit` rows."""
    import pyarrow

    def batches() -> Iterator[pyarrow.RecordBatch]:
        remaining = limit
        for batch in rows:
            yield batch[:remaining]
            remaining -= min(remaining, batch.num_rows)
            if not remaining:
                return

    return pyarrow.RecordBatchReader.from_batches(rows.schema, batches())


def export(
    home: Path,
    folder: Path,
    selection: Mapping[str, Sequence[str]] | None,
    report: Report = lambda done, of: None,
) -> list[dict[str, Any]]:
    """Write the home's tables and views as `<name>.parquet`, and return a description of each with
    its columns.

    `selection` maps KEY_COLUMNS to the values to export; None exports everything. Tables without a
    key column are left out of a selection, since their rows are about more than it.
    """
    with reader(home) as read:
        columns = _columns(read)
        meanings = dictionary()
        names = [
            name
            for name in columns
            if selection is None or _key_column(name, columns[name]) is not None
        ]
        filters = {"home": paths.home_id(home), **(selection or {})}
        tables = []
        for number, name in enumerate(names):
            report(number, len(names))
            rows = write_parquet(
                read(*_select(name, columns[name], filters)), folder / f"{name}.parquet"
            )
            table_meanings = meanings.get(name, {})
            described = [
                {
                    "name": column["name"],
                    "type": column["type"],
                    "meaning": table_meanings.get(column["name"]),
                }
                for column in columns[name]
            ]
            kind = columns[name][0]["kind"]
            tables.append({"name": name, "kind": kind, "rows": rows, "columns": described})
    return tables


def _columns(read: Read) -> dict[str, list[dict[str, Any]]]:
    """Return the columns of every table and view, in order."""
    columns: dict[str, list[dict[str, Any]]] = {}
    listing = """SELECT t.table_name, c.column_name AS name, lower(c.data_type) AS type,
                        CASE WHEN t.table_type = 'VIEW' THEN 'view' ELSE 'table' END AS kind
                 FROM information_schema.tables t
                 JOIN information_schema.columns c ON c.table_catalog = t.table_catalog
                  AND c.table_schema = t.table_schema AND c.table_name = t.table_name
                 WHERE t.table_catalog = current_database() AND t.table_schema = current_schema()
                 ORDER BY t.table_name, c.ordinal_position"""
    for row in read(listing, None).read_all().to_pylist():
        columns.setdefault(row.pop("table_name"), []).append(row)
    return columns


def _key_column(table: str, columns: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the column that names the subject of a table's rows."""
    if table == "experiments":
        return "name"
    names = {column["name"] for column in columns}
    return next((name for name in KEY_COLUMNS if name in names), None)


def _select(
    table: str, columns: Sequence[Mapping[str, Any]], filters: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Return the query of a table's selected rows, and its parameters."""
    params: dict[str, Any] = {}
    rules = []
    if filters["home"] is not None and any(column["name"] == "home" for column in columns):
        rules.append("home = $home")
        params["home"] = filters["home"]
    key = _key_column(table, columns)
    values = filters.get("experiment" if key == "name" else key or "")
    if values is not None:
        rules.append(f"{key} = ANY($selected)")
        params["selected"] = list(values)
    condition = f" WHERE {' AND '.join(rules)}" if rules else ""
    return f'SELECT * FROM "{table}"{condition}', params  # noqa: S608


def dictionary() -> dict[str, dict[str, str]]:
    """Return the meaning of every column in README.md, by table or view."""
    meanings: dict[str, dict[str, str]] = {}
    for section in DICTIONARY.read_text(encoding="utf-8").split("\n## ")[1:]:
        if title := re.match(r"(?:View|Table) `(\w+)`", section):
            rows = re.findall(r"^\| (\w+) \| (.+?) \|$", section, re.M)
            meanings[title[1]] = {column: meaning for column, meaning in rows if column != "column"}
    return meanings
