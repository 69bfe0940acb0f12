"""Surface L(N, D) = E + (A·N^-alpha + B·D^-beta)^gamma of all runs, and its compute-optimal models.

The additive form, gamma = 1, is approach 3 of Hoffmann et al. 2022 (arXiv 2203.15556); the coupled
form leaves gamma free. The objective is the sum of Huber losses of the log residuals, with
delta = 1.345·sigma or as passed (the paper's 1e-3). The linear part is solved at each (alpha, beta)
of a grid, the best cell of each block is a start of the batch, and the best result is polished. For
any gamma, N*(C) = G·(C/kappa)^(beta/(alpha+beta)) with G = (alpha·A/(beta·B))^(1/(alpha+beta)) and
kappa = FLOPs/(N·D).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from slm.fits.intervals import LEVEL, Ends, Interval, allowance, crossing, exponential_end
from slm.fits.isoflop import Minimum
from slm.fits.optimize import (
    EXPONENT,
    GAMMA,
    Centre,
    LossData,
    levenberg_marquardt,
    polish,
    predict,
    solve_each,
)
from slm.fits.points import Point
from slm.fits.power_law import (
    LEAST_SQUARES,
    ROUNDING,
    Noise,
    mad_noise,
    root_mean_square,
    seed_noise,
)
from slm.fits.types import Array, to_json

FORMS = {"additive": 5, "coupled": 6}
"""Number of parameters by form."""
PAPER = 1e-3
"""delta of Hoffmann et al. 2022."""
ONE_DIAL_WIDTH = 0.05
"""Root mean square distance from one curve in (ln N, ln D) below which runs move along one dial."""
BLOCKS = 4
CELLS = 6
"""The grid of exponents has BLOCKS × BLOCKS blocks of CELLS × CELLS; each block gives a start."""
TEMPERATURES = (0.3, 0.7, 1.5)
"""Starts of gamma for the coupled form."""
QUANTITIES: dict[str, tuple[float, float]] = {
    "E": (-np.inf, np.inf),
    "A": (-50.0, 250.0),
    "B": (-50.0, 250.0),
    "alpha": (EXPONENT[0], EXPONENT[1] / GAMMA[0]),
    "beta": (EXPONENT[0], EXPONENT[1] / GAMMA[0]),
    "gamma": GAMMA,
    "params_exponent": (0.01, 0.99),
}
"""Quantities that have an interval, and the bounds of the search; A and B as logarithms."""
SEARCH_REACH = 5.0
"""Distance from the best ln N within which the end of its interval is searched."""
PROFILE_ROUNDS = 14
"""Evaluations of a profile."""
STRAIGHT_UP_TO = 3.0
"""Root of the excess over that of the limit, up to which it counts as straight in the quantity."""


@dataclass(frozen=True)
class Surface:
    """A fitted form."""

    form: str
    """`additive` or `coupled`."""
    row: Array
    """(e, a, b, p, q, gamma) as in `slm.fits.optimize`."""
    centre: Centre
    """Means of ln N and ln D, the origin of the row."""
    kappa: float
    """FLOPs/(N·D), geometric mean of the runs; 6 by the usual rule."""
    intervals: dict[str, Interval]
    """Profile-likelihood intervals of QUANTITIES; one that the runs do not hold has no estimate."""
    objective: float
    """Weighted sum of Huber losses of the residuals."""
    noise: Noise
    """Noise that set delta, unless that was passed."""
    delta: float
    """Threshold of the Huber loss; infinite for least squares."""
    raw: bool
    """Whether residuals are of the loss itself instead of its logarithm."""
    starts_agreeing: float
    """Share of the starts that end within 1e-6 of the best objective."""
    status: str
    """Status of the optimiser."""
    residual_rms: float
    """Root mean square log residual."""
    n: int
    """Number of runs."""
    hessian: Array
    """JᵀWJ at the row, over the parameters of the form."""

    @property
    def free(self) -> int:
        """Degrees of freedom."""
        return self.n - FORMS[self.form]

    @property
    def limit(self) -> float:
        """Objective up to which a row is inside the 95 % region."""
        return (self.objective + self.n * ROUNDING**2) * allowance(self.free)

    @property
    def exponents(self) -> tuple[float, float]:
        """Best alpha and beta, whether or not the runs hold them."""
        p, q, gamma = self.row[3:].tolist()
        return p / gamma, q / gamma

    @property
    def unidentified(self) -> list[str]:
        """Exponents whose intervals lack an end."""
        names = ("alpha", "beta", "gamma", "params_exponent")
        return [name for name in names if not self.intervals[name].identifiable]

    def loss(self, params: Array | float, tokens: Array | float) -> Array:
        """Return the loss at N and D of one shape."""
        losses, _ = predict(self.row, *self._centred(params, tokens))
        return losses

    def optimum(self, flops: float) -> Minimum:
        """Return the compute-optimal model at C."""
        _, a, b, *_, gamma = self.row
        alpha, beta = self.exponents
        product = np.log(flops / self.kappa)
        log_ratio = (a - b) / gamma + alpha * self.centre[0] - beta * self.centre[1]
        size = (np.log(alpha / beta) + log_ratio + beta * product) / (alpha + beta)
        params = float(np.exp(size))
        tokens = float(np.exp(product - size))
        return Minimum(
            flops=flops,
            params=params,
            tokens=tokens,
            ratio=tokens / params,
            loss=float(self.loss(params, tokens)),
        )

    def prediction(self, params: float, tokens: float) -> Interval:
        """Predict the loss of a further run at N and D.

        The interval is y ± t·sqrt(g'Vg + sigma²) in ln loss, V from the curvature of the objective.
        """
        data = LossData.unmeasured(*self._centred([params], [tokens]))
        (prediction,) = predict_runs(data, self.row, self.hessian, self.objective, self.free, LEVEL)
        return prediction

    def _centred(self, params: ArrayLike, tokens: ArrayLike) -> tuple[Array, Array]:
        """Return ln N and ln D from the means of the runs."""
        return np.log(params) - self.centre[0], np.log(tokens) - self.centre[1]

    def document(self) -> dict[str, Any]:
        """Return the JSON document."""
        not_held = self.unidentified
        identified = not not_held
        return {
            "form": self.form,
            **to_json(self.intervals),
            "n": self.n,
            "kappa": self.kappa,
            "objective": self.objective,
            "delta": to_json(self.delta),
            "sigma": self.noise.sigma,
            "sigma_from": self.noise.source,
            "starts_agreeing": self.starts_agreeing,
            "status": self.status,
            "residual_rms": self.residual_rms,
            "identifiable": identified,
            "identifiability": {"identified": identified, "not_held": not_held},
        }


def obstacle(points: Sequence[Point]) -> tuple[str, str] | None:
    """Return why the runs cannot hold a surface, as a code and a sentence; None if they may."""
    sizes = len({point.params for point in points})
    tokens = len({point.tokens for point in points})
    if min(sizes, tokens) > 1 and _width(points) < ONE_DIAL_WIDTH:
        message = (
            "parameters and tokens move along one dial, so their exponents cannot be told apart"
        )
        return "one_dial_no_exponents", message
    if min(sizes, tokens) < 3 or len(points) <= FORMS["additive"] + 1:
        message = (
            f"{len(points)} runs of {sizes} sizes on {tokens} token counts; "
            f"a surface takes {FORMS['additive'] + 2} runs, with 3 of each"
        )
        return "too_few_runs_for_surface", message
    return None


def _width(points: Sequence[Point]) -> float:
    """Return the root mean square distance of the runs in (ln N, ln D) from a parabola.

    For few runs, from a straight line.
    """
    positions = np.log([[point.params, point.tokens] for point in points])
    positions -= positions.mean(0)
    _, _, axes = np.linalg.svd(positions, full_matrices=False)
    along, across = (positions @ axes.T).T
    terms = 3 if len(points) > FORMS["additive"] + 1 else 2
    design = np.vander(along / np.abs(along).max(), terms)
    coefficients, *_ = np.linalg.lstsq(design, across)
    return root_mean_square(across - design @ coefficients)


def fit_surface(
    points: Sequence[Point],
    form: str = "additive",
    delta: float | None = None,
    raw: bool = False,
    noise: Noise | None = None,
) -> Surface:
    """Fit one form to the runs.

    `delta` is the threshold of the Huber loss, by default 1.345·sigma of `noise`, which defaults to
    that of replicate seeds or of the residuals. `raw` takes residuals of the loss itself. Raises
    ValueError for an unknown form and for runs that cannot hold it.
    """
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; known are {', '.join(FORMS)}")
    problem = obstacle(points)
    if problem:
        raise ValueError(problem[1])
    if len(points) <= FORMS[form]:
        raise ValueError(f"{len(points)} runs; {form} takes {FORMS[form] + 1}")
    noise = noise or noise_around(points)
    data = loss_data(points, noise.delta if delta is None else delta, raw)
    row, objective, agreeing, status = fit_row(data, form)
    predicted, _ = predict(row, data.n, data.d)
    log_kappas = [np.log(point.flops / point.params / point.tokens) for point in points]
    surface = Surface(
        form=form,
        row=row,
        centre=data.centre,
        kappa=np.exp(np.mean(log_kappas)),
        intervals={},
        objective=objective,
        noise=noise,
        delta=data.delta,
        raw=raw,
        starts_agreeing=agreeing,
        status=status,
        residual_rms=root_mean_square(np.log(predicted / data.losses)),
        n=len(points),
        hessian=data.hessian(row, range(FORMS[form])),
    )
    return replace(surface, intervals=_intervals(data, surface))


def predict_runs(
    data: LossData, row: Array, hessian: Array, objective: float, free: int, level: float
) -> list[Interval]:
    """Predict further runs at the N and D of `data`.

    `hessian` is JᵀWJ of the fitted runs, `objective` and `free` their objective and degrees of
    freedom.
    """
    losses, _ = predict(row, data.n, data.d)
    _, (jacobian,) = data.residuals(row[None])
    slopes = jacobian[: len(hessian)]
    errors = (slopes * np.linalg.solve(_ridged(hessian), slopes)).sum(0)
    variance = 2 * objective / free * (1 + errors)
    quantile = stats.t.ppf((1 + level) / 2, free)
    reach = np.exp(quantile * np.sqrt(variance))
    ends = np.column_stack([losses, losses / reach, losses * reach])
    return [Interval(loss, low, high, True) for loss, low, high in ends.tolist()]


def loss_data(points: Sequence[Point], delta: float, raw: bool = False) -> LossData:
    """Return the runs with their logarithms centred."""
    n = np.log([point.params for point in points])
    d = np.log([point.tokens for point in points])
    centre = (n.mean(), d.mean())
    return LossData(
        n=n - centre[0],
        d=d - centre[1],
        losses=np.array([point.loss for point in points]),
        weights=np.array([point.weight for point in points]),
        centre=centre,
        delta=delta,
        raw=raw,
    )


def noise_around(points: Sequence[Point]) -> Noise:
    """Return the noise of ln loss: of replicate seeds, else around the widest form the runs allow.

    The fit is by least squares, then with the delta of its residuals, against a few wild runs.
    """
    noise = seed_noise(points)
    if noise:
        return noise
    form = "coupled" if len(points) > FORMS["coupled"] + 1 else "additive"
    noise = LEAST_SQUARES
    for _ in range(2):
        data = loss_data(points, noise.delta)
        row, *_ = fit_row(data, form)
        residuals, _ = data.residuals(row[None])
        noise = mad_noise(residuals)
    return noise


def fit_row(data: LossData, form: str) -> tuple[Array, float, float, str]:
    """Return the best row, its objective, the share of starts that reach it, and the status."""
    starts = _starts(data)
    if form == "coupled":
        is_gamma = np.arange(6) == 5
        starts = np.concatenate([np.where(is_gamma, gamma, starts) for gamma in TEMPERATURES])
    columns = range(FORMS[form])
    rows, objectives = levenberg_marquardt(data, starts, columns)
    row, objective, status = polish(data, rows[objectives.argmin()], columns)
    rounding = data.weights.sum() * ROUNDING**2
    agreeing = objectives <= objective * (1 + 1e-6) + rounding
    return row, objective, agreeing.mean(), status


def refit_rows(surface: Surface, data: LossData, weights: Array) -> Array:
    """Return rows (R, 6) of the surface's form, refitted from its own with weights (R, m)."""
    data = replace(data, weights=weights)
    starts = np.tile(surface.row, (len(weights), 1))
    rows, _ = levenberg_marquardt(data, starts, range(FORMS[surface.form]))
    return rows


def _starts(data: LossData) -> Array:
    """Return the best cell of each block of the grid of exponents as a row: (BLOCKS², 6)."""
    # 1) solve the linear part (E, A, B) at every cell of the grid
    grid = np.geomspace(0.03, 2.0, BLOCKS * CELLS)
    p = np.repeat(grid, len(grid))[:, None]
    q = np.tile(grid, len(grid))[:, None]
    x = np.exp(-p * data.n)
    y = np.exp(-q * data.d)
    design = np.stack([np.ones_like(x), x, y], 1)
    linear = _linear(design / data.losses, data.weights)
    rows = np.column_stack([np.log(linear), p, q, np.ones(len(p))])
    # 2) take the best cell of each block
    predicted = linear[:, :1] + linear[:, 1:2] * x + linear[:, 2:] * y
    residuals = np.log(predicted / data.losses)
    objectives = data.objective(residuals, data.weights)
    cells = np.arange(len(rows)).reshape(BLOCKS, CELLS, BLOCKS, CELLS)
    by_block = cells.transpose(0, 2, 1, 3).reshape(BLOCKS**2, CELLS**2)
    best = objectives[by_block].argmin(1)
    return rows[by_block[np.arange(BLOCKS**2), best]]


def _linear(design: Array, weights: Array) -> Array:
    """Solve design·c = 1 by relative least squares, without a floor if that would be negative.

    `design` is (g, 3, m); the coefficients are (g, 3) and positive.
    """
    gram = (design * weights) @ design.mT
    diagonal = np.einsum("gkk->gk", gram)[:, :, None]
    gram = gram + 1e-10 * diagonal * np.eye(3)
    right = design @ weights
    with_floor = solve_each(gram, right)
    without_floor = np.zeros_like(with_floor)
    without_floor[:, 1:] = solve_each(gram[:, 1:, 1:], right[:, 1:])
    coefficients = np.where(with_floor[:, :1] > 0, with_floor, without_floor)
    return np.maximum(coefficients, 1e-3 / np.abs(design).max(2))


def _intervals(data: LossData, surface: Surface) -> dict[str, Interval]:
    """Return the profile-likelihood intervals of QUANTITIES, all ends searched in one batch."""
    names = [name for name in QUANTITIES if name != "gamma" or surface.form == "coupled"]
    best = quantities(surface.row[None], data.centre)
    intervals = {name: Interval(1.0, 1.0, 1.0, True) for name in QUANTITIES}
    for name, (low, high) in zip(names, _Profile(data, surface).ends(names)):
        value = float(best[name][0])
        lowest, highest = QUANTITIES[name]
        identified = low is not None and high is not None and lowest <= value <= highest
        estimate = value if identified or name == "E" else None
        if name in ("A", "B"):
            estimate, low, high = map(exponential_end, (estimate, low, high))
        if name == "E" and low is None:
            low = 0.0
        intervals[name] = Interval(estimate, low, high, identified)
    return intervals


def frontier(
    points: Sequence[Point], surface: Surface, flops: Array
) -> list[tuple[Minimum, Interval]]:
    """Return the compute-optimal model at each C with the profile-likelihood interval of its N.

    The interval of its D is C/(kappa·N).
    """
    data = loss_data(points, surface.delta, surface.raw)
    limit = surface.limit
    columns = [column for column in range(FORMS[surface.form]) if column != 1]
    models = []
    for compute in flops:
        product = np.log(compute / surface.kappa)
        best = surface.optimum(float(compute))

        def excess(size: float, product: float = product) -> float:
            tie = partial(_tied, size, product, data.centre)
            _, objective, _ = polish(data, surface.row, columns, tie)
            return objective - limit

        size = np.log(best.params)
        low = crossing(excess, size, size - SEARCH_REACH, 0.02, 1e-5)
        high = crossing(excess, size, size + SEARCH_REACH, 0.02, 1e-5)
        ends = (exponential_end(low), exponential_end(high))
        models.append((best, Interval.of_ends(best.params, *ends)))
    return models


def _tied(size: float, product: float, centre: Centre, row: Array) -> tuple[Array, Array]:
    """Return the row with the a that makes ln N = size optimal, and the slopes (6,) of a.

    `product` is ln(N·D). The optimum has alpha·A·N^-alpha = beta·B·D^-beta.
    """
    n, d = centre
    p, q, gamma = np.maximum(row[3:], [EXPONENT[0], EXPONENT[0], GAMMA[0]])
    log_ratio = np.log(p / q)
    tied = row.copy()
    tied[1] = row[2] + p * (size - n) - q * (product - size - d) - gamma * log_ratio
    p_slope = size - n - gamma / p
    q_slope = size + d - product + gamma / q
    return tied, np.array([0, 0, 1, p_slope, q_slope, -log_ratio])


def quantities(rows: Array, centre: Centre) -> dict[str, Array]:
    """Return QUANTITIES of rows (R, 6), (R,) each; A and B as logarithms."""
    e, a, b, p, q, gamma = rows.T
    return {
        "E": np.exp(e),
        "A": (a + p * centre[0]) / gamma,
        "B": (b + q * centre[1]) / gamma,
        "alpha": p / gamma,
        "beta": q / gamma,
        "gamma": gamma,
        "params_exponent": q / (p + q),
    }


def _condition(name: str, value: float, centre: Centre) -> tuple[Array, float]:
    """Return normal (6,) and constant of normal·row = constant, true where the quantity is `value`.

    Both are affine in the value, for E in its logarithm.
    """
    normal = np.zeros(6)
    if name == "E":
        normal[0] = 1.0
        return normal, np.log(value)
    if name == "gamma":
        normal[5] = 1.0
        return normal, value
    if name == "params_exponent":
        normal[3:5] = -value, 1 - value
    elif name in ("alpha", "beta"):
        normal[[3 if name == "alpha" else 4, 5]] = 1.0, -value
    else:
        term = "AB".index(name)
        normal[[1 + term, 3 + term, 5]] = 1.0, centre[term], -value
    return normal, 0.0


@dataclass(frozen=True)
class _Profile:
    """Profile likelihoods of one fitted surface."""

    data: LossData
    surface: Surface

    @cached_property
    def allowed(self) -> float:
        """Excess of the objective at the limit."""
        return self.surface.limit - self.surface.objective

    @cached_property
    def covariance(self) -> Array:
        """Covariance of the form's parameters at unit noise."""
        return np.asarray(np.linalg.inv(_ridged(self.surface.hessian)), float)

    def ends(self, names: Sequence[str]) -> list[Ends]:
        """Return the ends of each quantity, where its profile crosses the limit; None if open.

        The root of the excess is nearly straight in the quantity, also in E but not in ln E, so
        secants find the crossing.
        """
        # 1) one task per quantity and side, from the best value outwards
        row = self.surface.row
        tasks = np.repeat(names, 2).tolist()
        values = quantities(row[None], self.data.centre)
        best = np.array([values[name][0] for name in tasks])
        sides = np.tile([-1.0, 1.0], len(names))
        first = sides * [self._quadratic_reach(name, values[name][0]) for name in tasks]
        low, high = np.array([self._bounds(name) for name in tasks]).T
        inner = best
        inner_depth = np.zeros(len(tasks))
        rows = np.tile(row, (len(tasks), 1))
        outer = np.full(len(tasks), np.nan)
        outer_depth = outer
        for _ in range(PROFILE_ROUNDS):
            # 2) fit with each quantity held at its next value
            following = _next_values(best, first, inner, inner_depth, outer, outer_depth)
            following = np.clip(following, low, high)
            moved, normals = self._moved(rows, tasks, following)
            columns = range(len(self.covariance))
            moved, objectives = levenberg_marquardt(self.data, moved, columns, normals)
            # 3) narrow the bracket: depth is the root of the excess, 1 at the limit
            excess = np.maximum(objectives - self.surface.objective, 0)
            depth = np.sqrt(excess / self.allowed)
            inside = depth <= 1
            inner = np.where(inside, following, inner)
            inner_depth = np.where(inside, depth, inner_depth)
            outer = np.where(inside, outer, following)
            outer_depth = np.where(inside, outer_depth, depth)
            rows = np.where(inside[:, None], moved, rows)
        # 4) interpolate the crossing; an end that was never passed is open
        share = (1 - inner_depth) / (outer_depth - inner_depth)
        crossed = inner + share * (outer - inner)
        return to_json(crossed.reshape(-1, 2))

    def _bounds(self, name: str) -> tuple[float, float]:
        if name == "E":
            return np.exp(self.data.log_floor), self.data.losses.max()
        return QUANTITIES[name]

    def _moved(self, rows: Array, names: Sequence[str], values: Array) -> tuple[Array, Array]:
        """Return the nearest rows with these values, and the normals that hold them."""
        width = len(self.covariance)
        conditions = [
            _condition(name, value, self.data.centre) for name, value in zip(names, values)
        ]
        normals = np.array([normal for normal, _ in conditions])
        missing = (normals * rows).sum(1) - [constant for _, constant in conditions]
        pull = normals[:, :width] @ self.covariance
        moved = rows.copy()
        distance = missing / (pull * normals[:, :width]).sum(1)
        moved[:, :width] -= pull * distance[:, None]
        # E moves alone: where it hardly counts ln E moves far, and would drag the exponents along.
        floors = np.array([name == "E" for name in names])
        moved[floors] = rows[floors]
        moved[floors, 0] -= missing[floors]
        highest = np.log(self.data.losses.max())
        moved[:, 0] = np.clip(moved[:, 0], self.data.log_floor, highest)
        return moved, normals

    def _quadratic_reach(self, name: str, value: float) -> float:
        """Return the half-width of the interval if the objective were a parabola."""
        centre = self.data.centre
        normal, _ = _condition(name, value, centre)
        half = value / 1000 if name == "E" else 0.5
        above, above_constant = _condition(name, value + half, centre)
        below, below_constant = _condition(name, value - half, centre)
        change = (above - below) @ self.surface.row - (above_constant - below_constant)
        rate = abs(change) / (2 * half)
        direction = normal[: len(self.covariance)]
        variance = direction @ self.covariance @ direction
        return float(np.sqrt(2 * self.allowed * variance) / rate)


def _next_values(
    best: Array, first: Array, inner: Array, inner_depth: Array, outer: Array, outer_depth: Array
) -> Array:
    """Return the next value of each search: outwards until outside, then where a secant crosses."""
    # 1) outwards: extrapolate the depth, by a tenth to thrice the distance so far
    distance = np.abs(inner - best)
    steady = distance / np.maximum(inner_depth, 0.05)
    pace = np.where(inner_depth > 0.05, steady, np.inf)
    longest = 3 * np.maximum(distance, np.abs(first))
    stride = np.clip(pace * (1.02 - inner_depth), 0.1 * distance, longest)
    stride = np.where(distance > 0, stride, np.abs(first))
    outwards = inner + np.sign(first) * stride
    # 2) between: a secant, its outer depth capped because far outside the root is not straight
    capped = np.minimum(outer_depth, STRAIGHT_UP_TO)
    share = np.clip((1 - inner_depth) / (capped - inner_depth), 0.02, 0.98)
    between = inner + share * (outer - inner)
    return np.where(np.isnan(outer), outwards, between)


def _ridged(hessian: Array) -> Array:
    return hessian + 1e-9 * np.trace(hessian) * np.eye(len(hessian))
