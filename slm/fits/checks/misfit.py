"""F tests of what a law or surface leaves over, and the bias of isoFLOP minima off the centre.

Lack of fit: the pure-error F test, residuals of the settings' means against the spread of replicate
seeds, without the worst setting, as one wild run is no wrong form. Structure: Rao's score test of
the surface's psi = clip(residual, ±delta) on (n, d, n², d², nd), n = ln N and d = ln D centred,
with the span of the fitted parameters' Jacobian taken out of both, so that what they have absorbed
counts for neither side: F with (rank, runs - parameters - rank) degrees of freedom.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

from slm.fits.checks.residuals import surface_residuals
from slm.fits.isoflop import IsoFlopCurve, IsoFlopFit
from slm.fits.points import Point
from slm.fits.power_law import ROUNDING, seed_noise
from slm.fits.surface import Surface, loss_data
from slm.fits.types import Array


@dataclass(frozen=True)
class Misfit:
    """An F test of the residuals of a fit."""

    F: float
    p: float
    """p-value."""
    spread: float
    """Standard deviation of the misfit, in log loss."""
    noise: float
    """Standard deviation of the noise it is tested against, in log loss."""
    pattern: Array
    """(runs,) misfit of each run: log of predicted over measured loss."""


def lack_of_fit(points: Sequence[Point], residuals: Array, parameters: int) -> Misfit | None:
    """Return the pure-error F test of log residuals (m,); None if there are too few settings."""
    seeds = seed_noise(points)
    index = _settings(points)
    counts = np.bincount(index)
    free = len(counts) - parameters - 1
    if seeds is None or free < 2:
        return None
    means = np.bincount(index, residuals) / counts
    squares = np.sort(counts * means**2)
    spread = float(np.sqrt(squares[:-1].sum() / free))
    noise = max(seeds.sigma, ROUNDING)
    ratio = (spread / noise) ** 2
    p = float(stats.f.sf(ratio, free, len(points) - len(counts)))
    return Misfit(ratio, p, spread, noise, means[index])


def structure(points: Sequence[Point], surface: Surface) -> Misfit | None:
    """Return the score test of the surface's residuals; None if it has too few runs.

    Seeds of one setting move together, which is no structure: they count as one, with their mean
    psi, weighted by their sum.
    """
    # 1) psi of each setting
    residuals, jacobian = surface_residuals(surface, points)
    data = loss_data(points, surface.delta)
    weights = data.weights
    index = _settings(points)
    first = np.unique(index, return_index=True)[1]
    roots = np.sqrt(np.bincount(index, weights))
    clipped = np.clip(residuals, -surface.delta, surface.delta)
    psi = np.bincount(index, weights * clipped) / roots
    # 2) directions of second order in ln N and ln D, outside the span of the fitted parameters
    n = data.n[first]
    d = data.d[first]
    fitted: Array = np.linalg.qr((jacobian[:, first] * roots).T)[0]
    directions = np.array([n, d, n * n, d * d, n * d]).T * roots[:, None]
    directions /= np.linalg.norm(directions, axis=0)
    directions -= fitted @ (fitted.T @ directions)
    basis, sizes, _ = np.linalg.svd(directions, full_matrices=False)
    basis = basis[:, sizes > 1e-7]
    # 3) the part of psi along them against the rest
    psi -= fitted @ (fitted.T @ psi)
    pattern = basis @ (basis.T @ psi)
    rest = psi - pattern
    rank = basis.shape[1]
    free = len(first) - len(jacobian) - rank
    if free < 2 or rank == 0:
        return None
    explained = float(pattern @ pattern)
    variance = (float(rest @ rest) + len(first) * ROUNDING**2) / free
    ratio = explained / rank / variance
    return Misfit(
        F=ratio,
        p=float(stats.f.sf(ratio, rank, free)),
        spread=float(np.sqrt(explained / weights.sum())),
        noise=float(np.sqrt(variance)),
        pattern=(pattern / roots)[index],
    )


def _settings(points: Sequence[Point]) -> Array:
    """Return the number of each run's setting, (m,): runs of one differ in nothing but the seed."""
    settings = [point.setting for point in points]
    numbers = {setting: k for k, setting in enumerate(dict.fromkeys(settings))}
    return np.array([numbers[setting] for setting in settings])


def centring_bias(isoflop: IsoFlopFit, surface: Surface) -> tuple[list[float], float] | None:
    """Return offsets, ln of each minimum over the centre of its sizes, and the exponent's bias.

    The bias is that of parabolas through the surface at these very runs against the surface's own
    minima; on skewed curves it grows with the square of the distance from the centre (arXiv
    2603.22339). None with fewer than two minima.
    """
    resolved = [curve for curve in isoflop.curves if curve.code is None]
    if len(resolved) < 2:
        return None
    offsets, biases = zip(*(_offset_and_bias(curve, surface) for curve in resolved))
    compute = np.log([curve.flops for curve in resolved])
    return list(offsets), float(np.polyfit(compute, biases, 1)[0])


def _offset_and_bias(curve: IsoFlopCurve, surface: Surface) -> tuple[float, float]:
    assert curve.parabola is not None
    sizes, tokens = np.log([[point.params, point.tokens] for point in curve.points]).T
    centre = (sizes.min() + sizes.max()) / 2
    v = sizes - centre
    path = np.polyfit(v, tokens, 2)

    def loss(v: Array | float) -> Array:
        return surface.loss(np.exp(centre + v), np.exp(np.polyval(path, v)))

    c, b, _ = np.polyfit(v, loss(v), 2)
    lowest = optimize.minimize_scalar(
        lambda v: float(loss(v)),
        bounds=(v.min() - 1, v.max() + 1),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(curve.parabola.vertex - centre), float(-b / (2 * c) - lowest.x)
