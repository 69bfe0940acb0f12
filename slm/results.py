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

import hashlib
import json
import re
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm.family import (
    MAX_DEPTH,
    best_model,
    candidates,
    depth_target,
    goal,
    known_recipe,
    nearest_model,
    sweeps,
)
from slm.files import write_json
from slm.recipe import RECIPES
from slm.selection import (
    COUNTS,
    METRICS,
    Note,
    Runs,
    Side,
    flag_warnings,
    ingest,
    only_experiment,
    runs_of_experiments,
    runs_of_file,
    sides_of_store,
    single_recipe,
    training_curves,
)

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

    from slm.evaluate.paired import PairedCore
    from slm.fits import Comparison, CurveFit, Design, Trial
    from slm.fits.prediction import Prediction
    from slm.report import ExperimentData, Report

Table = tuple[list[str], list[list[str]]]
"""Headers and rows."""
NO_CORE = "no run has a CORE; `slm eval RUN --core` measures it"
TIMES = {"wall_clock": "training time", "cost": "device time"}
"""Quantities that a comparison multiplies besides compute, and their names."""
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
        """Return all tables as headers and rows of text: predictions, laws, minima, surfaces,
        hold-outs."""
        from slm import fits

        tables = fits.tables(self.fit, self.predictions)
        return [*tables, _reach_table(self.reach, self.fit)] if self.reach else tables

    def table(self, name: str | None = None) -> pandas.DataFrame:
        """Return a table by its first header: "law", "budget (FLOPs)", "surface", ...; the first by
        default."""
        return _frame(self.tables(), name)

    def plot(self, name: str = "curve") -> Figure:
        """Plot "curve", "frontier", "residuals" or "core". Raises ValueError for one that the fit
        lacks."""
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
        _require_core(fit, "metric core")
    predictions = [fit.predict(best_model(fit, target, counting)) for target in targets]
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


def _fit_recipes(runs: Runs, allow_mixed: bool) -> list[FitRecord]:
    """Fit the runs of each recipe alone."""
    from slm import fits

    fitted = []
    for recipe in dict.fromkeys(point.recipe for point in runs.points):
        part = _of_recipe(runs, recipe)
        fit = fits.fit_curves(
            part.points, part.convention, other_counts=part.other_counts, allow_mixed=allow_mixed
        )
        fitted.append(_fit_record(fit, part))
    return fitted


def _of_recipe(runs: Runs, recipe: str) -> Runs:
    """Return the runs of one recipe."""
    chosen = [k for k, point in enumerate(runs.points) if point.recipe == recipe]
    return replace(
        runs,
        points=[runs.points[k] for k in chosen],
        warnings=[],
        rows=runs.rows.iloc[chosen] if runs.rows is not None else None,
        other_counts={
            name: [sizes[k] for k in chosen] for name, sizes in runs.other_counts.items()
        },
    )


def _require_core(fit: CurveFit, purpose: str) -> None:
    from slm.fits import CoreFit

    if not isinstance(fit.core, CoreFit):
        raise ValueError(f"{purpose}: {fit.core.why if fit.core else NO_CORE}")


def _reached(
    fit: CurveFit, core: float, speed: float | None, price: float | None
) -> dict[str, Any]:
    """Return the FLOPs at which the family reaches a CORE, the recipe's depth there, and hours and
    price.

    `speed` is FLOPs per second of the largest run, `price` per hour.
    """
    from slm.fits import CoreFit

    _require_core(fit, f"reach {core:g}")
    assert isinstance(fit.core, CoreFit)
    result = fit.core.reach(core)
    recipe = None if fit.mixed else RECIPES.get(fit.points[0].recipe)

    def convert(value: Callable[[float], float | None]) -> dict[str, float | None]:
        flops = result.flops
        ends = {"estimate": flops.estimate, "low": flops.low, "high": flops.high}
        return {name: None if end is None else value(end) for name, end in ends.items()}

    def depth(flops: float) -> int | None:
        hp = nearest_model(recipe, flops) if recipe else None
        return hp.depth if hp else None

    document = result.document()
    document["depth"] = convert(depth) if recipe else None
    document["hours"] = document["price"] = None
    if speed:
        document["hours"] = convert(lambda flops: flops / speed / 3600)
        if price:
            document["price"] = convert(lambda flops: flops / speed / 3600 * price)
    return document


