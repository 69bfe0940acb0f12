"""IsoFLOP valleys: at each budget a parabola of the loss in ln N, its minimum, and how the minima move with compute.

Approach 2 of Hoffmann et al. 2022 (arXiv 2203.15556), least squares on the raw loss, as nanochat publishes it. Its bias
grows with the width of the grid (Open-Athena 2026, arXiv 2603.22339), hence the local window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from slm.fits.intervals import Interval, allowance, crossing
from slm.fits.points import Point

Array = NDArray[np.float64]

WINDOW = 12.0
"""Sizes further than this factor from the lowest loss are left out: nanochat's grid, 10 wide, stays whole."""
SIZES = 4
"""Different sizes that a parabola and its interval need."""


@dataclass(frozen=True)
class Parabola:
    """loss = a + b·v + c·v², v = ln N - centre, by least squares."""

    centre: float
    """Mean ln N."""
    coefficients: Array
    """(a, b, c) in the loss's unit."""
    covariance: Array
    """Inverse Gram matrix (3 × 3): covariance of the coefficients at unit noise."""
    level: float
    """Mean loss, of which noise is a share: it is alike in ln loss from budget to budget."""
    residual: float
    """Sum of squared residuals, as shares of the level."""
    free: int
    """Degrees of freedom, n - 3."""
    lowest: float
    """Smallest ln N in the window."""
    highest: float
    """Largest ln N in the window."""

    def at(self, size: Array | float) -> Array:
        """Loss at ln N."""
        return np.asarray(np.polyval(self.coefficients[::-1], np.asarray(size) - self.centre))

    @property
    def vertex(self) -> float:
        """ln N of the minimum."""
        _, b, c = self.coefficients
        return float(self.centre - b / (2 * c))

    def error_at(self, size: float) -> float:
        """Standard error of the loss at ln N = size, where the noise is the loss itself."""
        powers = np.array([1.0, size - self.centre, (size - self.centre) ** 2])
        return float(self.level * np.sqrt(powers @ self.covariance @ powers))

    @property
    def bends(self) -> tuple[float, ...]:
        """Centre, b, c, and what multiplies their variance: from them (b + 2·c·v)/sqrt(bb + 4·v·bc + 4·v²·cc).

        That is the signed square root of what `residual` rises by when the vertex is moved to v.
        """
        (_, b, c), g = self.coefficients, self.covariance
        return (
            self.centre,
            float(b) / self.level,
            float(c) / self.level,
            float(g[1, 1]),
            float(g[1, 2]),
            float(g[2, 2]),
        )

    def vertex_ends(self, rise: float) -> tuple[float | None, float | None]:
        """The ln N around the vertex to which it may be moved for this rise of `residual`; None is open.

        Fieller's quadratic.
        """
        (_, b, c), g = self.coefficients / self.level, self.covariance
        square, half, rest = (
            (c * c - rise * g[2, 2]) * 4,
            (b * c - rise * g[1, 2]) * 2,
            b * b - rise * g[1, 1],
        )
        root = float(np.sqrt(max(half * half - square * rest, 0.0)))
        left, right = sorted(
            (self.centre + (-half - root) / square, self.centre + (-half + root) / square)
        )
        if square > 0:
            return left, right
        if root == 0:
            return None, None
        return (right, None) if self.vertex > right else (None, left)


@dataclass(frozen=True)
class Minimum:
    """The compute-optimal model of one budget."""

    flops: float
    """C."""
    params: float
    """N."""
    tokens: float
    """D; of a valley read off the runs' tokens at N."""
    ratio: float
    """D/N; of a valley read off the runs' ratios at N, which as published differs a little from tokens / params."""
    loss: float
    """The parabola's or the surface's, bits per byte."""


@dataclass(frozen=True)
class Valley:
    """One budget."""

    budget: float
    """FLOPs asked for."""
    flops: float
    """FLOPs spent, geometric mean of the runs."""
    points: tuple[Point, ...]
    """Runs inside the window, by size."""
    left_out: tuple[Point, ...]
    """Runs outside the window."""
    code: str | None
    """None when resolved; else too_few_runs, wrong_curvature or vertex_outside."""
    reason: str | None
    """The code in words."""
    parabola: Parabola | None
    """None with too few sizes."""

    @property
    def minimum(self) -> Minimum | None:
        """The optimum at this budget, None when unresolved."""
        if self.code or self.parabola is None:
            return None
        vertex = self.parabola.vertex
        tokens = self.read(lambda point: point.tokens, vertex)
        ratio = self.read(lambda point: point.tokens / point.params, vertex)
        return Minimum(
            self.flops, float(np.exp(vertex)), tokens, ratio, float(self.parabola.at(vertex))
        )

    def read(self, quantity: Callable[[Point], float], size: float) -> float:
        """A quantity of the runs at ln N = size, linear in ln N. Not C/(6·N): FLOPs per token vary with the size."""
        return float(np.interp(size, *self._by_size(quantity)))

    def size_of_tokens(self) -> Callable[[float], float]:
        """ln D -> ln N at this budget: what `read` inverts, straight in logarithms beyond the sizes."""
        sizes, tokens = self._by_size(lambda point: point.tokens)
        fine = np.linspace(sizes[0], sizes[-1], 400)
        log_tokens = np.log(np.interp(fine, sizes, tokens))
        slope = (log_tokens[-1] - log_tokens[0]) / (fine[-1] - fine[0])
        fine = np.concatenate([[fine[0] - 50], fine, [fine[-1] + 50]])
        log_tokens = np.concatenate(
            [[log_tokens[0] - 50 * slope], log_tokens, [log_tokens[-1] + 50 * slope]]
        )
        return lambda u: float(np.interp(u, log_tokens[::-1], fine[::-1]))

    def _by_size(self, quantity: Callable[[Point], float]) -> tuple[Array, Array]:
        sizes = sorted({point.params for point in self.points})
        values = [
            np.mean([quantity(point) for point in self.points if point.params == size])
            for size in sizes
        ]
        return np.log(sizes), np.array(values)


