"""Runs of two ladders to compare: checked, and grouped by depth."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

import numpy as np

from slm.fits.points import NotComparable
from slm.fits.types import Array

AXES = {"flops": "FLOPs", "seconds": "training time"}
"""Compute axes of a comparison, and their names in messages."""
SAME_COMPUTE = 0.03
"""Relative difference in compute below which runs count as equal, within a ladder and, if the
base's slope is unknown, between ladders."""


@dataclass(frozen=True)
class Trial:
    """Final result of one run of a ladder, which has one size and horizon per depth."""

    run_id: str
    depth: int
    seed: int
    """Runs of one recipe and depth that differ in the seed are replicates."""
    flops: float
    """Training FLOPs as counted."""
    loss: float
    """Final validation loss in bits per byte."""
    seconds: float | None = None
    """Training time on the devices of the comparison; None if unknown."""
    comparison_key: str = ""
    """Losses of different keys are not comparable; `name=value` parts joined by blanks."""

    def __post_init__(self) -> None:
        """Raise ValueError for a number without a logarithm."""
        for name in ("depth", "flops", "loss", "seconds"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(
                    f"run {self.run_id}: {name} is {value}; "
                    "a comparison needs positive finite numbers"
                )


@dataclass(frozen=True)
class DepthRuns:
    """Runs of one recipe at one depth."""

    depth: int
    compute: float
    """Mean ln FLOPs, or ln seconds."""
    flops: float
    """Mean training FLOPs."""
    losses: Array
    """ln loss of each run."""
    seeds: tuple[int, ...]
    """Seeds, ascending."""

    @cached_property
    def mean(self) -> float:
        """Mean ln loss."""
        return float(self.losses.mean())


Ladder = dict[int, DepthRuns]
"""Depth -> its runs."""


def group_by_depth(trials: Sequence[Trial], name: str, axis: str) -> Ladder:
    """Group the trials of recipe `name` by depth.

    Raises ValueError for a run without a value on the axis, and for FLOPs that differ at one depth.
    """
    groups = defaultdict(list)
    for trial in sorted(trials, key=lambda trial: (trial.depth, trial.seed)):
        if getattr(trial, axis) is None:
            raise ValueError(
                f"run {trial.run_id}: {axis} is not known, so {AXES[axis]} cannot be compared"
            )
        groups[trial.depth].append(trial)
    return {depth: _depth_runs(group, name, axis) for depth, group in groups.items()}


def _depth_runs(trials: Sequence[Trial], name: str, axis: str) -> DepthRuns:
    flops = [trial.flops for trial in trials]
    if max(flops) > min(flops) * (1 + SAME_COMPUTE):
        raise ValueError(
            f"{name} has runs of {min(flops):.3g} and of {max(flops):.3g} FLOPs at "
            f"d{trials[0].depth}: compare one ladder"
        )
    return DepthRuns(
        depth=trials[0].depth,
        compute=fmean(math.log(getattr(trial, axis)) for trial in trials),
        flops=fmean(flops),
        losses=np.log([trial.loss for trial in trials]),
        seeds=tuple(trial.seed for trial in trials),
    )


def check_trials(
    base: Sequence[Trial], candidate: Sequence[Trial], names: tuple[str, str], axis: str
) -> None:
    """Raise ValueError for an unknown axis, a recipe without runs, or a repeated run."""
    if axis not in AXES:
        raise ValueError(f"axis is {axis!r}; known are {', '.join(AXES)}")
    for name, trials in zip(names, (base, candidate)):
        if not trials:
            raise ValueError(f"{name} has no finished run to compare")
    counts = Counter(trial.run_id for trial in (*base, *candidate))
    run_id, count = counts.most_common(1)[0]
    if count > 1:
        raise ValueError(f"run {run_id} is given twice; a run belongs to one recipe")


def require_shared_depth(ladders: tuple[Ladder, Ladder], names: tuple[str, str]) -> None:
    """Raise NotComparable for ladders without a common depth."""
    if not ladders[0].keys() & ladders[1].keys():
        depths = [
            f"{name} has {format_depths(list(ladder))}" for name, ladder in zip(names, ladders)
        ]
        raise NotComparable(f"{' and '.join(depths)}: the recipes share no depth to compare")


def require_equal_compute(ladders: tuple[Ladder, Ladder], axis: str) -> None:
    """Raise NotComparable for a depth at which the ladders' compute differs.

    Only the slope of the base's loss, where known, can account for the difference.
    """
    base, candidate = ladders
    for depth in sorted(base.keys() & candidate.keys()):
        ratio = float(np.exp(candidate[depth].compute - base[depth].compute))
        if abs(np.log(ratio)) > np.log1p(SAME_COMPUTE):
            raise NotComparable(
                f"at d{depth} the recipes differ {ratio:.3g} times in {AXES[axis]}, and how fast "
                "the base's loss falls with it is not known: run the base at more depths"
            )


def format_depths(depths: Sequence[int]) -> str:
    """Join depths for a sentence: "d4", "d4 and d8", "d4, d8 and d12"."""
    *first, last = (f"d{depth}" for depth in depths)
    return f"{', '.join(first)} and {last}" if first else last


def flops_by_depth(trials: Iterable[Trial]) -> dict[int, float]:
    """Return the FLOPs of a run at each depth."""
    return {trial.depth: trial.flops for trial in trials}
