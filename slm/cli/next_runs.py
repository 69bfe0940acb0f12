"""`slm next`: the runs that would teach most about a target."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from slm.cli.fit_curves import Experiments, print_record
from slm.cli.options import Json, Mixed, depths_of, numbers_of, print_json


def next_runs(
    experiments: Experiments = None,
    target: Annotated[
        str,
        Option(
            help="loss@d26, loss@1e20 (the depth of that compute), params_exponent, alpha, beta "
            "or E."
        ),
    ] = "",
    budget: Annotated[str, Option(help="FLOPs for further runs: 1e20.")] = "",
    depths: Annotated[
        str | None, Option(help="Depths that may be run; by default from the smallest run on.")
    ] = None,
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
    record = results.next_runs(
        *(experiments or []),
        target=target,
        budget=numbers[0],
        depths=depths_of(depths) if depths else None,
        allow_mixed=allow_mixed,
    )
    if as_json:
        print_json(record.to_json())
        return
    from slm import fits

    print_record(record, fits.design_summary(record.design), record.document["excluded"])
    print("\n" + "\n".join(record.sweeps))
