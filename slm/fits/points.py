"""Points: one record per finished run, and the axes on which their losses can be compared."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from slm.fits.types import FitWarning

ORIGIN = ("recipe", "import", "axis")
"""Parts that say where a run comes from. Only these differ from a missing value."""
FINGERPRINT_DIGITS = 8
"""Digits of a fingerprint in a message."""


class NotComparable(ValueError):
    """Raised for runs whose losses are not measured on one axis, or that are not of one family."""


@dataclass(frozen=True)
class Point:
    """The end of one run. Checkpoints of one run are not independent and never make two points.

    Raises ValueError, naming run and field, for a number that has no logarithm.
    """

    run_id: str
    recipe: str
    """Name of the family."""
    depth: int
    params: float
    """N, counted by the convention of the fit; NaN if unknown."""
    tokens: float
    """D, training tokens; NaN if unknown. A run without N or D still counts for L(C)."""
    flops: float
    """C, training FLOPs as counted, not 6·N·D."""
    loss: float
    """Final validation loss, bits per byte."""
    seed: int
    """Runs that differ only in their seeds are replicates."""
    budget: float | None
    """Requested FLOPs of a run in an isoFLOP grid; None for a compute-optimal run."""
    comparison_key: str
    """`name=value` parts joined by blanks. Losses under different keys are not comparable."""
    weight: float = 1.0
    """Weight in the objective of a surface; laws and isoFLOP curves weigh all runs alike."""
    core: float | None = None
    """CORE, or the mean of another bundle: centred accuracy, 0 at chance; None if not measured."""
    core_error: float | None = None
    """Standard error of `core` over examples; None if unknown: then that of all CORE examples."""
    core_key: str | None = None
    """Values of `core` under different keys are not comparable; None if the source has no key."""

    def __post_init__(self) -> None:
        for name in ("depth", "params", "tokens", "flops", "loss", "budget", "weight"):
            value = getattr(self, name)
            unknown = value is None or (name in ("params", "tokens") and math.isnan(value))
            if not unknown and not (math.isfinite(value) and value > 0):
                raise ValueError(
                    f"run {self.run_id}: {name} is {value}; a fit needs positive finite numbers"
                )
        if self.core is not None and not -1 <= self.core <= 1:
            raise ValueError(
                f"run {self.run_id}: core is {self.core}; a centred accuracy lies from -1 to 1"
            )

    @property
    def sized(self) -> bool:
        """Whether N and D are known, as surfaces and isoFLOP curves require."""
        return not math.isnan(self.params + self.tokens)

    @property
    def setting(self) -> tuple[float, ...]:
        """Values that replicates share: runs of equal setting differ only in their seeds."""
        if self.sized:
            return (self.depth, self.params, self.tokens, self.budget or 0.0)
        return (self.depth, self.flops)

    @property
    def axis(self) -> dict[str, str]:
        """Recipe and parts of the comparison key; runs of one curve share them."""
        return {"recipe": self.recipe, **parts_of(self.comparison_key)}

    @property
    def core_name(self) -> str:
        """Name of `core`: CORE, or that of another bundle."""
        metric = re.search(r"(?:^|\s)metric=(\S+)", self.core_key or "")
        return metric[1] if metric and metric[1] != "core" else "CORE"


@dataclass(frozen=True)
class Axes:
    """Axes of a set of runs: one mapping per run, by part of the comparison key."""

    parts: tuple[Mapping[str, str], ...]

    @classmethod
    def of_points(cls, points: Iterable[Point]) -> Axes:
        """Return the axes of points: recipes and comparison keys."""
        return cls(tuple(point.axis for point in points))

    @classmethod
    def of_keys(cls, keys: Iterable[str]) -> Axes:
        """Return the axes that comparison keys name."""
        return cls(tuple(parts_of(key) for key in keys))

    @property
    def mixed(self) -> list[str]:
        """Distinct axes as sorted keys; empty if all runs are on one axis."""
        keys = {
            " ".join(f"{name}={value}" for name, value in sorted(parts.items()))
            for parts in self.parts
        }
        return sorted(keys) if len(keys) > 1 else []

    @property
    def differences(self) -> str:
        """Parts that differ, each value with its number of runs; empty if all runs are on one axis.

        A part that some runs lack is named only if no other part differs, or if it is of ORIGIN.
        """
        names = dict.fromkeys(name for parts in self.parts for name in parts)
        counts = {name: Counter(parts.get(name) for parts in self.parts) for name in names}
        differing = {name: values for name, values in counts.items() if len(values) > 1}
        decisive = [
            name
            for name, values in differing.items()
            if name in ORIGIN or len(values.keys() - {None}) > 1
        ]
        return "; ".join(f"{name}: {_versus(differing[name])}" for name in decisive or differing)

    @property
    def warnings(self) -> list[FitWarning]:
        """The warning that the runs are on several axes; empty if they are on one."""
        if not self.mixed:
            return []
        message = (
            f"{len(self.mixed)} axes are combined by --allow-mixed, so their differences count as "
            f"compute, recipe or noise: {self.differences}"
        )
        return [FitWarning("mixed-axes", message)]

    def require_one(self, allow_mixed: bool = False) -> None:
        """Raise NotComparable, naming what differs, for several axes unless `allow_mixed`."""
        if self.differences and not allow_mixed:
            raise NotComparable(
                f"the runs are not comparable: {self.differences}; "
                "name one experiment or one family, or pass --allow-mixed to combine them"
            )


def check(points: Sequence[Point], allow_mixed: bool = False) -> None:
    """Raise ValueError for no run or a repeated run, NotComparable for several axes.

    `allow_mixed` accepts several recipes and comparison keys as one curve.
    """
    if not points:
        raise ValueError("there is no finished run to fit")
    counts = Counter(point.run_id for point in points)
    repeated = sorted(name for name, count in counts.items() if count > 1)
    if repeated:
        raise ValueError(f"run {repeated[0]} is given twice; a run is one point")
    Axes.of_points(points).require_one(allow_mixed)


def parts_of(key: str) -> dict[str, str]:
    """Split a comparison key into name -> value.

    A part without a name is called `key`; values of a repeated name are joined.
    """
    parts: dict[str, str] = {}
    for part in key.split():
        name, value = part.split("=", 1) if "=" in part else ("key", part)
        parts[name] = f"{parts[name]} {value}" if name in parts else value
    return parts


def _versus(values: Counter[str | None]) -> str:
    """Describe each value with its number of runs, fingerprints by their first digits."""
    labels = {value: _shortened(value) for value in values}
    if len(set(labels.values())) < len(values):
        labels = {value: value or "none" for value in values}
    return " against ".join(
        f"{labels[value]} ({count} run{'s' * (count != 1)})" for value, count in values.items()
    )


def _shortened(value: str | None) -> str:
    if value and re.fullmatch(rf"[0-9a-f]{{{FINGERPRINT_DIGITS + 2},}}", value):
        return f"{value[:FINGERPRINT_DIGITS]}…"
    return value or "none"
