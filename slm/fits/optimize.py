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
TOLERANCE = 1e-9
"""Share of the objective that a step must gain to count as a gain."""
MAX_STRIDE = 3.0
"""Longest step of a parameter."""
REMAINING_GAIN = 1e-7
"""Share of the objective that one more step of a converged fit may gain."""
CHUNK = 200
"""Fits per batch, as many as stay in the cache."""


def predict(parameters: Array, n: Array, d: Array) -> tuple[Array, Array]:
    """Return losses, and shares of the first term in the reducible loss.

    Each of the six `parameters` has a shape that broadcasts with n and d.
    """
    e, a, b, p, q, gamma = parameters
    x = (a - p * n) / gamma
    y = (b - q * d) / gamma
    total = np.logaddexp(x, y)
    floor = np.exp(np.minimum(e, MAX_LOG_LOSS))
    reducible = np.exp(np.minimum(gamma * total, MAX_LOG_LOSS))
    return floor + reducible, np.exp(x - total)


Centre = tuple[float, float]
"""Means of ln N and ln D, the origin of rows."""


@dataclass(frozen=True)
class LossData:
    """Sizes, tokens and losses of the runs, with the objective of a fit."""

    n: Array
    """(m,) ln N from its mean."""
    d: Array
    """(m,) ln D from its mean."""
    losses: Array
    """(m,)."""
    weights: Array
    """Weights of the runs, (m,); for a batch of fits also (R, m), a row for each."""
    centre: Centre = (0.0, 0.0)
    delta: float = np.inf
    """Threshold of the Huber loss; infinite for least squares."""
    raw: bool = False
    """Whether residuals are of the loss itself instead of its logarithm."""

    @classmethod
    def unmeasured(cls, n: Array, d: Array) -> LossData:
        """Return data for predictions alone, with losses of 1."""
        ones = np.ones(len(n))
        return cls(n, d, ones, ones)

    @property
    def log_floor(self) -> float:
        """ln of an E that stands for no floor."""
        return np.log(self.losses.min()) + LOG_FLOOR

    @property
    def rounding(self) -> float:
        """Objective of runs that are off by rounding alone."""
        return len(self.n) * ROUNDING**2

    def residuals(self, rows: Array) -> tuple[Array, Array]:
        """Return residuals (R, m) and their Jacobian (R, 6, m)."""
        losses, share = predict(rows.T[:, :, None], self.n, self.d)
        unit = losses if self.raw else np.ones_like(losses)
        floor = np.exp(np.minimum(rows[:, :1], MAX_LOG_LOSS)) * unit / losses
        reducible = unit - floor
        first = reducible * share
        second = reducible * (1 - share)
        entropy = reducible * (entr(share) + entr(1 - share))
        jacobian = [floor, first, second, -first * self.n, -second * self.d, entropy]
        residuals = losses - self.losses if self.raw else np.log(losses / self.losses)
        return residuals, np.stack(jacobian, 1)

    def pull(self, residuals: Array, weights: Array) -> Array:
        """Return the derivatives of the objective by the residuals."""
        return weights * np.clip(residuals, -self.delta, self.delta)

    def objective(self, residuals: Array, weights: Array) -> Array:
        """Return the weighted sum of Huber losses over the last axis."""
        return huber(residuals, self.delta, weights)

    def curvature(self, residuals: Array, weights: Array, factor: Array | float = 1.0) -> Array:
        """Return the weights (R, m) of a Gauss-Newton step.

        A run beyond delta has that of reweighted least squares times `factor`, (R, 1) or one value.
        """
        size = np.abs(residuals)
        outlying = size > self.delta
        reweighted = factor * self.delta / np.where(outlying, size, 1.0)
        return weights * np.where(outlying, reweighted, 1.0)

    def hessian(self, row: Array, columns: Sequence[int]) -> Array:
        """Return JᵀWJ of one row (6,) over some of its columns, W reweighted beyond delta."""
        residuals, jacobian = self.residuals(row[None])
        slopes = jacobian[0, list(columns)]
        return (slopes * self.curvature(residuals, self.weights)) @ slopes.T

    def within_bounds(self, rows: Array) -> NDArray[np.bool_]:
        """Whether exponents and gamma of each row are within their bounds, (R,)."""
        low, high = np.array([EXPONENT, EXPONENT, GAMMA]).T
        inside = (rows[:, 3:] >= low) & (rows[:, 3:] <= high)
        return inside.all(1)


