"""Log residuals of laws and surfaces, their refits, and the tests of a run left out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

from slm.fits.intervals import Interval
from slm.fits.points import Point
from slm.fits.power_law import PARAMETERS, Law, Noise, best_law
from slm.fits.select import count_computes
from slm.fits.surface import FORMS, Surface, loss_data
from slm.fits.types import Array

SIGNIFICANCE = 0.01
"""p-value below which a statistic gives a warning, so that sound runs seldom have one."""
NEGLIGIBLE = 0.02
"""Share of a number below which its change does not matter."""


def half_width(interval: Interval) -> float:
    """Return half the width of an interval; infinite if an end is open."""
    if not interval.identifiable or interval.low is None or interval.high is None:
        return np.inf
    return (interval.high - interval.low) / 2


def law_residuals(law: Law, flops: Array, losses: Array) -> tuple[Array, Array]:
    """Return log residuals (m,) of the law and their Jacobian (parameters, m).

    The Jacobian has no row for a floor of 0.
    """
    floor, scale, exponent = law.best
    ratio = flops / law.reference
    power = ratio**-exponent
    predicted = law.loss(flops)
    slopes = np.array([np.ones_like(power), power, -scale * power * np.log(ratio)])
    first = int(floor == 0)
    return np.log(predicted / losses), slopes[first:] / predicted


def surface_residuals(surface: Surface, points: Sequence[Point]) -> tuple[Array, Array]:
    """Return log residuals (m,) of the surface and their Jacobian (parameters, m).

    The Jacobian has no row for a floor of 0.
    """
    data = loss_data(points, surface.delta)
    residuals, jacobian = data.residuals(surface.row[None])
    first = int(surface.row[0] <= data.log_floor)
    return residuals[0], jacobian[0, first : FORMS[surface.form]]


def refit_law(law: Law, flops: Array, losses: Array, noise: Noise) -> Law | None:
    """Return the law's form through other runs, without intervals; None if they are too few."""
    if count_computes(flops) <= PARAMETERS[law.form]:
        return None
    return best_law(law.form, flops, losses, noise)


def leverages(jacobian: Array, weights: Array) -> Array:
    """Return the share of each residual that its own run removes, (parameters, m) -> (m,)."""
    basis: Array = np.linalg.qr((jacobian * np.sqrt(weights)).T)[0]
    return np.minimum((basis**2).sum(1), 1 - 1e-9)


def huber_scale(residuals: Array, weights: Array, delta: float, free: int) -> Array:
    """Return the spread of sound residuals (…, m) by Huber's proposal 2.

    The spread of the clipped residuals over the share inside delta.
    """
    used = weights > 0
    sizes = np.abs(residuals)
    squares = (weights * np.minimum(sizes, delta) ** 2).sum(-1) / free
    inside = ((sizes <= delta) & used).sum(-1) / used.sum(-1)
    return np.asarray(np.sqrt(squares) / np.maximum(inside, 1e-3)) + 1e-300


def deleted_p_value(
    deleted: Array | float, leverage: Array | float, scale: Array | float, free: int
) -> Array:
    """Return two-sided p-values of deleted residuals, of variance scale²/(1 - leverage)."""
    t = np.abs(deleted) * np.sqrt(1 - leverage) / scale
    return np.asarray(2 * stats.t.sf(t, free))
