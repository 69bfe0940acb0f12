"""L(C) = E + K·C^-p through the compute-optimal runs, and its rival without a floor, L(C) = K·C^-p.

Estimator: the sum of Huber losses of the log residuals. For each p of a grid the linear part (E, K >= 0) is solved, the
best are polished together. delta = 1.345·sigma (95 % efficient under Gauss), sigma from replicate seeds, else
1.4826·MAD. Every interval is an extreme over one region, {S <= S_min·(1 + F_.95(1, n-p)/(n-p))}, of which the boundary
is sampled: the profile-likelihood interval of E, K, p, L(C) or any other function of them. A further run at C has
y ± t·sqrt(g'Vg + sigma²) of ln loss, the first term being the law's own interval.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from slm.fits.intervals import LEVEL, Interval, allowance, crossing, further
from slm.fits.points import Point

Array = NDArray[np.float64]

Solver = Callable[[Array], tuple[Array, Array]]
"""Exponents (P,) -> the best parameters there (P, 3) and their objectives (P,)."""

ADDITIVE = "E + K*C^-p"
PURE = "K*C^-p"
PARAMETERS = {ADDITIVE: 3, PURE: 2}
EXPONENTS = {ADDITIVE: np.geomspace(0.002, 3, 60), PURE: np.linspace(-1, 3, 161)}
"""Exponents looked at; an interval that reaches an end is open there. Without a floor the loss may also rise."""
REACH = 10.0
"""How many times beyond the largest run a law is read at most."""
ROUNDING = 1e-10
"""Log residuals below this are rounding, not noise."""


@dataclass(frozen=True)
class Noise:
    """How far a run is from the law."""

    sigma: float
    """Standard deviation of ln loss."""
    source: str
    """`replicate seeds` or `1.4826*MAD`."""

    @property
    def delta(self) -> float:
        """Where the Huber loss turns linear; infinite, so plain least squares, when there is no noise to speak of."""
        return 1.345 * self.sigma if self.sigma > ROUNDING else np.inf


LEAST_SQUARES = Noise(0.0, "none")


@dataclass(frozen=True)
class Law:
    """One law, fitted. Its parameters at C0, `reference`: loss = floor + scale·(C/C0)^-exponent."""

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
    """(m, 3): the boundary of the 95 % region, and the best."""
    open_low: bool
    """Whether the exponent has no lower end above 0."""
    open_high: bool
    """Whether the exponent has no upper end."""
    objective: float
    """Sum of Huber losses of the log residuals."""
    noise: Noise
    """What set delta."""
    residual_rms: float
    """Root mean square log residual."""
    n: int
    """Runs."""
    level: float
    """Of the region and so of every interval."""

    @property
    def free(self) -> int:
        """Degrees of freedom."""
        return self.n - PARAMETERS[self.form]

    @property
    def scatter(self) -> float:
        """Standard deviation of ln loss around the law, runs beyond delta counted as they weigh."""
        return float(np.sqrt(2 * self.objective / self.free))

    def loss(self, flops: Array | float) -> Array:
        """The law at C; any shape."""
        return np.asarray(
            _losses(self.best[None], np.log(np.asarray(flops, float) / self.reference))[0]
        )

    def band(self, flops: Array) -> tuple[Array, Array]:
        """Ends of the 95 % interval of the law (not of a further run) at C."""
        losses = _losses(self.region, np.log(flops / self.reference))
        return losses.min(0), losses.max(0)

    def at(self, flops: float) -> Interval:
        """The law at C."""
        low, high = self.band(np.array([flops]))
        return Interval(float(self.loss(flops)), float(low[0]), float(high[0]), True)

    def prediction(self, flops: float) -> Interval:
        """A further run at C."""
        return further(self.at(flops), self.scatter, self.free, self.level)

    def interval(self, value: Callable[[Array], Array]) -> Interval:
        """Any function of the parameters, given (m, 3) rows (floor, scale, exponent): estimate and extremes."""
        values = value(self.region)
        return Interval(
            float(value(self.best[None])[0]), float(values.min()), float(values.max()), True
        )

    @property
    def p(self) -> Interval:
        """Exponent of compute."""
        return self._open(self.interval(lambda rows: rows[:, 2]))

    @property
    def E(self) -> Interval:  # noqa: N802
        """Irreducible loss; not there in the pure law. An interval from 0 holds no floor."""
        if self.form == PURE:
            return Interval(None)
        own = self.interval(lambda rows: rows[:, 0])
        return replace(own, identifiable=bool(own.low) and self.p.identifiable)

    @property
    def K(self) -> Interval:  # noqa: N802
        """Reducible loss at one FLOP, in the loss's unit: as well known as p."""
        return self._open(self.interval(lambda rows: rows[:, 1] * self.reference ** rows[:, 2]))

    def document(self) -> dict[str, Any]:
        """As JSON; losses in the unit of the runs."""
        flops = np.geomspace(self.smallest, REACH * self.largest, 41)
        low, high = self.band(flops)
        band = {"flops": flops, "loss": self.loss(flops), "low": low, "high": high}
        return {
            "form": self.form,
            "n": self.n,
            "E": self.E.document(),
            "K": self.K.document(),
            "p": self.p.document(),
            "objective": self.objective,
            "delta": self.noise.delta if np.isfinite(self.noise.delta) else None,
            "sigma": self.noise.sigma,
            "sigma_from": self.noise.source,
            "residual_rms": self.residual_rms,
            "band": {name: own.tolist() for name, own in band.items()}
            | {"extrapolated_from": self.largest},
            "flattening": [self._flattening(times) for times in (1.0, REACH)],
        }

    def _flattening(self, times: float) -> dict[str, Any]:
        flops = times * self.largest
        return {
            "flops": flops,
            "times_largest": times,
            "slope": self.slope(flops).document(),
            "doubling": self.gain(flops).document(),
            "extrapolated": times > 1,
        }

    def _open(self, own: Interval) -> Interval:
        low = own.low if not self.open_low else 0.0 if self.form == ADDITIVE else None
        high = own.high if not self.open_high else None
        return Interval(own.estimate, low, high, not (self.open_low or self.open_high))

    def slope(self, flops: float) -> Interval:
        """d ln L / d ln C at C."""
        return self.interval(lambda rows: self._slopes(rows, flops))

    def gain(self, flops: float) -> Interval:
        """Share of the loss that doubling compute takes away at C, by the slope there: 1 - 2^slope."""
        return self.interval(lambda rows: 1 - 2 ** self._slopes(rows, flops))

    def _slopes(self, rows: Array, flops: float) -> Array:
        reducible = rows[:, 1] * (flops / self.reference) ** -rows[:, 2]
        return np.asarray(-rows[:, 2] * reducible / (rows[:, 0] + reducible))


