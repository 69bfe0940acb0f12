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
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from scipy import stats

from slm.fits.intervals import LEVEL, Interval, allowance, crossing
from slm.fits.isoflop import Minimum
from slm.fits.optimize import EXPONENT, GAMMA, LossData, levenberg_marquardt, polish
from slm.fits.points import Point
from slm.fits.power_law import LEAST_SQUARES, ROUNDING, Noise, mad_noise, seed_noise
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
    centre: tuple[float, float]
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
    def exponents(self) -> tuple[float, float]:
        """Best alpha and beta, whether or not the runs hold them."""
        return float(self.row[3] / self.row[5]), float(self.row[4] / self.row[5])

    @property
    def unidentified(self) -> list[str]:
        """Exponents whose intervals lack an end."""
        return [
            name
            for name in ("alpha", "beta", "gamma", "params_exponent")
            if not self.intervals[name].identifiable
        ]

    def loss(self, params: Array | float, tokens: Array | float) -> Array:
        """Return the loss at N and D of one shape."""
        n, d = np.broadcast_arrays(np.log(params) - self.centre[0], np.log(tokens) - self.centre[1])
        data = LossData(n.ravel(), d.ravel(), np.ones(n.size), self.centre, np.inf)
        return np.asarray(data.predict(self.row[None])[0].reshape(n.shape))

    def optimum(self, flops: float) -> Minimum:
        """Return the compute-optimal model at C."""
        alpha, beta = self.exponents
        product = np.log(flops / self.kappa)
        log_ratio = (
            (self.row[1] - self.row[2]) / self.row[5]
            + alpha * self.centre[0]
            - beta * self.centre[1]
        )
        size = (np.log(alpha / beta) + log_ratio + beta * product) / (alpha + beta)
        params = float(np.exp(size))
        tokens = float(np.exp(product - size))
        return Minimum(flops, params, tokens, tokens / params, float(self.loss(params, tokens)))

    def prediction(self, params: float, tokens: float, level: float = LEVEL) -> Interval:
        """Predict the loss of a further run at N and D.

        The interval is y ± t·sqrt(g'Vg + sigma²) in ln loss, V from the curvature of the objective.
        """
        n = np.log([params]) - self.centre[0]
        d = np.log([tokens]) - self.centre[1]
        data = LossData(n, d, np.ones(1), self.centre, 0)
        free = self.n - FORMS[self.form]
        loss, low, high = predict_runs(data, self.row, self.hessian, self.objective, free, level)
        return Interval(float(loss[0]), float(low[0]), float(high[0]), True)

    def document(self) -> dict[str, Any]:
        """Return the JSON document."""
        identified = not self.unidentified
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
            "identifiability": {"identified": identified, "not_held": self.unidentified},
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
    along, across = (positions @ np.linalg.svd(positions, full_matrices=False)[2].T).T
    terms = 3 if len(points) > FORMS["additive"] + 1 else 2
    design = np.vander(along / np.abs(along).max(), terms)
    return float(np.sqrt(np.mean((across - design @ np.linalg.lstsq(design, across)[0]) ** 2)))


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
    weights = weights_of(points)
    row, objective, agreeing, status = fit_row(data, weights, form)
    residuals = np.log(data.predict(row[None])[0][0] / data.losses)
    log_kappas = [np.log(point.flops / point.params / point.tokens) for point in points]
    return Surface(
        form=form,
        row=row,
        centre=data.centre,
        kappa=float(np.exp(np.mean(log_kappas))),
        intervals=_intervals(data, weights, form, row, objective),
        objective=objective,
        noise=noise,
        delta=data.delta,
        raw=raw,
        starts_agreeing=agreeing,
        status=status,
        residual_rms=float(np.sqrt(np.mean(residuals**2))),
        n=len(points),
        hessian=data.hessian(row, weights, range(FORMS[form])),
    )


def predict_runs(
    data: LossData, row: Array, hessian: Array, objective: float, free: int, level: float
) -> tuple[Array, Array, Array]:
    """Predict further runs at the N and D of `data`: losses, and low and high ends, (m,) each.

    `hessian` is JᵀWJ of the fitted runs, `objective` and `free` their objective and degrees of
    freedom.
    """
    losses, _ = data.predict(row[None])
    slopes = data.residuals(row[None])[1][0, : len(hessian)]
    errors = (slopes * np.linalg.solve(_ridged(hessian), slopes)).sum(0)
    variance = 2 * objective / free * (1 + errors)
    reach = np.exp(stats.t.ppf((1 + level) / 2, free) * np.sqrt(variance))
    return losses[0], losses[0] / reach, losses[0] * reach


