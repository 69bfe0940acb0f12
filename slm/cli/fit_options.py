"""Options and output that `slm fit-curves`, `compare` and `next` share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from slm.selection import Note

Experiments = Annotated[
    list[str] | None, typer.Argument(help="Experiments; by default the only one in the home.")
]
CsvFile = Annotated[
    Path | None, typer.Option("--from", help="CSV of runs: depth or params, flops, loss.")
]
Figure = Annotated[
    Path | None, typer.Option(help="Path of the figures, without ending; by default in the home.")
]


def check_file(file: Path | None, columns: str | None, name: str | None) -> None:
    """Refuse a missing --from, --from next to names of the store, and --map without --from."""
    if file is not None and name is not None:
        raise ValueError(f"{name} and --from {file}: choose one")
    if columns is not None and file is None:
        raise ValueError(f"--map {columns}: needs --from")
    if file is not None and not file.is_file():
        raise ValueError(f"--from {file}: no such file")


def columns_of(text: str | None) -> dict[str, str]:
    """Parse "loss=val_bpb,params=n". Raises ValueError for a part that is not name=column."""
    columns = {}
    for pair in text.split(",") if text else ():
        name, _, column = (part.strip() for part in pair.partition("="))
        if not (name and column):
            raise ValueError(f"--map {text}: write name=column, as in loss=val_bpb")
        columns[name] = column.strip("'\"")
    return columns


def print_notes(warnings: Sequence[Note], excluded: Sequence[Note]) -> None:
    """Print a paragraph per warning and per reason for leaving runs out."""
    from slm.selection import describe_excluded

    for warning in warnings:
        print(f"\n{warning['code']}: {warning['message']}")
    for line in describe_excluded(excluded):
        print(f"\nleft out: {line}")
