"""Read points and trials of any family from a table (CSV or Markdown), for `--from FILE`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from slm.exchange.importers.readers import read_table
from slm.fits.compare.trials import Trial
from slm.fits.points import Point

POINT_COLUMNS = ("params", "tokens", "flops", "loss")
POINT_OPTIONAL = (
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
TRIAL_COLUMNS = ("recipe", "depth", "flops", "loss")
TRIAL_OPTIONAL = ("seed", "seconds", "run", "comparison_key")
BUDGET_TOLERANCE = 0.03
"""FLOPs closer than this are one budget, in a file without budgets."""
YES = ("1", "true", "yes")
NO = ("", "0", "false", "no")


@dataclass(frozen=True)
class PointFile:
    """Runs of a file."""

    points: tuple[Point, ...]
    outliers: tuple[Point, ...]
    """Runs that the file marks as outliers."""


@dataclass(frozen=True)
class Line:
    """Non-empty cells of one line, by column."""

    number: int
    cells: dict[str, str]

    def number_of(self, name: str) -> float:
        """Return a cell as a number. Raises ValueError naming the line."""
        text = self.cells[name]
        try:
            return float(text)
        except ValueError:
            raise ValueError(f"line {self.number}: {name} is {text!r}, not a number") from None

    def optional(self, name: str) -> float | None:
        """Return a cell as a number, None if it is empty."""
        return self.number_of(name) if name in self.cells else None

    def count_of(self, name: str, default: int) -> int:
        """Return a cell as a whole number. Raises ValueError naming the line."""
        value = self.number_of(name) if name in self.cells else float(default)
        if not value.is_integer():
            text = self.cells[name]
            raise ValueError(f"line {self.number}: {name} is {text!r}, not a whole number")
        return int(value)

    @property
    def is_outlier(self) -> bool:
        """Whether the line is marked as an outlier. Raises ValueError for an unknown mark."""
        text = self.cells.get("outlier", "").lower()
        if text not in YES + NO:
            known = f"{', '.join(YES)} and {', '.join(NO[1:])}"
            raise ValueError(f"line {self.number}: outlier is {text!r}; known are {known}")
        return text in YES


def read_points(
    path: Path, names: Mapping[str, str] | None = None, budgets: bool = True
) -> PointFile:
    """Read runs from a table with the columns params, tokens, flops and loss.

    Optional columns: budget, core, depth, seed, run, recipe, weight, outlier, comparison_key. Other
    columns are ignored. `names` gives the file's name of a column: {"loss": "val_bpb"}. A run with
    an empty budget is compute-optimal. In a file without budgets, runs of several sizes whose FLOPs
    are within 3 % share one; with `budgets=False` no run has one. Defaults: run is the line, recipe
    and comparison key are the file's name, depth 1, seed 0, weight 1.

    Raises ValueError for a missing or repeated column, a cell that is not a number (with its line),
    no runs, and FLOPs that do not form clear budgets.
    """
    lines, columns = _read_lines(path, dict(names or {}), POINT_COLUMNS, POINT_OPTIONAL)
    outliers = tuple(_point(line, path.stem) for line in lines if line.is_outlier)
    points = [_point(line, path.stem) for line in lines if not line.is_outlier]
    if not points:
        raise ValueError(f"{path}: every run is marked as an outlier, so none remains to fit")
    if "budget" not in columns and budgets:
        points = _assign_budgets(points)
    return PointFile(tuple(points), outliers)


def read_trials(path: Path, names: Mapping[str, str] | None = None) -> dict[str, list[Trial]]:
    """Read the runs of two recipes from a table, the first recipe of the file first.

    Columns: recipe, depth, flops and loss, optionally seed, seconds, run and comparison_key; others
    are ignored. `names` and defaults are as in `read_points`. Raises ValueError for every defect of
    the file, and for any number of recipes but two.
    """
    lines, _ = _read_lines(path, dict(names or {}), TRIAL_COLUMNS, TRIAL_OPTIONAL)
    trials: dict[str, list[Trial]] = {}
    for line in lines:
        trials.setdefault(line.cells["recipe"], []).append(_trial(line, path.stem))
    if len(trials) != 2:
        raise ValueError(
            f"{path}: a comparison takes two recipes; the file has {', '.join(trials)}"
        )
    return trials


def _read_lines(
    path: Path, names: dict[str, str], required: tuple[str, ...], optional: tuple[str, ...]
) -> tuple[list[Line], list[str]]:
    """Return the lines under the project's column names, and the names the file has."""
    # 1) the table
    known = required + optional
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"no column is called {unknown[0]!r}; known are {', '.join(known)}")
    try:
        table = read_table(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    # 2) its columns
    for name in (*required, *names):
        source = names.get(name, name)
        if source not in table.header:
            alias = f" (for {name})" if source != name else ""
            there_are = ", ".join(table.header)
            raise ValueError(f"{path}: no column {source!r}{alias}; there are {there_are}")
    columns = {
        name: names.get(name, name) for name in known if names.get(name, name) in table.header
    }
    # 3) its lines
    if table.ragged:
        raise ValueError(f"line {table.ragged[0]}: more or fewer cells than the header")
    lines = []
    for number, row in table.lines:
        cells = {name: row[source] for name, source in columns.items() if row[source]}
        empty = [name for name in required if name not in cells]
        if empty:
            raise ValueError(f"line {number}: {empty[0]} is empty")
        lines.append(Line(number, cells))
    return lines, list(columns)


def _trial(line: Line, file_name: str) -> Trial:
    with _naming_line(line):
        return Trial(
            run_id=line.cells.get("run", f"line {line.number}"),
            depth=line.count_of("depth", 1),
            seed=line.count_of("seed", 0),
            flops=line.number_of("flops"),
            loss=line.number_of("loss"),
            seconds=line.optional("seconds"),
            comparison_key=line.cells.get("comparison_key", file_name),
        )


def _point(line: Line, file_name: str) -> Point:
    with _naming_line(line):
        return Point(
            run_id=line.cells.get("run", f"line {line.number}"),
            recipe=line.cells.get("recipe", file_name),
            depth=line.count_of("depth", 1),
            params=line.number_of("params"),
            tokens=line.number_of("tokens"),
            flops=line.number_of("flops"),
            loss=line.number_of("loss"),
            seed=line.count_of("seed", 0),
            budget=line.optional("budget"),
            comparison_key=line.cells.get("comparison_key", file_name),
            weight=line.number_of("weight") if "weight" in line.cells else 1.0,
            core=line.optional("core"),
        )


@contextmanager
def _naming_line(line: Line) -> Iterator[None]:
    """Name the line in errors about its run."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        prefix = "" if text.startswith("line ") else f"line {line.number}: "
        raise ValueError(f"{prefix}{text}") from None


def _assign_budgets(points: Sequence[Point]) -> list[Point]:
    """Give runs the budget they share with their neighbours in FLOPs, if their sizes differ."""
    order = sorted(range(len(points)), key=lambda k: points[k].flops)
    flops = np.array([points[k].flops for k in order])
    breaks = np.flatnonzero(np.diff(np.log(flops)) > np.log1p(BUDGET_TOLERANCE)) + 1
    result = list(points)
    for group in np.split(np.array(order, int), breaks):
        members = [points[k] for k in group]
        low = members[0].flops
        high = members[-1].flops
        if high > low * (1 + BUDGET_TOLERANCE):
            raise ValueError(
                f"FLOPs from {low:.4g} to {high:.4g} are within {BUDGET_TOLERANCE:.0%} of a "
                "neighbour but not of each other, so the budgets are not clear: give the file a "
                "column budget, or read it without (--map budget=none)"
            )
        if len({point.params for point in members}) > 1:
            budget = float(np.exp(np.mean(np.log([point.flops for point in members]))))
            for k in group:
                result[k] = replace(points[k], budget=budget)
    return result