def _reach_table(reached: Sequence[dict[str, Any]], fit: CurveFit) -> Table:
    from slm.fits import Interval

    def text(ends: dict[str, Any] | None) -> str:
        return Interval(ends["estimate"], ends["low"], ends["high"]).text() if ends else ""

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
class ComparisonRecord:
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
    document: dict[str, Any]
    """The record in `fits/`: hash, time, versions and every number."""
    stem: Path
    """Path of the figure, without ending."""
    figures: list[Path] = field(default_factory=list)
    """Files that `save` has written."""

    def tables(self) -> list[Table]:
        """Return all tables as headers and rows of text: loss, and CORE where both sides were
        evaluated."""
        from slm import fits

        tables = [fits.comparison_table(self.comparison)]
        if self.core:
            tables.append(self.core.table((self.sides[0].name, self.sides[1].name)))
        return tables

    def table(self, name: str | None = None) -> pandas.DataFrame:
        """Return a table by its first header: "depth", or the name of the benchmark; the first by
        default."""
        return _frame(self.tables(), name)

    def plot(self) -> Figure:
        """Plot the losses of both sides and the compute multiplier per depth."""
        from slm import figures

        return figures.plot_comparison(self.comparison)

    def save(self, stem: Path | None = None) -> list[Path]:
        """Write the figure as PNG and SVG; to `figures/` of the home by default."""
        from slm import figures

        stem = stem or self.stem
        stem.parent.mkdir(parents=True, exist_ok=True)
        self.figures = figures.draw_comparison(self.comparison, stem)
        return self.figures

    def to_json(self) -> dict[str, Any]:
        """Return the document of `slm compare --json`."""
        return self.document | {"figures": [str(path) for path in self.figures]}


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
    from slm.exchange.point_files import read_trials

    path = None
    experiments: list[str] = []
    if file is not None:
        read = read_trials(file, columns or {})
        sides = [Side(name, trials) for name, trials in read.items()]
        stem = Path(f"{file.stem}-compared")
    else:
        path = ingest(home)
        sides, experiments = sides_of_store(base, candidate, path)
        stem = path / "figures" / f"{base}-{candidate}".replace("/", ".")
    names = (sides[0].name, sides[1].name)
    comparison = fits.compare(sides[0].trials, sides[1].trials, names, allow_mixed=allow_mixed)
    times, warnings = _compare_times(sides, allow_mixed)
    warnings += _timing_warnings(sides)
    core = None
    if path is not None:
        frames = [side.rows for side in sides if side.rows is not None]
        for rows in frames:
            warnings += flag_warnings(rows)
        core, unpaired = compare_core(path, names, frames)
        warnings += unpaired
    document = comparison.document()
    document["excluded"] = [note for side in sides for note in side.excluded]
    for name in TIMES:
        document[name] = times[name].document() if name in times else None
    document["core"] = core.document() if core else None
    document["warnings"] += warnings
    document = record("compare", experiments, document, path)
    return ComparisonRecord(comparison, (sides[0], sides[1]), times, core, document, stem)


def _compare_times(
    sides: Sequence[Side], allow_mixed: bool
) -> tuple[dict[str, Comparison], list[Note]]:
    """Compare training time and device time (keys of TIMES), if both sides know them on devices of
    one kind.

    If times cannot be compared, there is a warning with the reason.
    """
    from slm import fits

    trials = [side.trials for side in sides]
    if any(trial.seconds is None for side in trials for trial in side):
        return {}, []
    questions = {"wall_clock": trials}
    frames = [side.rows for side in sides if side.rows is not None]
    if frames:
        devices = {name for rows in frames for name in rows["device_name"]}
        if len(devices) > 1 or any(rows["ranks"].isna().any() for rows in frames):
            return {}, []
        questions["cost"] = [
            _device_seconds(side.trials, rows) for side, rows in zip(sides, frames)
        ]
    names = (sides[0].name, sides[1].name)
    times = {}
    try:
        for name, (base, candidate) in questions.items():
            times[name] = fits.compare(base, candidate, names, "seconds", allow_mixed)
    except fits.NotComparable as error:
        return {}, [{"code": "times_not_compared", "message": str(error)}]
    return times, []


