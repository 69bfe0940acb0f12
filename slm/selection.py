"""Rows of the store's view `results` as typed points: which runs a fit or a comparison may use."""

from __future__ import annotations

import json
import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from slm.hardware.devices import mfu
from slm.text import first_few, plural

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from slm.fits import Point, Trial

LOG = logging.getLogger(__name__)
SMOOTHING = 12
"""A training curve is averaged over this share of its logged steps."""
COUNTS = {
    "matrices+head": "scaling",
    "total": "total",
    "matrices": "transformer_matrices",
}
"""Conventions of N, and the name of each in `Hyperparameters.parameters`."""
COUNT_COLUMNS = {
    "matrices+head": "parameters_scaling",
    "total": "parameters_total",
    "matrices": "parameters_matrices",
}
"""Conventions of N, and the column of `results` that has it."""
METRICS = {"val_bpb": "val_bpb", "loss": "val_loss", "core": "val_bpb"}
"""Metrics that a fit may have, and the column of its loss; CORE is fitted through the loss."""
CORE_COLUMNS = ("core", "core_error", "core_key")
NO_BUDGET = "none"
"""Value of `budget` in a column mapping for a file whose runs have no budgets."""

Note = dict[str, str]
"""A warning (code, message) or an excluded run (run_id, reason)."""


@dataclass(frozen=True)
class Runs:
    """Finished runs that a fit may use, as typed points."""

    points: list[Point]
    convention: str
    """Convention of N, one of COUNTS; of a file, a description."""
    stem: Path
    """Path of the figures, without ending."""
    home: Path | None = None
    """Home that holds the runs; None for a file."""
    experiments: list[str] = field(default_factory=list)
    """Experiments of the home that hold the runs; empty for a file, whose fit is not recorded."""
    excluded: list[Note] = field(default_factory=list)
    rows: pandas.DataFrame | None = None
    """Rows of `results`, one per point; None for a file."""
    warnings: list[Note] = field(default_factory=list)
    """Flags of runs that are used."""
    other_counts: dict[str, list[float]] = field(default_factory=dict)
    """N of every run by each other convention that all runs have."""
    speed: float | None = None
    """FLOPs per second of the largest run; None if unknown."""
    ratio: float | None = None
    """Tokens per parameter of a ladder at a fixed ratio; None at the recipe's own."""
    metric: str = "val_bpb"

    def of_recipe(self, recipe: str) -> Runs:
        """Return the runs of one recipe."""
        assert self.rows is not None
        rows = self.rows[self.rows["recipe"] == recipe]
        return replace(
            self,
            points=[point for point in self.points if point.recipe == recipe],
            warnings=[],
            rows=rows,
            other_counts={name: rows[COUNT_COLUMNS[name]].tolist() for name in self.other_counts},
        )

    def table(self) -> pandas.DataFrame:
        """Return a row per run."""
        import pandas

        return pandas.DataFrame([vars(point) for point in self.points])

    def to_json(self) -> dict[str, Any]:
        """Return the points, the excluded runs and the warnings; null for what is not known."""
        from slm.fits.types import to_json

        points = [to_json(point) for point in self.points]
        return {"points": points, "excluded": self.excluded, "warnings": self.warnings}

    def plot(self) -> Figure:
        """Plot the loss of every run against compute, its training curve behind it."""
        from slm import figures

        return figures.plot_runs(self.points, training_curves(self), self.metric, self.stem.name)


def ingest(home: Path | str | None = None) -> Path:
    """Bring a home's database up to date with its files, logging unreadable ones, and return the
    home.

    Without an argument the home is $SLM_HOME, else ./runs.
    """
    import store

    path = Path(home) if home is not None else store.home()
    for problem in store.ingest(path).problems:
        LOG.warning("slm: %s", problem)
    return path