def solve_each(matrices: Array, vectors: Array) -> Array:
    """Solve a batch of linear systems, (R, c, c) and (R, c) -> (R, c)."""
    solutions = np.linalg.solve(matrices, vectors[:, :, None])
    return np.asarray(solutions[:, :, 0], float)


def levenberg_marquardt(
    data: LossData,
    rows: Array,
    columns: Sequence[int],
    normals: Array | None = None,
) -> tuple[Array, Array]:
    """Minimise the objective from each row (R, 6); return rows and objectives.

    Only `columns` of a row move. With `normals` (R, 6), normal·row stays constant. A fit ends after
    two successive steps that gain less than TOLERANCE of its objective.
    """
    weights = np.broadcast_to(data.weights, (len(rows), len(data.n)))
    normals = np.zeros_like(rows) if normals is None else normals
    fits = []
    for k in range(0, len(rows), CHUNK):
        chunk = slice(k, k + CHUNK)
        fits.append(
            _minimize_chunk(data, rows[chunk], weights[chunk], list(columns), normals[chunk])
        )
    best, objectives = zip(*fits)
    return np.concatenate(best), np.concatenate(objectives)


def _minimize_chunk(
    data: LossData,
    rows: Array,
    weights: Array,
    columns: list[int],
    normals: Array,
) -> tuple[Array, Array]:
    rows = rows.copy()
    residuals, jacobian = data.residuals(rows)
    objectives = data.objective(residuals, weights)
    all_damping = np.full(len(rows), 1e-3)
    factors = np.ones(len(rows))  # on the curvature of runs beyond delta
    quiet = np.zeros(len(rows), int)  # successive steps without a gain
    live = np.arange(len(rows))
    for _ in range(MAX_STEPS):
        # 1) a damped Gauss-Newton step of every fit that is still running
        trial = rows[live]
        errors = residuals[live]
        weight = weights[live]
        value = objectives[live]
        damping = all_damping[live]
        factor = factors[live]
        pull = data.pull(errors, weight)
        slopes = jacobian[live][:, columns]
        falling = (slopes[:, 0] * pull).sum(1) > 0
        at_bound = trial[:, 0] <= data.log_floor
        slopes[falling & at_bound, 0] = 0.0
        curvature = data.curvature(errors, weight, factor[:, None])
        step, promise = _step(slopes, curvature, pull, damping, normals[live][:, columns])
        trial[:, columns] += step
        trial[:, 0] = np.maximum(trial[:, 0], data.log_floor)
        # 2) accept the trials that lower the objective within the bounds
        errors, slopes = data.residuals(trial)
        trial_value = data.objective(errors, weight)
        better = data.within_bounds(trial) & (trial_value < value)
        accepted = live[better]
        rows[accepted] = trial[better]
        residuals[accepted] = errors[better]
        jacobian[accepted] = slopes[better]
        objectives[accepted] = trial_value[better]
        # 3) adapt the damping; near the end, trust the curvature inside delta alone
        scale = np.maximum(value, data.rounding)
        gain = (value - trial_value) / scale
        all_damping[live] = np.where(better, damping / 5, np.maximum(damping, 1e-6) * 5)
        near_end = np.where(gain < 0.1, OUTLIER_CURVATURE, factor)
        factors[live] = np.where(better, near_end, 1.0)
        # 4) drop the fits that have gained nothing twice
        still = (better & (gain < TOLERANCE)) | (promise < TOLERANCE * scale)
        quiet[live] = np.where(still, quiet[live] + 1, 0)
        live = live[quiet[live] < 2]
        if not len(live):
            break
    return rows, objectives


