"""`slm export`: the results of a home as tables for everybody, and as files that another home takes in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slm.cli.data import progress
from slm.cli.options import Json, print_json, report_problems
from slm.text import count


def export(
    folder: Annotated[
        Path, typer.Argument(help="To be made; `slm import FOLDER` takes it into another home.")
    ],
    experiments: Annotated[list[str] | None, typer.Argument(help="Only these experiments.")] = None,
    weights: Annotated[
        bool, typer.Option("--weights", help="With the final weights of the runs.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write results into a folder: tables and views as Parquet, what they mean, and the files they are made from."""
    from slm import exchange
    from store import home

    reports = (progress("files"), progress("tables"))
    document = exchange.export(home(), folder, experiments or (), weights, reports)
    report_problems(document["problems"])
    if as_json:
        print_json({"folder": str(folder), **document})
        return
    files = {row["name"]: row["bytes"] for row in document["files"]}
    runs = sum(name.startswith("runs/") and name.endswith("/plan.json") for name in files)
    tables = sum(name.startswith("tables/") for name in files)
    size = count(sum(files.values()))
    print(
        f"{folder}: {runs} runs, {tables} tables, {len(files)} files of {size}B; home {document['home']['id']}"
    )