def fit_law(form: str, flops: Array, losses: Array, noise: Noise, level: float = LEVEL) -> Law:
    """One form through (n,) runs, at least one more than it has parameters."""
    free = len(flops) - PARAMETERS[form]
    reference, z, logc = _logs(flops, losses)
    solve = _solver(form, logc, z, noise.delta)
    best, objective = _best(solve, logc, z, noise.delta, form)
    limit = (objective + len(z) * ROUNDING**2) * allowance(free, level)
    low, high = _exponents_inside(solve, best[2], limit, form)
    region = _boundary(solve, logc, z, noise.delta, limit, _between(low, high, form), form)
    return Law(
        form=form,
        reference=reference,
        smallest=float(flops.min()),
        largest=float(flops.max()),
        best=best,
        region=np.vstack([best, region]),
        open_low=low is None,
        open_high=high is None,
        objective=objective,
        noise=noise,
        residual_rms=float(np.sqrt(np.mean((z - np.log(_losses(best[None], logc)[0])) ** 2))),
        n=len(z),
        level=level,
    )


def predict(form: str, flops: Array, losses: Array, noise: Noise, at: Array) -> Array:
    """Loss at compute `at` by a law through the runs, of which there may be as many as parameters."""
    reference, best, _ = least(form, flops, losses, noise)
    return np.asarray(_losses(best[None], np.log(at / reference))[0])


def least(form: str, flops: Array, losses: Array, noise: Noise) -> tuple[float, Array, float]:
    """C0, the (floor, scale, exponent) of least objective there, and that, without intervals."""
    reference, z, logc = _logs(flops, losses)
    return reference, *_best(_solver(form, logc, z, noise.delta), logc, z, noise.delta, form)


def _logs(flops: Array, losses: Array) -> tuple[float, Array, Array]:
    """C0, ln L and ln(C/C0)."""
    reference = float(np.exp(np.log(flops).mean()))
    return reference, np.log(losses), np.log(flops / reference)


def noise_of(points: Sequence[Point], flops: Array, losses: Array, form: str) -> Noise:
    """Spread of ln loss: of seeds, with two degrees of freedom at least, else around the least-squares law."""
    return seed_noise(points) or spread(
        np.log(losses / predict(form, flops, losses, LEAST_SQUARES, flops))
    )


