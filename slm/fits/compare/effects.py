"""Differences in ln loss of two ladders at equal compute, and the compute multipliers they imply.

The model is L_candidate(C) = L_base(m·C). What a depth adds to a smooth law (rounded batches, head
counts) is common to both recipes and cancels within the depth. With h = ln m, the difference,
candidate minus base, is s·h + q·h²: s is the base's slope d ln L / d ln C at the candidate's
compute and q its bend, both of the least-squares quadratic of ln L in ln C through the means of the
base's depths (within 2 % of the slopes of E + K·C^-p over three decades).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np
from numpy.typing import NDArray
from scipy import special

from slm.fits.compare.trials import DepthRuns, Ladder
from slm.fits.intervals import LEVEL, Interval
from slm.fits.power_law import ROUNDING
from slm.fits.select import count_computes
from slm.fits.types import Array

MIN_PAIRED_FREE = 8
"""Degrees of freedom from which runs of equal seeds are compared in pairs; below, pairing costs
more than it gains."""


Pairs = Sequence[tuple[DepthRuns, DepthRuns]]
"""Runs of base and candidate at each shared depth."""


@dataclass(frozen=True)
class BaseCurve:
    """The base's ln L = a + b·c + q·c², where c = ln C - centre."""

    centre: float
    """Mean ln C of the depths."""
    slope: float = 0.0
    """b."""
    bend: float = 0.0
    """q; 0 with two computes."""
    inverse: Array | None = None
    """(2, 2) covariance of (b, q) at unit variance of a depth's mean; None if the loss is not
    known to fall."""
    variance: float = 0.0
    """Variance of a depth's mean around the curve."""
    free: int = 0
    """Degrees of freedom of `variance`."""

    @property
    def falls(self) -> bool:
        """Whether the loss is known to fall with compute."""
        return self.inverse is not None

    def rise(self, c: Array) -> Array:
        """Return ln L at c minus that at the centre."""
        return np.asarray((self.slope + self.bend * c) * c)

    def slopes(self, c: Array) -> Array:
        """Return d ln L / d ln C at c."""
        return np.asarray(self.slope + 2 * self.bend * c)

    def known_to_fall(self, c: Array) -> NDArray[np.bool_]:
        """Return whether the whole interval of the slope is below 0 at each c."""
        reach = t_quantile(self.free)
        if reach is None or self.inverse is None:
            return np.zeros(np.shape(c), bool)
        gradient = np.stack([np.ones_like(c), 2 * c], -1)
        squares = np.einsum("...i,ij,...j", gradient, self.inverse, gradient)
        error = np.sqrt(self.variance * squares)
        return np.asarray(self.slopes(c) + reach * error < 0)

    def error_of(self, pull: Array, compute: Array, h: Array) -> float:
        """Return the standard error of an effect that is `pull` times the differences.

        The differences move by h with b and by (2c + h)·h with q.
        """
        if self.inverse is None:
            return 0.0
        moves = pull @ np.stack([h, (2 * compute + h) * h], 1)
        return float(np.sqrt(self.variance * (moves @ self.inverse @ moves)))


@dataclass(frozen=True)
class LossDifferences:
    """Differences in mean ln loss over the K shared depths, shallowest first; arrays are (K,)."""

    curve: BaseCurve
    pairs: Pairs
    compute: Array
    """ln C of the candidate minus the curve's centre."""
    difference: Array
    """Mean ln loss, candidate minus base, at the candidate's compute."""
    slope: Array
    """Slope of the base's curve; -1 if it is not known to fall, so that h is minus the
    difference."""
    bend: float
    """Bend of the base's curve."""
    weight: Array
    """Noise variance of a run over that of the difference."""
    squares: float
    """Sum of squares of ln loss within the depths."""
    free: int
    """Degrees of freedom within the depths; 0 without replicate seeds."""
    depth_variance: Array
    """Variance of a run by the seeds of each depth alone; 0 without replicate seeds."""
    paired: bool
    """Whether the noise is that of pairs of equal seeds."""
    sigma: float | None
    """Standard deviation of ln loss of a run over seeds."""
    correlation: float | None
    """Correlation of runs of equal seeds; None unless paired."""

    @property
    def variance(self) -> float:
        """Noise variance of ln loss of a run by replicate seeds; 0 without any."""
        return max(self.squares / self.free, ROUNDING**2) if self.free else 0.0

    @property
    def information(self) -> float:
        """Noise variance of a run over that of the mean difference."""
        return float(self.weight.sum())

    def slope_at(self, h: Array | float) -> Array:
        """Return the derivative of the differences by h."""
        return self.slope + 2 * self.bend * h

    def residual(self, h: float) -> Array:
        """Return the differences that a common h does not account for."""
        return self.difference - (self.slope + self.bend * h) * h

    def run_noise(self, pooled: Effect) -> float:
        """Return the standard deviation of ln loss of a run implied by the pooled effect."""
        return float(pooled.error * np.sqrt(self.weight @ self.slope**2))

    def middle(self, h: float) -> float:
        """Return the `compute` at which h and its slope over ln C are estimated independently."""
        weight = self.weight * self.slope_at(h) ** 2
        return float(weight @ self.compute / weight.sum())