@dataclass(frozen=True)
class IsoFlop:
    """All valleys of one recipe, their noise pooled, and the exponents of their minima."""

    valleys: tuple[Valley, ...]
    """By budget."""
    noise: float | None
    """Standard deviation of ln loss around the parabolas, all budgets together."""
    free: int
    """Degrees of freedom of the noise."""
    params_exponent: Interval | None
    """a of N*(C) ∝ C^a; None with fewer than two resolved budgets."""
    tokens_exponent: Interval | None
    """b of D*(C) ∝ C^b. N·D is not C/6, so a + b need not be 1."""

    @property
    def minima(self) -> list[Minimum]:
        """Of the resolved budgets."""
        return minima_of(self.valleys)

    def interval(self, valley: Valley) -> Interval:
        """N of the minimum: the profile of the joint sum of squares of all valleys."""
        best = valley.minimum
        if best is None or valley.parabola is None or self.noise is None:
            return Interval(None)
        low, high = (
            None if end is None or abs(end) > 600 else float(np.exp(end))
            for end in self._ends(valley)
        )
        return Interval(best.params, low, high, low is not None and high is not None)

    def intervals(self, valley: Valley) -> dict[str, Interval]:
        """Of the minimum's params, tokens, ratio and loss.

        Tokens and ratio are read off the runs at the ends of N, so they end where the sizes do; the loss has the
        standard error of the parabola at its vertex, to which the vertex's own adds nothing.
        """
        best = valley.minimum
        names = ("params", "tokens", "ratio", "loss")
        if best is None or valley.parabola is None or self.noise is None:
            return {name: Interval(None) for name in names}
        lower, upper = (self._within(valley, end) for end in self._ends(valley))
        read = {
            "tokens": (best.tokens, lambda point: point.tokens),
            "ratio": (best.ratio, lambda point: point.tokens / point.params),
        }
        found = {"params": self.interval(valley)}
        for name, (value, quantity) in read.items():  # both fall with N
            high, low = (
                None if end is None else valley.read(quantity, end) for end in (lower, upper)
            )
            found[name] = Interval(value, low, high, low is not None and high is not None)
        reach = (
            self.noise
            * valley.parabola.error_at(valley.parabola.vertex)
            * float(np.sqrt(self._rise))
        )
        return found | {"loss": Interval(best.loss, best.loss - reach, best.loss + reach, True)}

    @property
    def _rise(self) -> float:
        """What the sum of squares may rise by, in units of the noise's variance."""
        return self.free * (allowance(self.free) - 1)

    def _ends(self, valley: Valley) -> tuple[float | None, float | None]:
        assert valley.parabola is not None
        assert self.noise is not None
        return valley.parabola.vertex_ends(self.noise**2 * self._rise)

    def _within(self, valley: Valley, end: float | None) -> float | None:
        assert valley.parabola is not None
        return (
            end
            if end is not None and valley.parabola.lowest <= end <= valley.parabola.highest
            else None
        )

    def document(self) -> dict[str, Any]:
        """As JSON."""
        exponents = {
            "params_exponent": self.params_exponent,
            "tokens_exponent": self.tokens_exponent,
        }
        return {
            **{name: own.document() if own else None for name, own in exponents.items()},
            "noise": self.noise,
            "optima": [self._optimum(valley) for valley in self.valleys],
        }

    def _optimum(self, valley: Valley) -> dict[str, Any]:
        intervals = self.intervals(valley)
        return {
            "budget": valley.budget,
            **{name: own.estimate for name, own in intervals.items()},
            "status": "ok" if valley.minimum else "unresolved",
            "reason": valley.reason,
            "intervals": {name: own.document() for name, own in intervals.items()}
            if valley.minimum
            else None,
        }


