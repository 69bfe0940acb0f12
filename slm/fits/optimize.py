"""Batched Levenberg-Marquardt for surfaces L(N, D) = E + (A·N^-alpha + B·D^-beta)^gamma.

Each fit of a batch is a row of parameters (e, a, b, p, q, gamma). With n and d the logarithms of
N and D from their means, e = ln E, alpha = p/gamma and beta = q/gamma,

    L = e^e + e^(gamma·logsumexp(x/gamma, y/gamma)),  x = a - p·n,  y = b - q·d.

The second term is a smooth maximum of two power laws with temperature gamma, well conditioned down
to gamma = 0. The Jacobian follows from the shares of the terms, and for gamma from their entropy.
Each fit has its own weights, so starts, profiles, bootstraps and hold-outs are the same call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize
from scipy.special import entr

from slm.fits.power_law import ROUNDING, huber
from slm.fits.types import Array

LOG_FLOOR = -14.0
"""ln of the smallest E over the smallest loss: as good as no floor."""
EXPONENT = (0.003, 6.0)
"""Bounds of p and q."""
GAMMA = (0.02, 12.0)
"""Bounds of gamma."""
OUTLIER_CURVATURE = 0.1
"""Factor on the curvature of runs beyond delta once a fit is near its end."""
MAX_LOG_LOSS = 300.0
"""Bound on ln of a trial's loss, against overflow."""
MAX_STEPS = 200
MAX_STRIDE = 3.0
"""Longest step of a parameter."""
REMAINING_GAIN = 1e-7
"""Share of the objective that one more step of a converged fit may gain."""
CHUNK = 200
"""Fits per batch, as many as stay in the cache."""


@dataclass(frozen=True)
class LossData:
    """Sizes, tokens and losses of the runs, with the objective of a fit."""

    n: Array
    """(m,) ln N from its mean."""
    d: Array
    """(m,) ln D from its mean."""
    losses: Array
    """(m,)."""
    centre: tuple[float, float]
    """Means of ln N and ln D."""
    delta: float
    """Threshold of the Huber loss; infinite for least squares."""
    raw: bool = False
    """Whether residuals are of the loss itself instead of its logarithm."""

    @property
    def log_floor(self) -> float:
        """ln of an E that stands for no floor."""
        return float(np.log(self.losses.min()) + LOG_FLOOR)

    def predict(self, rows: Array) -> tuple[Array, Array]:
        """Return losses and shares of the first term in the reducible loss, (R, m) each."""
        e, a, b, p, q, gamma = (rows[:, k, None] for k in range(6))
        x = (a - p * self.n) / gamma
        y = (b - q * self.d) / gamma
        total = np.logaddexp(x, y)
        floor = np.exp(np.minimum(e, MAX_LOG_LOSS))
        reducible = np.exp(np.minimum(gamma * total, MAX_LOG_LOSS))
        return floor + reducible, np.exp(x - total)

    def residuals(self, rows: Array) -> tuple[Array, Array]:
        """Return residuals (R, m) and their Jacobian (R, 6, m)."""
        losses, share = self.predict(rows)
        unit = losses if self.raw else np.ones_like(losses)
        floor = np.exp(np.minimum(rows[:, :1], MAX_LOG_LOSS)) * unit / losses
        first = (unit - floor) * share
        second = (unit - floor) * (1 - share)
        entropy = (unit - floor) * (entr(share) + entr(1 - share))
        jacobian = np.stack([floor, first, second, -first * self.n, -second * self.d, entropy], 1)
        return losses - self.losses if self.raw else np.log(losses / self.losses), jacobian

    def objective(self, residuals: Array, weights: Array) -> Array:
        """Return the weighted sum of Huber losses over the last axis."""
        return huber(residuals, self.delta, weights)

    def curvature(self, residuals: Array, weights: Array, factor: Array) -> Array:
        """Return the weights (R, m) of a Gauss-Newton step.

        A run beyond delta has that of reweighted least squares times `factor` (R,).
        """
        size = np.abs(residuals)
        outlying = size > self.delta
        reweighted = factor[:, None] * self.delta / np.where(outlying, size, 1.0)
        return np.asarray(weights * np.where(outlying, reweighted, 1.0))

    def hessian(self, row: Array, weights: Array, columns: Sequence[int]) -> Array:
        """Return JᵀWJ of one row (6,) over some of its columns, W reweighted beyond delta."""
        residuals, jacobian = self.residuals(row[None])
        slopes = jacobian[0, list(columns)]
        return np.asarray(
            (slopes * self.curvature(residuals, weights[None], np.ones(1))) @ slopes.T
        )

    def within_bounds(self, rows: Array) -> NDArray[np.bool_]:
        """Whether exponents and gamma of each row are within their bounds, (R,)."""
        low = [EXPONENT[0], EXPONENT[0], GAMMA[0]]
        high = [EXPONENT[1], EXPONENT[1], GAMMA[1]]
        return np.asarray(((rows[:, 3:] >= low) & (rows[:, 3:] <= high)).all(1))


