"""Posterior of the coupled surface under a weak prior: its mode, and samples of surfaces.

L = E + (A·N^-alpha + B·D^-beta)^gamma in theta = (ln E, a, b, ln p, ln q, ln gamma), the row of
`slm.fits.optimize` with its last three as logarithms; a and b belong to the centre of the runs. Any
runs have a posterior, however little they hold. Seeds deviate by sigma, a run of any seed by tau,
so the mean of m seeds has the weight 1/(tau² + sigma²/m).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from slm.fits.optimize import LossData, solve_each
from slm.fits.points import Point
from slm.fits.power_law import ROUNDING, Noise, seed_noise
from slm.fits.types import Array

Cell = tuple[float, float]
"""N and D. Runs of one cell are seeds of each other."""

SHARES = (0.7, 0.15, 0.15)
"""Prior means of the floor and of both terms at the centre, as shares of the mean loss there."""
EXPONENTS = (0.35, 0.35, 0.75)
"""Prior means of p, q and gamma."""
SPREADS = np.array([1.0, 1.0, 1.0, 0.45, 0.45, 0.4])
"""Prior standard deviations of theta. Twice these include the coupled surfaces of Epoch, Llama 3
and nanochat: p and q from .14 to .86, and a floor down to next to none."""
PRECISION = np.diag(SPREADS**-2)
"""Inverse prior covariance of theta."""
TAU = 7e-4
"""Relative misfit of the coupled surface to nanochat's 28 runs, whose seeds differ by 2e-4."""
SIGMA = 2e-3
"""Relative noise of a run without replicate seeds, counted as two runs."""
DRAWS = 32
"""Sampled surfaces, over which a design is averaged."""
MAX_STEPS = 200


def sample_posterior(points: Sequence[Point]) -> tuple[Array, Array, Noise]:
    """Return the mode of theta (1, 6), DRAWS samples (s, 6), and the noise of a run.

    The noise is that of replicate seeds, else of the residuals with SIGMA counted as two runs.
    Samples are by randomise-then-optimise (Bardsley et al. 2014): fits to losses and a prior mean
    that are moved by their own uncertainty. For a nearly linear surface they are the posterior, and
    they follow the long bent valley that a single dial leaves.
    """
    # 1) one mean loss per cell
    groups: dict[Cell, list[float]] = defaultdict(list)
    for point in points:
        groups[point.params, point.tokens].append(np.log(point.loss))
    centre = np.log([(point.params, point.tokens) for point in points]).mean(0)
    positions = np.log(list(groups)) - centre
    logs = np.array([np.mean(losses) for losses in groups.values()])
    seeds = np.array([len(losses) for losses in groups.values()])
    # 2) prior mean and noise
    shares = logs.mean() + np.log(SHARES)
    mean = np.concatenate([shares, np.log(EXPONENTS)])
    noise = seed_noise(points) or _residual_noise(positions, logs, seeds, mean)
    # 3) the mode, and the modes for randomised losses and prior means
    scale = np.sqrt(information(seeds, noise.sigma))
    draw = np.random.default_rng(0)
    shifts = draw.standard_normal((DRAWS, len(logs))) / scale
    random_means = mean + SPREADS * draw.standard_normal((DRAWS, len(mean)))
    mode = _modes(positions, logs[None], scale, mean[None])
    return mode, _modes(positions, logs + shifts, scale, random_means), noise


def _residual_noise(positions: Array, logs: Array, seeds: Array, mean: Array) -> Noise:
    """Return the spread around the mode, over its degrees of freedom, with SIGMA as two more."""
    scale = np.sqrt(information(seeds, SIGMA))
    mode = _modes(positions, logs[None], scale, mean[None])
    (predicted,), (slopes,) = log_losses(mode, positions)
    scaled = slopes * scale[:, None]
    gram = scaled.T @ scaled
    used = np.linalg.solve(gram + PRECISION, gram).trace()
    free = len(logs) - used
    squares = seeds @ (predicted - logs) ** 2
    variance = (squares + 2 * SIGMA**2) / (free + 2)
    return Noise(np.sqrt(variance), "residuals and a prior")


def _modes(positions: Array, logs: Array, scale: Array, means: Array) -> Array:
    """Return the theta (s, 6) that minimise |scale·(ln L - logs)|² + |(theta - means)/SPREADS|².

    `logs` is (s, k), `means` (s, 6). Levenberg-Marquardt in theta, a batch with a damping each;
    unlike that of `slm.fits.optimize` for least squares alone, and without bounds.
    """
    prior = SPREADS**-2

    def evaluate(thetas: Array) -> tuple[Array, Array, Array]:
        """Return objectives (s,), misfits (s, k) and their slopes (s, k, 6)."""
        predicted, slopes = log_losses(thetas, positions)
        misfits = scale * (predicted - logs)
        penalty = (prior * (thetas - means) ** 2).sum(1)
        return (misfits**2).sum(1) + penalty, misfits, slopes * scale[:, None]

    thetas = means
    damping = np.full(len(means), 1e-2)
    done = np.zeros(len(means), bool)
    values, misfits, slopes = evaluate(thetas)
    for _ in range(MAX_STEPS):
        # 1) damped normal equations of data and prior; no step beyond one prior deviation
        pull = (misfits[:, None] @ slopes)[:, 0]
        gradient = pull + prior * (thetas - means)
        normal = slopes.mT @ slopes + PRECISION
        diagonal = np.einsum("skk->sk", normal)[:, None] * np.eye(len(prior))
        damped = normal + damping[:, None, None] * diagonal
        step = solve_each(damped, gradient)
        longest = np.abs(step / SPREADS).max(1, keepdims=True)
        trial = thetas - step / np.maximum(longest, 1.0)
        # 2) accept what is no worse, and stop once all fits have stopped gaining
        trial_values, trial_misfits, trial_slopes = evaluate(trial)
        better = trial_values <= values
        damping = np.where(better, damping / 5, damping * 5)
        done |= better & (values - trial_values <= 1e-8 * values)
        thetas = np.where(better[:, None], trial, thetas)
        values = np.where(better, trial_values, values)
        misfits = np.where(better[:, None], trial_misfits, misfits)
        slopes = np.where(better[:, None, None], trial_slopes, slopes)
        if done.all():
            break
    return thetas


def log_losses(thetas: Array, positions: Array) -> tuple[Array, Array]:
    """Return ln L (s, k) of each theta (s, 6) at positions (k, 2), and its slopes (s, k, 6).

    Positions are ln N and ln D from the centre of the runs.
    """
    data = LossData.unmeasured(*positions.T)
    logs, slopes = data.residuals(rows_of(thetas))
    slopes[:, 3:] *= np.exp(thetas[:, 3:, None])
    return logs, slopes.mT


def rows_of(thetas: Array) -> Array:
    """Return the rows of `slm.fits.optimize` for theta, (..., 6) each."""
    return np.concatenate([thetas[..., :3], np.exp(thetas[..., 3:])], -1)


def information(counts: Array, sigma: float) -> Array:
    """Return the weight (k,) of so many seeds of a run: 1/(tau² + sigma²/m), 0 for none."""
    return counts / (counts * TAU**2 + sigma**2 + ROUNDING**2)