def fit_isoflop(points: Sequence[Point]) -> IsoFlop | None:
    """Valleys of the runs that have a budget; None when there are none.

    Noise is one value for all budgets (four sizes alone leave one degree of freedom). An exponent is the slope of the
    least-squares line through the minima in logarithms, its interval the profile over all valleys at once: it carries
    the minima's own uncertainty, so two budgets already have one; how far the minima are from a line is not in it.
    """
    valleys = fit_valleys(points)
    if not valleys:
        return None
    fitted = [valley.parabola for valley in valleys if valley.parabola is not None]
    residual, free = (
        sum(parabola.residual for parabola in fitted),
        sum(parabola.free for parabola in fitted),
    )
    resolved = [valley for valley in valleys if valley.code is None]
    exponents: list[Interval | None] = [None, None]
    if len(resolved) >= 2:
        exponents = [
            _exponent(resolved, [lambda u: u for _ in resolved], residual, free),
            _exponent(resolved, [valley.size_of_tokens() for valley in resolved], residual, free),
        ]
    return IsoFlop(valleys, float(np.sqrt(residual / free)) if free else None, free, *exponents)


def minima_of(valleys: Sequence[Valley]) -> list[Minimum]:
    """Of the resolved ones."""
    return [valley.minimum for valley in valleys if valley.minimum]


def fit_valleys(points: Sequence[Point]) -> tuple[Valley, ...]:
    """Every budget alone, by budget."""
    budgets = sorted({point.budget for point in points if point.budget is not None})
    return tuple(
        _valley(budget, [point for point in points if point.budget == budget]) for budget in budgets
    )


def _valley(budget: float, points: list[Point]) -> Valley:
    centre = min(points, key=lambda point: (point.loss, point.params)).params
    near = [point for point in points if 1 / WINDOW <= point.params / centre <= WINDOW]
    inside = tuple(sorted(near, key=lambda point: (point.params, point.run_id)))
    outside = tuple(point for point in points if point not in inside)
    flops = float(np.exp(np.mean([np.log(point.flops) for point in points])))
    parabola = _parabola(inside) if len({point.params for point in inside}) >= SIZES else None
    return Valley(budget, flops, inside, outside, *_verdict(inside, parabola), parabola)


def _parabola(points: Sequence[Point]) -> Parabola:
    sizes, losses = (
        np.log([point.params for point in points]),
        np.array([point.loss for point in points]),
    )
    centre = float(sizes.mean())
    design = np.vander(sizes - centre, 3, increasing=True)
    coefficients: Array = np.linalg.lstsq(design, losses)[0]
    level = float(losses.mean())
    residual = float(((losses - design @ coefficients) ** 2).sum()) / level**2
    return Parabola(
        centre,
        coefficients,
        np.asarray(np.linalg.inv(design.T @ design), float),
        level,
        residual,
        len(points) - 3,
        float(sizes.min()),
        float(sizes.max()),
    )


def _verdict(points: Sequence[Point], parabola: Parabola | None) -> tuple[str | None, str | None]:
    sizes = {point.params for point in points}
    if parabola is None:
        return "too_few_runs", f"{len(sizes)} different sizes where a parabola needs {SIZES}"
    if parabola.coefficients[2] <= 0:
        return "wrong_curvature", "the loss does not curve upwards in size: there is no minimum"
    if parabola.vertex > parabola.highest:
        return (
            "vertex_outside",
            f"the minimum lies beyond the largest size run, {max(sizes):.3g}: run larger ones",
        )
    if parabola.vertex < parabola.lowest:
        return (
            "vertex_outside",
            f"the minimum lies below the smallest size run, {min(sizes):.3g}: run smaller ones",
        )
    return None, None


def _exponent(
    valleys: Sequence[Valley], sizes: Sequence[Callable[[float], float]], residual: float, free: int
) -> Interval:
    """Slope over ln C of the straight line through the minima u_k, with `sizes[k]` taking u to ln N at budget k."""
    compute = np.log([valley.flops for valley in valleys])
    compute -= compute.mean()
    parabolas = [valley.parabola for valley in valleys if valley.parabola is not None]
    minima = np.array([_inverse(size, parabola.vertex) for size, parabola in zip(sizes, parabolas)])
    weights = compute / (compute @ compute)
    estimate = float(weights @ minima)
    # Moving the minima along `compute` sets the slope; every move across it leaves the slope and is profiled out.
    across = np.linalg.svd(weights[None, :])[2][1:]
    scale = np.sqrt(residual / free) + 1e-12
    limit = (residual / scale**2 + 1e-9) * (allowance(free) - 1)

    centre, b, c, bb, bc, cc = np.array([own.bends for own in parabolas]).T

    def rise(slope: float) -> float:
        moved = minima + (slope - estimate) * compute

        def misfits(theta: Array) -> Array:
            v = np.array([size(u) for size, u in zip(sizes, moved + theta @ across)]) - centre
            return np.asarray((b + 2 * c * v) / np.sqrt(bb + 4 * v * bc + 4 * v * v * cc) / scale)

        return float(
            2
            * optimize.least_squares(
                misfits, np.zeros(len(across)), method="lm", ftol=1e-7, max_nfev=500
            ).cost
            - limit
        )

    low, high = (
        crossing(rise, estimate, estimate - 5, 0.05),
        crossing(rise, estimate, estimate + 5, 0.05),
    )
    return Interval(estimate, low, high, low is not None and high is not None)


def _inverse(size: Callable[[float], float], vertex: float) -> float:
    """u whose ln N is the vertex."""
    return float(optimize.brentq(lambda u: size(u) - vertex, -100, 200))
