"""Results of a home as functions: the door for notebooks and scripts, and what the commands print.

    from slm import results

    fit = results.fit_curves("isoflop")
    fit.table("budget (FLOPs)")    # a pandas DataFrame
    fit.plot()                     # a matplotlib Figure
    fit.to_json()                  # the document of `slm fit-curves isoflop --json`

Every function brings the database of its home up to date first. The home is the argument `home`,
else $SLM_HOME, else ./runs. Fits, comparisons and designs of experiments are recorded in the home
under `fits/`, as the commands record them; figures are files only after `save`.
"""

from __future__ import annotations

import json
import re
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm.candidates import (
    MAX_DEPTH,
    best_model,
    candidates,
    depth_target,
    goal,
    nearest_model,
    recipe_of_fit,
    recipe_of_points,
    sweeps,
)
from slm.files import fingerprint, write_json
from slm.recipe import Recipe
from slm.selection import (
    COUNTS,
    METRICS,
    Note,
    Runs,
    Side,
    corpus_of,
    excluded_for,
    flag_warnings,
    ingest,
    only_experiment,
    runs_of_experiments,
    runs_of_file,
    sides_of_file,
    sides_of_store,
    training_curves,
)

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

    from slm.evaluate.paired import PairedCore
    from slm.fits import Comparison, CoreFit, CurveFit, Design
    from slm.fits.prediction import Prediction
    from slm.report import ExperimentData, Report

Table = tuple[list[str], list[list[str]]]
"""Headers and rows."""
NO_CORE = "no run has a CORE; `slm eval RUN --core` measures it"
TIMES = {"wall_clock": "training time", "cost": "device time"}
"""Quantities that a comparison multiplies besides compute, and their names."""
ENDS = ("estimate", "low", "high")
"""Numbers of an interval in a document."""
SCATTER = 1.1
"""Ratio of training times of one depth and recipe from which a warning is given."""


def points(
    *experiments: str,
    params: str = "matrices+head",
    metric: str = "val_bpb",
    home: Path | str | None = None,
) -> Runs:
    """Return the finished runs of experiments that a fit can use, as typed points.

    `params` is what N counts (one of COUNTS), `metric` one of METRICS. Without a name it is the
    only experiment of the home. Raises ValueError for an unknown name or an experiment without
    such a run.

    Example: `points("isoflop").table()`.
    """
    _check_choices(metric, params)
    return runs_of_experiments(experiments, ingest(home), params, metric)


@dataclass
class DrawnRecord(ABC):
    """A recorded result with tables and figures."""

    document: dict[str, Any]
    """The record in `fits/`: hash, time, versions and every number."""
    stem: Path
    """Path of the figures, without ending."""
    figures: list[Path] = field(default_factory=list, init=False)
    """Files that `save` has written."""

    @abstractmethod
    def tables(self) -> list[Table]:
        """Return all tables as headers and rows of text."""

    def table(self, name: str | None = None) -> pandas.DataFrame:
        """Return a table by its first header, such as "law" or "depth"; the first by default."""
        return _frame(self.tables(), name)

    def save(self, stem: Path | None = None) -> list[Path]:
        """Write all figures as PNG and SVG; to `figures/` of the home by default."""
        stem = stem or self.stem
        stem.parent.mkdir(parents=True, exist_ok=True)
        self.figures = self._draw(stem)
        return self.figures

    @abstractmethod
    def _draw(self, stem: Path) -> list[Path]:
        """Write all figures, and return their paths."""

    def to_json(self) -> dict[str, Any]:
        """Return the document that the command prints with `--json`."""
        return self.document | {"figures": [str(path) for path in self.figures]}