def _step(
    jacobian: Array, curvature: Array, pull: Array, damping: Array, normals: Array
) -> tuple[Array, Array]:
    """Return the damped steps (R, c) with normals·step = 0, and the linear decrease of each.

    The constraint is a last row and column of the normal equations, a Lagrange multiplier.
    """
    count, width, _ = jacobian.shape
    gradient = (jacobian @ pull[:, :, None])[:, :, 0]
    matrix = np.zeros((count, width + 1, width + 1))
    weighted = jacobian * curvature[:, None]
    matrix[:, :width, :width] = weighted @ jacobian.mT
    diagonal = np.einsum("rkk->rk", matrix)[:, :width]
    largest = diagonal.max(1, keepdims=True)
    ridge = damping[:, None] * diagonal + 1e-12 * largest + 1e-300
    matrix[:, np.arange(width), np.arange(width)] += ridge
    matrix[:, :width, width] = normals * largest
    matrix[:, width, :width] = normals * largest
    matrix[:, width, width] = np.where(normals.any(1), 0.0, 1.0)
    right = np.zeros((count, width + 1))
    right[:, :width] = -gradient
    step = solve_each(matrix, right)[:, :width]
    longest = np.abs(step).max(1, keepdims=True)
    step /= np.maximum(longest / MAX_STRIDE, 1.0)
    return step, -(gradient * step).sum(1)


Tie = Callable[[Array], tuple[Array, Array]]
"""Row -> row whose second parameter, a, follows from the others, and the slopes (6,) of a."""


def untied(row: Array) -> tuple[Array, Array]:
    """Leave a free: return the row as it is, and the slopes of a by itself alone."""
    return row, np.eye(6)[1]


def polish(
    data: LossData, row: Array, columns: Sequence[int], tie: Tie = untied
) -> tuple[Array, float, str]:
    """Minimise by L-BFGS from a row; return row, objective and status.

    Moves `columns` of the row, with `tie` its second by them, in coordinates in which the objective
    is round. The status is `converged`, or what one more step would gain.
    """
    # 1) turn and scale the coordinates by the eigenvectors of the Hessian
    start, _ = tie(row)
    columns = list(columns)[int(row[0] <= data.log_floor) :]
    first = _directions(start, columns, tie)
    hessian = first.T @ data.hessian(start, range(6)) @ first
    values, vectors = np.linalg.eigh(hessian)
    residuals, _ = data.residuals(start[None])
    before = data.objective(residuals, data.weights)[0]
    unit = max(before, data.rounding)
    positive = np.maximum(values, 1e-12 * values[-1])
    turn = vectors * np.minimum(np.sqrt(unit / positive), 1.0)

    def moved(theta: Array) -> Array:
        moved_row = start.copy()
        moved_row[columns] += turn @ theta
        return tie(moved_row)[0]

    def objective(theta: Array) -> tuple[float, Array]:
        trial = moved(theta)
        residuals, jacobian = data.residuals(trial[None])
        slopes = jacobian[0] @ data.pull(residuals[0], data.weights)
        gradient = turn.T @ _directions(trial, columns, tie).T @ slopes
        return data.objective(residuals, data.weights)[0] / unit, gradient / unit

    # 2) minimise, and keep the start if that is not better
    origin = np.zeros(len(columns))
    best = optimize.minimize(
        objective,
        origin,
        method="L-BFGS-B",
        jac=True,
        bounds=[(-MAX_STRIDE, MAX_STRIDE)] * len(columns),
        options={"ftol": 1e-15, "gtol": 1e-9, "maxiter": 500},
    )
    inside = data.within_bounds(moved(best.x)[None])[0]
    theta = best.x if inside and best.fun * unit < before else origin
    # 3) judge convergence by the gain of a Newton step, half the squared gradient where it is round
    value, slope = objective(theta)
    gain = slope @ slope / 2
    status = f"a further step would gain {gain:.2g} of the objective: {best.message}"
    if gain < REMAINING_GAIN:
        status = "converged"
    return moved(theta), value * unit, status


def _directions(row: Array, columns: Sequence[int], tie: Tie) -> Array:
    """Return how a row moves with each of its columns, (6, c)."""
    directions = np.eye(6)
    directions[1] = tie(row)[1]
    return directions[:, columns]
