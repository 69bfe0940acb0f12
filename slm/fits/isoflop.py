"""IsoFLOP curves: loss over ln N at each budget, parabolas, and their minima over compute.

Approach 2 of Hoffmann et al. 2022 (arXiv 2203.15556), least squares on the raw loss, as nanochat
publishes it. Its bias grows with the width of the grid (Open-Athena 2026, arXiv 2603.22339), hence
the window around the lowest loss.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize

from slm.fits.intervals import Ends, Interval, allowance, crossing, exponential_end
from slm.fits.points import Point
from slm.fits.types import Array, to_json

WINDOW = 12.0
"""Largest factor in N from the lowest loss; nanochat's grid, 10 wide, stays whole."""
MIN_SIZES = 4
"""Distinct sizes that a parabola and its interval need."""

Quantity = Callable[[Point], float]
"""A number read off a run."""
SizeOf = Callable[[float], float]
"""ln N of a budget as a function of ln N or ln D."""


@dataclass(frozen=True)
class Parabola:
    """Least-squares parabola loss = a + b·v + c·v², v = ln N - centre."""

    centre: float
    """Mean ln N."""
    coefficients: Array
    """(a, b, c) in the unit of the loss."""
    covariance: Array
    """(3, 3) inverse Gram matrix: covariance of the coefficients at unit noise."""
    level: float
    """Mean loss. Noise is a share of it, since it is alike in ln loss from budget to budget."""
    residual: float
    """Sum of squared residuals, as shares of the level."""
    free: int
    """Degrees of freedom, n - 3."""
    lowest: float
    """Smallest ln N in the window."""
    highest: float
    """Largest ln N in the window."""

    def at(self, size: Array | float) -> Array:
        """Return the loss at ln N."""
        a, b, c = self.coefficients
        v = np.asarray(size) - self.centre
        return a + v * (b + v * c)

    @property
    def vertex(self) -> float:
        """ln N of the minimum."""
        _, b, c = self.coefficients
        return self.centre - b / (2 * c)

    def error_at(self, size: float) -> float:
        """Return the standard error of the loss at ln N for noise of the size of the loss."""
        v = size - self.centre
        powers = np.array([1.0, v, v**2])
        return self.level * np.sqrt(powers @ self.covariance @ powers)

    def vertex_ends(self, rise: float) -> Ends:
        """Return the ln N to which the vertex can move while `residual` rises by `rise`.

        Roots of Fieller's quadratic; None for an open end.
        """
        _, b, c = self.coefficients / self.level
        _, (_, bb, bc), (_, _, cc) = self.covariance
        square = (c * c - rise * cc) * 4
        half = (b * c - rise * bc) * 2
        rest = b * b - rise * bb
        root = np.sqrt(max(half * half - square * rest, 0.0))
        roots = np.array([-half - root, -half + root]) / square
        first, second = sorted((self.centre + roots).tolist())
        if square > 0:
            return first, second
        if root == 0:
            return None, None
        return (second, None) if self.vertex > second else (None, first)


@dataclass(frozen=True)
class Minimum:
    """The compute-optimal model of one budget."""

    flops: float
    """C."""
    params: float
    """N."""
    tokens: float
    """D; on an isoFLOP curve, interpolated between the runs at N."""
    ratio: float
    """D/N; on an isoFLOP curve interpolated too, as published, so not quite tokens / params."""
    loss: float
    """Loss of the parabola or surface, bits per byte."""


@dataclass(frozen=True)
class IsoFlopCurve:
    """Loss against N at one budget."""

    budget: float
    """Requested FLOPs."""
    flops: float
    """Actual FLOPs, geometric mean of the runs."""
    points: tuple[Point, ...]
    """Runs inside the window, by size."""
    left_out: tuple[Point, ...]
    """Runs outside the window."""
    code: str | None
    """None if resolved, else too_few_runs, wrong_curvature or vertex_outside."""
    reason: str | None
    """Sentence for the code."""
    parabola: Parabola | None
    """None with too few sizes."""

    @property
    def minimum(self) -> Minimum | None:
        """Optimum at this budget; None if unresolved."""
        if self.code or self.parabola is None:
            return None
        vertex = self.parabola.vertex
        return Minimum(
            flops=self.flops,
            params=np.exp(vertex),
            tokens=self.read(_tokens, vertex),
            ratio=self.read(_ratio, vertex),
            loss=float(self.parabola.at(vertex)),
        )

    def read(self, quantity: Quantity, size: float) -> float:
        """Interpolate a quantity of the runs at ln N, linearly in ln N.

        D is read thus instead of C/(6·N), because FLOPs per token vary with the size.
        """
        return np.interp(size, *self._by_size(quantity))

    def size_at_tokens(self) -> SizeOf:
        """Return the function ln D -> ln N at this budget, linear beyond the runs."""
        sizes, tokens = self._by_size(_tokens)
        smallest, largest = sizes[[0, -1]]
        fine = np.linspace(smallest, largest, 400)
        log_tokens = np.log(np.interp(fine, sizes, tokens))
        first, last = log_tokens[[0, -1]]
        rise = 50 * ((last - first) / (largest - smallest))
        fine = np.concatenate([[smallest - 50], fine, [largest + 50]])
        log_tokens = np.concatenate([[first - rise], log_tokens, [last + rise]])
        return lambda u: float(np.interp(u, log_tokens[::-1], fine[::-1]))

    def _by_size(self, quantity: Quantity) -> tuple[Array, Array]:
        """Return ln N, ascending, and the mean of the quantity at each."""
        groups: dict[float, list[float]] = defaultdict(list)
        for point in self.points:
            groups[point.params].append(quantity(point))
        means = [np.mean(values) for values in groups.values()]
        return np.log(list(groups)), np.array(means)