def runs_of_experiments(
    names: Sequence[str], home: Path, counting: str = "matrices+head", metric: str = "val_bpb"
) -> Runs:
    """Select the finished runs of experiments; of the only one there is if none is named.

    Raises ValueError for an unknown experiment, or one without a finished run that a fit can use.
    """
    names = list(dict.fromkeys(names)) or [only_experiment(home)]
    finished = finished_rows(names, home)
    usable, excluded = usable_rows(finished, ("flops", METRICS[metric]))
    ladder, off_ladder = ladder_rows(usable)
    excluded += off_ladder
    if ladder.empty:
        raise ValueError(_why_empty(names, usable, excluded))
    horizons = ladder["horizon"].dropna()
    ratios = [text[6:] for text in horizons if text.startswith("ratio=")]
    largest_last = ladder.sort_values("flops")
    other_counts = {
        name: ladder[column].tolist()
        for name, column in COUNT_COLUMNS.items()
        if name != counting and ladder[column].notna().all()
    }
    return Runs(
        points=to_points(ladder, COUNT_COLUMNS[counting], METRICS[metric]),
        convention=counting,
        stem=home / "figures" / "+".join(names),
        home=home,
        experiments=names,
        excluded=excluded,
        rows=ladder,
        warnings=flag_warnings(ladder),
        other_counts=other_counts,
        speed=known(largest_last["flops_per_second"].iloc[-1]),
        ratio=float(ratios[0]) if ratios else None,
        metric=metric,
    )


def runs_of_file(file: Path, columns: dict[str, str], metric: str = "loss") -> Runs:
    """Read the runs of a table; `columns` maps the names of a point's fields to the file's columns.

    Raises ValueError as `exchange.point_files.read_points` does.
    """
    from slm.exchange.point_files import read_points

    has_budgets = columns.get("budget") != NO_BUDGET
    if not has_budgets:
        columns = {name: column for name, column in columns.items() if name != "budget"}
    table = read_points(file, columns, has_budgets)
    outliers = [point.run_id for point in table.outliers]
    return Runs(
        points=list(table.points),
        convention="params as the file gives them",
        stem=Path(file.stem),
        excluded=excluded_for("marked as an outlier", outliers),
        metric=metric,
    )


def excluded_for(reason: str, runs: Iterable[str]) -> list[Note]:
    """Return the notes on runs that are excluded for one reason."""
    return [{"run_id": run, "reason": reason} for run in runs]


def _why_empty(names: Sequence[str], usable: pandas.DataFrame, excluded: Sequence[Note]) -> str:
    experiments = "experiment " + " and ".join(repr(name) for name in names)
    if not excluded:
        return f"{experiments} has no finished run to fit: see `slm status {names[0]}`"
    if usable.empty:
        reasons = "; ".join(describe_excluded(excluded))
        hint = ""
        if any(run["reason"] == "no val_bpb" for run in excluded):
            hint = "; --metric loss fits nats per token"
        return f"{experiments} has no run to fit: {reasons}{hint}"
    horizons = ", ".join(sorted(set(usable["horizon"])))
    return f"{experiments} has runs at {horizons}: a fit takes one ratio, or FLOPs budgets"


def corpus_of(experiment: str, home: Path) -> str:
    """Return the corpus that an experiment's declaration names."""
    import store

    query = "select declared from experiments where home = ? and name = ?"
    owner = store.experiment_home(experiment, home)
    frame = store.sql(query, [owner, experiment], home=home)
    declared = parsed(frame["declared"].iloc[0])
    return str(declared.get("data", "python"))


def only_experiment(home: Path) -> str:
    """Return the name of the home's only experiment. Raises ValueError if it has several, or
    none."""
    import store

    query = "select name from experiments where home = ? order by name"
    names = store.sql(query, [store.home_id(home)], home=home)["name"].tolist()
    if len(names) != 1:
        raise ValueError(f"name an experiment: there are {', '.join(names) or 'none'} in {home}")
    return str(names[0])


def finished_rows(names: Sequence[str], home: Path) -> pandas.DataFrame:
    """Return the rows of finished runs of experiments, each run once."""
    import pandas

    import store

    frames = [store.results(name, home=home) for name in names]
    frame = pandas.concat(frames)
    frame = frame.drop_duplicates("run_id", ignore_index=True)
    return frame[frame["status"] == "finished"]