def seed_noise(points: Sequence[Point]) -> Noise | None:
    """Spread of ln loss over runs that differ in nothing but the seed; None below two degrees of freedom."""
    groups: dict[tuple[float, ...], list[float]] = defaultdict(list)
    for point in points:
        groups[point.setting].append(float(np.log(point.loss)))
    free = sum(len(group) - 1 for group in groups.values())
    squares = sum(float(np.var(group)) * len(group) for group in groups.values())
    return Noise(float(np.sqrt(squares / free)), "replicate seeds") if free >= 2 else None


def spread(residuals: Array) -> Noise:
    """Spread of log residuals, whatever a few of them are."""
    return Noise(float(1.4826 * np.median(np.abs(residuals))), "1.4826*MAD")


def aicc(objective: float, runs: int, parameters: int) -> float | None:
    """Corrected Akaike criterion, the spread being one more parameter; None where runs are too few to correct."""
    count = parameters + 1
    if runs <= count + 1:
        return None
    fit = runs * np.log(2 * objective / runs + ROUNDING**2)
    return float(fit + 2 * count + 2 * count * (count + 1) / (runs - count - 1))


def huber(residuals: Array, delta: float) -> Array:
    """Sum over the last axis."""
    size = np.abs(residuals)
    inner = np.minimum(size, delta)
    return np.asarray((inner * (size - inner / 2)).sum(-1))


def _losses(rows: Array, logc: Array) -> Array:
    """(m, 3) parameters at c = ln(C/C0) -> (m, *c.shape)."""
    floor, scale, exponent = (rows[:, k].reshape(-1, *[1] * np.ndim(logc)) for k in range(3))
    return np.asarray(floor + scale * np.exp(-exponent * logc))


def _linear(
    exponents: Array, *, logc: Array, z: Array, delta: float, additive: bool
) -> tuple[Array, Array]:
    """Best (floor, scale) >= 0 at each exponent: rows (P, 3) and their objectives (P,).

    Reweighted least squares on ln L ~ ln m + (m' - m)/m, linear in the new m' = floor + scale·x.
    """
    x = np.exp(-exponents[:, None] * logc)
    model, weights = np.broadcast_to(np.exp(z), x.shape), np.ones_like(x)
    for _ in range(200):
        a, b, target = 1 / model, x / model, z - np.log(model) + 1
        aa, ab, bb = ((weights * u * v).sum(-1) for u, v in ((a, a), (a, b), (b, b)))
        at, bt = ((weights * u * target).sum(-1) for u in (a, b))
        if additive:
            determinant = aa * bb - ab * ab
            floor, scale = (bb * at - ab * bt) / determinant, (aa * bt - ab * at) / determinant
            scale = np.where(floor < 0, bt / bb, scale)
            floor = np.where(scale < 0, at / aa, np.maximum(floor, 0))
            scale = np.maximum(scale, 0)
        else:
            floor, scale = np.zeros_like(bb), bt / bb
        previous, model = model, floor[:, None] + scale[:, None] * x
        residuals = z - np.log(model)
        weights = delta / np.maximum(np.abs(residuals), delta) if np.isfinite(delta) else weights
        if np.abs(model / previous - 1).max() < 1e-11:
            break
    return np.stack([floor, scale, exponents], 1), huber(residuals, delta)


def _solver(form: str, logc: Array, z: Array, delta: float) -> Solver:
    return partial(_linear, logc=logc, z=z, delta=delta, additive=form == ADDITIVE)


def _best(solve: Solver, logc: Array, z: Array, delta: float, form: str) -> tuple[Array, float]:
    """Best parameters and objective: the best of the grid of exponents polished, and the best without a floor."""
    grid, objectives = solve(EXPONENTS[form])
    order = objectives.argsort()
    starts = dict.fromkeys([*order[grid[order, 0] == 0][:1], order[0]])
    found = [(grid[k], float(objectives[k])) for k in starts]
    found += [_polish(grid[k], logc, z, delta, form) for k in starts if grid[k, 1] > 0]
    best, objective = min(found, key=lambda pair: pair[1] * (1 + 1e-9 * (pair[0][0] > 0)))
    return np.where([best[0] < 1e-9 * np.exp(z.min()), False, False], 0.0, best), objective