def _tokens(point: Point) -> float:
    return point.tokens


def _ratio(point: Point) -> float:
    return point.tokens / point.params


@dataclass(frozen=True)
class IsoFlopFit:
    """IsoFLOP curves of one recipe, their pooled noise, and the exponents of their minima."""

    curves: tuple[IsoFlopCurve, ...]
    """Curves, sorted by budget."""
    noise: float | None
    """Standard deviation of ln loss around the parabolas, pooled over budgets."""
    free: int
    """Degrees of freedom of the noise."""
    params_exponent: Interval | None
    """a of N*(C) ∝ C^a; None with fewer than two resolved budgets."""
    tokens_exponent: Interval | None
    """b of D*(C) ∝ C^b. N·D is not C/6, so a + b need not be 1."""

    @property
    def minima(self) -> list[Minimum]:
        """Minima of the resolved budgets."""
        return minima_of(self.curves)

    def intervals(self, curve: IsoFlopCurve) -> dict[str, Interval]:
        """Return params, tokens, ratio and loss of the minimum.

        N has the profile of the joint sum of squares of all curves. Tokens and ratio are read off
        the runs at the ends of N, so they are open beyond the sizes. The loss has the standard
        error of the parabola at its vertex; that of the vertex adds none.
        """
        best, parabola = curve.minimum, curve.parabola
        if best is None or parabola is None or self.noise is None:
            return {name: Interval(None) for name in ("params", "tokens", "ratio", "loss")}
        rise = self.free * (allowance(self.free) - 1)  # in units of the noise's variance
        low, high = parabola.vertex_ends(self.noise**2 * rise)

        def read(quantity: Quantity, end: float | None) -> float | None:
            if end is None or not parabola.lowest <= end <= parabola.highest:
                return None
            return curve.read(quantity, end)

        half = self.noise * parabola.error_at(parabola.vertex) * np.sqrt(rise)
        ends = (exponential_end(low), exponential_end(high))
        tokens = (read(_tokens, high), read(_tokens, low))
        ratios = (read(_ratio, high), read(_ratio, low))
        return {
            "params": Interval.of_ends(best.params, *ends),
            "tokens": Interval.of_ends(best.tokens, *tokens),  # which fall with N
            "ratio": Interval.of_ends(best.ratio, *ratios),
            "loss": Interval(best.loss, best.loss - half, best.loss + half, True),
        }

    def document(self) -> dict[str, Any]:
        """Return the JSON document."""
        return to_json(
            {
                "params_exponent": self.params_exponent,
                "tokens_exponent": self.tokens_exponent,
                "noise": self.noise,
                "optima": [self._optimum(curve) for curve in self.curves],
            }
        )

    def _optimum(self, curve: IsoFlopCurve) -> dict[str, Any]:
        intervals = self.intervals(curve)
        return {
            "budget": curve.budget,
            **{name: interval.estimate for name, interval in intervals.items()},
            "status": "ok" if curve.minimum else "unresolved",
            "reason": curve.reason,
            "intervals": intervals if curve.minimum else None,
        }


def fit_isoflop(points: Sequence[Point]) -> IsoFlopFit | None:
    """Fit the isoFLOP curves of the runs that have a budget; None if there are none.

    Noise is pooled over budgets, because four sizes alone leave one degree of freedom. An exponent
    is the slope of the least-squares line through the minima in logarithms, and its interval the
    profile over all curves at once: it carries the uncertainty of the minima, so two budgets have
    one already, but not the distance of the minima from a line.
    """
    curves = fit_isoflop_curves(points)
    if not curves:
        return None
    parabolas = [curve.parabola for curve in curves if curve.parabola is not None]
    residual = sum(parabola.residual for parabola in parabolas)
    free = sum(parabola.free for parabola in parabolas)
    noise = np.sqrt(residual / free) if free else None
    resolved = [curve for curve in curves if curve.code is None]
    if len(resolved) < 2:
        return IsoFlopFit(curves, noise, free, None, None)
    at_sizes: list[SizeOf] = [lambda size: size] * len(resolved)
    at_tokens = [curve.size_at_tokens() for curve in resolved]
    return IsoFlopFit(
        curves=curves,
        noise=noise,
        free=free,
        params_exponent=_exponent(resolved, at_sizes, residual, free),
        tokens_exponent=_exponent(resolved, at_tokens, residual, free),
    )


