"""Every table and view as Arrow and Parquet, exact to the last digit and one batch at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from store import paths as places
from store import query

if TYPE_CHECKING:
    import pandas
    import pyarrow

    Read = Callable[[str, places.Parameters | None], pyarrow.RecordBatchReader]

BATCH = 100_000
"""Rows that are in memory at a time."""
DICTIONARY = Path(__file__).parent / "README.md"
"""What the columns mean."""
ABOUT = ("experiment", "hash", "run_id")
"""Columns that say what a row is about; the first that a table has decides whether it belongs to an experiment."""
Report = Callable[[int, int], None]
"""Told how many of how many parts are done."""


@contextmanager
def reader(home: Path | None = None) -> Iterator[Read]:
    """Reads queries, each as batches of Arrow, all from the same moment; what one gives ends with the next.

    NULL and NaN stay two things, whole numbers stay whole. Raises as `store.sql` does, while it is read too.
    """
    if url := places.server():
        from store import server

        with server.reading(url) as run:
            yield lambda sql, params: _as_arrow(run(sql, params))
    else:
        with query._attached(home or places.home()) as connection, query._told():
            yield lambda sql, params: query._executed(connection, sql, params).to_arrow_reader(
                BATCH
            )


def _as_arrow(rows: pandas.DataFrame) -> pyarrow.RecordBatchReader:
    """Rows of a server, which come whole; NaN is NULL there."""
    import pyarrow

    return pyarrow.Table.from_pandas(rows, preserve_index=False).to_reader(BATCH)


def write_parquet(rows: pyarrow.RecordBatchReader, file: Path | IO[bytes]) -> int:
    """Write rows as a Parquet file; how many there were."""
    from pyarrow import parquet

    count = 0
    with parquet.ParquetWriter(file, rows.schema, compression="zstd") as writer:
        for batch in rows:
            writer.write_batch(batch)
            count += batch.num_rows
    return count


def first(rows: pyarrow.RecordBatchReader, most: int) -> pyarrow.RecordBatchReader:
    """The first rows of what is read."""
    import pyarrow

    def batches() -> Iterator[pyarrow.RecordBatch]:
        left = most
        for batch in rows:
            yield batch[:left]
            left -= min(left, batch.num_rows)
            if not left:
                return

    return pyarrow.RecordBatchReader.from_batches(rows.schema, batches())


def export(
    home: Path,
    folder: Path,
    only: Mapping[str, Sequence[str]] | None,
    report: Report = lambda done, of: None,
) -> list[dict[str, Any]]:
    """Write own tables and views as `<name>.parquet`; what each is and its columns mean, in words.

    `only`: the values of the ABOUT columns that are wanted, those of one's own home all else. What a table that has
    none of these columns says is about more than they are, and left out.
    """
    with reader(home) as read:
        columns = _columns(read)
        meanings = dictionary()
        wanted = [name for name in columns if only is None or _about(name, columns[name])]
        tables = []
        for number, name in enumerate(wanted):
            report(number, len(wanted))
            kind, about = columns[name][0]["kind"], {"home": places.identity(home), **(only or {})}
            rows = write_parquet(
                read(*_chosen(name, columns[name], about)), folder / f"{name}.parquet"
            )
            described = [
                {
                    "name": column["name"],
                    "type": column["type"],
                    "meaning": meanings.get(name, {}).get(column["name"]),
                }
                for column in columns[name]
            ]
            tables.append({"name": name, "kind": kind, "rows": rows, "columns": described})
    return tables


def _columns(read: Read) -> dict[str, list[dict[str, Any]]]:
    """The columns of every table and view, in their order."""
    found: dict[str, list[dict[str, Any]]] = {}
    listing = """SELECT t.table_name, c.column_name AS name, lower(c.data_type) AS type,
                        CASE WHEN t.table_type = 'VIEW' THEN 'view' ELSE 'table' END AS kind
                 FROM information_schema.tables t
                 JOIN information_schema.columns c ON c.table_catalog = t.table_catalog
                  AND c.table_schema = t.table_schema AND c.table_name = t.table_name
                 WHERE t.table_catalog = current_database() AND t.table_schema = current_schema()
                 ORDER BY t.table_name, c.ordinal_position"""
    for row in read(listing, None).read_all().to_pylist():
        found.setdefault(row.pop("table_name"), []).append(row)
    return found


def _about(table: str, columns: Sequence[Mapping[str, Any]]) -> str | None:
    """The column that says what a table's rows are about."""
    names = {column["name"] for column in columns}
    return (
        "name" if table == "experiments" else next((name for name in ABOUT if name in names), None)
    )


def _chosen(
    table: str, columns: Sequence[Mapping[str, Any]], wanted: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The query of a table's rows that are wanted, and its parameters."""
    params: dict[str, Any] = {}
    rules = []
    if wanted["home"] is not None and any(column["name"] == "home" for column in columns):
        rules.append("home = $home")
        params["home"] = wanted["home"]
    about = _about(table, columns)
    values = wanted.get("experiment" if about == "name" else about or "")
    if values is not None:
        rules.append(f"{about} = ANY($wanted)")
        params["wanted"] = list(values)
    return f'SELECT * FROM "{table}"' + (f" WHERE {' AND '.join(rules)}" if rules else ""), params


def dictionary() -> dict[str, dict[str, str]]:
    """What every column means, by table or view, as README.md says it."""
    meanings: dict[str, dict[str, str]] = {}
    for section in DICTIONARY.read_text(encoding="utf-8").split("\n## ")[1:]:
        if named := re.match(r"(?:View|Table) `(\w+)`", section):
            rows = re.findall(r"^\| (\w+) \| (.+?) \|$", section, re.M)
            meanings[named[1]] = {column: meaning for column, meaning in rows if column != "column"}
    return meanings