def _polish(start: Array, logc: Array, z: Array, delta: float, form: str) -> tuple[Array, float]:
    """Trust region on all parameters at once with the analytic Jacobian; a floor of 0 stays 0."""
    columns = [0, 1, 2] if start[0] > 0 else [1, 2]
    unit = delta if np.isfinite(delta) else 1e-3
    low = np.array([0, 0, EXPONENTS[form][0]])[columns]
    high = np.array([np.inf, np.inf, EXPONENTS[form][-1]])[columns]

    def row(theta: Array) -> Array:
        full = np.zeros(3)
        full[columns] = theta
        return full[None]

    def residuals(theta: Array) -> Array:
        return np.asarray((np.log(_losses(row(theta), logc)[0]) - z) / unit)

    def jacobian(theta: Array) -> Array:
        _, scale, exponent = row(theta)[0]
        x = np.exp(-exponent * logc)
        slopes = np.stack([np.ones_like(x), x, -scale * logc * x], 1)[:, columns]
        return np.asarray(slopes / _losses(row(theta), logc)[0][:, None] / unit)

    best = optimize.least_squares(
        residuals,
        np.clip(start[columns], low + 1e-9, high - 1e-9),
        jac=jacobian,
        bounds=(low, high),
        loss="huber" if np.isfinite(delta) else "linear",
        x_scale="jac",
        xtol=1e-13,
        ftol=1e-15,
        gtol=1e-13,
        max_nfev=500,
    )
    return row(best.x)[0], float(huber(residuals(best.x) * unit, delta))


def _exponents_inside(
    solve: Solver, best: float, limit: float, form: str
) -> tuple[float | None, float | None]:
    """Ends of the exponent's profile; None where it is still inside at the end of those looked at."""

    def excess(exponent: float) -> float:
        return float(solve(np.array([exponent]))[1][0]) - limit if exponent != best else -limit

    first, last = EXPONENTS[form][[0, -1]]
    stride = (abs(best) + 0.01) / 20
    return crossing(excess, best, first, stride), crossing(excess, best, last, stride)


def _between(low: float | None, high: float | None, form: str) -> Array:
    """41 exponents from end to end, denser near the ends where the region closes."""
    first, last = (EXPONENTS[form][k] if end is None else end for k, end in ((0, low), (-1, high)))
    share = (1 - np.cos(np.linspace(0, np.pi, 41))) / 2
    return np.asarray(
        first + (last - first) * share if form == PURE else first * (last / first) ** share
    )


def _boundary(
    solve: Solver,
    logc: Array,
    z: Array,
    delta: float,
    limit: float,
    exponents: Array,
    form: str,
) -> Array:
    """Points of the region's boundary (m, 3): at each exponent, rays from the best (floor, scale) to where S = limit.

    Where a ray meets floor = 0 or scale = 0 first, it ends there: the region is that of non-negative parameters.
    """
    centres = solve(exponents)[0]
    x = np.exp(-exponents[:, None] * logc)
    centre, rays = centres[:, :2, None], _rays(centres, x, form)
    with np.errstate(divide="ignore", invalid="ignore"):
        wall = np.nanmin(np.where(rays < 0, -centre / rays, np.inf), 1) * (1 - 1e-9)

    def inside(radius: Array) -> NDArray[np.bool_]:
        floor, scale = np.moveaxis(centre + radius[:, None] * rays, 1, 0)
        return huber(np.log(floor[..., None] + scale[..., None] * x[:, None]) - z, delta) <= limit

    floor, scale = np.moveaxis(
        centre + _edge(inside, wall, np.sqrt(2 * limit))[:, None] * rays, 1, 0
    )
    floor = np.where(floor < 1e-6 * np.exp(z.min()), 0.0, floor)
    return np.stack(np.broadcast_arrays(floor, scale, exponents[:, None]), -1).reshape(-1, 3)


def _edge(inside: Callable[[Array], NDArray[np.bool_]], wall: Array, first: float) -> Array:
    """Largest radii inside and not beyond the wall: doubled while inside, then halved in between."""
    near, far = np.zeros_like(wall), np.minimum(wall, first)
    for _ in range(60):
        growing = inside(far) & (far < wall)
        if not growing.any():
            break
        near, far = np.where(growing, far, near), np.where(growing, np.minimum(2 * far, wall), far)
    for _ in range(36):
        middle = (near + far) / 2
        within = inside(middle)
        near, far = np.where(within, middle, near), np.where(within, far, middle)
    return near


def _rays(centres: Array, x: Array, form: str) -> Array:
    """(P, 2, rays) directions of (floor, scale), scaled so that a unit changes the log residuals by one in length."""
    model = centres[:, :1] + centres[:, 1:2] * x
    jacobian = np.stack([np.ones_like(x), x], -1) / model[..., None]
    if form == PURE:
        unit = 1 / np.sqrt((jacobian[..., 1] ** 2).sum(-1))
        return np.stack([np.zeros((len(unit), 2)), np.stack([unit, -unit], 1)], 1)
    angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    lower = np.linalg.cholesky(np.swapaxes(jacobian, 1, 2) @ jacobian)
    return np.linalg.solve(
        np.swapaxes(lower, 1, 2), np.stack([np.cos(angles), np.sin(angles)])[None]
    )
