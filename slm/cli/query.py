"""`slm query` and `slm store`: SQL in, tables out."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Exit, Option

import store
from slm.cli.options import Json, print_result, report_problems
from slm.cli.output import Format, write_rows
from slm.files import replacing
from slm.text import count
from store import home, paths, tables

if TYPE_CHECKING:
    import pyarrow

TABLE_ROWS = 1000
"""Rows printed of a table without --limit."""


def query(
    sql: Annotated[str, Argument(help="A SELECT over the tables and views of store/README.md.")],
    output_format: Annotated[Format, Option("--format", help="Format of the rows.")] = Format.TABLE,
    output: Annotated[
        Path | None, Option("--output", "-o", help="File to write instead of printing.")
    ] = None,
    param: Annotated[
        list[str] | None,
        Option("--param", help="A value for $NAME in the query.", metavar="NAME=VALUE"),
    ] = None,
    limit: Annotated[
        int | None,
        Option(
            min=1, help=f"Maximum rows; default {TABLE_ROWS:,} in a table, all in other formats."
        ),
    ] = None,
) -> None:
    """Query the results database."""
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
    first = tables.first(rows, TABLE_ROWS + 1).read_all()
    if len(first) > TABLE_ROWS:
        report_problems(
            [f"only the first {TABLE_ROWS:,} rows; --limit N shows more, --format csv all"]
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
        params[name] = value
        with suppress(ValueError):
            document = json.loads(value)
            if not isinstance(document, list | dict):
                params[name] = document
    return params


def rebuild(as_json: Json = False) -> None:
    """Recreate the database from the run folders."""
    counts = store.rebuild(home())
    report_problems(counts.problems)
    print_result(
        as_json,
        {"runs": counts.runs, "metrics": counts.metrics, "problems": counts.problems},
        f"{home()}: {counts.runs} runs, {counts.metrics} metric values",
    )


def check(as_json: Json = False) -> None:
    """Compare the database with the run folders, row by row; exit code 1 if they differ."""
    report = store.check(home())
    result = f"clean: {sum(report.rows.values()):,} rows of {len(report.rows)} tables"
    if report.problems:
        result = f"{len(report.problems)} problems"
    notes = [f"note: {line}" for line in report.notes]
    lines = [*notes, *report.problems, f"{home()}: {result}"]
    print_result(as_json, {"home": home(), **vars(report)}, "\n".join(lines))
    if report.problems:
        raise Exit(1)


def vacuum(as_json: Json = False) -> None:
    """Compact the database file, remove what interrupted commands left, and say what that frees."""
    report = store.vacuum(home())
    lines = [f"removed {name}" for name in report.names]
    if paths.server_url():
        lines.append("results are in PostgreSQL; run VACUUM there")
    database = count(max(report.database, 0))
    lines.append(f"freed {database}B of the database, {count(report.leftovers)}B of leftovers")
    print_result(as_json, {"home": home(), **vars(report)}, "\n".join(lines))