def minima_of(curves: Sequence[IsoFlopCurve]) -> list[Minimum]:
    """Return the minima of the resolved curves."""
    return [curve.minimum for curve in curves if curve.minimum]


def fit_isoflop_curves(points: Sequence[Point]) -> tuple[IsoFlopCurve, ...]:
    """Fit the curve of every budget by itself, by budget."""
    groups: dict[float, list[Point]] = defaultdict(list)
    for point in points:
        if point.budget is not None:
            groups[point.budget].append(point)
    return tuple(_curve(budget, groups[budget]) for budget in sorted(groups))


def _curve(budget: float, points: list[Point]) -> IsoFlopCurve:
    centre = min(points, key=lambda point: (point.loss, point.params)).params
    window = [point for point in points if 1 / WINDOW <= point.params / centre <= WINDOW]
    window.sort(key=lambda point: (point.params, point.run_id))
    outside = tuple(point for point in points if point not in window)
    flops = np.exp(np.log([point.flops for point in points]).mean())
    sizes = len({point.params for point in window})
    parabola = _parabola(window) if sizes >= MIN_SIZES else None
    code, reason = _unresolved(sizes, parabola)
    return IsoFlopCurve(budget, flops, tuple(window), outside, code, reason, parabola)


def _parabola(points: Sequence[Point]) -> Parabola:
    sizes = np.log([point.params for point in points])
    losses = np.array([point.loss for point in points])
    centre = sizes.mean()
    design = np.vander(sizes - centre, 3, increasing=True)
    coefficients: Array = np.linalg.lstsq(design, losses)[0]
    squares = (losses - design @ coefficients) ** 2
    level = losses.mean()
    return Parabola(
        centre=centre,
        coefficients=coefficients,
        covariance=np.linalg.inv(design.T @ design),
        level=level,
        residual=squares.sum() / level**2,
        free=len(points) - 3,
        lowest=sizes.min(),
        highest=sizes.max(),
    )


def _unresolved(sizes: int, parabola: Parabola | None) -> tuple[str | None, str | None]:
    """Return code and reason of a parabola without a minimum among the runs; None if it has one."""
    if parabola is None:
        return "too_few_runs", f"{sizes} different sizes where a parabola needs {MIN_SIZES}"
    if parabola.coefficients[2] <= 0:
        return "wrong_curvature", "the loss does not curve upwards in size: there is no minimum"
    smallest, largest = np.exp([parabola.lowest, parabola.highest])
    reason = None
    if parabola.vertex > parabola.highest:
        reason = f"the minimum lies beyond the largest size, {largest:.3g}: run larger ones"
    if parabola.vertex < parabola.lowest:
        reason = f"the minimum lies below the smallest size, {smallest:.3g}: run smaller ones"
    return "vertex_outside" if reason else None, reason


def _exponent(
    curves: Sequence[IsoFlopCurve], sizes: Sequence[SizeOf], residual: float, free: int
) -> Interval:
    """Return the slope over ln C of the line through the minima u_k, with its profile interval.

    `sizes[k]` maps u to ln N at budget k.
    """
    # 1) the least-squares slope is weights·u
    compute = np.log([curve.flops for curve in curves])
    compute -= compute.mean()
    parabolas = [curve.parabola for curve in curves if curve.parabola is not None]
    vertices = [parabola.vertex for parabola in parabolas]
    minima = np.array(list(map(_inverse, sizes, vertices)))
    weights = compute / (compute @ compute)
    estimate = weights @ minima
    # 2) moving the minima along `compute` sets the slope; moves across it are profiled out
    across = np.linalg.svd(weights[None, :])[2][1:]
    scale = np.sqrt(residual / free) + 1e-12
    limit = (residual / scale**2 + 1e-9) * (allowance(free) - 1)
    # 3) the rise of a parabola's residual when its vertex moves to v is a square in closed form
    centre = np.array([parabola.centre for parabola in parabolas])
    b, c = np.array([parabola.coefficients[1:] / parabola.level for parabola in parabolas]).T
    covariance = np.array([parabola.covariance for parabola in parabolas])
    bb = covariance[:, 1, 1]
    bc = covariance[:, 1, 2]
    cc = covariance[:, 2, 2]

    def excess(slope: float) -> float:
        moved = minima + (slope - estimate) * compute

        def misfits(theta: Array) -> Array:
            at = moved + theta @ across
            v = np.array([size(u) for size, u in zip(sizes, at)]) - centre
            errors = np.sqrt(bb + 4 * v * bc + 4 * v * v * cc)
            return (b + 2 * c * v) / errors / scale

        start = np.zeros(len(across))
        best = optimize.least_squares(misfits, start, method="lm", ftol=1e-7, max_nfev=500)
        return 2 * best.cost - limit

    low = crossing(excess, estimate, estimate - 5, 0.05)
    high = crossing(excess, estimate, estimate + 5, 0.05)
    return Interval.of_ends(estimate, low, high)


def _inverse(size: SizeOf, vertex: float) -> float:
    """Return the u whose ln N is the vertex."""
    return optimize.brentq(lambda u: size(u) - vertex, -100, 200)
