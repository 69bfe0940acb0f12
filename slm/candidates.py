"""Models of a recipe's family: which depth a compute trains, and which runs a design may add."""

from __future__ import annotations

import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Sequence
from math import inf, log
from typing import TYPE_CHECKING

from slm.recipe import RECIPES, Hyperparameters, Recipe
from slm.selection import COUNTS, Runs

if TYPE_CHECKING:
    from slm.fits import Candidate, CurveFit, Design, Goal, Point, Target

MAX_DEPTH = 100
"""Depth of the deepest model considered."""
GRID_BUDGETS = 3
"""isoFLOP budgets that a design considers besides those of the existing runs."""
RATIO_RANGE = 16
"""Largest factor between a candidate's tokens per parameter and the recipe's."""


def nearest_model(recipe: Recipe, flops: float) -> Hyperparameters | None:
    """Return the compute-optimal model whose training is nearest to a compute; None beyond
    MAX_DEPTH.

    Example: `nearest_model(nanochat, 1e20).depth`.
    """
    models = _models(recipe)
    if flops > models[-1].flops:
        return None
    return min(models, key=lambda hp: abs(log(hp.flops / flops)))


def _models(recipe: Recipe) -> list[Hyperparameters]:
    """Return the compute-optimal models, shallowest first."""
    return [recipe(depth) for depth in range(1, MAX_DEPTH + 1)]


def recipe_of_fit(fit: CurveFit) -> Recipe | None:
    """Return the recipe of the fitted runs; None if they are of several, or of an unknown one."""
    return None if fit.mixed else RECIPES.get(fit.points[0].recipe)


def recipe_of_points(points: Sequence[Point], purpose: str) -> Recipe:
    """Return the recipe of all points. Raises ValueError, naming the purpose, for several recipes
    or an unknown one."""
    names = sorted({point.recipe for point in points})
    if len(names) > 1:
        raise ValueError(f"{purpose} takes runs of one recipe; these are of {' and '.join(names)}")
    (name,) = names
    if name not in RECIPES:
        raise ValueError(f"{purpose}: unknown recipe {name}; there are {', '.join(RECIPES)}")
    return RECIPES[name]


def depth_target(runs: Runs, depth: int, counting: str) -> Target:
    """Return the recipe's compute-optimal model of a depth, or the one at the ladder's ratio."""
    from slm.fits import Target

    recipe = recipe_of_points(runs.points, f"a prediction of depth {depth}")
    hp = recipe(depth, ratio=runs.ratio)
    return Target(
        flops=float(hp.flops), depth=depth, params=_count(hp, counting), tokens=float(hp.tokens)
    )


def best_model(fit: CurveFit, target: Target, counting: str) -> Target:
    """Replace a compute by the recipe's best model at it: depth*(C) = argmin L(N_k, C/f_k) of the
    surface."""
    from slm.fits import Target

    surface = fit.predicting_surface
    recipe = recipe_of_fit(fit)
    if target.depth is not None or surface is None or recipe is None:
        return target

    def loss(hp: Hyperparameters) -> float:
        tokens = target.flops / hp.flops_per_token
        return float(surface.loss(float(_count(hp, counting)), tokens))

    best = min(_models(recipe), key=loss)
    return Target(
        flops=target.flops,
        depth=best.depth,
        params=float(_count(best, counting)),
        tokens=target.flops / best.flops_per_token,
    )


def _count(hp: Hyperparameters, counting: str) -> int:
    """Return N of a model by a convention."""
    return int(getattr(hp.parameters, COUNTS[counting]))


def goal(target: str, recipe: Recipe) -> Goal:
    """Parse a target. Raises ValueError naming what is wrong with it."""
    from slm.fits import Goal

    kind, at, run = target.partition("@")
    if kind == "multiplier":
        raise ValueError(f"target {target}: `slm compare BASE CANDIDATE` advises on further seeds")
    if kind != "loss":
        if at:
            raise ValueError(f"target {target}: only a loss is of a run; write {kind}")
        return Goal(kind)
    if match := re.fullmatch(r"d(\d+)", run):
        return Goal("loss", _candidate(recipe(int(match[1]))))
    try:
        flops = float(run)
    except ValueError:
        raise ValueError(f"target {target}: {run!r} is not a number") from None
    if not 0 < flops < inf:
        raise ValueError(f"target {target}: {run} is not positive and finite")
    model = nearest_model(recipe, flops)
    if model is None:
        raise ValueError(f"target {target}: no model of up to {MAX_DEPTH} layers takes that much")
    return Goal("loss", _candidate(model))


def candidates(
    recipe: Recipe, depths: Sequence[int], points: Sequence[Point], budget: float
) -> list[Candidate]:
    """Return the compute-optimal runs of the depths, and runs at budgets.

    Budgets are those of the existing grid and GRID_BUDGETS more; at a budget a model's tokens are
    within RATIO_RANGE times the recipe's.
    """
    largest = min(budget, max(point.flops for point in points))
    budgets = {float(f"{largest / 4**step:.2g}") for step in range(GRID_BUDGETS)}
    budgets |= {point.budget for point in points if point.budget is not None}
    optimal = {depth: _candidate(recipe(depth)) for depth in depths}
    candidates = list(optimal.values())
    for flops in sorted(budgets):
        for depth, model in optimal.items():
            if 1 / RATIO_RANGE <= flops / model.flops <= RATIO_RANGE:
                candidates.append(_candidate(recipe(depth, flops=flops), f"flops={flops:g}"))
    return [candidate for candidate in candidates if candidate.flops <= budget] or candidates


def _candidate(hp: Hyperparameters, horizon: str = "compute-optimal") -> Candidate:
    from slm.fits import Candidate

    return Candidate(
        depth=hp.depth,
        params=float(hp.parameters.scaling),
        tokens=float(hp.tokens),
        flops=float(hp.flops),
        horizon=horizon,
    )


def sweeps(design: Design, runs: Runs, recipe: Recipe, corpus: str) -> list[str]:
    """Return the command lines that make the picks; an existing experiment keeps its runs and gains
    these."""
    picks = Counter(run.candidate for run in design.runs)
    depths: dict[tuple[str, int], list[int]] = defaultdict(list)
    for run in sorted(picks, key=lambda run: run.depth):
        size = (run.params, run.tokens)
        used = {point.seed for point in runs.points if (point.params, point.tokens) == size}
        free = [seed for seed in range(len(used) + picks[run]) if seed not in used]
        seeds = free[picks[run] - 1] + 1
        depths[run.horizon, seeds].append(run.depth)
    commands = []
    for (horizon, seeds), layers in depths.items():
        command = f"slm sweep --recipe {recipe.name} --depths {','.join(map(str, layers))}"
        if horizon != "compute-optimal":
            command += f" --flops {horizon.removeprefix('flops=')}"
        if seeds > 1:
            command += f" --seeds {seeds}"
        if corpus != "python":
            command += f" --data {shlex.quote(corpus)}"
        commands.append(f"{command} --name {runs.experiments[0]}")
    return commands