def usable_rows(
    finished: pandas.DataFrame, required: Sequence[str]
) -> tuple[pandas.DataFrame, list[Note]]:
    """Split rows into those that no flag forbids and that have all required columns, and the
    excluded runs."""
    from slm.exchange.importers.checks import flags_of_weight

    is_usable = finished["usable"].astype(bool)
    excluded = []
    flagged = finished[~is_usable]
    for run, flags in zip(flagged["run_id"], flagged["flags"]):
        excluded += excluded_for(f"flagged {flags_of_weight(flags, 'forbids')}", [run])
    usable = finished[is_usable]
    for column in required:
        is_known = usable[column].notna()
        excluded += excluded_for(f"no {column}", usable[~is_known]["run_id"])
        usable = usable[is_known]
    return usable, excluded


def ladder_rows(usable: pandas.DataFrame) -> tuple[pandas.DataFrame, list[Note]]:
    """Split rows into those that one fit may hold, and the excluded runs.

    One fit holds runs at FLOPs budgets and one ladder: the compute-optimal runs, or those of the
    only ratio if there are none. An imported run without a horizon belongs to the ladder.
    """
    horizons = usable["horizon"]
    ratios = {text for text in set(horizons.dropna()) if text.startswith("ratio=")}
    ladder = {"compute-optimal"}
    if len(ratios) == 1 and not horizons.isin(ladder).any():
        ladder = ratios
    at_budget = horizons.map(budget_of).notna()
    in_fit = at_budget | horizons.isin(ladder) | horizons.isna()
    off_ladder = usable[~in_fit]
    excluded = []
    for run, horizon in zip(off_ladder["run_id"], off_ladder["horizon"]):
        excluded += excluded_for(f"{horizon} is not compute-optimal", [run])
    return usable[in_fit], excluded


def flag_warnings(used: pandas.DataFrame) -> list[Note]:
    """Return a warning that lists the runs used despite a flag; empty if there are none."""
    from slm.exchange.importers.checks import flags_of_weight

    flagged = []
    for run, flags in zip(used["run_id"], used["flags"]):
        serious = flags_of_weight(flags, "warns") if isinstance(flags, str) else ""
        if serious:
            flagged.append(f"{run} ({serious})")
    if not flagged:
        return []
    message = (
        f"{len(flagged)} of {len(used)} runs are flagged but used: {first_few(flagged)}; "
        "check their source"
    )
    return [{"code": "flagged_runs", "message": message}]


def to_points(
    rows: pandas.DataFrame, params: str = "parameters_scaling", loss: str = "val_bpb"
) -> list[Point]:
    """Convert rows of `results` to points; `params` and `loss` name the columns of N and of the
    loss.

    An imported run without a depth gets depth 1, one without a seed gets seed 0, as in a CSV.
    """
    from slm.fits import Point

    return [
        Point(
            run_id=row["run_id"],
            recipe=row["recipe"],
            depth=int(known(row["depth"], 1)),
            params=float(known(row[params], math.nan)),
            tokens=float(known(row["tokens"], math.nan)),
            flops=row["flops"],
            loss=row[loss],
            seed=int(known(row["seed"], 0)),
            budget=budget_of(row["horizon"]),
            comparison_key=row["comparison_key"],
            **{name: known(row[name]) for name in CORE_COLUMNS if name in row},
        )
        for row in rows.to_dict("records")
    ]


def to_trials(rows: pandas.DataFrame, unknown_seed: int) -> list[Trial]:
    """Convert rows of `results` to trials.

    A run without a seed gets `unknown_seed`, which must differ between the two sides of a
    comparison so that it pairs with no run of the other side.
    """
    from slm.fits import Trial

    return [
        Trial(
            run_id=row["run_id"],
            depth=row["depth"],
            seed=int(known(row["seed"], unknown_seed)),
            flops=row["flops"],
            loss=row["val_bpb"],
            seconds=known(row["train_seconds"]),
            comparison_key=row["comparison_key"],
        )
        for row in rows.to_dict("records")
    ]