def loss_data(points: Sequence[Point], delta: float, raw: bool = False) -> LossData:
    """Return the runs with their logarithms centred."""
    n = np.log([point.params for point in points])
    d = np.log([point.tokens for point in points])
    losses = np.array([point.loss for point in points])
    centre = (float(n.mean()), float(d.mean()))
    return LossData(n - n.mean(), d - d.mean(), losses, centre, delta, raw)


def weights_of(points: Sequence[Point]) -> Array:
    """Return the weights of the runs, (m,)."""
    return np.array([point.weight for point in points])


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
        row, *_ = fit_row(data, weights_of(points), form)
        noise = mad_noise(data.residuals(row[None])[0][0])
    return noise


def fit_row(data: LossData, weights: Array, form: str) -> tuple[Array, float, float, str]:
    """Return the best row, its objective, the share of starts that reach it, and the status."""
    starts = _starts(data, weights)
    if form == "coupled":
        at_gamma = [np.where(np.arange(6) == 5, gamma, starts) for gamma in TEMPERATURES]
        starts = np.concatenate(at_gamma)
    columns = range(FORMS[form])
    all_weights = np.broadcast_to(weights, (len(starts), weights.size))
    rows, objectives = levenberg_marquardt(data, starts, all_weights, columns)
    best = rows[int(objectives.argmin())]
    row, objective, status = polish(data, best, weights, columns)
    rounding = weights.sum() * ROUNDING**2
    agreeing = objectives <= objective * (1 + 1e-6) + rounding
    return row, objective, float(agreeing.mean()), status


def _starts(data: LossData, weights: Array) -> Array:
    """Return the best cell of each block of the grid of exponents as a row: (BLOCKS², 6)."""
    # 1) solve the linear part (E, A, B) at every cell of the grid
    grid = np.geomspace(0.03, 2.0, BLOCKS * CELLS)
    p, q = (axis.reshape(-1, 1) for axis in np.meshgrid(grid, grid, indexing="ij"))
    x = np.exp(-p * data.n)
    y = np.exp(-q * data.d)
    linear = _linear(np.stack([np.ones_like(x), x, y], 1) / data.losses, weights)
    rows = np.column_stack([np.log(linear), p, q, np.ones(len(p))])
    # 2) find the best cell of each block
    predicted = linear[:, :1] + linear[:, 1:2] * x + linear[:, 2:] * y
    objectives = data.objective(np.log(predicted / data.losses), weights)
    by_block = objectives.reshape(BLOCKS, CELLS, BLOCKS, CELLS).transpose(0, 2, 1, 3)
    best = by_block.reshape(BLOCKS**2, CELLS**2).argmin(1)
    # 3) take the rows of these cells
    blocks = np.arange(BLOCKS**2)
    first = blocks // BLOCKS * CELLS + best // CELLS
    second = blocks % BLOCKS * CELLS + best % CELLS
    return np.asarray(rows[first * BLOCKS * CELLS + second])


def _linear(design: Array, weights: Array) -> Array:
    """Solve design·c = 1 by relative least squares, without a floor if that would be negative.

    `design` is (g, 3, m); the coefficients are (g, 3) and positive.
    """
    gram = (design * weights) @ design.transpose(0, 2, 1)
    right = design @ weights
    gram = gram + 1e-10 * np.einsum("gkk->gk", gram)[:, :, None] * np.eye(3)
    with_floor = np.linalg.solve(gram, right[:, :, None])[:, :, 0]
    terms = np.linalg.solve(gram[:, 1:, 1:], right[:, 1:, None])[:, :, 0]
    without_floor = np.column_stack([np.zeros(len(terms)), terms])
    coefficients = np.where(with_floor[:, :1] > 0, with_floor, without_floor)
    return np.maximum(coefficients, 1e-3 / np.abs(design).max(2))


