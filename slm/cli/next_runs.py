"""`slm next`: which runs would teach most about a target for the FLOPs there are."""

from __future__ import annotations

import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

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
    from slm.fits import Candidate, Design, Goal, Point
    from slm.recipe import Hyperparameters, Recipe

GOAL = "loss@d26, loss@1e20 (the depth of that compute), params_exponent, alpha, beta or E."
GRID = 3
"""isoFLOP budgets that are candidates beside those of the runs there are."""
WIDE = 16
"""How far from the recipe's tokens a parameter a run may be."""


def next_runs(
    experiments: Annotated[
        list[str] | None, typer.Argument(help="Experiments; else the only one there is.")
    ] = None,
    target: Annotated[str, typer.Option(help=GOAL)] = "",
    budget: Annotated[str, typer.Option(help="FLOPs there are for further runs: 1e20.")] = "",
    depths: Annotated[
        str | None, typer.Option(help="Depths that may be run; else from the smallest run on.")
    ] = None,
    allow_mixed: Mixed = False,
    as_json: Json = False,
) -> None:
    """Choose the runs that remove most of a target's uncertainty per FLOP, and print the sweeps that make them."""
    from slm import fits

    if not target:
        raise ValueError("no --target: write --target loss@d26, or params_exponent")
    given = numbers_of("--budget", budget or None)
    if len(given) != 1:
        raise ValueError(
            f"--budget {budget}: write the FLOPs there are, one number, as in --budget 1e20"
        )
    (flops,) = given
    runs = fitting.of_experiments(experiments or [])
    fits.check(runs.points, allow_mixed)
    points, unsized = _sized(runs)
    recipe = recipe_of(fitting.family_of(points, "slm next"), option="slm next: the runs' recipe")
    layers = (
        depths_of(depths)
        if depths
        else tuple(range(min(point.depth for point in points), DEEPEST + 1))
    )
    candidates = _candidates(recipe, layers, points, flops)
    design = fits.next_runs(points, candidates, _goal(target, recipe), flops, allow_mixed)
    sweeps = _sweeps(design, runs, recipe)
    excluded = [*runs.excluded, *unsized]
    document = design.document() | {"sweeps": sweeps, "excluded": excluded}
    document["warnings"] += runs.warnings
    document = fitting.recorded("next", runs.experiments, document)
    if as_json:
        print_json(document)
        return
    print(fits.design_summary(design))
    headers, rows = fits.design_table(design)
    print()
    print_table(rows, headers)
    fitting.print_warnings(document)
    for line in fitting.left_out(excluded):
        print(f"\nleft out: {line}")
    print("\n" + "\n".join(sweeps))


def _sized(runs: fitting.Runs) -> tuple[list[Point], list[dict[str, str]]]:
    """The runs of known size, which a design stands on, and the others with the reason. ValueError without any."""
    sized = [point for point in runs.points if point.sized]
    if not sized:
        raise ValueError(
            f"no run of {'+'.join(runs.experiments)} has params and tokens: there is no surface to improve"
        )
    return sized, [
        {"run_id": own.run_id, "reason": "no params"} for own in runs.points if not own.sized
    ]


def _goal(text: str, recipe: Recipe) -> Goal:
    """What is to be known better. Raises ValueError naming what is no target."""
    from slm.fits import Goal

    kind, at, where = text.partition("@")
    if kind == "multiplier":
        raise ValueError(
            f"--target {text}: `slm compare BASE CANDIDATE` says which further seeds would decide"
        )
    if kind != "loss":
        if at:
            raise ValueError(f"--target {text}: only the loss is of a run; write --target {kind}")
        return Goal(kind)
    if match := re.fullmatch(r"d(\d+)", where):
        return Goal("loss", _candidate(recipe(int(match[1])), "compute-optimal"))
    (flops,) = numbers_of("--target loss@", where)
    model = depth_at(recipe, flops)
    if model is None:
        raise ValueError(f"--target {text}: no model of up to {DEEPEST} layers takes that much")
    return Goal("loss", _candidate(model, "compute-optimal"))


def _candidates(
    recipe: Recipe, depths: Sequence[int], points: Sequence[Point], budget: float
) -> list[Candidate]:
    """Compute-optimal runs of the depths, and runs at budgets: those of the grid there is, and GRID beside.

    At a budget a model has tokens within WIDE times the recipe's ratio.
    """
    wanted = {point.budget for point in points if point.budget is not None}
    largest = max(point.flops for point in points)
    wanted |= {float(f"{min(largest, budget) / 4**step:.2g}") for step in range(GRID)}
    found = [_candidate(recipe(depth), "compute-optimal") for depth in depths]
    for flops in sorted(wanted):
        for depth in depths:
            optimal = recipe(depth)
            if 1 / WIDE <= flops / optimal.flops <= WIDE:
                found.append(_candidate(recipe(depth, flops=flops), f"flops={flops:g}"))
    return [own for own in found if own.flops <= budget] or found


def _candidate(given: Hyperparameters, horizon: str) -> Candidate:
    from slm.fits import Candidate

    counts = given.parameters
    return Candidate(
        given.depth, float(counts.scaling), float(given.tokens), float(given.flops), horizon
    )


def _sweeps(design: Design, runs: fitting.Runs, recipe: Recipe) -> list[str]:
    """The command lines that make the picks; a name swept before keeps its runs and gains these."""
    wanted = Counter(pick.candidate for pick in design.picks)
    lines: dict[tuple[str, int], list[int]] = defaultdict(list)
    for run, count in sorted(wanted.items(), key=lambda own: own[0].depth):
        there = {
            own.seed for own in runs.points if (own.params, own.tokens) == (run.params, run.tokens)
        }
        free = [seed for seed in range(len(there) + count) if seed not in there]
        lines[run.horizon, free[count - 1] + 1].append(run.depth)
    return [
        _sweep(horizon, seeds, depths, runs, recipe) for (horizon, seeds), depths in lines.items()
    ]


def _sweep(
    horizon: str, seeds: int, depths: Sequence[int], runs: fitting.Runs, recipe: Recipe
) -> str:
    words = [
        "slm sweep --recipe",
        recipe.name,
        "--depths",
        ",".join(str(depth) for depth in depths),
    ]
    words += ["--flops", horizon.removeprefix("flops=")] if horizon != "compute-optimal" else []
    words += ["--seeds", str(seeds)] if seeds > 1 else []
    words += ["--data", shlex.quote(runs.data)] if runs.data != "python" else []
    return " ".join([*words, "--name", runs.experiments[0]])
