"""`slm fit-curves`: what more compute buys."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slm.cli import fitting
from slm.cli.options import Json, depths_of, numbers_of, print_json, print_table, recipe_of

if TYPE_CHECKING:
    from slm.fits import CurveFit, Target

METRIC = "val_bpb, loss (nats a token) or core."
PARAMS = "What N counts: matrices+head, total or matrices."
FORM = "Surface: auto, additive or coupled; power for L(C) alone."


def fit_curves(
    experiments: Annotated[list[str] | None, typer.Argument(help="Experiments; else the only one there is.")] = None,
    file: Annotated[Path | None, typer.Option("--from", help="Runs of a CSV: params, tokens, flops, loss.")] = None,
    names: Annotated[str | None, typer.Option("--map", help="What columns are called there: loss=val_bpb.")] = None,
    metric: Annotated[str, typer.Option(help=METRIC)] = "val_bpb",
    params: Annotated[str | None, typer.Option(help=PARAMS)] = None,
    form: Annotated[str, typer.Option(help=FORM)] = "auto",
    paper: Annotated[bool, typer.Option("--paper", help="Hoffmann et al.'s objective: Huber, delta 1e-3.")] = False,
    at: Annotated[str | None, typer.Option(help="Predict the optimum at these FLOPs: 1e20,1e21.")] = None,
    depth: Annotated[str | None, typer.Option(help="Predict these depths, trained compute-optimally: 24,26.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Where to draw, without ending; else by the fit's name.")] = None,
    as_json: Json = False,
) -> None:
    """Fit the loss against FLOPs, with intervals, isoFLOP minima and what cannot be concluded; draw the figures."""
    from slm import figures, fits

    _check(experiments, file, names, metric, params)
    counting = params or "matrices+head"
    runs = (
        fitting.of_experiments(experiments or [], counting, metric)
        if file is None
        else fitting.of_file(file, fitting.columns_of(names))
    )
    fit = fits.fit_curves(runs.points, runs.convention, metric, form, paper)
    targets = _targets(fit, at, depth, counting)
    document = fit.document() | {"predictions": [fit.predict(target).document() for target in targets]}
    document["points"]["excluded"] += runs.excluded
    document = fitting.recorded("fit-curves", runs.experiments, document)
    stem = figure or runs.stem
    stem.parent.mkdir(parents=True, exist_ok=True)
    drawn = figures.draw_curve(fit, runs.points, stem, curves=runs.curves, title=stem.name)
    if as_json:
        print_json(document | {"figures": [str(path) for path in drawn]})
        return
    print(fits.summary(fit))
    for headers, rows in fits.tables(fit, [fit.predict(target) for target in targets]):
        print()
        print_table(rows, headers)
    for warning in document["warnings"]:
        print(f"\n{warning['code']}: {warning['message']}")
    for reason, count in Counter(run["reason"] for run in runs.excluded).items():
        print(f"\nleft out: {count} runs, {reason}")
    print(f"\nfigures: {', '.join(str(path) for path in drawn)}")


def _check(
    experiments: list[str] | None, file: Path | None, names: str | None, metric: str, params: str | None
) -> None:
    """Refuse options that contradict each other or are unknown."""
    if file is not None and experiments:
        raise ValueError(f"{experiments[0]} and --from {file}: fit one or the other")
    if names is not None and file is None:
        raise ValueError(f"--map {names}: it goes with --from")
    if params is not None and file is not None:
        raise ValueError(f"--params {params}: a file has the params it has; --map params=COLUMN chooses")
    for option, value, known in (("--metric", metric, fitting.METRICS), ("--params", params, fitting.COUNTS)):
        if value is not None and value not in known:
            raise ValueError(f"{option} {value}: unknown; there are {', '.join(known)}")


def _targets(fit: CurveFit, at: str | None, depth: str | None, counting: str) -> list[Target]:
    """What predictions are asked for; a depth is the recipe's compute-optimal model."""
    from slm.fits import Target

    targets = [Target(flops) for flops in numbers_of("--at", at)]
    for layers in depths_of(depth, "--depth") if depth else ():
        given = recipe_of(fit.points[0].recipe, option="--depth: the runs' recipe")(layers)
        counts = {
            "matrices+head": given.parameters.scaling,
            "total": given.parameters.total,
            "matrices": given.parameters.transformer_matrices,
        }
        targets.append(Target(given.flops, layers, counts[counting], given.tokens))
    return targets
