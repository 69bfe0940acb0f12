"""Law L(C) = E + K·C^-p of compute-optimal runs, and its rival without a floor, L(C) = K·C^-p.

The objective is the sum of Huber losses of the log residuals. The linear part (E, K >= 0) is solved
for each p of a grid, and the best are polished together. delta = 1.345·sigma (95 % efficient for
Gaussian noise), sigma from replicate seeds, else 1.4826·MAD. All intervals are extremes over one
region, {S <= S_min·(1 + F_.95(1, n-p)/(n-p))}, whose boundary is sampled: that is the
profile-likelihood interval of E, K, p, L(C) or any other function of them. A further run at C has
y ± t·sqrt(g'Vg + sigma²) in ln loss, the first term being the interval of the law.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from slm.fits.intervals import LEVEL, Ends, Interval, allowance, crossing, prediction_interval
from slm.fits.points import Point
from slm.fits.types import Array, to_json

ADDITIVE = "E + K*C^-p"
PURE = "K*C^-p"
PARAMETERS = {ADDITIVE: 3, PURE: 2}
"""Number of parameters by form."""
EXPONENTS = {ADDITIVE: np.geomspace(0.002, 3, 60), PURE: np.linspace(-1, 3, 161)}
"""Grid of p; an interval that reaches its end is open. Without a floor the loss may also rise."""
REACH = 10.0
"""Largest multiple of the largest run's compute at which a law is read."""
ROUNDING = 1e-10
"""Log residuals below this are rounding, not noise."""


@dataclass(frozen=True)
class Noise:
    """Noise of runs around a law."""

    sigma: float
    """Standard deviation of ln loss."""
    source: str
    """`replicate seeds`, `1.4826*MAD` or another estimator."""

    @property
    def delta(self) -> float:
        """Threshold of the Huber loss; infinite, least squares, if the noise is mere rounding."""
        return 1.345 * self.sigma if self.sigma > ROUNDING else np.inf


LEAST_SQUARES = Noise(0.0, "none")


@dataclass(frozen=True)
class Law:
    """A fitted law: loss = floor + scale·(C/C0)^-exponent, C0 being `reference`."""

    form: str
    """ADDITIVE or PURE."""
    reference: float
    """C0, FLOPs: geometric mean of the runs."""
    smallest: float
    """Smallest compute of the runs, FLOPs."""
    largest: float
    """Largest compute of the runs, FLOPs."""
    best: Array
    """(floor, scale, exponent)."""
    region: Array
    """(m, 3): the best parameters first, then points of the boundary of the 95 % region."""
    open_low: bool
    """Whether the exponent has no lower end above 0."""
    open_high: bool
    """Whether the exponent has no upper end."""
    objective: float
    """Sum of Huber losses of the log residuals."""
    noise: Noise
    """Noise that set delta."""
    residual_rms: float
    """Root mean square log residual."""
    n: int
    """Number of runs."""
    level: float
    """Level of the region and so of every interval."""

    @property
    def free(self) -> int:
        """Degrees of freedom."""
        return self.n - PARAMETERS[self.form]

    @property
    def scatter(self) -> float:
        """Standard deviation of ln loss around the law, runs beyond delta counted by their loss."""
        return np.sqrt(2 * self.objective / self.free)

    def loss(self, flops: Array | float) -> Array:
        """Return the law at C, of the shape of `flops`."""
        logc = np.log(np.asarray(flops) / self.reference)
        return _losses(self.best, logc)

    def band(self, flops: Array) -> tuple[Array, Array]:
        """Return the ends of the 95 % interval of the law, not of a further run, at C."""
        losses = _losses(self.region, np.log(flops / self.reference))
        return losses.min(0), losses.max(0)

    def at(self, flops: float) -> Interval:
        """Return the law at C with its interval."""
        logc = np.log(flops / self.reference)
        return self.interval(lambda rows: _losses(rows, logc))

    def prediction(self, flops: float) -> Interval:
        """Predict the loss of a further run at C."""
        return prediction_interval(self.at(flops), self.scatter, self.free, self.level)

    def interval(self, value: Callable[[Array], Array]) -> Interval:
        """Return estimate and extremes of a function of rows (m, 3) of (floor, scale, exponent)."""
        values = value(self.region)
        return Interval(float(values[0]), float(values.min()), float(values.max()), True)

    @property
    def p(self) -> Interval:
        """Exponent of compute."""
        exponent = self.interval(lambda rows: rows[:, 2])
        return self._opened(exponent)

    @property
    def E(self) -> Interval:  # noqa: N802
        """Irreducible loss; unknown for the pure law. An interval from 0 does not hold a floor."""
        if self.form == PURE:
            return Interval(None)
        floor = self.interval(lambda rows: rows[:, 0])
        return replace(floor, identifiable=bool(floor.low) and self.p.identifiable)

    @property
    def K(self) -> Interval:  # noqa: N802
        """Reducible loss at one FLOP, in the unit of the loss; identifiable if p is."""
        scale = self.interval(lambda rows: rows[:, 1] * self.reference ** rows[:, 2])
        return self._opened(scale)

    def document(self) -> dict[str, Any]:
        """Return the JSON document; losses in the unit of the runs."""
        flops = np.geomspace(self.smallest, REACH * self.largest, 41)
        low, high = self.band(flops)
        band = {"flops": flops, "loss": self.loss(flops), "low": low, "high": high}
        return to_json(
            {
                "form": self.form,
                "n": self.n,
                "E": self.E,
                "K": self.K,
                "p": self.p,
                "objective": self.objective,
                "delta": self.noise.delta,
                "sigma": self.noise.sigma,
                "sigma_from": self.noise.source,
                "residual_rms": self.residual_rms,
                "band": band | {"extrapolated_from": self.largest},
                "flattening": [self._flattening(times) for times in (1.0, REACH)],
            }
        )

    def _flattening(self, times: float) -> dict[str, Any]:
        flops = times * self.largest
        return {
            "flops": flops,
            "times_largest": times,
            "slope": self.slope(flops),
            "doubling": self.gain(flops),
            "extrapolated": times > 1,
        }

    def _opened(self, interval: Interval) -> Interval:
        """Return the interval with the open ends of the exponent."""
        low = interval.low
        if self.open_low:
            low = 0.0 if self.form == ADDITIVE else None
        high = None if self.open_high else interval.high
        return Interval(interval.estimate, low, high, not (self.open_low or self.open_high))

    def slope(self, flops: float) -> Interval:
        """Return d ln L / d ln C at C."""
        return self.interval(lambda rows: self._slopes(rows, flops))

    def gain(self, flops: float) -> Interval:
        """Return the share of the loss that doubling compute saves at C, 1 - 2^slope."""
        return self.interval(lambda rows: 1 - 2 ** self._slopes(rows, flops))

    def _slopes(self, rows: Array, flops: float) -> Array:
        floor, scale, exponent = rows.T
        reducible = scale * (flops / self.reference) ** -exponent
        return -exponent * reducible / (floor + reducible)