@dataclass(frozen=True)
class Side:
    """A side of a comparison: an experiment, a recipe, or runs of one version of the trainer's
    code."""

    name: str
    trials: list[Trial]
    rows: pandas.DataFrame | None = None
    """Rows of `results`, one per trial; None for a file."""
    excluded: list[Note] = field(default_factory=list)

    def at_depth(self, depth: int) -> DepthMeans:
        """Return the losses of a depth, and the means of what else is known of all its runs."""
        trials = [trial for trial in self.trials if trial.depth == depth]
        losses = [trial.loss for trial in trials]
        seconds = [trial.seconds for trial in trials if trial.seconds is not None]
        train_seconds = mean(seconds) if seconds else None
        if self.rows is None:
            return DepthMeans(losses, train_seconds)
        rows = self.rows[self.rows["depth"] == depth]
        speeds = rows[["flops_per_second", "device_name", "ranks"]]
        shares = [mfu(*map(known, row)) for row in speeds.itertuples(index=False)]
        known_shares = [share for share in shares if share is not None]
        return DepthMeans(
            losses,
            train_seconds,
            core=_mean_if_known(rows["core"]),
            tokens_per_second=_mean_if_known(rows["tokens_per_second"]),
            mfu=mean(known_shares) if len(known_shares) == len(shares) else None,
        )

    def device_trials(self) -> list[Trial]:
        """Return the trials with the seconds of all their devices together."""
        assert self.rows is not None
        seconds = self.rows["train_seconds"] * self.rows["ranks"]
        return [replace(trial, seconds=each) for trial, each in zip(self.trials, seconds)]


@dataclass(frozen=True)
class DepthMeans:
    """Measurements of the runs of one side at a depth; None for what is not known of all of
    them."""

    losses: list[float]
    train_seconds: float | None
    core: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None


def _mean_if_known(column: pandas.Series[float]) -> float | None:
    return float(column.mean()) if column.notna().all() else None


def sides_of_file(file: Path, columns: dict[str, str]) -> tuple[Side, Side]:
    """Return both sides of a table with two recipes, base first."""
    from slm.exchange.point_files import read_trials

    base, candidate = read_trials(file, columns).items()
    return Side(*base), Side(*candidate)


def sides_of_store(
    base: str | None, candidate: str | None, home: Path
) -> tuple[tuple[Side, Side], list[str]]:
    """Return both sides and the experiments that hold their runs."""
    import store

    if base is None or candidate is None:
        raise ValueError("two names are needed: `slm compare BASE CANDIDATE`, or --from FILE.csv")
    rows = store.results(home=home)
    finished = rows[rows["status"] == "finished"]
    query = "select experiment, run_id from memberships where home = ?"
    memberships = store.sql(query, [store.home_id(home)], home=home)
    experiments = dict(memberships.groupby("experiment")["run_id"].agg(set))
    # unknown seeds differ between the sides, so that they make no pairs
    first = _named_side(base, finished, experiments, unknown_seed=-1)
    second = _named_side(candidate, finished, experiments, unknown_seed=-2)
    base_runs = {trial.run_id for trial in first.trials}
    runs = {trial.run_id for trial in second.trials}
    if shared := sorted(base_runs & runs):
        raise ValueError(
            f"{base} and {candidate} share run {shared[0]} and {len(shared) - 1} others: "
            "nothing to compare"
        )
    compared = base_runs | runs
    names = [name for name, members in experiments.items() if members & compared]
    return (first, second), sorted(names)


