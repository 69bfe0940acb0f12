"""Models of a recipe's family: which depth a compute trains, and which runs a design may add."""

from __future__ import annotations

import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Sequence
from math import inf, log
from typing import TYPE_CHECKING

from slm.recipe import RECIPES, Hyperparameters, Recipe
from slm.selection import COUNTS, Runs, single_recipe

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
    models = [recipe(depth) for depth in range(1, MAX_DEPTH + 1)]
    if flops > models[-1].flops:
        return None
    return min(models, key=lambda hp: abs(log(hp.flops / flops)))


def known_recipe(name: str, purpose: str) -> Recipe:
    if name not in RECIPES:
        raise ValueError(f"{purpose}: unknown recipe {name}; there are {', '.join(RECIPES)}")
    return RECIPES[name]


def depth_target(runs: Runs, depth: int, counting: str) -> Target:
    """Return the recipe's compute-optimal model of a depth, or the one at the ladder's ratio."""
    from slm.fits import Target

    purpose = f"a prediction of depth {depth}"
    hp = known_recipe(single_recipe(runs.points, purpose), purpose)(depth, ratio=runs.ratio)
    return Target(float(hp.flops), depth, _count(hp, counting), float(hp.tokens))


def best_model(fit: CurveFit, target: Target, counting: str) -> Target:
    """Replace a compute by the recipe's best model at it: depth*(C) = argmin L(N_k, C/f_k) of the
    surface."""
    from slm.fits import Target

    surface = fit.predicting_surface
    recipe = None if fit.mixed else RECIPES.get(fit.points[0].recipe)
    if target.depth is not None or surface is None or recipe is None:
        return target
    best = target
    lowest = inf
    for depth in range(1, MAX_DEPTH + 1):
        hp = recipe(depth)
        size = float(_count(hp, counting))
        tokens = target.flops / hp.flops_per_token
        loss = float(surface.loss(size, tokens))
        if loss < lowest:
            lowest = loss
            best = Target(target.flops, depth, size, tokens)
    return best


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
        return Goal("loss", _candidate(recipe(int(match[1])), "compute-optimal"))
    try:
        flops = float(run)
    except ValueError:
        raise ValueError(f"target {target}: {run!r} is not a number") from None
    if not 0 < flops < float("inf"):
        raise ValueError(f"target {target}: {run} is not positive and finite")
    model = nearest_model(recipe, flops)
    if model is None:
        raise ValueError(f"target {target}: no model of up to {MAX_DEPTH} layers takes that much")
    return Goal("loss", _candidate(model, "compute-optimal"))


def candidates(
    recipe: Recipe, depths: Sequence[int], points: Sequence[Point], budget: float
) -> list[Candidate]:
    """Return the compute-optimal runs of the depths, and runs at budgets.

    Budgets are those of the existing grid and GRID_BUDGETS more; at a budget a model's tokens are
    within RATIO_RANGE times the recipe's.
    """
    budgets = {point.budget for point in points if point.budget is not None}
    largest = min(budget, max(point.flops for point in points))
    budgets |= {float(f"{largest / 4**step:.2g}") for step in range(GRID_BUDGETS)}
    candidates = [_candidate(recipe(depth), "compute-optimal") for depth in depths]
    for flops in sorted(budgets):
        for depth in depths:
            if 1 / RATIO_RANGE <= flops / recipe(depth).flops <= RATIO_RANGE:
                candidates.append(_candidate(recipe(depth, flops=flops), f"flops={flops:g}"))
    return [candidate for candidate in candidates if candidate.flops <= budget] or candidates


def _candidate(hp: Hyperparameters, horizon: str) -> Candidate:
    from slm.fits import Candidate

    size = float(hp.parameters.scaling)
    return Candidate(hp.depth, size, float(hp.tokens), float(hp.flops), horizon)


def sweeps(design: Design, runs: Runs, recipe: Recipe) -> list[str]:
    """Return the command lines that make the picks; an existing experiment keeps its runs and gains
    these."""
    picks = Counter(run.candidate for run in design.runs)
    depths: dict[tuple[str, int], list[int]] = defaultdict(list)
    for run, count in sorted(picks.items(), key=lambda item: item[0].depth):
        size = (run.params, run.tokens)
        used = {point.seed for point in runs.points if (point.params, point.tokens) == size}
        free = [seed for seed in range(len(used) + count) if seed not in used]
        depths[run.horizon, free[count - 1] + 1].append(run.depth)
    sweeps = []
    for (horizon, seeds), layers in depths.items():
        words = ["slm sweep --recipe", recipe.name, "--depths", ",".join(map(str, layers))]
        if horizon != "compute-optimal":
            words += ["--flops", horizon.removeprefix("flops=")]
        if seeds > 1:
            words += ["--seeds", str(seeds)]
        if runs.corpus != "python":
            words += ["--data", shlex.quote(runs.corpus)]
        sweeps.append(" ".join([*words, "--name", runs.experiments[0]]))
    return sweeps
