"""Gaps of ln loss between two ladders at equal compute, and the compute multipliers that they are.

The law is L_B(C) = L_A(m·C). What a depth adds to a smooth law (rounded batches, head counts) is common to both
recipes and cancels within the depth. With h = ln m, the gap there, candidate minus base, is e = s·h + q·h²: s is the
base's slope d ln L / d ln C at the candidate's compute and q its bend, both of the least-squares quadratic of ln L in
ln C through the means of the base's depths (within 2 % of the slopes of E + K·C^-p over three decades).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean

import numpy as np
from numpy.typing import NDArray
from scipy import special

from slm.fits.intervals import LEVEL, Interval
from slm.fits.ladder import computes
from slm.fits.power_law import ROUNDING

Array = NDArray[np.float64]

PAIRS = 8
"""Degrees of freedom from which runs of equal seeds are compared in pairs; fewer do not pay for it."""


@dataclass(frozen=True)
class Rung:
    """The runs of one recipe at one depth, by seed."""

    compute: float
    """Mean ln C, or ln of the seconds."""
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


@dataclass(frozen=True)
class Curve:
    """ln L = a + b·c + q·c², c = ln C - centre, of the base."""

    centre: float
    """Mean ln C of the depths."""
    slope: float
    """b."""
    bend: float
    """q; 0 for two computes."""
    inverse: Array
    """(2, 2) covariance of (b, q) at unit variance of a depth's mean."""
    square: float
    """Variance of a depth's mean around the curve."""
    free: int
    """Degrees of freedom of that variance."""
    falls: bool
    """Whether compute is known to lower the loss."""

    def rise(self, c: Array | float) -> Array:
        """ln L at c, from the centre."""
        return np.asarray((self.slope + self.bend * c) * c)

    def slopes(self, c: Array | float) -> Array:
        """d ln L / d ln C at c."""
        return np.asarray(self.slope + 2 * self.bend * c)

    def known(self, c: Array) -> NDArray[np.bool_]:
        """Where the whole interval of the slope is below 0."""
        reach = quantile(self.free)
        if reach is None:
            return np.zeros(np.shape(c), bool)
        turn = np.stack([np.ones_like(c), 2 * c], -1)
        error = np.sqrt(self.square * np.einsum("...i,ij,...j", turn, self.inverse, turn))
        return np.asarray(self.slopes(c) + reach * error < 0)


@dataclass(frozen=True)
class Gaps:
    """What two ladders have in common; arrays are over the K shared depths, smallest first."""

    compute: Array
    """ln C of the candidate, from the curve's centre."""
    gap: Array
    """Mean ln loss, candidate minus base, at the candidate's compute."""
    slope: Array
    """Of the base's curve there; -1 where it is not known to fall, so that h is minus the gap."""
    bend: float
    """Of the base's curve."""
    weight: Array
    """Noise variance of a run over that of the gap."""
    squares: float
    """Sum of squares of ln loss within the depths."""
    free: int
    """Degrees of freedom within the depths; 0 without replicate seeds."""
    own: Array
    """Variance of a run by the seeds of each depth alone; 0 where it has none."""
    paired: bool
    """Whether gaps are of pairs of equal seeds."""
    sigma: float | None
    """Standard deviation of ln loss of a run over seeds."""
    correlation: float | None
    """Of runs of equal seeds; None unless gaps are of pairs that scatter."""

    @property
    def variance(self) -> float:
        """Of ln loss of a run, by replicate seeds alone; 0 without any."""
        return max(self.squares / self.free, ROUNDING**2) if self.free else 0.0

    def middle(self, h: float) -> float:
        """Where on `compute` h and its slope over ln C are estimated independently of each other."""
        weight = self.weight * (self.slope + 2 * self.bend * h) ** 2
        return float(weight @ self.compute / weight.sum())


