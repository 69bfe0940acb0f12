"""`slm fit-curves`: what more compute buys, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from slm.cli.options import Json, Mixed, depths_of, numbers_of, print_json, table

if TYPE_CHECKING:
    from slm import results
    from slm.selection import Note

Experiments = Annotated[
    list[str] | None, Argument(help="Experiments; by default the only one in the home.")
]
CsvFile = Annotated[
    Path | None, Option("--from", help="CSV of runs: depth or params, flops, loss.")
]
Figure = Annotated[
    Path | None, Option(help="Path of the figures, without ending; by default in the home.")
]


def fit_curves(
    experiments: Experiments = None,
    file: CsvFile = None,
    names: Annotated[
        str | None,
        Option(
            "--map", help="Columns of the CSV: loss=val_bpb; budget=none for runs without budgets."
        ),
    ] = None,
    metric: Annotated[
        str | None,
        Option(
            help="val_bpb, loss (nats per token; of a CSV, its own unit) or core (pocket-core "
            "where that was measured)."
        ),
    ] = None,
    params: Annotated[
        str | None, Option(help="What N counts: matrices+head, total or matrices.")
    ] = None,
    form: Annotated[
        str, Option(help="Surface: auto, additive or coupled; power for L(C) alone.")
    ] = "auto",
    paper: Annotated[
        bool, Option("--paper", help="Objective of Hoffmann et al. 2022: Huber, delta 1e-3.")
    ] = False,
    at: Annotated[str | None, Option(help="Predict the optimum at these FLOPs: 1e20,1e21.")] = None,
    depth: Annotated[
        str | None, Option(help="Predict these depths, trained compute-optimally: 24,26.")
    ] = None,
    reach: Annotated[
        str | None, Option(help="Find the compute that reaches this CORE: 0.2565.")
    ] = None,
    price: Annotated[
        str | None, Option(help="Price per hour of the devices of the largest run; with --reach.")
    ] = None,
    figure: Figure = None,
    allow_mixed: Mixed = False,
    as_json: Json = False,
) -> None:
    """Fit the loss against FLOPs, with intervals, isoFLOP minima and warnings; draw the figures."""
    from slm import results

    check_file(file, names, experiments[0] if experiments else None)
    record = results.fit_curves(
        *(experiments or []),
        file=file,
        columns=columns_of(names),
        metric=metric,
        params=params,
        form=form,
        paper=paper,
        at=numbers_of("--at", at),
        depths=depths_of(depth, "--depth") if depth is not None else (),
        reach=numbers_of("--reach", reach),
        price=next(iter(numbers_of("--price", price)), None),
        allow_mixed=allow_mixed,
    )
    record.save(figure)
    if as_json:
        print_json(record.to_json())
        return
    from slm import fits

    print_record(record, fits.summary(record.fit), record.runs.excluded)
    print(f"\nfigures: {', '.join(map(str, record.figures))}")


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


def print_record(
    record: results.FitRecord | results.DesignRecord, summary: str, excluded: Sequence[Note]
) -> None:
    """Print the answer, the tables and the notes of a record."""
    print(summary)
    for headers, rows in record.tables():
        print(f"\n{table(rows, headers)}")
    print_notes(record.document["warnings"], excluded)


def print_notes(warnings: Sequence[Note], excluded: Sequence[Note]) -> None:
    """Print a paragraph per warning and per reason for leaving runs out."""
    from slm.selection import describe_excluded

    for warning in warnings:
        print(f"\n{warning['code']}: {warning['message']}")
    for line in describe_excluded(excluded):
        print(f"\nleft out: {line}")
