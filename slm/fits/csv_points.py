"""Runs of any family from a CSV file: typed points, and one clear error for each defect of the file."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from slm.fits.compare.trials import Trial
from slm.fits.points import Point

REQUIRED = ("params", "tokens", "flops", "loss")
OPTIONAL = (
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
TRIAL = ("recipe", "depth", "flops", "loss")
TRIAL_OPTIONAL = ("seed", "seconds", "run", "comparison_key")
SAME = 0.03
"""FLOPs that differ by less are one budget, in a file that names none."""
YES, NO = ("1", "true", "yes"), ("", "0", "false", "no")


@dataclass(frozen=True)
class Table:
    """A file read."""

    points: tuple[Point, ...]
    """Runs to fit, in the file's order."""
    outliers: tuple[Point, ...]
    """Runs that the file marks as outliers."""


@dataclass(frozen=True)
class _Line:
    """One row of the file."""

    number: int
    """Line, the header being 1."""
    cells: dict[str, str]
    """Text by name, without what is empty."""

    def number_of(self, name: str) -> float:
        text = self.cells[name]
        try:
            return float(text)
        except ValueError:
            raise ValueError(f"line {self.number}: {name} is {text!r}, not a number") from None

    def count_of(self, name: str, default: int) -> int:
        value = self.number_of(name) if name in self.cells else float(default)
        if not value.is_integer():
            raise ValueError(
                f"line {self.number}: {name} is {self.cells[name]!r}, not a whole number"
            )
        return int(value)

    def marked(self) -> bool:
        text = self.cells.get("outlier", "").lower()
        if text not in YES + NO:
            raise ValueError(
                f"line {self.number}: outlier is {text!r}; known are {', '.join(YES)} and {', '.join(NO[1:])}"
            )
        return text in YES


def read_points(path: Path, names: Mapping[str, str] | None = None, budgets: bool = True) -> Table:
    """The runs of a CSV file with a header.

    Columns: params, tokens, flops and loss, optionally budget, core, depth, seed, run, recipe, weight, outlier and
    comparison_key; others are passed over. `names` says what a column is called in the file: {"loss": "val_bpb"}. An
    empty budget is a compute-optimal run. In a file without budgets, runs of several sizes whose FLOPs lie within 3 %
    are one budget, unless `budgets` is False, when no run has one. Where the file says nothing, a run is named by its
    line, its recipe by the file, its depth 1, its seed 0, its weight 1 and its comparison key the file's name.

    Raises ValueError for a missing or repeated column, a cell that is no number (with its line), no run, and FLOPs that
    do not fall into budgets.
    """
    lines, columns = _lines(path, dict(names or {}), REQUIRED, OPTIONAL)
    runs = [(_point(line, path.stem), line) for line in lines]
    if all(line.marked() for line in lines):
        raise ValueError(f"{path}: every run is marked as an outlier, so none is left to fit")
    if "budget" not in columns and budgets:
        kept = _budgeted([point for point, line in runs if not line.marked()])
        found = iter(kept)
        runs = [(point if line.marked() else next(found), line) for point, line in runs]
    return Table(
        points=tuple(point for point, line in runs if not line.marked()),
        outliers=tuple(point for point, line in runs if line.marked()),
    )


def read_trials(path: Path, names: Mapping[str, str] | None = None) -> dict[str, list[Trial]]:
    """The runs of two recipes from a CSV file with a header, the first recipe of the file first.

    Columns: recipe, depth, flops and loss, optionally seed, seconds, run and comparison_key; others are passed over.
    `names` says what a column is called in the file. A run is named by its line where the file does not, its seed is 0,
    its comparison key the file's name. Raises ValueError for every defect of the file, and for any number of recipes
    but two.
    """
    lines, _ = _lines(path, dict(names or {}), TRIAL, TRIAL_OPTIONAL)
    found: dict[str, list[Trial]] = {}
    for line in lines:
        found.setdefault(line.cells["recipe"], []).append(_trial(line, path.stem))
    if len(found) != 2:
        raise ValueError(f"{path}: a comparison takes two recipes; the file has {', '.join(found)}")
    return found


