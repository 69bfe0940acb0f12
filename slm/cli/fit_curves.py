"""`slm fit-curves`: what more compute buys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slm import results as fitting
from slm.cli.options import (
    DEEPEST,
    Json,
    Mixed,
    depth_at,
    depths_of,
    numbers_of,
    print_json,
    print_table,
    recipe_of,
)

if TYPE_CHECKING:
    from slm.fits import CurveFit, Target
    from slm.recipe import Hyperparameters

METRIC = "val_bpb, loss (nats a token; of a file, whatever it is) or core (pocket-core where that was measured)."
COLUMNS = "What columns are called there: loss=val_bpb; budget=none for runs without any."
NO_CORE = "no run has a CORE; `slm eval RUN --core` measures it"
PARAMS = "What N counts: matrices+head, total or matrices."
FORM = "Surface: auto, additive or coupled; power for L(C) alone."


def fit_curves(
    experiments: Annotated[
        list[str] | None, typer.Argument(help="Experiments; else the only one there is.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--from", help="Runs of a CSV: params, tokens, flops, loss.")
    ] = None,
    names: Annotated[str | None, typer.Option("--map", help=COLUMNS)] = None,
    metric: Annotated[str | None, typer.Option(help=METRIC)] = None,
    params: Annotated[str | None, typer.Option(help=PARAMS)] = None,
    form: Annotated[str, typer.Option(help=FORM)] = "auto",
    paper: Annotated[
        bool, typer.Option("--paper", help="Hoffmann et al.'s objective: Huber, delta 1e-3.")
    ] = False,
    at: Annotated[
        str | None, typer.Option(help="Predict the optimum at these FLOPs: 1e20,1e21.")
    ] = None,
    depth: Annotated[
        str | None, typer.Option(help="Predict these depths, trained compute-optimally: 24,26.")
    ] = None,
    reach: Annotated[
        str | None, typer.Option(help="When the family reaches this CORE: 0.2565.")
    ] = None,
    price: Annotated[
        str | None, typer.Option(help="Of an hour on the devices of the largest run.")
    ] = None,
    figure: Annotated[
        Path | None, typer.Option(help="Where to draw, without ending; else by the fit's name.")
    ] = None,
    allow_mixed: Mixed = False,
    as_json: Json = False,
) -> None:
    """Fit the loss against FLOPs, with intervals, isoFLOP minima and what cannot be concluded; draw the figures."""
    from slm import figures, fits

    _check(experiments, file, names, metric, params)
    if price is not None and reach is None:
        raise ValueError(f"--price {price}: it goes with --reach")
    if paper and form == "power":
        raise ValueError("--paper and --form power: the paper's objective is the surface's")
    columns = fitting.columns_of(names)
    metric = metric or ("val_bpb" if file is None or columns.get("loss") == "val_bpb" else "loss")
    counting = params or "matrices+head"
    runs = (
        fitting.of_experiments(experiments or [], counting, metric)
        if file is None
        else fitting.of_file(file, columns)
    )
    targets, cores = _targets(runs, at, depth, counting), numbers_of("--reach", reach)
    (hourly,) = numbers_of("--price", price) or (None,)
    fit = fits.fit_curves(
        runs.points, runs.convention, metric, form, paper, runs.others, allow_mixed
    )
    if metric == "core" and not isinstance(fit.core, fits.CoreFit):
        raise ValueError(f"--metric core: {fit.core.why if fit.core else NO_CORE}")
    predictions = [fit.predict(_model_of(fit, target, counting)) for target in targets]
    reached = [_reached(fit, core, runs.speed, hourly) for core in cores]
    document = fit.document() | {
        "predictions": [own.document() for own in predictions],
        "reach": reached,
    }
    document["points"]["excluded"] += runs.excluded
    document["warnings"] += runs.warnings
    document = fitting.recorded("fit-curves", runs.experiments, document)
    stem = figure or runs.stem
    stem.parent.mkdir(parents=True, exist_ok=True)
    drawn = figures.draw_fit(
        fit, stem, curves=fitting.training_curves(runs, metric), title=stem.name
    )
    if as_json:
        print_json(document | {"figures": [str(path) for path in drawn]})
        return
    print(fits.summary(fit))
    for headers, rows in [
        *fits.tables(fit, predictions),
        *([_reach_table(reached, fit)] if reached else []),
    ]:
        print()
        print_table(rows, headers)
    fitting.print_warnings(document)
    for line in fitting.left_out(runs.excluded):
        print(f"\nleft out: {line}")
    print(f"\nfigures: {', '.join(str(path) for path in drawn)}")


def _check(
    experiments: list[str] | None,
    file: Path | None,
    names: str | None,
    metric: str | None,
    params: str | None,
) -> None:
    """Refuse options that contradict each other or are unknown."""
    fitting.check_file(file, names, experiments[0] if experiments else None)
    if params is not None and file is not None:
        raise ValueError(
            f"--params {params}: a file has the params it has; --map params=COLUMN chooses"
        )
    for option, value, known in (
        ("--metric", metric, fitting.METRICS),
        ("--params", params, fitting.COUNTS),
    ):
        if value is not None and value not in known:
            raise ValueError(f"{option} {value}: unknown; there are {', '.join(known)}")


def _reached(
    fit: CurveFit, core: float, speed: float | None, price: float | None
) -> dict[str, Any]:
    """When the family reaches a CORE: FLOPs, hours at the largest run's speed, their price, the recipe's depth."""
    from slm.fits import CoreFit
    from slm.recipe import RECIPES

    if not isinstance(fit.core, CoreFit):
        raise ValueError(f"--reach {core:g}: {fit.core.why if fit.core else NO_CORE}")
    found, recipe = fit.core.reach(core), None if fit.mixed else RECIPES.get(fit.points[0].recipe)
    ends = {"estimate": found.flops.estimate, "low": found.flops.low, "high": found.flops.high}

    def each(value: Callable[[float], float | None]) -> dict[str, float | None]:
        return {name: None if end is None else value(end) for name, end in ends.items()}

    return {
        **found.document(),
        "depth": each(lambda flops: own.depth if (own := depth_at(recipe, flops)) else None)
        if recipe
        else None,
        "hours": each(lambda flops: flops / speed / 3600) if speed else None,
        "price": each(lambda flops: flops / speed / 3600 * price) if speed and price else None,
    }


def _reach_table(reached: list[dict[str, Any]], fit: CurveFit) -> tuple[list[str], list[list[str]]]:
    def text(own: dict[str, Any] | None) -> str:
        return Interval(own["estimate"], own["low"], own["high"]).text() if own else ""

    from slm.fits import Interval

    rows = [
        [
            f"{own['core']:g}",
            text(own),
            *(text(own[name]) for name in ("depth", "hours", "price")),
            "" if own["probability_never"] is None else f"{own['probability_never']:.0%}",
            "extrapolated" if own["extrapolated"] else "",
        ]
        for own in reached
    ]
    return [
        f"{fit.core.name if fit.core else 'CORE'} reached",
        "FLOPs [95 %]",
        "depth",
        "hours",
        "price",
        "never",
        "",
    ], rows


def _targets(runs: fitting.Runs, at: str | None, depth: str | None, counting: str) -> list[Target]:
    """What predictions are asked for; a depth is the recipe's compute-optimal model, or one at the ladder's ratio."""
    from slm.fits import Target

    targets = [Target(flops) for flops in numbers_of("--at", at)]
    for layers in depths_of(depth, "--depth") if depth is not None else ():
        family = fitting.family_of(runs.points, f"--depth {depth}")
        given = recipe_of(family, option="--depth: the runs' recipe")(layers, ratio=runs.ratio)
        targets.append(
            Target(float(given.flops), layers, _count(given, counting), float(given.tokens))
        )
    return targets


def _model_of(fit: CurveFit, target: Target, counting: str) -> Target:
    """At a compute, the recipe's model that the surface likes best: depth*(C) = argmin L(N_k, C/f_k)."""
    from slm.fits import Target
    from slm.recipe import RECIPES

    surface, recipe = fit.answering, None if fit.mixed else RECIPES.get(fit.points[0].recipe)
    if target.depth is not None or surface is None or recipe is None:
        return target
    models = [recipe(depth) for depth in range(1, DEEPEST + 1)]
    sizes = [float(_count(given, counting)) for given in models]
    tokens = [target.flops / given.flops_per_token for given in models]
    best = min(range(len(models)), key=lambda k: float(surface.loss(sizes[k], tokens[k])))
    return Target(target.flops, models[best].depth, sizes[best], tokens[best])


def _count(given: Hyperparameters, counting: str) -> int:
    """N of a model by a convention."""
    return int(getattr(given.parameters, fitting.COUNTS[counting][1]))
