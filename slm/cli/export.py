"""`slm export`: the results of a home as tables, and as files that another home can import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from slm.cli.options import Json, print_result, report_problems
from slm.monitor.progress import ProgressBars
from slm.text import count
from store import home


def export(
    folder: Annotated[
        Path, Argument(help="New folder; `slm import FOLDER` merges it into another home.")
    ],
    experiments: Annotated[
        list[str] | None, Argument(help="Export only these experiments.")
    ] = None,
    weights: Annotated[
        bool, Option("--weights", help="Include the final weights of the runs.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write results into a folder: tables and views as Parquet, a data dictionary, and files."""
    from slm import exchange

    with ProgressBars() as bars:
        document = exchange.export(
            home(), folder, experiments or (), weights, bars.add("files"), bars.add("tables")
        )
    report_problems(document["problems"])
    names = [row["name"] for row in document["files"]]
    runs = sum(name.startswith("runs/") and name.endswith("/plan.json") for name in names)
    tables = sum(name.startswith("tables/") for name in names)
    size = count(sum(row["bytes"] for row in document["files"]))
    print_result(
        as_json,
        {"folder": folder, **document},
        f"{folder}: {runs} runs, {tables} tables, {len(names)} files of {size}B; "
        f"home {document['home']['id']}",
    )
