"""What few runs allow: the coupled surface under a weak prior, and a handful of surfaces that may be true.

L = E + (A·N^-alpha + B·D^-beta)^gamma in theta = (ln E, a, b, ln p, ln q, ln gamma), the row of `descent` with its last
three as logarithms; a and b are those of the two terms at the centre of the runs. Any runs have an answer, so that it
can be said how little they hold. Seeds deviate by sigma, a run whatever its seed by tau, and the mean of m seeds has
the weight 1/(tau² + sigma²/m).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from slm.fits.optimize import Array, Cloud
from slm.fits.points import Point
from slm.fits.power_law import ROUNDING, Noise, seed_noise

Cell = tuple[float, float]
"""N and D: runs that share them are seeds of one."""

SHARES = (0.7, 0.15, 0.15)
"""Prior means of the floor and of both terms at the centre, as shares of the mean loss there."""
EXPONENTS = (0.35, 0.35, 0.75)
"""Prior means of p, q and gamma."""
SPREADS = np.array([1.0, 1.0, 1.0, 0.45, 0.45, 0.4])
"""Prior standard deviations of theta, all logarithms: twice these hold the coupled surfaces of Epoch's, Llama 3's and
nanochat's runs, exponents p and q from .14 to .86, and a floor from next to none."""
TAU = 7e-4
"""Relative: what the coupled surface leaves of nanochat's 28 runs, of which seeds differ by 2e-4."""
SIGMA = 2e-3
"""Relative noise of a run, worth two runs, where there are no seeds to tell."""
DRAWS = 32
"""Surfaces that the runs allow, over which a design is chosen."""
STEPS = 200
"""Steps of a fit at most."""


def believe(points: Sequence[Point]) -> tuple[Array, Array, Noise]:
    """The most probable theta (1, 6), DRAWS of those that may be (s, 6), and the noise.

    Noise is of seeds, else of what the fit leaves, SIGMA counting as two runs. A draw is the fit to losses and a prior
    mean that have been moved by their own uncertainty (Bardsley et al. 2014): for a nearly linear surface the
    posterior, and where one dial leaves a long bent valley it follows that.
    """
    groups: dict[Cell, list[float]] = defaultdict(list)
    for point in points:
        groups[point.params, point.tokens].append(float(np.log(point.loss)))
    places = np.log(list(groups)) - np.log([(point.params, point.tokens) for point in points]).mean(
        0
    )
    logs, seeds = (
        np.array([np.mean(own) for own in groups.values()]),
        np.array([len(own) for own in groups.values()]),
    )
    mean = np.concatenate([logs.mean() + np.log(SHARES), np.log(EXPONENTS)])
    noise = seed_noise(points) or _noise_left(places, logs, seeds, mean)
    scale = np.sqrt(weight(seeds, noise.sigma))
    draw = np.random.default_rng(0)
    losses = logs + draw.standard_normal((DRAWS, len(logs))) / scale
    means = mean + SPREADS * draw.standard_normal((DRAWS, len(mean)))
    return (
        _probable(places, logs[None], scale, mean[None]),
        _probable(places, losses, scale, means),
        noise,
    )


def _noise_left(places: Array, logs: Array, seeds: Array, mean: Array) -> Noise:
    """Spread around the surface over the degrees of freedom it leaves, with SIGMA worth two."""
    scale = np.sqrt(weight(seeds, SIGMA))
    (predicted,), (slopes,) = log_losses(_probable(places, logs[None], scale, mean[None]), places)
    own = slopes * scale[:, None]
    free = len(logs) - np.linalg.solve(own.T @ own + np.diag(SPREADS**-2), own.T @ own).trace()
    squares = seeds @ (predicted - logs) ** 2
    return Noise(float(np.sqrt((squares + 2 * SIGMA**2) / (free + 2))), "residuals and a prior")


def _probable(places: Array, logs: Array, scale: Array, means: Array) -> Array:
    """theta (s, 6) of the least squares of scale·(ln L - logs), logs (s, k), and of the prior around means (s, 6).

    Levenberg-Marquardt, side by side, each damped on its own.
    """
    thetas, damping, prior = means, np.full(len(means), 1e-2), SPREADS**-2

    def errors(thetas: Array) -> tuple[Array, Array, Array]:
        predicted, slopes = log_losses(thetas, places)
        misfit = scale * (predicted - logs)
        return (
            (misfit**2).sum(1) + (prior * (thetas - means) ** 2).sum(1),
            misfit,
            slopes * scale[:, None],
        )

    values, misfit, slopes = errors(thetas)
    done = np.zeros(len(values), bool)
    for _ in range(STEPS):
        normal = slopes.transpose(0, 2, 1) @ slopes + np.diag(prior)
        damped = normal + damping[:, None, None] * np.einsum("skk->sk", normal)[:, None] * np.eye(
            len(prior)
        )
        slope = (misfit[:, None] @ slopes)[:, 0] + prior * (thetas - means)
        step = np.linalg.solve(damped, slope[:, :, None])[:, :, 0]
        trial = thetas - step / np.maximum(np.abs(step / SPREADS).max(1, keepdims=True), 1.0)
        there, *others = errors(trial)
        better = there <= values
        damping = np.where(better, damping / 5, damping * 5)
        done |= better & (values - there <= 1e-8 * values)
        thetas, values = np.where(better[:, None], trial, thetas), np.where(better, there, values)
        misfit = np.where(better[:, None], others[0], misfit)
        slopes = np.where(better[:, None, None], others[1], slopes)
        if done.all():
            break
    return thetas


def log_losses(thetas: Array, places: Array) -> tuple[Array, Array]:
    """ln L (s, k) at (k, 2) centred ln N and ln D by each theta (s, 6), and its slopes (s, k, 6)."""
    cloud = Cloud(places[:, 0], places[:, 1], np.ones(len(places)), (0.0, 0.0), np.inf)
    logs, slopes = cloud.residuals(rows_of(thetas))
    slopes[:, 3:] *= np.exp(thetas[:, 3:, None])
    return logs, slopes.transpose(0, 2, 1)


def rows_of(thetas: Array) -> Array:
    """theta -> the row of `descent`; (..., 6)."""
    return np.concatenate([thetas[..., :3], np.exp(thetas[..., 3:])], -1)


def weight(counts: Array, sigma: float) -> Array:
    """Information (k,) of so many seeds of one run: 1/(tau² + sigma²/m), 0 of none."""
    return np.asarray(counts / (counts * TAU**2 + sigma**2 + ROUNDING**2))