@dataclass(frozen=True)
class Effect:
    """A number read off the gaps, with its two sources of uncertainty."""

    estimate: float
    """Best value."""
    error: float
    """Standard error by the noise of the runs."""
    free: int
    """Degrees of freedom of that noise."""
    lean: float = 0.0
    """Standard error by the base's curve."""
    lean_free: int = 0
    """Degrees of freedom of the curve's noise."""

    @property
    def t(self) -> float:
        """Over its standard error of both sources; 0 where the noise is not known."""
        return float(self.estimate / np.hypot(self.error, self.lean)) if self.free else 0.0

    @property
    def p(self) -> float | None:
        """Two-sided, of no effect, in one look; None where the noise is not known."""
        return float(2 * special.stdtr(self.free, -abs(self.t))) if self.free else None

    def interval(self, reach: float | None) -> Interval:
        """`reach` standard errors of the noise to each side, None for no end.

        The curve's own half-width is added in squares (Zou and Donner 2008, for sources of unequal freedom).
        """
        if reach is None:
            return Interval(self.estimate)
        lean = (quantile(self.lean_free) or 0.0) * self.lean
        half = float(np.hypot(reach * self.error, lean))
        return Interval(self.estimate, self.estimate - half, self.estimate + half, True)


def quantile(free: int) -> float | None:
    """Standard errors of a nominal interval to each side; None without degrees of freedom."""
    return float(special.stdtrit(free, (1 + LEVEL) / 2)) if free else None


def measure(base: Mapping[int, Rung], candidate: Mapping[int, Rung]) -> tuple[Curve, Gaps]:
    """The base's curve, and the gaps at the shared depths; compute is not accounted for where it is not known to fall.

    The curve's noise is the scatter of its depths or that of the gaps, whichever is larger, with both their freedoms.
    """
    rough = _curve(list(base.values()))
    pairs = [(base[depth], candidate[depth]) for depth in sorted(base.keys() & candidate.keys())]
    if rough.falls:
        gaps = _gaps(rough, pairs)
        effect, left = solve(rough, gaps, common(gaps) or 0.0)
        if effect.free:
            noise = (
                (gaps.squares + left)
                / effect.free
                * fmean(1 / len(own.seeds) for own in base.values())
            )
            curve = replace(
                rough, square=max(rough.square, noise, ROUNDING**2), free=rough.free + effect.free
            )
            if curve.known(np.array(gaps.middle(0.0))):
                return curve, gaps
    flat = Curve(rough.centre, 0.0, 0.0, np.zeros((2, 2)), 0.0, 0, False)
    return flat, _gaps(flat, pairs)


def _curve(ladder: Sequence[Rung]) -> Curve:
    compute = np.array([own.compute for own in ladder])
    means = np.array([own.mean for own in ladder])
    centre, steps = float(compute.mean()), computes(np.exp(compute))
    design = np.vander(compute - centre, min(3, steps), increasing=True)
    gram = np.asarray(np.linalg.inv(design.T @ design), float)
    coefficients = np.zeros(3)
    coefficients[: design.shape[1]] = gram @ (design.T @ means)
    inverse = np.zeros((2, 2))
    inverse[: design.shape[1] - 1, : design.shape[1] - 1] = gram[1:, 1:]
    free = len(ladder) - design.shape[1]
    left = means - design @ coefficients[: design.shape[1]]
    square = float(left @ left) / free if free else 0.0
    return Curve(
        centre, float(coefficients[1]), float(coefficients[2]), inverse, square, free, steps > 1
    )