@dataclass(frozen=True)
class Effect:
    """An estimate from the differences, with its two sources of uncertainty."""

    estimate: float
    error: float
    """Standard error from the noise of the runs."""
    free: int
    """Degrees of freedom of that noise."""
    curve_error: float = 0.0
    """Standard error from the base's curve."""
    curve_free: int = 0
    """Degrees of freedom of the curve's noise."""

    @property
    def t(self) -> float:
        """Estimate over its standard error from both sources; 0 if the noise is unknown."""
        return float(self.estimate / np.hypot(self.error, self.curve_error)) if self.free else 0.0

    @property
    def p(self) -> float | None:
        """Two-sided p-value of no effect, for a single look; None if the noise is unknown."""
        return float(2 * special.stdtr(self.free, -abs(self.t))) if self.free else None

    def interval(self, reach: float | None) -> Interval:
        """Return the interval of `reach` standard errors of the noise; None leaves the ends open.

        The curve's own half-width is added in squares (Zou and Donner 2008, for sources of unequal
        degrees of freedom).
        """
        if reach is None:
            return Interval(self.estimate)
        curve_half = (t_quantile(self.curve_free) or 0.0) * self.curve_error
        half = float(np.hypot(reach * self.error, curve_half))
        return Interval(self.estimate, self.estimate - half, self.estimate + half, True)

    def nominal_interval(self) -> Interval:
        """Return the 95 % interval for a single look."""
        return self.interval(t_quantile(self.free))


def t_quantile(free: int) -> float | None:
    """Return the half-width of a 95 % interval in standard errors; None if `free` is 0."""
    return float(special.stdtrit(free, (1 + LEVEL) / 2)) if free else None


def measure(base: Ladder, candidate: Ladder) -> LossDifferences:
    """Return the differences at the shared depths, with the base's curve.

    Differences in compute are not accounted for if the base's loss is not known to fall. The
    curve's noise is the scatter of its depths or that of the differences, whichever is larger, with
    the degrees of freedom of both.
    """
    curve = _fit_curve(list(base.values()))
    pairs = [(base[depth], candidate[depth]) for depth in sorted(base.keys() & candidate.keys())]
    flat = _differences(BaseCurve(curve.centre), pairs)
    if not curve.falls:
        return flat
    differences = _differences(curve, pairs)
    effect, between = linear_effect(differences, common_effect(differences) or 0.0)
    if not effect.free:
        return flat
    noise = (differences.squares + between) / effect.free
    noise *= fmean(1 / len(runs.seeds) for runs in base.values())
    variance = max(curve.variance, noise, ROUNDING**2)
    curve = replace(curve, variance=variance, free=curve.free + effect.free)
    if not curve.known_to_fall(np.array(differences.middle(0.0))):
        return flat
    return replace(differences, curve=curve)


def _fit_curve(depths: Sequence[DepthRuns]) -> BaseCurve:
    """Fit a quadratic by least squares, a line with two computes, nothing with one."""
    compute, means, _ = _columns(depths)
    centre = compute.mean()
    computes = count_computes(np.exp(compute))
    design = np.vander(compute - centre, min(3, computes), increasing=True)
    size = design.shape[1]
    gram = np.linalg.inv(design.T @ design)
    coefficients = np.zeros(3)
    coefficients[:size] = gram @ (design.T @ means)
    inverse = np.zeros((2, 2))
    inverse[: size - 1, : size - 1] = gram[1:, 1:]
    free = len(depths) - size
    residuals = means - design @ coefficients[:size]
    return BaseCurve(
        centre=centre,
        slope=coefficients[1],
        bend=coefficients[2],
        inverse=inverse if computes > 1 else None,
        variance=residuals @ residuals / free if free else 0.0,
        free=free,
    )