def levenberg_marquardt(
    data: LossData,
    rows: Array,
    weights: Array,
    columns: Sequence[int],
    normals: Array | None = None,
    tolerance: float = 1e-9,
) -> tuple[Array, Array]:
    """Minimise the objective from each row (R, 6) with weights (R, m); return rows and objectives.

    Only `columns` of a row move. With `normals` (R, 6), normal·row stays constant. A fit ends after
    two successive steps that gain less than `tolerance` of its objective.
    """
    normals = np.zeros_like(rows) if normals is None else normals
    best = []
    objectives = []
    for k in range(0, len(rows), CHUNK):
        chunk = slice(k, k + CHUNK)
        row, objective = _minimize_chunk(
            data, rows[chunk], weights[chunk], list(columns), normals[chunk], tolerance
        )
        best.append(row)
        objectives.append(objective)
    return np.concatenate(best), np.concatenate(objectives)


def _minimize_chunk(
    data: LossData,
    rows: Array,
    weights: Array,
    columns: list[int],
    normals: Array,
    tolerance: float,
) -> tuple[Array, Array]:
    rows = rows.copy()
    residuals, jacobian = data.residuals(rows)
    values = data.objective(residuals, weights)
    damping = np.full(len(rows), 1e-3)
    factor = np.ones(len(rows))  # on the curvature of runs beyond delta
    quiet = np.zeros(len(rows), int)  # successive steps without a gain
    live = np.arange(len(rows))
    for _ in range(MAX_STEPS):
        # 1) a damped Gauss-Newton step of every fit that is still running
        curvature = data.curvature(residuals[live], weights[live], factor[live])
        pull = weights[live] * np.clip(residuals[live], -data.delta, data.delta)
        slopes = jacobian[live][:, columns]
        falling = (slopes[:, 0] * pull).sum(1) > 0
        slopes[falling & (rows[live, 0] <= data.log_floor), 0] = 0.0  # E is at its bound
        step, promise = _step(slopes, curvature, pull, damping[live], normals[live][:, columns])
        trial = rows[live]
        trial[:, columns] += step
        trial[:, 0] = np.maximum(trial[:, 0], data.log_floor)
        # 2) accept the trials that lower the objective within the bounds
        trial_residuals, trial_jacobian = data.residuals(trial)
        trial_values = data.objective(trial_residuals, weights[live])
        trial_values = np.where(data.within_bounds(trial), trial_values, np.inf)
        scale = np.maximum(values[live], data.n.size * ROUNDING**2)
        better = trial_values < values[live]
        gain = (values[live] - trial_values) / scale
        accepted = live[better]
        rows[accepted] = trial[better]
        residuals[accepted] = trial_residuals[better]
        jacobian[accepted] = trial_jacobian[better]
        values[accepted] = trial_values[better]
        # 3) adapt the damping; near the end, trust the curvature inside delta alone
        damping[live] = np.where(better, damping[live] / 5, np.maximum(damping[live], 1e-6) * 5)
        near_end = np.where(gain < 0.1, OUTLIER_CURVATURE, factor[live])
        factor[live] = np.where(better, near_end, 1.0)
        # 4) drop the fits that have gained nothing twice
        still = (better & (gain < tolerance)) | (promise < tolerance * scale)
        quiet[live] = np.where(still, quiet[live] + 1, 0)
        live = live[quiet[live] < 2]
        if not live.size:
            break
    return rows, values