def _intervals(
    data: LossData, weights: Array, form: str, row: Array, objective: float
) -> dict[str, Interval]:
    """Return the profile-likelihood intervals of QUANTITIES, all ends searched in one batch."""
    names = [name for name in QUANTITIES if name != "gamma" or form == "coupled"]
    profile = _Profile(data, weights, form, row, objective)
    best = quantities(row[None], data.centre)
    intervals = {"gamma": Interval(1.0, 1.0, 1.0, True)}
    for name, (low, high) in zip(names, profile.ends(names)):
        outward = np.exp if name in ("A", "B") else float
        low = None if low is None else float(outward(low))
        high = None if high is None else float(outward(high))
        value = float(best[name][0])
        lowest, highest = QUANTITIES[name]
        identified = low is not None and high is not None and lowest <= value <= highest
        estimate = float(outward(value)) if identified or name == "E" else None
        if name == "E" and low is None:
            low = 0.0
        intervals[name] = Interval(estimate, low, high, identified)
    return {name: intervals[name] for name in QUANTITIES}


def _limit(objective: float, runs: int, form: str) -> float:
    """Return the objective up to which a row is inside the 95 % region."""
    return (objective + runs * ROUNDING**2) * allowance(runs - FORMS[form])


def frontier(
    points: Sequence[Point], surface: Surface, flops: Array
) -> list[tuple[Minimum, Interval]]:
    """Return the compute-optimal model at each C with the profile-likelihood interval of its N.

    The interval of its D is C/(kappa·N).
    """
    data = loss_data(points, surface.delta, surface.raw)
    weights = weights_of(points)
    limit = _limit(surface.objective, weights.size, surface.form)
    columns = [column for column in range(FORMS[surface.form]) if column != 1]
    models = []
    for compute in flops:
        product = float(np.log(compute / surface.kappa))
        best = surface.optimum(float(compute))

        def excess(size: float, product: float = product) -> float:
            tie = partial(_tied, size, product, data.centre)
            return polish(data, surface.row, weights, columns, tie)[1] - limit

        size = float(np.log(best.params))
        low, high = (
            crossing(excess, size, size + reach, 0.02, 1e-5)
            for reach in (-SEARCH_REACH, SEARCH_REACH)
        )
        models.append((best, Interval.of_ends(best.params, _exp(low), _exp(high))))
    return models


def _exp(end: float | None) -> float | None:
    return None if end is None else float(np.exp(end))


def _tied(
    size: float, product: float, centre: tuple[float, float], row: Array
) -> tuple[Array, Array]:
    """Return the row with the a that makes ln N = size optimal, and the slopes (6,) of a.

    `product` is ln(N·D). The optimum has alpha·A·N^-alpha = beta·B·D^-beta.
    """
    tied = row.copy()
    n, d = centre
    lowest = [-np.inf, -np.inf, -np.inf, EXPONENT[0], EXPONENT[0], GAMMA[0]]
    _, _, b, p, q, gamma = np.maximum(row, lowest)
    tied[1] = b + p * (size - n) - q * (product - size - d) - gamma * np.log(p / q)
    slopes = [0, 0, 1, size - n - gamma / p, size + d - product + gamma / q, -np.log(p / q)]
    return tied, np.array(slopes)


def quantities(rows: Array, centre: tuple[float, float]) -> dict[str, Array]:
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


def _condition(name: str, value: float, centre: tuple[float, float]) -> tuple[Array, float]:
    """Return normal (6,) and constant of normal·row = constant, true where the quantity is `value`.

    Both are affine in the value, for E in its logarithm.
    """
    normal = np.zeros(6)
    if name == "E":
        normal[0] = 1.0
        return normal, float(np.log(value))
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


