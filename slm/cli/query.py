"""`slm query` and `slm store`: SQL in, tables out."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated

import typer

from slm.cli.options import Json, print_json, records, report_problems


class Format(StrEnum):
    """How a query's rows are printed."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"


def query(
    sql: Annotated[str, typer.Argument(help="A SELECT over the tables and views of store/README.md.")],
    output: Annotated[Format, typer.Option("--format", help="How to print the rows.")] = Format.TABLE,
) -> None:
    """Query the results database."""
    import store

    frame = store.sql(sql)
    if output is Format.CSV:
        frame.to_csv(sys.stdout, index=False)
    elif output is Format.JSON:
        print_json(records(frame))
    else:
        from tabulate import tabulate

        rows = [list(row.values()) for row in records(frame)]
        print(tabulate(rows, headers=list(frame.columns), missingval="-", floatfmt=".6g"))


def rebuild(as_json: Json = False) -> None:
    """Recreate the database from the run folders."""
    import store

    counts = store.rebuild(store.home())
    report_problems(counts.problems)
    if as_json:
        print_json({"runs": counts.runs, "metrics": counts.metrics, "problems": list(counts.problems)})
    else:
        print(f"{store.home()}: {counts.runs} runs, {counts.metrics} metric values")
