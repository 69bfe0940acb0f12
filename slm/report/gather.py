"""Data of a report: an experiment's rows in the store, and the fits of its recipes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slm.fits import CurveFit
from slm.fits.points import Axes
from slm.report.render import Drawing
from slm.selection import budget_of, parsed, records
from slm.text import plural

Row = Mapping[str, Any]
"""A row of the store; None is not known. An integer may come as a float, where the column has
gaps."""


@dataclass(frozen=True)
class Family:
    """The runs of one recipe and their fit."""

    recipe: str
    fit: CurveFit | None
    why: str = ""
    """Why there is no fit."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """The recorded document of the fit."""
    drawings: Sequence[Drawing] = ()
    """The curve first, then the others that the fit has."""

    def drawings_named(self, *names: str) -> list[Drawing]:
        """Return those figures that the fit has."""
        return [drawing for drawing in self.drawings if drawing.name in names]


@dataclass(frozen=True)
class ExperimentData:
    """Data of an experiment in the store."""

    name: str
    question: str
    """Empty if none was declared."""
    declared: Mapping[str, Any]
    """Recipes, depths, horizons, seeds, corpus and plans as declared; empty for imported runs."""
    rows: Sequence[Row]
    """Rows of the view `results`, cheapest first."""
    attempts: Sequence[Row]
    """Rows of the table `attempts`."""
    families: Sequence[Family] = ()
    """Families of recipes with a finished run."""

    @property
    def finished(self) -> list[Row]:
        """Rows with a result."""
        return [row for row in self.rows if row["status"] == "finished"]

    @property
    def scored(self) -> list[Row]:
        """Rows with a result and a score of a benchmark."""
        return [row for row in self.finished if row["core"] is not None]

    @property
    def core_name(self) -> str:
        """Name of that benchmark, several joined by commas; CORE is that of the full bundle."""
        names = {str(row["core_metric"]) for row in self.rows if row["core_metric"]} or {"core"}
        return ", ".join(sorted("CORE" if name == "core" else name for name in names))


def gather(name: str, home: Path, allow_mixed: bool) -> ExperimentData:
    """Read an experiment from the store, without its fits.

    Raises QueryError for an unknown experiment, ValueError for one without runs, NotComparable for
    runs on several axes unless `allow_mixed`.
    """
    import store

    frame = store.results(name, home=home)
    if frame.empty:
        raise ValueError(
            f"experiment {name!r} has no runs left: run the same sweep again to plan them"
        )
    key = [str(frame["home"].iloc[0]), name]
    query = "select question, declared from experiments where home = ? and name = ?"
    (experiment,) = records(store.sql(query, key, home=home))
    query = """select attempts.* from attempts join memberships using (home, run_id)
               where home = ? and experiment = ? order by run_id, attempt"""
    data = ExperimentData(
        name=name,
        question=experiment["question"] or "",
        declared=parsed(experiment["declared"]),
        rows=sorted(records(frame), key=_order),
        attempts=records(store.sql(query, key, home=home)),
    )
    Axes.of_keys(row["comparison_key"] for row in data.finished).require_one(allow_mixed)
    return data


def _order(row: Row) -> tuple[float, int, str, int]:
    """Sort by budget, then by depth, recipe and seed."""
    budget = budget_of(row["horizon"] or "") or 0.0
    return budget, row["depth"] or 0, row["recipe"] or "", row["seed"] or 0


def replicates(rows: Sequence[Row]) -> list[list[Row]]:
    """Return groups of two or more runs that differ only in the seed."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    names = ("recipe", "depth", "horizon", "comparison_key", "code")
    for row in rows:
        if row["val_bpb"] is not None and row["seed"] is not None:
            groups[tuple(row[name] for name in names)].append(row)
    return [group for group in groups.values() if len(group) > 1]


def distinct(rows: Sequence[Row], name: str) -> list[str]:
    """Return the known values of a column, each once."""
    return list(dict.fromkeys(str(row[name]) for row in rows if row[name] is not None))


def describe_states(rows: Sequence[Row]) -> str:
    """Return counts by status: "2 runs failed, 1 planned"."""
    states = Counter(row["status"] for row in rows).most_common()
    (state, count), *rest = states
    return ", ".join([f"{plural(count, 'run')} {state}", *(f"{n} {name}" for name, n in rest)])


def depth_label(row: Row) -> str:
    """Return "d4", or the label of an imported run without a depth."""
    return f"d{row['depth']:g}" if row["depth"] is not None else str(row["label"] or row["run_id"])


def row_label(row: Row) -> str:
    """Return a run's depth, and its horizon and seed where they are not the default."""
    words = [depth_label(row)]
    if row["horizon"] and row["horizon"] != "compute-optimal":
        words.append(row["horizon"])
    if row["seed"]:
        words.append(f"seed {row['seed']:g}")
    return " ".join(words)


def row_labels(rows: Sequence[Row]) -> str:
    """Name up to four runs, count more."""
    return ", ".join(map(row_label, rows)) if len(rows) <= 4 else plural(len(rows), "run")


def devices_of(row: Row) -> str:
    """Return "2 × NVIDIA H100", empty if unknown."""
    name = row["device_name"] or row["device"]
    return f"{row['ranks'] or 1:g} × {name}" if name else ""
