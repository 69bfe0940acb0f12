"""Many robust fits of one surface at once: L = E + (A·N^-alpha + B·D^-beta)^gamma, one row of parameters per fit.

A row is (e, a, b, p, q, gamma), e = ln E and, with n and d the logarithms of N and D from their means,

    L = e^e + e^(gamma·logsumexp(x/gamma, y/gamma)),  x = a - p·n,  y = b - q·d,  alpha = p/gamma,  beta = q/gamma:

a smooth maximum of two power laws of which gamma is the temperature, well conditioned down to gamma = 0. The Jacobian
is that of the shares: those of E and of the two terms, their entropy for gamma. Every fit has weights of its own, so
that starts, profiles, bootstraps and held-out runs are the same call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize
from scipy.special import entr

from slm.fits.power_law import ROUNDING

Array = NDArray[np.float64]

FLOOR = -14.0
"""ln of the smallest E over the smallest loss: as good as none."""
EXPONENT = (0.003, 6.0)
"""Least and greatest p and q looked at."""
GAMMA = (0.02, 12.0)
"""Least and greatest gamma looked at."""
OUTSIDE = 0.1
"""Curvature kept of a run beyond delta, of what reweighting gives it, once a fit is near its end."""
EDGE = 300.0
"""ln of the greatest loss of a trial."""
STEPS = 200
"""Steps of a fit at most."""
STRIDE = 3.0
"""Longest step of a parameter."""
LEFT = 1e-7
"""Share of the objective that a further step may gain where a fit has converged."""
CHUNK = 200
"""Fits side by side: what stays in the cache."""


@dataclass(frozen=True)
class Cloud:
    """The runs, as the fits see them."""

    n: Array
    """(m,) ln N from its mean."""
    d: Array
    """(m,) ln D from its mean."""
    losses: Array
    """(m,) losses."""
    centre: tuple[float, float]
    """Means of ln N and ln D."""
    delta: float
    """Where the Huber loss turns linear; infinite is least squares."""
    raw: bool = False
    """Whether the residual is that of the loss; else of its logarithm."""

    @property
    def lowest(self) -> float:
        """ln of the E that stands for none."""
        return float(np.log(self.losses.min()) + FLOOR)

    def predicted(self, rows: Array) -> tuple[Array, Array]:
        """(R, 6) rows -> the losses and the first term's share of what gamma is the power of, each (R, m)."""
        e, a, b, p, q, gamma = (rows[:, k, None] for k in range(6))
        x, y = (a - p * self.n) / gamma, (b - q * self.d) / gamma
        total = np.logaddexp(x, y)
        return np.exp(np.minimum(e, EDGE)) + np.exp(np.minimum(gamma * total, EDGE)), np.exp(
            x - total
        )

    def residuals(self, rows: Array) -> tuple[Array, Array]:
        """(R, m) residuals and their (R, 6, m) Jacobian."""
        losses, share = self.predicted(rows)
        unit = losses if self.raw else np.ones_like(losses)
        floor = np.exp(np.minimum(rows[:, :1], EDGE)) * unit / losses
        first, second = (unit - floor) * share, (unit - floor) * (1 - share)
        spread = (unit - floor) * (entr(share) + entr(1 - share))
        jacobian = np.stack([floor, first, second, -first * self.n, -second * self.d, spread], 1)
        return losses - self.losses if self.raw else np.log(losses / self.losses), jacobian

    def objective(self, residuals: Array, weights: Array) -> Array:
        """Weighted sum of Huber losses over the last axis."""
        size = np.abs(residuals)
        inner = np.minimum(size, self.delta)
        return np.asarray((weights * inner * (size - inner / 2)).sum(-1))

    def curvature(self, residuals: Array, weights: Array, outside: Array) -> Array:
        """Weights of a Gauss-Newton step: reweighting's, beyond delta times `outside` (R,)."""
        far = np.abs(residuals) > self.delta
        scale = np.where(
            far, outside[:, None] * self.delta / np.where(far, np.abs(residuals), 1.0), 1.0
        )
        return np.asarray(weights * scale)

    def hessian(self, row: Array, weights: Array, columns: Sequence[int]) -> Array:
        """JᵀWJ of one row (6,), reweighted."""
        residuals, jacobian = self.residuals(row[None])
        own = jacobian[0, list(columns)]
        return np.asarray((own * self.curvature(residuals, weights[None], np.ones(1))) @ own.T)

    def inside(self, rows: Array) -> NDArray[np.bool_]:
        """Whether exponents and gamma of rows (R, 6) are among those looked at."""
        ends = ((rows[:, 3:5], EXPONENT), (rows[:, 5:], GAMMA))
        return np.all([((own >= low) & (own <= high)).all(1) for own, (low, high) in ends], axis=0)


def descend(
    cloud: Cloud,
    rows: Array,
    weights: Array,
    columns: Sequence[int],
    normals: Array | None = None,
    tolerance: float = 1e-9,
) -> tuple[Array, Array]:
    """Least objective from each row (R, 6), weights (R, m): the rows found and their objectives (R,).

    Levenberg-Marquardt over `columns` of a row, the others as given; with `normals` (R, 6) no step changes normal·row.
    A fit is done when two steps in a row gain less than `tolerance` of its objective.
    """
    normals = np.zeros_like(rows) if normals is None else normals
    parts = [
        _descend(
            cloud,
            rows[k : k + CHUNK],
            weights[k : k + CHUNK],
            list(columns),
            normals[k : k + CHUNK],
            tolerance,
        )
        for k in range(0, len(rows), CHUNK)
    ]
    found, objectives = zip(*parts)
    return np.concatenate(found), np.concatenate(objectives)


