"""`slm next`: which runs would teach most about a target for the FLOPs available."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from slm.cli.fit_options import (
    Experiments,
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

TARGET = "loss@d26, loss@1e20 (the depth of that compute), params_exponent, alpha, beta or E."

Target = Annotated[str, typer.Option(help=TARGET)]
Budget = Annotated[str, typer.Option(help="FLOPs for further runs: 1e20.")]
Depths = Annotated[
    str | None, typer.Option(help="Depths that may be run; by default from the smallest run on.")
]


def next_runs(
    experiments: Experiments = None,
    target: Target = "",
    budget: Budget = "",
    depths: Depths = None,
    allow_mixed: Mixed = False,
    as_json: Json = False,
) -> None:
    """Choose the runs that remove most of a target's uncertainty per FLOP, and print the sweeps
    that make them."""
    from slm import results

    if not target:
        raise ValueError("no --target: write --target loss@d26, or params_exponent")
    numbers = numbers_of("--budget", budget or None)
    if len(numbers) != 1:
        raise ValueError(f"--budget {budget}: write one number of FLOPs, as in --budget 1e20")
    design = results.next_runs(
        *(experiments or []),
        target=target,
        budget=numbers[0],
        depths=depths_of(depths) if depths else None,
        allow_mixed=allow_mixed,
    )
    if as_json:
        print_json(design.to_json())
    else:
        _print(design)


def _print(design: results.DesignRecord) -> None:
    from slm import fits

    print(fits.design_summary(design.design))
    headers, rows = fits.design_table(design.design)
    print()
    print_table(rows, headers)
    print_notes(design.document["warnings"], design.document["excluded"])
    print("\n" + "\n".join(design.sweeps))