def _differences(curve: BaseCurve, pairs: Pairs) -> LossDifferences:
    """Return the differences, and their noise from the seeds within each depth."""
    base_compute, base_mean, base_count = _columns([base for base, _ in pairs])
    compute, mean, count = _columns([candidate for _, candidate in pairs])
    # 1) the noise of a run: that of pairs of equal seeds, if there are enough
    deviations = [(base.losses - base.mean, new.losses - new.mean) for base, new in pairs]
    base_all = np.concatenate([base for base, _ in deviations])
    new_all = np.concatenate([new for _, new in deviations])
    enough = len(base_all) - len(pairs) >= MIN_PAIRED_FREE
    paired = enough and all(map(_same_seeds, pairs))
    squares, free = _noise(base_all, new_all, len(pairs), paired)
    by_depth = [_noise(base, new, 1, paired) for base, new in deviations]
    # 2) the noise over seeds, and how much of it a pair shares
    all_squares, all_free = _noise(base_all, new_all, len(pairs), paired=False)
    norms = base_all @ base_all * (new_all @ new_all)
    correlation = base_all @ new_all / np.sqrt(norms) if paired and norms else None
    # 3) the differences at equal compute
    c = compute - curve.centre
    accounted = curve.rise(c) - curve.rise(base_compute - curve.centre)
    return LossDifferences(
        curve=curve,
        pairs=pairs,
        compute=c,
        difference=mean - base_mean - accounted,
        slope=curve.slopes(c) if curve.falls else -np.ones(len(pairs)),
        bend=curve.bend,
        weight=base_count * count / (base_count + count),
        squares=squares,
        free=free,
        depth_variance=np.array([squares / max(free, 1) for squares, free in by_depth]),
        paired=paired,
        sigma=np.sqrt(all_squares / all_free) if all_free else None,
        correlation=correlation,
    )


def _noise(base: Array, candidate: Array, depths: int, paired: bool) -> tuple[float, int]:
    """Return the sum of squares of the deviations of both sides, and its degrees of freedom."""
    if paired:
        difference = candidate - base
        return float(difference @ difference) / 2, len(base) - depths
    squares = float(base @ base + candidate @ candidate)
    return squares, len(base) + len(candidate) - 2 * depths


def _columns(depths: Sequence[DepthRuns]) -> Array:
    """Return (3, K): compute, mean ln loss and number of runs."""
    return np.array([(runs.compute, runs.mean, len(runs.seeds)) for runs in depths]).T


def _same_seeds(pair: tuple[DepthRuns, DepthRuns]) -> bool:
    """Whether both sides have one run of each of the same seeds."""
    base, candidate = pair
    return base.seeds == candidate.seeds and len(set(base.seeds)) == len(base.seeds)


def common_effect(differences: LossDifferences) -> float | None:
    """Return the h of all differences by least squares (Gauss-Newton).

    None if the base's curve never comes to such a loss.
    """
    h = 0.0
    for _ in range(50):
        slope = differences.slope_at(h)
        if slope.max() >= 0:
            return None
        pull = differences.weight * slope
        step = float(pull @ differences.residual(h) / (pull @ slope))
        h += step
        if abs(step) < 1e-12:
            return h
    return None


def linear_effect(
    differences: LossDifferences, h: float, trend: bool = False
) -> tuple[Effect, float]:
    """Return h, or with `trend` its slope over ln C, and the sum of squares between the depths.

    The differences are linearised at h. At h = 0 the base's curve adds no uncertainty: whether the
    recipes differ depends on the differences alone.
    """
    slope = differences.slope_at(h)
    columns = [slope]
    if trend:
        columns.append(slope * (differences.compute - differences.middle(h)))
    design = np.stack(columns, 1)
    weighted = design.T * differences.weight
    gram = np.linalg.inv(weighted @ design)
    pull = gram @ weighted
    residual = differences.residual(h)
    solution = pull @ residual
    remainder = residual - design @ solution
    between = float((differences.weight * remainder) @ remainder)
    free = differences.free + len(remainder) - 1 - trend
    variance = max((differences.squares + between) / free, ROUNDING**2) if free else 0.0
    curve = differences.curve
    effect = Effect(
        estimate=solution[-1] + (0.0 if trend else h),
        error=np.sqrt(variance * gram[-1, -1]),
        free=free,
        curve_error=curve.error_of(pull[-1], differences.compute, np.full_like(residual, h)),
        curve_free=curve.free,
    )
    return effect, between


def effects_by_depth(differences: LossDifferences) -> list[Effect | None]:
    """Return h of each depth alone, its noise that of replicate seeds.

    None for a depth at which the slope is not known to be negative.
    """
    curve = differences.curve
    discriminant = differences.slope**2 + 4 * differences.bend * differences.difference
    known = (discriminant > 0) & curve.known_to_fall(differences.compute)
    root = np.sqrt(np.where(known, discriminant, np.inf))
    h = 2 * differences.difference / (differences.slope - root)
    slope = differences.slope_at(h)
    errors = np.sqrt(differences.variance / differences.weight) / -slope
    effects = []
    for k, is_known in enumerate(known):
        depth = slice(k, k + 1)
        curve_error = curve.error_of(1 / slope[depth], differences.compute[depth], h[depth])
        effect = Effect(h[k], errors[k], differences.free, curve_error, curve.free)
        effects.append(effect if is_known else None)
    return effects
