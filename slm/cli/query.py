"""`slm query` and `slm store`: SQL in, tables out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slm.cli.options import Json, print_json, report_problems
from slm.cli.output import Format, write
from slm.files import replacing
from slm.text import count

if TYPE_CHECKING:
    import pyarrow

SHOWN = 1000
"""Rows of a table, at most, unless --limit says otherwise."""


def query(
    sql: Annotated[
        str, typer.Argument(help="A SELECT over the tables and views of store/README.md.")
    ],
    form: Annotated[Format, typer.Option("--format", help="How to print the rows.")] = Format.TABLE,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A file to write instead.")
    ] = None,
    param: Annotated[
        list[str] | None,
        typer.Option("--param", help="A value for $NAME in the query.", metavar="NAME=VALUE"),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help=f"Rows at most; {SHOWN:,} in a table, all in other formats."),
    ] = None,
) -> None:
    """Query the results database."""
    from store import tables

    if form is Format.PARQUET and output is None and sys.stdout.isatty():
        raise ValueError("--format parquet is not for a terminal: --output FILE, or send it on")
    with tables.reader() as read:
        rows = read(sql, _params(param or ()) or None)
        if limit:
            rows = tables.first(rows, limit)
        elif form in (Format.TABLE, Format.MARKDOWN):
            rows = _shown(rows)
        if output:
            with replacing(output) as temporary, temporary.open("wb") as file:
                write(rows, form, file)
        else:
            write(rows, form, sys.stdout.buffer)


def _shown(rows: pyarrow.RecordBatchReader) -> pyarrow.RecordBatchReader:
    """As many rows as people read; says so where there are more."""
    from store import tables

    found = tables.first(rows, SHOWN + 1).read_all()
    if len(found) > SHOWN:
        print(
            f"slm: only the first {SHOWN:,} rows; --limit N shows more, --format csv all",
            file=sys.stderr,
        )
    return found[:SHOWN].to_reader()


def _params(given: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """The values of parameters: as JSON writes numbers, true, false, null and "texts"; else a text as it is."""
    params: dict[str, Any] = {}
    for text in given:
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
        print_json(
            {"runs": counts.runs, "metrics": counts.metrics, "problems": list(counts.problems)}
        )
    else:
        print(f"{store.home()}: {counts.runs} runs, {counts.metrics} metric values")


def check(as_json: Json = False) -> None:
    """Compare the database with the run folders to the last row; exit code 1 where it does not hold what they say."""
    import store

    found = store.check(store.home())
    if as_json:
        print_json({"home": str(store.home()), **vars(found)})
    else:
        for line in found.notes:
            print(f"note: {line}")
        for line in found.problems:
            print(line)
        clean = (
            ""
            if found.problems
            else f"clean: {sum(found.rows.values()):,} rows of {len(found.rows)} tables"
        )
        print(f"{store.home()}: {clean or f'{len(found.problems)} problems'}")
    if found.problems:
        raise typer.Exit(1)


def vacuum(as_json: Json = False) -> None:
    """Make the database's file dense, and remove what interrupted commands left; says what that frees."""
    import store
    from store import paths

    freed = store.vacuum(store.home())
    if as_json:
        print_json({"home": str(store.home()), **vars(freed)})
        return
    for name in freed.names:
        print(f"removed {name}")
    if paths.server_url():
        print("the rows lie on a server, which keeps its own files dense: VACUUM is its matter")
    print(
        f"freed {count(max(freed.database, 0))}B of the database, {count(freed.leftovers)}B of leftovers"
    )