def fit_law(form: str, flops: Array, losses: Array, noise: Noise, level: float = LEVEL) -> Law:
    """Fit one form to (n,) runs, at least one more than it has parameters."""
    law = best_law(form, flops, losses, noise)
    problem = _Problem(form, np.log(flops / law.reference), np.log(losses), noise.delta)
    limit = (law.objective + law.n * ROUNDING**2) * allowance(law.free, level)
    low, high = problem.exponent_ends(law.best[2], limit)
    exponents = problem.exponents_between(low, high)
    return replace(
        law,
        region=np.vstack([law.best, problem.boundary(limit, exponents)]),
        open_low=low is None,
        open_high=high is None,
        level=level,
    )


def best_law(form: str, flops: Array, losses: Array, noise: Noise) -> Law:
    """Fit one form to as many runs as it has parameters, or more, without intervals.

    The region of the law is its best parameters alone.
    """
    reference = np.exp(np.log(flops).mean())
    problem = _Problem(form, np.log(flops / reference), np.log(losses), noise.delta)
    best, objective = problem.best()
    predicted = _losses(best, problem.logc)
    return Law(
        form=form,
        reference=reference,
        smallest=float(flops.min()),
        largest=float(flops.max()),
        best=best,
        region=best[None],
        open_low=True,
        open_high=True,
        objective=objective,
        noise=noise,
        residual_rms=root_mean_square(problem.z - np.log(predicted)),
        n=len(flops),
        level=LEVEL,
    )


def root_mean_square(errors: Array) -> float:
    """Return the root of the mean square of log errors."""
    return np.sqrt(np.mean(errors**2))


def noise_of(points: Sequence[Point], flops: Array, losses: Array, form: str) -> Noise:
    """Return the noise of ln loss: of replicate seeds, else around the least-squares law."""
    noise = seed_noise(points)
    if noise:
        return noise
    predicted = best_law(form, flops, losses, LEAST_SQUARES).loss(flops)
    return mad_noise(np.log(losses / predicted))


def seed_noise(points: Sequence[Point]) -> Noise | None:
    """Return the noise of ln loss among replicates; None below two degrees of freedom."""
    groups: dict[tuple[float, ...], list[float]] = defaultdict(list)
    for point in points:
        groups[point.setting].append(np.log(point.loss))
    free = sum(len(group) - 1 for group in groups.values())
    squares = sum(np.var(group) * len(group) for group in groups.values())
    return Noise(np.sqrt(squares / free), "replicate seeds") if free >= 2 else None


