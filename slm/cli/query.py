"""`slm query` and `slm store`: SQL in, tables out."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slm.cli.options import Json, print_json, report_problems
from slm.cli.output import Format, write_rows
from slm.files import replacing
from slm.text import count

if TYPE_CHECKING:
    import pyarrow

TABLE_ROWS = 1000
"""Rows printed of a table without --limit."""


def query(
    sql: Annotated[
        str, typer.Argument(help="A SELECT over the tables and views of store/README.md.")
    ],
    output_format: Annotated[
        Format, typer.Option("--format", help="Format of the rows.")
    ] = Format.TABLE,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write instead of printing.")
    ] = None,
    param: Annotated[
        list[str] | None,
        typer.Option("--param", help="A value for $NAME in the query.", metavar="NAME=VALUE"),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"Maximum rows; default {TABLE_ROWS:,} in a table, all in other formats."
        ),
    ] = None,
) -> None:
    """Query the results database."""
    from store import tables

    if output_format is Format.PARQUET and output is None and sys.stdout.isatty():
        raise ValueError(
            "--format parquet cannot be printed: name a file with --output, or pipe it"
        )
    with tables.reader() as read:
        rows = read(sql, _parse_params(param or ()) or None)
        if limit:
            rows = tables.first(rows, limit)
        elif output_format in (Format.TABLE, Format.MARKDOWN):
            rows = _table_rows(rows)
        if output:
            with replacing(output) as temporary, temporary.open("wb") as file:
                write_rows(rows, output_format, file)
        else:
            write_rows(rows, output_format, sys.stdout.buffer)


def _table_rows(rows: pyarrow.RecordBatchReader) -> pyarrow.RecordBatchReader:
    """Return the rows of a table for people; a line on standard error says if there are more."""
    from store import tables

    first = tables.first(rows, TABLE_ROWS + 1).read_all()
    if len(first) > TABLE_ROWS:
        print(
            f"slm: only the first {TABLE_ROWS:,} rows; --limit N shows more, --format csv all",
            file=sys.stderr,
        )
    return first[:TABLE_ROWS].to_reader()


def _parse_params(texts: Sequence[str]) -> dict[str, Any]:
    """Parse NAME=VALUE: JSON numbers, true, false, null and "texts"; any other value is a text.

    Raises ValueError for a text without a name.
    """
    params: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--param {text}: write NAME=VALUE, and $NAME in the query")
        try:
            params[name] = json.loads(value)
        except ValueError:
            params[name] = value
        if isinstance(params[name], list | dict):
            params[name] = value
    return params


def rebuild(as_json: Json = False) -> None:
    """Recreate the database from the run folders."""
    import store

    counts = store.rebuild(store.home())
    report_problems(counts.problems)
    if as_json:
        document = {"runs": counts.runs, "metrics": counts.metrics, "problems": counts.problems}
        print_json(document)
    else:
        print(f"{store.home()}: {counts.runs} runs, {counts.metrics} metric values")


def check(as_json: Json = False) -> None:
    """Compare the database with the run folders, row by row; exit code 1 if they differ."""
    import store

    report = store.check(store.home())
    if as_json:
        print_json({"home": str(store.home()), **vars(report)})
    else:
        for line in report.notes:
            print(f"note: {line}")
        for line in report.problems:
            print(line)
        result = f"{len(report.problems)} problems"
        if not report.problems:
            result = f"clean: {sum(report.rows.values()):,} rows of {len(report.rows)} tables"
        print(f"{store.home()}: {result}")
    if report.problems:
        raise typer.Exit(1)


def vacuum(as_json: Json = False) -> None:
    """Compact the database file, remove what interrupted commands left, and say what that frees."""
    import store
    from store import paths

    report = store.vacuum(store.home())
    if as_json:
        print_json({"home": str(store.home()), **vars(report)})
        return
    for name in report.names:
        print(f"removed {name}")
    if paths.server_url():
        print("results are in PostgreSQL; run VACUUM there")
    database = count(max(report.database, 0))
    print(f"freed {database}B of the database, {count(report.leftovers)}B of leftovers")
