"""What a fit reads: one record per finished run."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass


class NotComparable(ValueError):
    """The runs' losses are not measured on one axis, or are not one family."""


@dataclass(frozen=True)
class Point:
    """The end of one run. Checkpoints of one run are not independent and never make two points."""

    run_id: str
    """Identity of the run."""
    recipe: str
    """Name of the family."""
    depth: int
    """Layers."""
    params: float
    """N; the convention is said once, at the fit."""
    tokens: float
    """D, training tokens."""
    flops: float
    """C, training FLOPs as counted, not 6·N·D."""
    loss: float
    """Final validation loss in bits per byte."""
    seed: int
    """Seed; runs that differ in nothing else are replicates."""
    budget: float | None
    """FLOPs asked for, of a run in an isoFLOP grid; None for a compute-optimal run."""
    comparison_key: str
    """Losses of two different keys are not one axis."""
    weight: float = 1.0
    """Of the run in the objective of a surface; the laws and valleys give every run one."""
    core: float | None = None
    """DCLM CORE, centred accuracy: 0 at chance; None where it was not measured."""

    def __post_init__(self) -> None:
        """Refuse what has no logarithm, by name: ValueError."""
        for name in ("depth", "params", "tokens", "flops", "loss", "budget", "weight"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"run {self.run_id}: {name} is {value}; a fit needs positive finite numbers")
        if self.core is not None and not -1 <= self.core <= 1:
            raise ValueError(f"run {self.run_id}: core is {self.core}; a centred accuracy lies from -1 to 1")


def check(points: Sequence[Point]) -> None:
    """Raise ValueError for no run or one given twice, NotComparable for several recipes or comparison keys."""
    if not points:
        raise ValueError("there is no finished run to fit")
    ids = [point.run_id for point in points]
    twice = sorted({name for name in ids if ids.count(name) > 1})
    if twice:
        raise ValueError(f"run {twice[0]} is given twice; a run is one point")
    for field, word in (("recipe", "recipes"), ("comparison_key", "comparison keys")):
        values = sorted({getattr(point, field) for point in points})
        if len(values) > 1:
            raise NotComparable(
                f"the runs have {len(values)} {word} and are not one curve: {differences(values)}; fit each alone"
            )


def differences(keys: Sequence[str]) -> str:
    """The parts of composite keys that are not common to all, side by side."""
    parts = [[part for part in re.split(r"[;,|&\s]+", key) if part] for key in keys]
    common = set(parts[0]).intersection(*parts[1:])
    return " against ".join(
        repr(" ".join(part for part in own if part not in common) or key) for own, key in zip(parts, keys)
    )
