"""Log residuals of laws and surfaces, their Jacobians, and the tests of a run left out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

from slm.fits.intervals import Interval
from slm.fits.points import Point
from slm.fits.power_law import Law
from slm.fits.surface import FORMS, Surface, loss_data
from slm.fits.types import Array

SIGNIFICANCE = 0.01
"""p-value below which a statistic gives a warning, so that sound runs seldom have one."""
NEGLIGIBLE = 0.02
"""Share of a number below which its change does not matter."""


def half_width(interval: Interval | None) -> float:
    """Return half the width of an interval; infinite if an end is open."""
    if interval is None or not interval.identifiable:
        return np.inf
    if interval.low is None or interval.high is None:
        return np.inf
    return (interval.high - interval.low) / 2


def law_residuals(law: Law, flops: Array, losses: Array) -> tuple[Array, Array]:
    """Return log residuals (m,) of the law and their Jacobian (parameters, m).

    The Jacobian has no row for a floor of 0.
    """
    floor, scale, exponent = law.best
    x = (flops / law.reference) ** -exponent
    predicted = law.loss(flops)
    rows = np.array([np.ones_like(x), x, -scale * x * np.log(flops / law.reference)]) / predicted
    return np.log(predicted / losses), rows[int(floor == 0) :]


def surface_residuals(surface: Surface, points: Sequence[Point]) -> tuple[Array, Array]:
    """Return log residuals (m,) of the surface and their Jacobian (parameters, m).

    The Jacobian has no row for a floor of 0.
    """
    data = loss_data(points, surface.delta)
    residuals, jacobian = data.residuals(surface.row[None])
    return residuals[0], jacobian[0, int(surface.row[0] <= data.log_floor) : FORMS[surface.form]]


def leverages(jacobian: Array, weights: Array) -> Array:
    """Return the share of each residual that its own run removes, (parameters, m) -> (m,)."""
    basis: Array = np.linalg.qr((jacobian * np.sqrt(weights)).T)[0]
    return np.minimum((basis**2).sum(1), 1 - 1e-9)


def huber_scale(residuals: Array, weights: Array, delta: float, free: int) -> Array:
    """Return the spread of sound residuals (…, m) by Huber's proposal 2.

    The spread of the clipped residuals over the share inside delta.
    """
    used = weights > 0
    squares = (weights * np.minimum(np.abs(residuals), delta) ** 2).sum(-1) / free
    inside = ((np.abs(residuals) <= delta) & used).sum(-1) / used.sum(-1)
    return np.asarray(np.sqrt(squares) / np.maximum(inside, 1e-3)) + 1e-300


def deleted_p_value(
    deleted: Array | float, leverage: Array | float, scale: Array | float, free: int
) -> Array:
    """Return two-sided p-values of deleted residuals, of variance scale²/(1 - leverage)."""
    return np.asarray(2 * stats.t.sf(np.abs(deleted) * np.sqrt(1 - leverage) / scale, free))
