"""`slm export`: the results of a home as tables, and as files that another home can import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slm.cli.options import Json, print_json, report_problems
from slm.monitor.progress import ProgressBars
from slm.text import count


def export(
    folder: Annotated[
        Path, typer.Argument(help="New folder; `slm import FOLDER` merges it into another home.")
    ],
    experiments: Annotated[
        list[str] | None, typer.Argument(help="Export only these experiments.")
    ] = None,
    weights: Annotated[
        bool, typer.Option("--weights", help="Include the final weights of the runs.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write results into a folder: tables and views as Parquet, a data dictionary, and files."""
    from slm import exchange
    from store import home

    with ProgressBars() as bars:
        document = exchange.export(
            home(), folder, experiments or (), weights, bars.add("files"), bars.add("tables")
        )
    report_problems(document["problems"])
    if as_json:
        print_json({"folder": str(folder), **document})
        return
    files = {row["name"]: row["bytes"] for row in document["files"]}
    runs = sum(name.startswith("runs/") and name.endswith("/plan.json") for name in files)
    tables = sum(name.startswith("tables/") for name in files)
    size = count(sum(files.values()))
    home_id = document["home"]["id"]
    print(f"{folder}: {runs} runs, {tables} tables, {len(files)} files of {size}B; home {home_id}")
