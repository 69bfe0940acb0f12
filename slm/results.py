"""Results of a home as functions: the door for notebooks and scripts, and what the commands print.

    from slm import results

    fit = results.fit_curves("isoflop")
    fit.table("budget (FLOPs)")    # a pandas DataFrame
    fit.plot()                     # a matplotlib Figure
    fit.to_json()                  # the document of `slm fit-curves isoflop --json`

Every function brings the database of its home up to date first. The home is the argument `home`, else
$SLM_HOME, else ./runs. Fits, comparisons and designs of experiments are recorded in the home under `fits/`,
as the commands record them; figures are files only after `save`.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from math import log
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from slm.files import write_json
from slm.hardware.devices import mfu
from slm.recipe import RECIPES, Hyperparameters, Recipe
from slm.selection import (
    COUNTS,
    METRICS,
    Note,
    Runs,
    budget_of,
    describe_excluded,
    flag_warnings,
    ingest,
    known,
    ladder_rows,
    only_experiment,
    runs_of_experiments,
    runs_of_file,
    single_recipe,
    to_trials,
    training_curves,
    usable_rows,
)

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

    from slm.evaluate.paired import Paired
    from slm.fits import Candidate, Comparison, CurveFit, Design, Goal, Point, Prediction, Target, Trial
    from slm.report import ExperimentData, Report

Table = tuple[list[str], list[list[str]]]
"""Headers and rows."""
MAX_DEPTH = 100
"""Depth of the deepest model considered."""
NO_CORE = "no run has a CORE; `slm eval RUN --core` measures it"
TIMES = {"wall_clock": "training time", "cost": "device time"}
"""What a comparison multiplies besides compute, in words."""
SCATTER = 1.1
"""Ratio of training times of one depth and recipe from which a warning is given."""
GRID_BUDGETS = 3
"""isoFLOP budgets that a design considers besides those of the existing runs."""
RATIO_RANGE = 16
"""Largest factor between a candidate's tokens per parameter and the recipe's."""


def points(
    *experiments: str,
    params: str = "matrices+head",
    metric: str = "val_bpb",
    home: Path | str | None = None,
) -> Runs:
    """Return the finished runs of experiments that a fit can use, as typed points.

    `params` is what N counts (one of COUNTS), `metric` one of METRICS. Without a name it is the only
    experiment of the home. Raises ValueError for an unknown name or an experiment without such a run.

    Example: `points("isoflop").table()`.
    """
    _check_choice("metric", metric, METRICS)
    _check_choice("params", params, COUNTS)
    return runs_of_experiments(experiments, ingest(home), params, metric)


@dataclass
class FitRecord:
    """A fit of `fit_curves`, with its predictions."""

    fit: CurveFit
    runs: Runs
    predictions: list[Prediction]
    reach: list[dict[str, Any]]
    """Compute at which the family reaches a CORE, with depth, hours and price where known."""
    document: dict[str, Any]
    """The record in `fits/`: hash, time, versions and every number."""
    figures: list[Path] = field(default_factory=list)
    """Files that `save` has written."""

    def tables(self) -> list[Table]:
        """Return all tables as headers and rows of text: predictions, laws, minima, surfaces, hold-outs."""
        from slm import fits

        tables = fits.tables(self.fit, self.predictions)
        return [*tables, _reach_table(self.reach, self.fit)] if self.reach else tables

    def table(self, name: str | None = None) -> pandas.DataFrame:
        """Return a table by its first header: "law", "budget (FLOPs)", "surface", ...; the first by default."""
        return _frame(self.tables(), name)

    def plot(self, name: str = "curve") -> Figure:
        """Plot "curve", "frontier", "residuals" or "core". Raises ValueError for one that the fit lacks."""
        from slm import figures

        return figures.plot_fit(self.fit, name, training_curves(self.runs), self.runs.stem.name)

    def save(self, stem: Path | None = None) -> list[Path]:
        """Write all figures as PNG and SVG; to `figures/` of the home by default."""
        from slm import figures

        stem = stem or self.runs.stem
        stem.parent.mkdir(parents=True, exist_ok=True)
        self.figures = figures.draw_fit(self.fit, stem, training_curves(self.runs), stem.name)
        return self.figures

    def to_json(self) -> dict[str, Any]:
        """Return the document of `slm fit-curves --json`."""
        return self.document | {"figures": [str(path) for path in self.figures]}


def fit_curves(
    *experiments: str,
    file: Path | None = None,
    columns: dict[str, str] | None = None,
    metric: str | None = None,
    params: str | None = None,
    form: str = "auto",
    paper: bool = False,
    at: Sequence[float] = (),
    depths: Sequence[int] = (),
    reach: Sequence[float] = (),
    price: float | None = None,
    allow_mixed: bool = False,
    home: Path | str | None = None,
) -> FitRecord:
    """Fit loss against compute: law, isoFLOP minima, surface and CORE, with intervals and warnings.

    The runs are those of experiments, or of a CSV `file` whose `columns` map the names of a point's fields
    to the file's. `metric`, `params`, `form` and `paper` are those of `fits.fit_curves`. `at` predicts the
    optimum at these FLOPs, `depths` these depths trained compute-optimally; `reach` finds the compute at
    which these CORE are reached, with the cost at `price` per hour on the devices of the largest run.

    Raises ValueError for contradicting options and runs that cannot be fitted, NotComparable (a ValueError)
    for runs on several axes unless `allow_mixed`.

    Example: `fit_curves("ladder", at=[1e20]).table("prediction")`.
    """
    from slm import fits

    _check_choice("metric", metric, METRICS)
    _check_choice("params", params, COUNTS)
    if price is not None and not reach:
        raise ValueError(f"price {price:g}: it needs a CORE to reach")
    if paper and form == "power":
        raise ValueError("paper and form power: the paper's objective is that of a surface")
    counting = params or "matrices+head"
    if file is None:
        metric = metric or "val_bpb"
        runs = runs_of_experiments(experiments, ingest(home), counting, metric)
    else:
        if params is not None:
            raise ValueError(f"params {params}: a file's N is its column; map params to another one")
        columns = columns or {}
        metric = metric or ("val_bpb" if columns.get("loss") == "val_bpb" else "loss")
        runs = runs_of_file(file, columns, metric)
    targets = [fits.Target(flops) for flops in at]
    targets += [_depth_target(runs, depth, counting) for depth in depths]
    fit = fits.fit_curves(
        runs.points, runs.convention, metric, form, paper, runs.other_counts, allow_mixed
    )
    if metric == "core":
        _require_core(fit, "metric core")
    predictions = [fit.predict(_best_model(fit, target, counting)) for target in targets]
    reached = [_reached(fit, core, runs.speed, price) for core in reach]
    return _fit_record(fit, runs, predictions, reached)


def _fit_record(
    fit: CurveFit,
    runs: Runs,
    predictions: Sequence[Prediction] = (),
    reached: Sequence[dict[str, Any]] = (),
) -> FitRecord:
    """Record a fit in the home of its runs."""
    document = fit.document()
    document["predictions"] = [prediction.document() for prediction in predictions]
    document["reach"] = list(reached)
    document["points"]["excluded"] += runs.excluded
    document["warnings"] += runs.warnings
    document = record("fit-curves", runs.experiments, document, runs.home)
    return FitRecord(fit, runs, list(predictions), list(reached), document)


def fit_recipes(experiment: str, allow_mixed: bool = False, home: Path | None = None) -> list[FitRecord]:
    """Fit each recipe of an experiment alone.

    Raises as `fit_curves` does.

    Example: `[fit.runs.points[0].recipe for fit in fit_recipes("crippled")]`.
    """
    from slm import fits

    runs = runs_of_experiments([experiment], ingest(home))
    fitted = []
    for recipe in dict.fromkeys(point.recipe for point in runs.points):
        part = _of_recipe(runs, recipe)
        fit = fits.fit_curves(
            part.points, part.convention, others=part.other_counts, allow_mixed=allow_mixed
        )
        fitted.append(_fit_record(fit, replace(part, warnings=[])))
    return fitted