def _device_seconds(trials: Sequence[Trial], rows: pandas.DataFrame) -> list[Trial]:
    """Return trials with the seconds of all their devices together."""
    ranks = dict(zip(rows["run_id"], rows["ranks"]))
    return [
        replace(trial, seconds=(trial.seconds or 0.0) * float(ranks[trial.run_id]))
        for trial in trials
    ]


def _timing_warnings(sides: Sequence[Side]) -> list[Note]:
    """Return a warning if runs of one depth and side took unequal times: the machine was busy."""
    worst = 1.0
    for side in sides:
        seconds: dict[int, list[float]] = defaultdict(list)
        for trial in side.trials:
            if trial.seconds is not None:
                seconds[trial.depth].append(trial.seconds)
        worst = max([worst, *(max(times) / min(times) for times in seconds.values())])
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

    def table(self) -> pandas.DataFrame:
        """Return a row per picked run, by variance removed per FLOP."""
        from slm import fits

        return _frame([fits.design_table(self.design)])

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

    runs = runs_of_experiments(experiments, ingest(home))
    fits.check(runs.points, allow_mixed)
    sized = [point for point in runs.points if point.sized]
    if not sized:
        names = "+".join(runs.experiments)
        raise ValueError(f"no run of {names} has params and tokens: no surface can be fitted")
    recipe = known_recipe(single_recipe(sized, "a design"), "a design")
    depths = depths or range(min(point.depth for point in sized), MAX_DEPTH + 1)
    possible = candidates(recipe, depths, sized, budget)
    design = fits.next_runs(sized, possible, goal(target, recipe), budget, allow_mixed)
    lines = sweeps(design, runs, recipe)
    unsized = [
        {"run_id": point.run_id, "reason": "no params"} for point in runs.points if not point.sized
    ]
    document = design.document()
    document["sweeps"] = lines
    document["excluded"] = [*runs.excluded, *unsized]
    document["warnings"] += runs.warnings
    document = record("next", runs.experiments, document, runs.home)
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
    from slm.report import Family, build_report, drawings, gather

    path = ingest(home)
    name = experiment or only_experiment(path)
    data = gather(name, path, allow_mixed)
    try:
        runs = runs_of_experiments([name], path)
    except ValueError as error:
        families = [Family("", None, str(error))]
    else:
        fitted = _fit_recipes(runs, allow_mixed)
        families = []
        for fit in fitted:
            recipe = fit.runs.points[0].recipe
            suffix = "-" + re.sub(r"[^A-Za-z0-9._-]+", "_", recipe) if len(fitted) > 1 else ""
            drawn = drawings(fit.fit, suffix, training_curves(fit.runs))
            families.append(Family(recipe, fit.fit, "", fit.document, drawn))
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
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    entry = {"hash": digest, "created": time.time(), **content}
    if not experiments or home is None:
        return entry
    path = home / "fits" / f"{digest}.json"
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        write_json(path, entry)
    store.ingest(home)
    return entry


def _check_choice(name: str, value: str | None, choices: dict[str, str]) -> None:
    if value is not None and value not in choices:
        raise ValueError(f"{name} {value}: unknown; there are {', '.join(choices)}")


def _frame(tables: Sequence[Table], name: str | None = None) -> pandas.DataFrame:
    """Return one of several tables, by its first header. Raises ValueError for an unknown one."""
    import pandas

    by_name = {headers[0]: (headers, rows) for headers, rows in tables}
    if name is None and by_name:
        name = next(iter(by_name))
    if name not in by_name:
        raise ValueError(f"table {name!r}: there are {', '.join(map(repr, by_name)) or 'none'}")
    headers, rows = by_name[name]
    return pandas.DataFrame(rows, columns=headers).set_index(headers[0])
