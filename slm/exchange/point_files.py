"""Read points and trials of any family from a table (CSV or Markdown), for `--from FILE`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from slm.exchange.importers.readers import read_table
from slm.exchange.importers.types import Names
from slm.fits.compare.trials import Trial
from slm.fits.points import Point

REQUIRED_OF_POINTS = ("params", "tokens", "flops", "loss")
OPTIONAL_OF_POINTS = (
    "budget",
    "core",
    "depth",
    "seed",
    "run",
    "recipe",
    "weight",
    "outlier",
    "comparison_key",
)
REQUIRED_OF_TRIALS = ("recipe", "depth", "flops", "loss")
OPTIONAL_OF_TRIALS = ("seed", "seconds", "run", "comparison_key")
TEXTS = ("run", "recipe", "outlier", "comparison_key")
"""Columns of text; the others hold numbers."""
COUNTS = ("depth", "seed")
"""Columns of whole numbers."""
BUDGET_TOLERANCE = 0.03
"""FLOPs closer than this are one budget, in a file without budgets."""
YES = ("1", "true", "yes")
NO = ("", "0", "false", "no")
Run = TypeVar("Run")


@dataclass(frozen=True)
class PointFile:
    """Runs of a file."""

    points: list[Point]
    outliers: list[Point]
    """Runs that the file marks as outliers."""


def read_points(path: Path, names: Names | None = None, budgets: bool = True) -> PointFile:
    """Read runs from a table with the columns params, tokens, flops and loss.

    Optional columns: budget, core, depth, seed, run, recipe, weight, outlier, comparison_key. Other
    columns are ignored. `names` gives the file's name of a column: {"loss": "val_bpb"}. A run with
    an empty budget is compute-optimal. In a file without budgets, runs of several sizes whose FLOPs
    are within 3 % share one; with `budgets=False` no run has one. Defaults: run is the line, recipe
    and comparison key are the file's name, depth 1, seed 0, weight 1.

    Raises ValueError for a missing or repeated column, a cell that is not a number (with its line),
    no runs, and FLOPs that do not form clear budgets.
    """
    runs, columns = _read_runs(path, names or {}, REQUIRED_OF_POINTS, OPTIONAL_OF_POINTS, _point)
    outliers = [point for point, is_outlier in runs if is_outlier]
    points = [point for point, is_outlier in runs if not is_outlier]
    if not points:
        raise ValueError(f"{path}: every run is marked as an outlier, so none remains to fit")
    if "budget" not in columns and budgets:
        points = _assign_budgets(points)
    return PointFile(points, outliers)


def read_trials(path: Path, names: Names | None = None) -> dict[str, list[Trial]]:
    """Read the runs of two recipes from a table, the first recipe of the file first.

    Columns: recipe, depth, flops and loss, optionally seed, seconds, run and comparison_key; others
    are ignored. `names` and defaults are as in `read_points`. Raises ValueError for every defect of
    the file, and for any number of recipes but two.
    """
    runs, _ = _read_runs(path, names or {}, REQUIRED_OF_TRIALS, OPTIONAL_OF_TRIALS, _trial)
    trials: dict[str, list[Trial]] = {}
    for recipe, trial in runs:
        trials.setdefault(recipe, []).append(trial)
    if len(trials) != 2:
        raise ValueError(
            f"{path}: a comparison takes two recipes; the file has {', '.join(trials)}"
        )
    return trials


def _read_runs(
    path: Path,
    names: Names,
    required: tuple[str, ...],
    optional: tuple[str, ...],
    make: Callable[..., Run],
) -> tuple[list[Run], Names]:
    """Make a run of the values of each line; return the file's columns by name, too."""
    try:
        table = read_table(path.read_text(encoding="utf-8-sig"))
        columns = _columns(table.header, names, required, optional)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if table.ragged:
        raise ValueError(f"line {table.ragged[0]}: more or fewer cells than the header")
    runs = []
    for number, row in table.lines:
        values: dict[str, Any] = {"run": f"line {number}", "depth": 1, "seed": 0}
        values |= {"recipe": path.stem, "comparison_key": path.stem}
        try:
            for name, source in columns.items():
                if row[source]:
                    values[name] = _value(name, row[source])
                elif name in required:
                    raise ValueError(f"{name} is empty")
            runs.append(make(**values))
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    return runs, columns


def _columns(
    header: Sequence[str], names: Names, required: tuple[str, ...], optional: tuple[str, ...]
) -> dict[str, str]:
    """Return the file's column of each name that it has."""
    columns = {name: names.get(name, name) for name in (*required, *optional)}
    for name in (*names, *required):
        if name not in columns:
            raise ValueError(f"no column is called {name!r}; known are {', '.join(columns)}")
        source = columns[name]
        if source not in header:
            alias = f" (for {name})" if source != name else ""
            raise ValueError(f"no column {source!r}{alias}; there are {', '.join(header)}")
    return {name: source for name, source in columns.items() if source in header}


def _value(name: str, text: str) -> str | float:
    if name in TEXTS:
        return text
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{name} is {text!r}, not a number") from None
    if name not in COUNTS:
        return value
    if not value.is_integer():
        raise ValueError(f"{name} is {text!r}, not a whole number")
    return int(value)


def _point(
    run: str, outlier: str = "", budget: float | None = None, **values: Any
) -> tuple[Point, bool]:
    """Return a run, and whether it is marked as an outlier."""
    if outlier.lower() not in YES + NO:
        known = f"{', '.join(YES)} and {', '.join(NO[1:])}"
        raise ValueError(f"outlier is {outlier.lower()!r}; known are {known}")
    return Point(run_id=run, budget=budget, **values), outlier.lower() in YES


def _trial(run: str, recipe: str, **values: Any) -> tuple[str, Trial]:
    return recipe, Trial(run_id=run, **values)


def _assign_budgets(points: Sequence[Point]) -> list[Point]:
    """Give runs the budget they share with their neighbours in FLOPs, if their sizes differ."""
    flops = np.array([point.flops for point in points])
    order = np.argsort(flops, kind="stable")
    steps = np.diff(np.log(flops[order]))
    breaks = np.flatnonzero(steps > np.log1p(BUDGET_TOLERANCE)) + 1
    result = list(points)
    for group in np.split(order, breaks):
        low = flops[group[0]]
        high = flops[group[-1]]
        if high > low * (1 + BUDGET_TOLERANCE):
            raise ValueError(
                f"FLOPs from {low:.4g} to {high:.4g} are within {BUDGET_TOLERANCE:.0%} of a "
                "neighbour but not of each other, so the budgets are not clear: give the file a "
                "column budget, or read it without (--map budget=none)"
            )
        if len({points[k].params for k in group}) > 1:
            mean_log = np.mean(np.log(flops[group]))
            budget = float(np.exp(mean_log))
            for k in group:
                result[k] = replace(points[k], budget=budget)
    return result