def _gaps(curve: Curve, pairs: Sequence[tuple[Rung, Rung]]) -> Gaps:
    before, after = (
        np.array([(own.compute, own.mean, len(own.seeds)) for own in side]).T
        for side in zip(*pairs)
    )
    within = [[own.losses - own.mean for own in pair] for pair in pairs]
    alone = [float(a @ a + b @ b) / max(len(a) + len(b) - 2, 1) for a, b in within]
    one, two = (np.concatenate([pair[side] for pair in within]) for side in (0, 1))
    squares, free, correlation = (
        float(one @ one + two @ two),
        len(one) + len(two) - 2 * len(pairs),
        None,
    )
    sigma = float(np.sqrt(squares / free)) if free else None
    paired = len(one) - len(pairs) >= PAIRS and all(
        a.seeds == b.seeds and len(set(a.seeds)) == len(a.seeds) for a, b in pairs
    )
    compute = after[0] - curve.centre
    if paired:
        correlation = (
            float(one @ two / np.sqrt(one @ one * (two @ two))) if one @ one * (two @ two) else None
        )
        squares, free = float((two - one) @ (two - one)) / 2, len(one) - len(pairs)
        alone = [float((b - a) @ (b - a)) / 2 / max(len(a) - 1, 1) for a, b in within]
    return Gaps(
        compute=compute,
        gap=after[1] - before[1] - (curve.rise(compute) - curve.rise(before[0] - curve.centre)),
        slope=curve.slopes(compute) if curve.falls else -np.ones(len(pairs)),
        bend=curve.bend,
        weight=before[2] * after[2] / (before[2] + after[2]),
        squares=squares,
        free=free,
        own=np.array(alone),
        paired=paired,
        sigma=sigma,
        correlation=correlation,
    )


def common(gaps: Gaps) -> float | None:
    """The h of all gaps by least squares (Gauss-Newton); None where the base's curve never comes to such a loss."""
    h = 0.0
    for _ in range(50):
        slope = gaps.slope + 2 * gaps.bend * h
        if slope.max() >= 0:
            return None
        step = float((gaps.weight * slope) @ (gaps.gap - (gaps.slope + gaps.bend * h) * h))
        step /= float((gaps.weight * slope) @ slope)
        h += step
        if abs(step) < 1e-12:
            return h
    return None


def solve(curve: Curve, gaps: Gaps, h: float, trend: bool = False) -> tuple[Effect, float]:
    """h by the gaps' straight line at h, or its slope over ln C; and the sum of squares left between the depths.

    At h = 0 the base's curve adds no uncertainty: whether the recipes differ is a matter of the gaps alone.
    """
    slope = gaps.slope + 2 * gaps.bend * h
    columns = np.stack([slope, slope * (gaps.compute - gaps.middle(h))][: 1 + trend], 1)
    gram = np.asarray(np.linalg.inv((columns.T * gaps.weight) @ columns), float)
    pull = gram @ (columns.T * gaps.weight)
    missing = gaps.gap - (gaps.slope + gaps.bend * h) * h
    moved = pull @ missing
    left = missing - columns @ moved
    between = float((gaps.weight * left) @ left)
    free = gaps.free + len(left) - 1 - trend
    variance = max((gaps.squares + between) / free, ROUNDING**2) if free else 0.0
    lean = _lean(curve, pull[-1], gaps.compute, np.full(len(left), h))
    estimate = float(moved[-1]) + (0.0 if trend else h)
    return Effect(
        estimate, float(np.sqrt(variance * gram[-1, -1])), free, lean, curve.free
    ), between


def at_depths(curve: Curve, gaps: Gaps) -> list[Effect | None]:
    """h of each depth alone, its noise that of replicate seeds; None where its slope is not known to be negative."""
    inside = gaps.slope**2 + 4 * gaps.bend * gaps.gap
    known = (inside > 0) & (curve.known(gaps.compute))
    h = 2 * gaps.gap / (gaps.slope - np.sqrt(np.where(known, inside, np.inf)))
    slope = gaps.slope + 2 * gaps.bend * h
    error = np.sqrt(gaps.variance / gaps.weight) / -slope
    found: list[Effect | None] = []
    for k in range(len(h)):
        lean = _lean(curve, 1 / slope[k : k + 1], gaps.compute[k : k + 1], h[k : k + 1])
        own = Effect(float(h[k]), float(error[k]), gaps.free, lean, curve.free)
        found.append(own if known[k] else None)
    return found


def _lean(curve: Curve, pull: Array, compute: Array, h: Array) -> float:
    """Standard error by the curve of what pulls at the gaps, which move by h with b and by (2c + h)·h with q."""
    moves = pull @ np.stack([h, (2 * compute + h) * h], 1)
    return float(np.sqrt(curve.square * (moves @ curve.inverse @ moves)))