def _lines(
    path: Path, names: dict[str, str], required: tuple[str, ...], optional: tuple[str, ...]
) -> tuple[list[_Line], list[str]]:
    """Every row under our names, and which of our names the file has."""
    unknown = sorted(set(names) - {*required, *optional})
    if unknown:
        raise ValueError(
            f"no column is called {unknown[0]!r}; known are {', '.join(required + optional)}"
        )
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        header = [cell.strip() for cell in next(reader, [])]
        rows = [
            (reader.line_num, [cell.strip() for cell in row])
            for row in reader
            if any(cell.strip() for cell in row)
        ]
    for name in (*required, *names):
        if names.get(name, name) not in header:
            alias = f", asked for as {name}" if names.get(name, name) != name else ""
            raise ValueError(
                f"{path}: no column {names.get(name, name)!r}{alias}; there are {', '.join(header)}"
            )
    columns = [name for name in required + optional if names.get(name, name) in header]
    places = {name: header.index(names.get(name, name)) for name in columns}
    twice = [name for name in columns if header.count(header[places[name]]) > 1]
    if twice:
        raise ValueError(f"{path}: column {header[places[twice[0]]]!r} is there twice")
    if not rows:
        raise ValueError(f"{path}: no run below the header")
    return [_line(number, row, len(header), places, required) for number, row in rows], columns


def _line(
    number: int, row: list[str], width: int, places: dict[str, int], required: tuple[str, ...]
) -> _Line:
    if len(row) != width:
        raise ValueError(f"line {number}: {len(row)} cells where the header has {width}")
    cells = {name: row[place] for name, place in places.items() if row[place]}
    empty = [name for name in required if name not in cells]
    if empty:
        raise ValueError(f"line {number}: {empty[0]} is empty")
    return _Line(number, cells)


def _trial(line: _Line, name: str) -> Trial:
    with _named(line):
        return Trial(
            run_id=line.cells.get("run", f"line {line.number}"),
            depth=line.count_of("depth", 1),
            seed=line.count_of("seed", 0),
            flops=line.number_of("flops"),
            loss=line.number_of("loss"),
            seconds=line.number_of("seconds") if "seconds" in line.cells else None,
            comparison_key=line.cells.get("comparison_key", name),
        )


def _point(line: _Line, name: str) -> Point:
    with _named(line):
        required: dict[str, Any] = {column: line.number_of(column) for column in REQUIRED}
        return Point(
            run_id=line.cells.get("run", f"line {line.number}"),
            recipe=line.cells.get("recipe", name),
            depth=line.count_of("depth", 1),
            **required,
            seed=line.count_of("seed", 0),
            budget=line.number_of("budget") if "budget" in line.cells else None,
            comparison_key=line.cells.get("comparison_key", name),
            weight=line.number_of("weight") if "weight" in line.cells else 1.0,
            core=line.number_of("core") if "core" in line.cells else None,
        )


@contextmanager
def _named(line: _Line) -> Iterator[None]:
    """Errors about a run say its line."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        raise ValueError(
            text if text.startswith("line ") else f"line {line.number}: {text}"
        ) from None


def _budgeted(points: Sequence[Point]) -> list[Point]:
    """Runs with the budget of their neighbours in FLOPs; those alone, or all of one size, have none."""
    order = sorted(range(len(points)), key=lambda k: points[k].flops)
    flops = np.array([points[k].flops for k in order])
    breaks = np.flatnonzero(np.diff(np.log(flops)) > np.log1p(SAME)) + 1
    found = list(points)
    for group in np.split(np.array(order, int), breaks):
        members = [points[k] for k in group]
        low, high = members[0].flops, members[-1].flops
        if high > low * (1 + SAME):
            raise ValueError(
                f"FLOPs from {low:.4g} to {high:.4g} lie within {SAME:.0%} of a neighbour but not of each other, so "
                "the budgets are not clear: give the file a column budget, or read it without (--map budget=none)"
            )
        if len({point.params for point in members}) > 1:
            budget = float(np.exp(np.mean(np.log([point.flops for point in members]))))
            for k in group:
                found[k] = replace(points[k], budget=budget)
    return found