def _step(
    jacobian: Array, curvature: Array, pull: Array, damping: Array, normals: Array
) -> tuple[Array, Array]:
    """Return the damped steps (R, c) with normals·step = 0, and the linear decrease of each.

    The constraint is a last row and column of the normal equations, a Lagrange multiplier.
    """
    count = len(damping)
    width = jacobian.shape[1]
    gradient = (jacobian @ pull[:, :, None])[:, :, 0]
    matrix = np.zeros((count, width + 1, width + 1))
    matrix[:, :width, :width] = (jacobian * curvature[:, None]) @ jacobian.transpose(0, 2, 1)
    diagonal = np.einsum("rkk->rk", matrix)[:, :width]
    largest = diagonal.max(1, keepdims=True)
    ridge = damping[:, None] * diagonal + 1e-12 * largest + 1e-300
    matrix[:, np.arange(width), np.arange(width)] += ridge
    matrix[:, :width, width] = matrix[:, width, :width] = normals * largest
    matrix[:, width, width] = np.where(normals.any(1), 0.0, 1.0)
    right = np.concatenate([-gradient, np.zeros((count, 1))], 1)
    step = np.linalg.solve(matrix, right[:, :, None])[:, :width, 0]
    step /= np.maximum(np.abs(step).max(1, keepdims=True) / MAX_STRIDE, 1.0)
    return step, -(gradient * step).sum(1)


Tie = Callable[[Array], tuple[Array, Array]]
"""Row -> row whose second parameter, a, follows from the others, and the slopes (6,) of a."""


def polish(
    data: LossData, row: Array, weights: Array, columns: Sequence[int], tie: Tie | None = None
) -> tuple[Array, float, str]:
    """Minimise by L-BFGS from a row; return row, objective and status.

    Moves `columns` of the row, with `tie` its second by them, in coordinates in which the objective
    is round. The status is `converged`, or what one more step would gain.
    """
    # 1) turn and scale the coordinates by the eigenvectors of the Hessian
    start = tie(row)[0] if tie else row
    columns = list(columns)[int(row[0] <= data.log_floor) :]
    first = _directions(start, columns, tie)
    values, vectors = np.linalg.eigh(first.T @ data.hessian(start, weights, range(6)) @ first)
    before = float(data.objective(data.residuals(start[None])[0], weights)[0])
    unit = max(before, data.n.size * ROUNDING**2)
    turn = vectors * np.minimum(np.sqrt(unit / np.maximum(values, 1e-12 * values[-1])), 1.0)

    def moved(theta: Array) -> Array:
        moved_row = start.copy()
        moved_row[columns] += turn @ theta
        return tie(moved_row)[0] if tie else moved_row

    def objective(theta: Array) -> tuple[float, Array]:
        trial = moved(theta)
        errors, slopes = data.residuals(trial[None])
        pull = weights * np.clip(errors[0], -data.delta, data.delta)
        gradient = turn.T @ _directions(trial, columns, tie).T @ (slopes[0] @ pull)
        return float(data.objective(errors, weights)[0]) / unit, gradient / unit

    # 2) minimise, and keep the start if that is not better
    origin = np.zeros(len(columns))
    best = optimize.minimize(
        objective,
        origin,
        (),
        "L-BFGS-B",
        jac=True,
        bounds=[(-MAX_STRIDE, MAX_STRIDE)] * len(columns),
        options={"ftol": 1e-15, "gtol": 1e-9, "maxiter": 500},
    )
    better = best.fun * unit < before and data.within_bounds(moved(best.x)[None])[0]
    theta = best.x if better else origin
    # 3) judge convergence by the gain of a Newton step, half the squared gradient where it is round
    value, slope = objective(theta)
    gain = float(slope @ slope) / 2
    if gain < REMAINING_GAIN:
        return moved(theta), value * unit, "converged"
    status = f"a further step would gain {gain:.2g} of the objective: {best.message}"
    return moved(theta), value * unit, status


def _directions(row: Array, columns: Sequence[int], tie: Tie | None) -> Array:
    """Return how a row moves with each of its columns, (6, c)."""
    directions = np.eye(6)[:, list(columns)]
    if tie:
        directions[1] = tie(row)[1][list(columns)]
    return directions