def _descend(
    cloud: Cloud, rows: Array, weights: Array, columns: list[int], normals: Array, tolerance: float
) -> tuple[Array, Array]:
    rows, (residuals, jacobian) = rows.copy(), cloud.residuals(rows)
    values = cloud.objective(residuals, weights)
    damping, outside, quiet = np.full(len(rows), 1e-3), np.ones(len(rows)), np.zeros(len(rows), int)
    live = np.arange(len(rows))
    for _ in range(STEPS):
        bent = cloud.curvature(residuals[live], weights[live], outside[live])
        pull = weights[live] * np.clip(residuals[live], -cloud.delta, cloud.delta)
        slopes = jacobian[live][:, columns]
        down = (slopes[:, 0] * pull).sum(1) > 0
        slopes[down & (rows[live, 0] <= cloud.lowest), 0] = 0.0  # E is none already
        step, promise = _step(slopes, bent, pull, damping[live], normals[live][:, columns])
        trial = rows[live]
        trial[:, columns] += step
        trial[:, 0] = np.maximum(trial[:, 0], cloud.lowest)
        there, slopes = cloud.residuals(trial)
        reached = np.where(cloud.inside(trial), cloud.objective(there, weights[live]), np.inf)
        scale = np.maximum(values[live], cloud.n.size * ROUNDING**2)
        better, gain = reached < values[live], (values[live] - reached) / scale
        taken = live[better]
        rows[taken], residuals[taken], jacobian[taken] = (
            trial[better],
            there[better],
            slopes[better],
        )
        values[taken] = reached[better]
        damping[live] = np.where(better, damping[live] / 5, np.maximum(damping[live], 1e-6) * 5)
        outside[live] = np.where(better, np.where(gain < 0.1, OUTSIDE, outside[live]), 1.0)
        still = (better & (gain < tolerance)) | (promise < tolerance * scale)
        quiet[live] = np.where(still, quiet[live] + 1, 0)
        live = live[quiet[live] < 2]
        if not live.size:
            break
    return rows, values


def _step(
    jacobian: Array, bent: Array, pull: Array, damping: Array, normals: Array
) -> tuple[Array, Array]:
    """The damped steps (R, c) along `normals`·step = 0, and what the objective would fall by were it linear."""
    count, width = len(damping), jacobian.shape[1]
    gradient = (jacobian @ pull[:, :, None])[:, :, 0]
    matrix = np.zeros((count, width + 1, width + 1))
    matrix[:, :width, :width] = (jacobian * bent[:, None]) @ jacobian.transpose(0, 2, 1)
    diagonal = np.einsum("rkk->rk", matrix)[:, :width]
    most = diagonal.max(1, keepdims=True)
    extra = damping[:, None] * diagonal + 1e-12 * most + 1e-300
    matrix[:, np.arange(width), np.arange(width)] += extra
    matrix[:, :width, width] = matrix[:, width, :width] = normals * most
    matrix[:, width, width] = np.where(normals.any(1), 0.0, 1.0)
    right = np.concatenate([-gradient, np.zeros((count, 1))], 1)
    step = np.linalg.solve(matrix, right[:, :, None])[:, :width, 0]
    step /= np.maximum(np.abs(step).max(1, keepdims=True) / STRIDE, 1.0)
    return step, -(gradient * step).sum(1)


Tie = Callable[[Array], tuple[Array, Array]]
"""A row -> the row with one parameter set by the others, and the slopes (6,) of that parameter, the second of a row."""


def polish(
    cloud: Cloud, row: Array, weights: Array, columns: Sequence[int], tie: Tie | None = None
) -> tuple[Array, float, str]:
    """L-BFGS from a row, in coordinates that make the objective round: row, objective and the optimiser's word.

    Over `columns` of the row; with `tie` its second is set by them.
    """
    columns, start = list(columns), tie(row)[0] if tie else row
    columns = columns[int(row[0] <= cloud.lowest) :]
    first = _directions(start, columns, tie)
    values, vectors = np.linalg.eigh(first.T @ cloud.hessian(start, weights, range(6)) @ first)
    before = float(cloud.objective(cloud.residuals(start[None])[0], weights)[0])
    unit = max(before, cloud.n.size * ROUNDING**2)
    turn = vectors * np.minimum(np.sqrt(unit / np.maximum(values, 1e-12 * values[-1])), 1.0)

    def moved(theta: Array) -> Array:
        found = start.copy()
        found[columns] += turn @ theta
        return tie(found)[0] if tie else found

    def objective(theta: Array) -> tuple[float, Array]:
        there = moved(theta)
        errors, slopes = cloud.residuals(there[None])
        pull = weights * np.clip(errors[0], -cloud.delta, cloud.delta)
        down = turn.T @ _directions(there, columns, tie).T @ (slopes[0] @ pull)
        return float(cloud.objective(errors, weights)[0]) / unit, down / unit

    origin, bounds = np.zeros(len(columns)), [(-STRIDE, STRIDE)] * len(columns)
    best = optimize.minimize(
        objective,
        origin,
        (),
        "L-BFGS-B",
        jac=True,
        bounds=bounds,
        options={"ftol": 1e-15, "gtol": 1e-9, "maxiter": 500},
    )
    better = best.fun * unit < before and cloud.inside(moved(best.x)[None])[0]
    theta = best.x if better else origin
    value, slope = objective(theta)
    left = float(slope @ slope) / 2
    status = (
        "converged"
        if left < LEFT
        else f"a further step would gain {left:.2g} of the objective: {best.message}"
    )
    return moved(theta), value * unit, status


def _directions(row: Array, columns: Sequence[int], tie: Tie | None) -> Array:
    """(6, c) what a row moves by with each of its columns."""
    found = np.eye(6)[:, list(columns)]
    if tie:
        found[1] = tie(row)[1][list(columns)]
    return found
