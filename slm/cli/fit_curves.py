"""`slm fit-curves`: what more compute buys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from slm.cli.fit_options import (
    CsvFile,
    Experiments,
    Figure,
    check_file,
    columns_of,
    print_notes,
)
from slm.cli.options import (
    Json,
    Mixed,
    depths_of,
    numbers_of,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from slm import results

COLUMNS = "Columns of the CSV: loss=val_bpb; budget=none for runs without budgets."
METRIC = (
    "val_bpb, loss (nats per token; of a CSV, its own unit) or core (pocket-core where that was "
    "measured)."
)

Map = Annotated[str | None, typer.Option("--map", help=COLUMNS)]
Metric = Annotated[str | None, typer.Option(help=METRIC)]
Params = Annotated[
    str | None, typer.Option(help="What N counts: matrices+head, total or matrices.")
]
Form = Annotated[
    str, typer.Option(help="Surface: auto, additive or coupled; power for L(C) alone.")
]
Paper = Annotated[
    bool, typer.Option("--paper", help="Objective of Hoffmann et al. 2022: Huber, delta 1e-3.")
]
At = Annotated[str | None, typer.Option(help="Predict the optimum at these FLOPs: 1e20,1e21.")]
Depth = Annotated[
    str | None, typer.Option(help="Predict these depths, trained compute-optimally: 24,26.")
]
Reach = Annotated[str | None, typer.Option(help="Find the compute that reaches this CORE: 0.2565.")]
Price = Annotated[
    str | None, typer.Option(help="Price per hour of the devices of the largest run; with --reach.")
]


def fit_curves(
    experiments: Experiments = None,
    file: CsvFile = None,
    names: Map = None,
    metric: Metric = None,
    params: Params = None,
    form: Form = "auto",
    paper: Paper = False,
    at: At = None,
    depth: Depth = None,
    reach: Reach = None,
    price: Price = None,
    figure: Figure = None,
    allow_mixed: Mixed = False,
    as_json: Json = False,
) -> None:
    """Fit the loss against FLOPs, with intervals, isoFLOP minima and warnings; draw the figures."""
    from slm import results

    check_file(file, names, experiments[0] if experiments else None)
    fit = results.fit_curves(
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
    fit.save(figure)
    if as_json:
        print_json(fit.to_json())
    else:
        _print(fit)


def _print(fit: results.FitRecord) -> None:
    from slm import fits

    print(fits.summary(fit.fit))
    for headers, rows in fit.tables():
        print()
        print_table(rows, headers)
    print_notes(fit.document["warnings"], fit.runs.excluded)
    print(f"\nfigures: {', '.join(map(str, fit.figures))}")