class _Profile:
    """Profile likelihoods of one fitted surface."""

    def __init__(
        self, data: LossData, weights: Array, form: str, row: Array, objective: float
    ) -> None:
        self.data = data
        self.weights = weights
        self.columns = list(range(FORMS[form]))
        self.row = row
        self.objective = objective
        self.allowed = _limit(objective, weights.size, form) - objective
        hessian = data.hessian(row, weights, self.columns)
        self.metric: Array = np.linalg.inv(_ridged(hessian)).astype(float)
        """Covariance of the form's parameters at unit noise."""

    def ends(self, names: Sequence[str]) -> list[list[float | None]]:
        """Return [low, high] of each quantity, where its profile crosses the limit; None if open.

        The root of the excess is nearly straight in the quantity, also in E but not in ln E, so
        secants find the crossing.
        """
        # 1) one task per quantity and side, from the best value outwards
        tasks = [(name, side) for name in names for side in (-1.0, 1.0)]
        values = quantities(self.row[None], self.data.centre)
        best = np.array([values[name][0] for name, _ in tasks])
        first = np.array([side * self._quadratic_reach(name) for name, side in tasks])
        low, high = np.array([self._bounds(name) for name, _ in tasks]).T
        inner = best.copy()
        inner_depth = np.zeros(len(tasks))
        rows = np.tile(self.row, (len(tasks), 1))
        outer = np.full(len(tasks), np.nan)
        outer_depth = np.full(len(tasks), np.nan)
        weights = np.tile(self.weights, (len(tasks), 1))
        for _ in range(PROFILE_ROUNDS):
            # 2) fit with each quantity held at its next value
            u = np.clip(
                _next_values(best, first, inner, inner_depth, outer, outer_depth), low, high
            )
            moved, normals = self._moved(rows, [name for name, _ in tasks], u)
            moved, objectives = levenberg_marquardt(
                self.data, moved, weights, self.columns, normals
            )
            # 3) narrow the bracket: depth is the root of the excess, 1 at the limit
            depth = np.sqrt(np.maximum(objectives - self.objective, 0) / self.allowed)
            inside = depth <= 1
            inner = np.where(inside, u, inner)
            inner_depth = np.where(inside, depth, inner_depth)
            outer = np.where(inside, outer, u)
            outer_depth = np.where(inside, outer_depth, depth)
            rows = np.where(inside[:, None], moved, rows)
        # 4) interpolate the crossing; an end that was never passed is open
        crossed = inner + (1 - inner_depth) / (outer_depth - inner_depth) * (outer - inner)
        ends = [None if np.isnan(end) else float(end) for end in crossed]
        return [ends[k : k + 2] for k in range(0, len(ends), 2)]

    def _bounds(self, name: str) -> tuple[float, float]:
        if name == "E":
            return float(np.exp(self.data.log_floor)), float(self.data.losses.max())
        return QUANTITIES[name]

    def _moved(self, rows: Array, names: Sequence[str], values: Array) -> tuple[Array, Array]:
        """Return the nearest rows with these values, and the normals that hold them."""
        width = len(self.metric)
        conditions = [
            _condition(name, value, self.data.centre) for name, value in zip(names, values)
        ]
        normals = np.array([normal for normal, _ in conditions])
        missing = (normals * rows).sum(1) - [constant for _, constant in conditions]
        moved = rows.copy()
        pull = normals[:, :width] @ self.metric
        moved[:, :width] -= pull * (missing / (pull * normals[:, :width]).sum(1))[:, None]
        # E moves alone: where it hardly counts ln E moves far, and would drag the exponents along.
        floors = np.array([name == "E" for name in names])
        moved[floors] = rows[floors]
        moved[floors, 0] -= missing[floors]
        moved[:, 0] = np.clip(moved[:, 0], self.data.log_floor, np.log(self.data.losses.max()))
        return moved, normals

    def _quadratic_reach(self, name: str) -> float:
        """Return the half-width of the interval if the objective were a parabola."""
        centre = self.data.centre
        value = float(quantities(self.row[None], centre)[name][0])
        normal, _ = _condition(name, value, centre)
        half = value / 1000 if name == "E" else 0.5
        above, above_constant = _condition(name, value + half, centre)
        below, below_constant = _condition(name, value - half, centre)
        change = (above - below) @ self.row - (above_constant - below_constant)
        rate = abs(change) / (2 * half)
        direction = normal[: len(self.metric)]
        return float(np.sqrt(2 * self.allowed * (direction @ self.metric @ direction)) / rate)


def _next_values(
    best: Array, first: Array, inner: Array, inner_depth: Array, outer: Array, outer_depth: Array
) -> Array:
    """Return the next value of each search: outwards until outside, then where a secant crosses."""
    # 1) outwards: extrapolate the depth, by a tenth to thrice the distance so far
    distance = np.abs(inner - best)
    pace = np.where(inner_depth > 0.05, distance / np.maximum(inner_depth, 0.05), np.inf)
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
    return np.asarray(hessian + 1e-9 * np.trace(hessian) * np.eye(len(hessian)))