@dataclass
class FitRecord(DrawnRecord):
    """A fit of `fit_curves`, with its predictions."""

    fit: CurveFit
    runs: Runs
    predictions: Sequence[Prediction] = ()

    @property
    def reach(self) -> list[dict[str, Any]]:
        """Compute at which the family reaches each requested CORE, with depth, hours and price."""
        reached: list[dict[str, Any]] = self.document["reach"]
        return reached

    def tables(self) -> list[Table]:
        """Return the tables of predictions, laws, minima, surfaces, hold-outs and reached CORE."""
        from slm import fits

        tables = fits.tables(self.fit, self.predictions)
        return [*tables, _reach_table(self.reach, self.fit)] if self.reach else tables

    def plot(self, name: str = "curve") -> Figure:
        """Plot "curve", "frontier", "residuals" or "core". Raises ValueError for one that the fit
        lacks."""
        from slm import figures

        return figures.plot_fit(self.fit, name, training_curves(self.runs), self.stem.name)

    def _draw(self, stem: Path) -> list[Path]:
        from slm import figures

        return figures.draw_fit(self.fit, stem, training_curves(self.runs), stem.name)


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

    The runs are those of experiments, or of a CSV `file` whose `columns` map the names of a
    point's fields to the file's. `metric`, `params`, `form` and `paper` are those of
    `fits.fit_curves`. `at` predicts the optimum at these FLOPs, `depths` these depths trained
    compute-optimally; `reach` finds the compute at which these CORE are reached, with the cost at
    `price` per hour on the devices of the largest run.

    Raises ValueError for contradicting options and runs that cannot be fitted, NotComparable (a
    ValueError) for runs on several axes unless `allow_mixed`.

    Example: `fit_curves("ladder", at=[1e20]).table("prediction")`.
    """
    from slm import fits

    _check_choices(metric, params)
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
            raise ValueError(
                f"params {params}: a file's N is its column; map params to another one"
            )
        columns = columns or {}
        metric = metric or ("val_bpb" if columns.get("loss") == "val_bpb" else "loss")
        runs = runs_of_file(file, columns, metric)
    targets = [fits.Target(flops) for flops in at]
    targets += [depth_target(runs, depth, counting) for depth in depths]
    fit = fits.fit_curves(
        runs.points, runs.convention, metric, form, paper, runs.other_counts, allow_mixed
    )
    if metric == "core":
        _core_fit(fit, "metric core")
    predictions = [fit.predict(best_model(fit, target, counting)) for target in targets]
    reached = [_reach(fit, core, runs.speed, price) for core in reach]
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
    return FitRecord(document, runs.stem, fit, runs, predictions)


def _core_fit(fit: CurveFit, purpose: str) -> CoreFit:
    """Return the fit of CORE. Raises ValueError, naming the purpose, if there is none."""
    from slm.fits import CoreFit

    if isinstance(fit.core, CoreFit):
        return fit.core
    raise ValueError(f"{purpose}: {fit.core.why if fit.core else NO_CORE}")


def _reach(fit: CurveFit, core: float, speed: float | None, price: float | None) -> dict[str, Any]:
    """Return the FLOPs at which the family reaches a CORE, the recipe's depth there, and hours and
    price.

    `speed` is FLOPs per second of the largest run, `price` per hour.
    """
    document = _core_fit(fit, f"reach {core:g}").reach(core).document()
    flops = {end: document[end] for end in ENDS}

    def convert(value: Callable[[float], float | None]) -> dict[str, float | None]:
        return {end: None if each is None else value(each) for end, each in flops.items()}

    document |= {"depth": None, "hours": None, "price": None}
    if recipe := recipe_of_fit(fit):
        document["depth"] = convert(partial(_nearest_depth, recipe))
    if speed:
        document["hours"] = convert(lambda flops: flops / speed / 3600)
        if price:
            document["price"] = convert(lambda flops: flops / speed / 3600 * price)
    return document


def _nearest_depth(recipe: Recipe, flops: float) -> int | None:
    model = nearest_model(recipe, flops)
    return model.depth if model else None


def _reach_table(reached: Sequence[dict[str, Any]], fit: CurveFit) -> Table:
    from slm.fits import Interval

    def text(ends: dict[str, Any] | None) -> str:
        return Interval(*(ends[end] for end in ENDS)).text() if ends else ""

    rows = []
    for row in reached:
        never = row["probability_never"]
        rows.append(
            [
                f"{row['core']:g}",
                text(row),
                text(row["depth"]),
                text(row["hours"]),
                text(row["price"]),
                "" if never is None else f"{never:.0%}",
                "extrapolated" if row["extrapolated"] else "",
            ]
        )
    name = fit.core.name if fit.core else "CORE"
    return [f"{name} reached", "FLOPs [95 %]", "depth", "hours", "price", "never", ""], rows


@dataclass
class ComparisonRecord(DrawnRecord):
    """A comparison of `compare`."""

    comparison: Comparison
    sides: tuple[Side, Side]
    """Base and candidate."""
    times: dict[str, Comparison]
    """The same comparison in training time and device time (keys of TIMES), where both sides have
    them."""
    core: PairedCore | None
    """CORE, or the mean of another bundle, on the same examples; None where not both were
    evaluated."""

    def tables(self) -> list[Table]:
        """Return the table of losses, and that of CORE where both sides were evaluated."""
        from slm import fits

        tables = [fits.comparison_table(self.comparison)]
        if self.core:
            tables.append(self.core.table((self.sides[0].name, self.sides[1].name)))
        return tables

    def plot(self) -> Figure:
        """Plot the losses of both sides and the compute multiplier per depth."""
        from slm import figures

        return figures.plot_comparison(self.comparison)

    def _draw(self, stem: Path) -> list[Path]:
        from slm import figures

        return figures.draw_comparison(self.comparison, stem)


def compare(
    base: str | None = None,
    candidate: str | None = None,
    *,
    file: Path | None = None,
    columns: dict[str, str] | None = None,
    allow_mixed: bool = False,
    home: Path | str | None = None,
) -> ComparisonRecord:
    """Price a change in compute: how much more the base needs for the candidate's loss, depth by
    depth.

    Each side is an experiment, a recipe, a version of the trainer's code, or several of them
    joined by /. A CSV `file` holds two recipes, base first; `columns` maps the names of a trial's
    fields to its own. Raises ValueError for unknown names and sides that share runs, NotComparable
    (a ValueError) for several axes unless `allow_mixed`.

    Example: `compare("seeds", "crippled").plot()`.
    """
    from slm import fits
    from slm.evaluate.paired import compare_core

    path = None
    experiments: list[str] = []
    if file is not None:
        sides = sides_of_file(file, columns or {})
        stem = Path(f"{file.stem}-compared")
    else:
        path = ingest(home)
        sides, experiments = sides_of_store(base, candidate, path)
        stem = path / "figures" / f"{base}-{candidate}".replace("/", ".")
    names = (sides[0].name, sides[1].name)
    comparison = fits.compare(sides[0].trials, sides[1].trials, names, allow_mixed=allow_mixed)
    frames = [side.rows for side in sides if side.rows is not None]
    times, warnings = _compare_times(sides, frames, allow_mixed)
    warnings += _timing_warnings(sides)
    for rows in frames:
        warnings += flag_warnings(rows)
    core = None
    if path is not None:
        core, unpaired = compare_core(path, names, frames)
        warnings += unpaired
    document = comparison.document()
    document["excluded"] = [*sides[0].excluded, *sides[1].excluded]
    for name in TIMES:
        document[name] = times[name].document() if name in times else None
    document["core"] = core.document() if core else None
    document["warnings"] += warnings
    document = record("compare", experiments, document, path)
    return ComparisonRecord(document, stem, comparison, sides, times, core)


def _compare_times(
    sides: Sequence[Side], frames: Sequence[pandas.DataFrame], allow_mixed: bool
) -> tuple[dict[str, Comparison], list[Note]]:
    """Compare training time and device time (keys of TIMES), if both sides know them on devices of
    one kind.

    If times cannot be compared, there is a warning with the reason.
    """
    from slm import fits

    if any(trial.seconds is None for side in sides for trial in side.trials):
        return {}, []
    questions = {"wall_clock": [side.trials for side in sides]}
    if frames:
        devices = {name for rows in frames for name in rows["device_name"]}
        if len(devices) > 1 or any(rows["ranks"].isna().any() for rows in frames):
            return {}, []
        questions["cost"] = [side.device_trials() for side in sides]
    names = (sides[0].name, sides[1].name)
    times = {}
    try:
        for question, (base, candidate) in questions.items():
            times[question] = fits.compare(base, candidate, names, "seconds", allow_mixed)
    except fits.NotComparable as error:
        return {}, [{"code": "times_not_compared", "message": str(error)}]
    return times, []


def _timing_warnings(sides: Sequence[Side]) -> list[Note]:
    """Return a warning if runs of one depth and side took unequal times: the machine was busy."""
    seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
    for side in sides:
        for trial in side.trials:
            if trial.seconds is not None:
                seconds[side.name, trial.depth].append(trial.seconds)
    worst = max((max(times) / min(times) for times in seconds.values()), default=1.0)
    if worst <= SCATTER:
        return []
    message = (
        f"training times of one depth and recipe differ by up to {worst:.3g} times: "
        "the machine was busy with other work"
    )
    return [{"code": "timings_scatter", "message": message}]


@dataclass
class DesignRecord:
    """A design of `next_runs`."""

    design: Design
    runs: Runs
    sweeps: list[str]
    """Command lines that make the picked runs."""
    document: dict[str, Any]
    """The record in `fits/`: hash, time, versions and every number."""

    def tables(self) -> list[Table]:
        """Return the table of picked runs as headers and rows of text."""
        from slm import fits

        return [fits.design_table(self.design)]

    def table(self) -> pandas.DataFrame:
        """Return a row per picked run, by variance removed per FLOP."""
        return _frame(self.tables())

    def plot(self) -> Figure:
        """Plot the runs that the design starts from, loss against compute."""
        return self.runs.plot()

    def to_json(self) -> dict[str, Any]:
        """Return the document of `slm next --json`."""
        return self.document


def next_runs(
    *experiments: str,
    target: str,
    budget: float,
    depths: Sequence[int] | None = None,
    allow_mixed: bool = False,
    home: Path | str | None = None,
) -> DesignRecord:
    """Choose the runs that remove most of a target's uncertainty for `budget` FLOPs, and the sweeps
    that make them.

    `target` is "loss@d26", "loss@1e20" (the depth of that compute), "params_exponent", "alpha",
    "beta" or "E". `depths` may be run; by default all from the smallest run on. Raises ValueError
    for an unknown target, runs of several recipes or of unknown size, and a budget below the
    cheapest run.

    Example: `next_runs("ladder", target="loss@d26", budget=1e20).sweeps`.
    """
    from slm import fits

    path = ingest(home)
    runs = runs_of_experiments(experiments, path)
    fits.check(runs.points, allow_mixed)
    sized = [point for point in runs.points if point.sized]
    if not sized:
        names = "+".join(runs.experiments)
        raise ValueError(f"no run of {names} has params and tokens: no surface can be fitted")
    recipe = recipe_of_points(sized, "a design")
    depths = depths or range(min(point.depth for point in sized), MAX_DEPTH + 1)
    possible = candidates(recipe, depths, sized, budget)
    design = fits.next_runs(sized, possible, goal(target, recipe), budget, allow_mixed)
    corpus = corpus_of(runs.experiments[0], path)
    lines = sweeps(design, runs, recipe, corpus)
    unsized = [point.run_id for point in runs.points if not point.sized]
    document = design.document()
    document["sweeps"] = lines
    document["excluded"] = runs.excluded + excluded_for("no params", unsized)
    document["warnings"] += runs.warnings
    document = record("next", runs.experiments, document, path)
    return DesignRecord(design, runs, lines, document)


@dataclass(frozen=True)
class ReportRecord:
    """A report of `report`."""

    data: ExperimentData
    report: Report
    page: Path
    """Path of the HTML page, whether or not it is written."""

    def table(self) -> pandas.DataFrame:
        """Return a row per run of the experiment."""
        import pandas

        return pandas.DataFrame(self.data.rows)

    def plot(self) -> Figure:
        """Plot the first fit of the experiment. Raises ValueError if no run can be fitted."""
        family = self.data.families[0]
        if not family.drawings:
            raise ValueError(f"no curve: {family.why}")
        return family.drawings[0].figure

    def html(self) -> str:
        """Return the report as one self-contained HTML page."""
        from slm.report import render_html

        return render_html(self.report)

    def markdown(self) -> str:
        """Return the report as Markdown; its figures are written next to the page."""
        from slm.report import render_markdown

        return render_markdown(self.report, self.page.with_suffix(""))

    def to_json(self) -> dict[str, Any]:
        """Return the document of `slm report --json`."""
        attempts = [
            {name: value for name, value in row.items() if name != "diff"}
            for row in self.data.attempts
        ]
        return {
            "experiment": self.data.name,
            "question": self.data.question,
            "answer": list(self.report.answer),
            "runs": self.data.rows,
            "attempts": attempts,
            "fits": [family.record for family in self.data.families if family.record],
            "page": str(self.page),
        }


def report(
    experiment: str | None = None,
    *,
    page: Path | None = None,
    allow_mixed: bool = False,
    home: Path | str | None = None,
) -> ReportRecord:
    """Return an experiment as a page: question, answer, curve, runs, warnings, cost, provenance,
    repetition.

    `page` is where the page belongs; `reports/` of the home by default. Raises ValueError for an
    unknown experiment or one without runs, NotComparable (a ValueError) for several axes unless
    `allow_mixed`.

    Example: `Path("page.html").write_text(report("ladder").html())`.
    """
    from slm import fits
    from slm.report import Family, build_report, drawings, gather

    path = ingest(home)
    name = experiment or only_experiment(path)
    data = gather(name, path, allow_mixed)
    families = []
    try:
        runs = runs_of_experiments([name], path)
        recipes = list(dict.fromkeys(point.recipe for point in runs.points))
    except ValueError as error:
        recipes = []
        families.append(Family("", None, str(error)))
    for recipe in recipes:
        part = runs.of_recipe(recipe)
        counts = part.other_counts
        fit = fits.fit_curves(
            part.points, part.convention, other_counts=counts, allow_mixed=allow_mixed
        )
        suffix = "-" + re.sub(r"[^A-Za-z0-9._-]+", "_", recipe) if len(recipes) > 1 else ""
        drawn = drawings(fit, suffix, training_curves(part))
        families.append(Family(recipe, fit, "", _fit_record(fit, part).document, drawn))
    data = replace(data, families=families)
    return ReportRecord(data, build_report(data), page or path / "reports" / f"{name}.html")


def record(
    kind: str, experiments: Sequence[str], document: dict[str, Any], home: Path | None
) -> dict[str, Any]:
    """Return a document with its kind, hash, time and versions.

    Of experiments of a home, it is also written to `fits/` and ingested; of a file it is not.
    """
    from importlib import metadata

    import store

    versions = {name: metadata.version(name) for name in ("slm", "numpy", "scipy")}
    content = {"kind": kind, "experiments": list(experiments), "versions": versions, **document}
    text = json.dumps(content, sort_keys=True, allow_nan=False)
    digest = fingerprint(text, 12)
    entry = {"hash": digest, "created": time.time(), **content}
    if not experiments or home is None:
        return entry
    path = home / "fits" / f"{digest}.json"
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        write_json(path, entry)
    store.ingest(home)
    return entry


def _check_choices(metric: str | None, params: str | None) -> None:
    for name, value, choices in (("metric", metric, METRICS), ("params", params, COUNTS)):
        if value is not None and value not in choices:
            raise ValueError(f"{name} {value}: unknown; there are {', '.join(choices)}")


def _frame(tables: Sequence[Table], name: str | None = None) -> pandas.DataFrame:
    """Return one of several tables, by its first header. Raises ValueError for an unknown one."""
    import pandas

    for headers, rows in tables:
        if name in (None, headers[0]):
            return pandas.DataFrame(rows, columns=headers).set_index(headers[0])
    names = ", ".join(repr(headers[0]) for headers, _ in tables) or "none"
    raise ValueError(f"table {name!r}: there are {names}")