def _named_side(
    name: str, finished: pandas.DataFrame, experiments: dict[str, set[str]], unknown_seed: int
) -> Side:
    """Return the compute-optimal runs that belong to every part of a name.

    Raises ValueError for an unknown part, for no run, and for several recipes or versions of the
    code.
    """
    for part in name.split("/"):
        finished = finished[_matches(part, finished, experiments)]
    usable, excluded = usable_rows(finished, ("depth", "flops", "val_bpb"))
    ladder, _ = ladder_rows(usable)
    ladder = ladder[ladder["horizon"].map(budget_of).isna()]
    if ladder.empty:
        reasons = "; ".join(describe_excluded(excluded))
        why = f" ({reasons})" if reasons else ""
        raise ValueError(
            f"{name}: no finished compute-optimal run matches{why}; `slm status` lists the runs"
        )
    for column, noun in (("recipe", "recipes"), ("code", "versions of the trainer's code")):
        values = sorted(set(ladder[column].dropna()))
        if len(values) > 1:
            choices = ", ".join(f"{name}/{value}" for value in values)
            raise ValueError(f"{name} has runs of {len(values)} {noun}: name one, as in {choices}")
    return Side(name, to_trials(ladder, unknown_seed), ladder, excluded)


def _matches(
    part: str, rows: pandas.DataFrame, experiments: dict[str, set[str]]
) -> pandas.Series[bool]:
    """Return which rows belong to an experiment, a recipe or a version of the code (4 digits or
    more)."""
    if part in experiments:
        return rows["run_id"].isin(experiments[part])
    if part in set(rows["recipe"]):
        return rows["recipe"] == part
    codes = rows["code"].fillna("")
    matches = codes.str.startswith(part) & (len(part) >= 4)
    if not matches.any():
        recipes = rows["recipe"].dropna()
        names = {*experiments, *recipes, *rows["code"].dropna()}
        choices = ", ".join(sorted(names)) or "none"
        raise ValueError(f"{part}: no such experiment, recipe or code; there are {choices}")
    return matches


def training_curves(runs: Runs) -> list[tuple[int, NDArray[Any], NDArray[Any]]]:
    """Return depth, FLOPs and smoothed training loss of each run that has them; none for a file.

    Nats per token are converted to the unit of the fitted loss by the run's own ratio of the two
    on the validation rows.
    """
    import store

    if runs.rows is None:
        return []
    logged: dict[Any, pandas.DataFrame] = {}
    for name in runs.experiments:
        curves = store.curves(name, home=runs.home)
        curves = curves.dropna(subset=["loss", "flops"])
        logged |= dict(iter(curves.groupby("run_id")))
    smoothed = []
    for point, val_loss in zip(runs.points, runs.rows["val_loss"]):
        if point.run_id not in logged or known(val_loss) is None:
            continue
        steps = logged[point.run_id]
        window = max(1, len(steps) // SMOOTHING)
        flops = steps["flops"].to_numpy()
        mean_loss = steps["loss"].rolling(window, min_periods=1).mean()
        loss = mean_loss.to_numpy() * point.loss / val_loss
        smoothed.append((point.depth, flops, loss))
    return smoothed


def describe_excluded(excluded: Sequence[Note]) -> list[str]:
    """Return a line per reason: the number of runs, the reason, the first runs by name."""
    runs: dict[str, list[str]] = defaultdict(list)
    for note in excluded:
        runs[note["reason"]].append(note["run_id"])
    return [
        f"{plural(len(names), 'run')}, {reason}: {first_few(names)}"
        for reason, names in runs.items()
    ]


def budget_of(horizon: Any) -> float | None:
    """Return the FLOPs of a horizon "flops=1e12"; None for another horizon, and for none."""
    name, _, value = str(horizon).partition("=")
    return float(value) if name == "flops" else None


def known(value: Any, default: Any = None) -> Any:
    """Return a cell of a DataFrame, or the default if it is missing."""
    import pandas

    return default if pandas.isna(value) else value


def records(frame: pandas.DataFrame) -> list[dict[str, Any]]:
    """Return rows as dictionaries of plain Python values, None for what is missing."""
    return frame.astype(object).where(frame.notna(), None).to_dict("records")  # type: ignore[return-value]


def parsed(value: Any) -> dict[str, Any]:
    """Return a JSON column, which a database gives as text or as an object; empty if it is no
    object."""
    document = json.loads(value) if isinstance(value, str) else value
    return document if isinstance(document, dict) else {}