def mad_noise(residuals: Array) -> Noise:
    """Return the noise of log residuals, robust to a few outliers."""
    return Noise(1.4826 * np.median(np.abs(residuals)), "1.4826*MAD")


def aicc(objective: float, runs: int, parameters: int) -> float | None:
    """Return the corrected Akaike criterion, the noise being one more parameter.

    None if the runs are too few for the correction.
    """
    count = parameters + 1
    if runs <= count + 1:
        return None
    fit = runs * np.log(2 * objective / runs + ROUNDING**2)
    correction = 2 * count * (count + 1) / (runs - count - 1)
    return fit + 2 * count + correction


def huber(residuals: Array, delta: float, weights: Array | float = 1.0) -> Array:
    """Return the weighted sum of Huber losses over the last axis."""
    size = np.abs(residuals)
    inner = np.minimum(size, delta)
    return (weights * inner * (size - inner / 2)).sum(-1)


def _losses(rows: Array, logc: Array) -> Array:
    """Return the losses (..., *c.shape) of parameters (..., 3) at c = ln(C/C0)."""
    shape = (3, *rows.shape[:-1], *[1] * logc.ndim)
    floor, scale, exponent = rows.T.reshape(shape)
    return floor + scale * np.exp(-exponent * logc)


@dataclass(frozen=True)
class _Problem:
    """Fit of one form to ln loss over ln(C/C0)."""

    form: str
    logc: Array
    """(n,) ln(C/C0)."""
    z: Array
    """(n,) ln loss."""
    delta: float
    """Threshold of the Huber loss."""

    def solve(self, exponents: Array) -> tuple[Array, Array]:
        """Return the best (floor, scale) >= 0 at each exponent as rows (P, 3), and objectives.

        Reweighted least squares on ln L ~ ln m + (m' - m)/m, linear in m' = floor + scale·x.
        """
        x = np.exp(-exponents[:, None] * self.logc)
        model = np.broadcast_to(np.exp(self.z), x.shape)
        weights = np.ones_like(x)
        for _ in range(200):
            # 1) the normal equations of this linearisation
            a = 1 / model
            b = x / model
            target = self.z - np.log(model) + 1
            aa = (weights * a * a).sum(-1)
            ab = (weights * a * b).sum(-1)
            bb = (weights * b * b).sum(-1)
            at = (weights * a * target).sum(-1)
            bt = (weights * b * target).sum(-1)
            # 2) their solution; a parameter that would be negative is 0 and the other solved alone
            floor = np.zeros_like(bb)
            scale = bt / bb
            if self.form == ADDITIVE:
                determinant = aa * bb - ab * ab
                free_floor = (bb * at - ab * bt) / determinant
                free_scale = (aa * bt - ab * at) / determinant
                scale = np.where(free_floor < 0, scale, free_scale)
                floor = np.where(scale < 0, at / aa, np.maximum(free_floor, 0))
                scale = np.maximum(scale, 0)
            # 3) new weights, until the model stays
            previous = model
            model = floor[:, None] + scale[:, None] * x
            residuals = self.z - np.log(model)
            if np.isfinite(self.delta):
                weights = self.delta / np.maximum(np.abs(residuals), self.delta)
            if np.abs(model / previous - 1).max() < 1e-11:
                break
        return np.stack([floor, scale, exponents], 1), huber(residuals, self.delta)

    def best(self) -> tuple[Array, float]:
        """Return the best parameters and objective.

        Candidates are the best of the grid of exponents, polished or not, and the best without a
        floor.
        """
        grid, objectives = self.solve(EXPONENTS[self.form])
        order = objectives.argsort()
        without_floor = order[grid[order, 0] == 0]
        starts = dict.fromkeys([*without_floor[:1], order[0]])
        fits = [(grid[k], objectives[k]) for k in starts]
        fits += [self._polish(grid[k]) for k in starts if grid[k, 1] > 0]
        # A floor must pay for itself by more than rounding.
        best, objective = min(fits, key=lambda fit: fit[1] * (1 + 1e-9 * (fit[0][0] > 0)))
        if best[0] < 1e-9 * np.exp(self.z.min()):
            best = best * [0, 1, 1]
        return best, objective

    def _polish(self, start: Array) -> tuple[Array, float]:
        """Refine all parameters at once by a trust region; a floor of 0 stays 0."""
        columns = [0, 1, 2] if start[0] > 0 else [1, 2]
        least_squares = np.isinf(self.delta)
        unit = 1e-3 if least_squares else self.delta
        lowest, *_, highest = EXPONENTS[self.form]
        low = np.array([0, 0, lowest])[columns]
        high = np.array([np.inf, np.inf, highest])[columns]

        def row(theta: Array) -> Array:
            full = np.zeros(3)
            full[columns] = theta
            return full

        def residuals(theta: Array) -> Array:
            losses = _losses(row(theta), self.logc)
            return (np.log(losses) - self.z) / unit

        def jacobian(theta: Array) -> Array:
            _, scale, exponent = row(theta)
            losses = _losses(row(theta), self.logc)
            x = np.exp(-exponent * self.logc)
            slopes = np.stack([np.ones_like(x), x, -scale * self.logc * x], 1)
            return slopes[:, columns] / losses[:, None] / unit

        best = optimize.least_squares(
            residuals,
            np.clip(start[columns], low + 1e-9, high - 1e-9),
            jac=jacobian,
            bounds=(low, high),
            loss="linear" if least_squares else "huber",
            x_scale="jac",
            xtol=1e-13,
            ftol=1e-15,
            gtol=1e-13,
            max_nfev=500,
        )
        objective = huber(residuals(best.x) * unit, self.delta)
        return row(best.x), float(objective)

    def exponent_ends(self, best: float, limit: float) -> Ends:
        """Return the ends of the exponent's profile; None if it is inside up to the grid's end."""

        def excess(exponent: float) -> float:
            if exponent == best:
                return -limit
            _, objectives = self.solve(np.array([exponent]))
            return objectives[0] - limit

        first, last = EXPONENTS[self.form][[0, -1]]
        stride = (abs(best) + 0.01) / 20
        low = crossing(excess, best, first, stride)
        high = crossing(excess, best, last, stride)
        return low, high

    def exponents_between(self, low: float | None, high: float | None) -> Array:
        """Return 41 exponents from end to end, denser near the ends, where the region closes."""
        first = EXPONENTS[self.form][0] if low is None else low
        last = EXPONENTS[self.form][-1] if high is None else high
        angles = np.linspace(0, np.pi, 41)
        share = (1 - np.cos(angles)) / 2
        if self.form == PURE:
            return first + (last - first) * share
        return first * (last / first) ** share

    def boundary(self, limit: float, exponents: Array) -> Array:
        """Return points (m, 3) of the boundary of the region {S <= limit}.

        A ray that reaches floor = 0 or scale = 0 ends there: no parameter is negative.
        """
        # 1) at each exponent, rays from the best (floor, scale), and where they meet the walls
        x = np.exp(-exponents[:, None] * self.logc)
        centre = self.solve(exponents)[0][:, :2, None]
        rays = self._rays(centre[..., 0], x)
        with np.errstate(divide="ignore", invalid="ignore"):
            walls = np.where(rays < 0, -centre / rays, np.inf)
            wall = np.nanmin(walls, 1) * (1 - 1e-9)

        def ends(radius: Array) -> Array:
            return np.moveaxis(centre + radius[:, None] * rays, 1, 0)

        def inside(radius: Array) -> NDArray[np.bool_]:
            floor, scale = ends(radius)
            losses = floor[..., None] + scale[..., None] * x[:, None]
            return huber(np.log(losses) - self.z, self.delta) <= limit

        # 2) the radius at which each ray leaves the region
        floor, scale = ends(_largest_inside(inside, wall, np.sqrt(2 * limit)))
        # 3) a floor that is next to none is none
        negligible = 1e-6 * np.exp(self.z.min())
        floor = np.where(floor < negligible, 0.0, floor)
        columns = np.broadcast_arrays(floor, scale, exponents[:, None])
        return np.stack(columns, -1).reshape(-1, 3)

    def _rays(self, centres: Array, x: Array) -> Array:
        """Return directions (P, 2, rays) of (floor, scale).

        They are scaled so that a unit changes the log residuals by a vector of length one.
        """
        model = centres[:, :1] + centres[:, 1:2] * x
        jacobian = np.stack([np.ones_like(x), x], -1) / model[..., None]
        if self.form == PURE:
            unit = 1 / np.sqrt((jacobian[..., 1] ** 2).sum(-1))
            scales = np.stack([unit, -unit], 1)
            return np.stack([np.zeros_like(scales), scales], 1)
        angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        circle = np.stack([np.cos(angles), np.sin(angles)])
        lower = np.linalg.cholesky(jacobian.mT @ jacobian)
        return np.linalg.solve(lower.mT, circle[None])


def _largest_inside(
    inside: Callable[[Array], NDArray[np.bool_]], wall: Array, first: float
) -> Array:
    """Return the largest radii inside and not beyond the wall, by doubling and bisection."""
    inner = np.zeros_like(wall)
    outer = np.minimum(wall, first)
    for _ in range(60):
        growing = inside(outer) & (outer < wall)
        if not growing.any():
            break
        inner = np.where(growing, outer, inner)
        outer = np.where(growing, np.minimum(2 * outer, wall), outer)
    for _ in range(36):
        middle = (inner + outer) / 2
        within = inside(middle)
        inner = np.where(within, middle, inner)
        outer = np.where(within, outer, middle)
    return inner
