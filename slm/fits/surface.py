"""L(N, D) = E + (A·N^-alpha + B·D^-beta)^gamma through all runs, and what is compute-optimal on it.

Additive is gamma = 1: approach 3 of Hoffmann et al. 2022 (arXiv 2203.15556); coupled leaves gamma free. Estimator: the
sum of Huber losses of the log residuals, delta = 1.345·sigma or as given (the paper's 1e-3). At each (alpha, beta) of a
grid the linear part is solved, the best of each block of it descends, the best of those is polished. On the surface
N*(C) = G·(C/kappa)^(beta/(alpha+beta)), G = (alpha·A/(beta·B))^(1/(alpha+beta)), kappa = FLOPs/(N·D), whatever gamma.
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
from slm.fits.optimize import EXPONENT, GAMMA, Array, Cloud, descend, polish
from slm.fits.points import Point
from slm.fits.power_law import LEAST_SQUARES, ROUNDING, Noise, seed_noise, spread

FORMS = {"additive": 5, "coupled": 6}
"""Parameters of each form."""
PAPER = 1e-3
"""delta of Hoffmann et al. 2022."""
THIN = 0.05
"""Runs nearer than this to one curve in (ln N, ln D), root mean square, move along one dial."""
BLOCKS, CELLS = 4, 6
"""The grid of exponents is BLOCKS × BLOCKS blocks of CELLS × CELLS, and every block gives a start."""
TEMPERATURES = (0.3, 0.7, 1.5)
"""gamma of the coupled form's starts."""
QUANTITIES: dict[str, tuple[float, float]] = {
    "E": (-np.inf, np.inf),
    "A": (-50.0, 250.0),
    "B": (-50.0, 250.0),
    "alpha": (EXPONENT[0], EXPONENT[1] / GAMMA[0]),
    "beta": (EXPONENT[0], EXPONENT[1] / GAMMA[0]),
    "gamma": GAMMA,
    "params_exponent": (0.01, 0.99),
}
"""What has an interval, and between which ends it is sought; A and B as logarithms, E as it is."""
FAR = 5.0
"""How far from the best ln N an end of its interval is sought."""
ROUNDS = 14
"""Evaluations of a profile on its way to an end."""
BENT = 3.0
"""Root of the excess, as a share of that of the limit, up to which it is taken to be straight in the quantity."""


@dataclass(frozen=True)
class Surface:
    """One form, fitted."""

    form: str
    """`additive` or `coupled`."""
    row: Array
    """(e, a, b, p, q, gamma) as in `descent`."""
    centre: tuple[float, float]
    """Means of ln N and ln D, from which the row counts."""
    kappa: float
    """FLOPs/(N·D), geometric mean of the runs; 6 by the usual rule."""
    intervals: dict[str, Interval]
    """E, A, B, alpha, beta, gamma, params_exponent: profile likelihood. What the runs do not hold has no value."""
    objective: float
    """Weighted sum of Huber losses of the residuals."""
    noise: Noise
    """What set delta, where it is not given."""
    delta: float
    """Where the Huber loss turns linear; infinite is least squares."""
    raw: bool
    """Whether residuals are of the loss; else of its logarithm."""
    starts_agreeing: float
    """Share of the starts that end within 1e-6 of the best objective."""
    status: str
    """The optimiser's last word."""
    residual_rms: float
    """Root mean square log residual."""
    n: int
    """Runs."""
    bend: Array
    """JᵀWJ at the row, over the form's parameters."""

    @property
    def exponents(self) -> tuple[float, float]:
        """Best alpha and beta, held by the runs or not."""
        return float(self.row[3] / self.row[5]), float(self.row[4] / self.row[5])

    @property
    def unheld(self) -> list[str]:
        """Exponents without both ends of an interval."""
        return [
            name
            for name in ("alpha", "beta", "gamma", "params_exponent")
            if not self.intervals[name].identifiable
        ]

    def loss(self, params: Array | float, tokens: Array | float) -> Array:
        """The surface at N and D of one shape."""
        n, d = np.broadcast_arrays(np.log(params) - self.centre[0], np.log(tokens) - self.centre[1])
        cloud = Cloud(n.ravel(), d.ravel(), np.ones(n.size), self.centre, np.inf)
        return np.asarray(cloud.predicted(self.row[None])[0].reshape(n.shape))

    def optimum(self, flops: float) -> Minimum:
        """The compute-optimal model at C."""
        alpha, beta = self.exponents
        product = np.log(flops / self.kappa)
        lean = (
            (self.row[1] - self.row[2]) / self.row[5]
            + alpha * self.centre[0]
            - beta * self.centre[1]
        )
        size = (np.log(alpha / beta) + lean + beta * product) / (alpha + beta)
        params, tokens = float(np.exp(size)), float(np.exp(product - size))
        return Minimum(flops, params, tokens, tokens / params, float(self.loss(params, tokens)))

    def prediction(self, params: float, tokens: float, level: float = LEVEL) -> Interval:
        """A further run of this N and D: y ± t·sqrt(g'Vg + sigma²) in ln loss, V from the objective's curvature."""
        cloud = Cloud(
            np.log([params]) - self.centre[0],
            np.log([tokens]) - self.centre[1],
            np.ones(1),
            self.centre,
            0,
        )
        loss, low, high = foretold(
            cloud, self.row, self.bend, self.objective, self.n - FORMS[self.form], level
        )
        return Interval(float(loss[0]), float(low[0]), float(high[0]), True)

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "form": self.form,
            **{name: interval.document() for name, interval in self.intervals.items()},
            "n": self.n,
            "kappa": self.kappa,
            "objective": self.objective,
            "delta": self.delta if np.isfinite(self.delta) else None,
            "sigma": self.noise.sigma,
            "sigma_from": self.noise.source,
            "starts_agreeing": self.starts_agreeing,
            "status": self.status,
            "residual_rms": self.residual_rms,
            "identifiable": not self.unheld,
            "identifiability": {"identified": not self.unheld, "not_held": self.unheld},
        }


def obstacle(points: Sequence[Point]) -> tuple[str, str] | None:
    """Why the runs cannot hold a surface, as a code and a sentence; None when they may."""
    sizes, tokens = len({point.params for point in points}), len({point.tokens for point in points})
    if min(sizes, tokens) > 1 and _width(points) < THIN:
        message = (
            "parameters and tokens move along one dial, so their exponents cannot be told apart"
        )
        return "one_dial_no_exponents", message
    if min(sizes, tokens) < 3 or len(points) <= FORMS["additive"] + 1:
        count = f"{len(points)} runs of {sizes} sizes on {tokens} token counts"
        return (
            "too_few_runs_for_surface",
            f"{count}; a surface takes {FORMS['additive'] + 2}, with 3 of each",
        )
    return None


def _width(points: Sequence[Point]) -> float:
    """Root mean square distance of the runs in (ln N, ln D) from a parabola, of few from a straight line."""
    cloud = np.log([[point.params, point.tokens] for point in points])
    cloud -= cloud.mean(0)
    along, across = (cloud @ np.linalg.svd(cloud, full_matrices=False)[2].T).T
    curve = np.vander(along / np.abs(along).max(), 3 if len(points) > FORMS["additive"] + 1 else 2)
    return float(np.sqrt(np.mean((across - curve @ np.linalg.lstsq(curve, across)[0]) ** 2)))


def fit_surface(
    points: Sequence[Point],
    form: str = "additive",
    delta: float | None = None,
    raw: bool = False,
    noise: Noise | None = None,
) -> Surface:
    """One form through the runs.

    `delta` is the Huber loss's, else 1.345·sigma of `noise`, else of seeds or the residuals; `raw` takes residuals of
    the loss itself. Raises ValueError for an unknown form and for runs that cannot hold it.
    """
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; known are {', '.join(FORMS)}")
    problem = obstacle(points)
    if problem or len(points) <= FORMS[form]:
        raise ValueError(
            problem[1] if problem else f"{len(points)} runs; {form} takes {FORMS[form] + 1}"
        )
    noise = noise or noise_around(points)
    cloud = cloud_of(points, noise.delta if delta is None else delta, raw)
    weights = np.array([point.weight for point in points])
    row, objective, agreeing, status = best_row(cloud, weights, form)
    residuals = np.log(cloud.predicted(row[None])[0][0] / cloud.losses)
    return Surface(
        form=form,
        row=row,
        centre=cloud.centre,
        kappa=float(
            np.exp(np.mean([np.log(point.flops / point.params / point.tokens) for point in points]))
        ),
        intervals=_intervals(cloud, weights, form, row, objective),
        objective=objective,
        noise=noise,
        delta=cloud.delta,
        raw=raw,
        starts_agreeing=agreeing,
        status=status,
        residual_rms=float(np.sqrt(np.mean(residuals**2))),
        n=len(points),
        bend=cloud.hessian(row, weights, range(FORMS[form])),
    )


def foretold(
    cloud: Cloud, row: Array, bend: Array, objective: float, free: int, level: float
) -> tuple[Array, Array, Array]:
    """Loss of the runs of a cloud by a fitted row: estimate and the ends of a further run's interval, each (m,).

    `bend` is JᵀWJ of the runs fitted, `objective` theirs, `free` their degrees of freedom.
    """
    losses, _ = cloud.predicted(row[None])
    slopes = cloud.residuals(row[None])[1][0, : len(bend)]
    variance = 2 * objective / free * (1 + (slopes * np.linalg.solve(_ridged(bend), slopes)).sum(0))
    reach = np.exp(stats.t.ppf((1 + level) / 2, free) * np.sqrt(variance))
    return losses[0], losses[0] / reach, losses[0] * reach


def cloud_of(points: Sequence[Point], delta: float, raw: bool = False) -> Cloud:
    """The runs with their logarithms centred."""
    n, d = np.log([point.params for point in points]), np.log([point.tokens for point in points])
    losses = np.array([point.loss for point in points])
    return Cloud(n - n.mean(), d - d.mean(), losses, (float(n.mean()), float(d.mean())), delta, raw)


def noise_around(points: Sequence[Point]) -> Noise:
    """Spread of ln loss: of seeds, else around the surface of the widest form the runs allow.

    Least squares first, then once more with the delta that its residuals give, so that a few wild runs do not widen it.
    """
    known = seed_noise(points)
    if known:
        return known
    form = "coupled" if len(points) > FORMS["coupled"] + 1 else "additive"
    noise = LEAST_SQUARES
    for _ in range(2):
        cloud = cloud_of(points, noise.delta)
        row, *_ = best_row(cloud, np.array([point.weight for point in points]), form)
        noise = spread(cloud.residuals(row[None])[0][0])
    return noise


def best_row(cloud: Cloud, weights: Array, form: str) -> tuple[Array, float, float, str]:
    """The best row, its objective, the share of starts that reach it and the optimiser's word; `weights` (m,)."""
    rows = _starts(cloud, weights)
    if form == "coupled":
        rows = np.concatenate([np.where(np.arange(6) == 5, gamma, rows) for gamma in TEMPERATURES])
    columns = range(FORMS[form])
    found, objectives = descend(
        cloud, rows, np.broadcast_to(weights, (len(rows), weights.size)), columns
    )
    least = int(objectives.argmin())
    row, objective, status = polish(cloud, found[least], weights, columns)
    rounding = weights.sum() * ROUNDING**2
    agreeing = objectives <= objective * (1 + 1e-6) + rounding
    return row, objective, float(agreeing.mean()), status


def _starts(cloud: Cloud, weights: Array) -> Array:
    """The best cell of every block of the grid of exponents, its linear part solved: (BLOCKS², 6)."""
    grid = np.geomspace(0.03, 2.0, BLOCKS * CELLS)
    p, q = (own.reshape(-1, 1) for own in np.meshgrid(grid, grid, indexing="ij"))
    x, y = np.exp(-p * cloud.n), np.exp(-q * cloud.d)
    linear = _linear(np.stack([np.ones_like(x), x, y], 1) / cloud.losses, weights)
    rows = np.column_stack([np.log(linear), p, q, np.ones(len(p))])
    residuals = np.log((linear[:, :1] + linear[:, 1:2] * x + linear[:, 2:] * y) / cloud.losses)
    misfits = cloud.objective(residuals, weights).reshape(BLOCKS, CELLS, BLOCKS, CELLS)
    least = misfits.transpose(0, 2, 1, 3).reshape(BLOCKS**2, CELLS**2).argmin(1)
    blocks = np.arange(BLOCKS**2)
    chosen = (
        (blocks // BLOCKS * CELLS + least // CELLS) * BLOCKS * CELLS
        + blocks % BLOCKS * CELLS
        + least % CELLS
    )
    return np.asarray(rows[chosen])


def _linear(design: Array, weights: Array) -> Array:
    """Coefficients (g, 3) of the relative least squares design·c = 1, without a floor where that would be negative."""
    gram, right = (design * weights) @ design.transpose(0, 2, 1), design @ weights
    ridge = 1e-10 * np.einsum("gkk->gk", gram)[:, :, None] * np.eye(3)
    full = np.linalg.solve(gram + ridge, right[:, :, None])[:, :, 0]
    bare = np.linalg.solve((gram + ridge)[:, 1:, 1:], right[:, 1:, None])[:, :, 0]
    without = np.column_stack([np.zeros(len(bare)), bare])
    found = np.where(full[:, :1] > 0, full, without)
    return np.maximum(found, 1e-3 / np.abs(design).max(2))


def _intervals(
    cloud: Cloud, weights: Array, form: str, row: Array, objective: float
) -> dict[str, Interval]:
    """Profile-likelihood intervals, all ends sought together."""
    names = [name for name in QUANTITIES if name != "gamma" or form == "coupled"]
    limit = _limit(objective, weights.size, form)
    ends = _ends(cloud, weights, range(FORMS[form]), row, (objective, limit), names)
    best = _sought(row[None], cloud.centre)
    found = {"gamma": Interval(1.0, 1.0, 1.0, True)}
    for name, (low, high) in zip(names, ends):
        outward = np.exp if name in ("A", "B") else float
        lower, upper = (None if end is None else float(outward(end)) for end in (low, high))
        value, (least, most) = float(best[name][0]), QUANTITIES[name]
        held = lower is not None and upper is not None and least <= value <= most
        estimate = float(outward(value)) if held or name == "E" else None
        found[name] = Interval(
            estimate, 0.0 if name == "E" and lower is None else lower, upper, held
        )
    return {name: found[name] for name in QUANTITIES}


def _limit(objective: float, runs: int, form: str) -> float:
    """The objective up to which a row is inside the 95 % region."""
    return (objective + runs * ROUNDING**2) * allowance(runs - FORMS[form])


def frontier(
    points: Sequence[Point], surface: Surface, flops: Array
) -> list[tuple[Minimum, Interval]]:
    """The compute-optimal model at each C, and the profile-likelihood interval of its N; that of D is C/(kappa·N)."""
    cloud, weights = (
        cloud_of(points, surface.delta, surface.raw),
        np.array([point.weight for point in points]),
    )
    limit = _limit(surface.objective, weights.size, surface.form)
    columns = [column for column in range(FORMS[surface.form]) if column != 1]
    found = []
    for own in flops:
        product, best, row = (
            float(np.log(own / surface.kappa)),
            surface.optimum(float(own)),
            surface.row,
        )

        def excess(size: float, product: float = product, row: Array = row) -> float:
            return (
                polish(cloud, row, weights, columns, partial(_tied, size, product, cloud.centre))[1]
                - limit
            )

        size = float(np.log(best.params))
        ends = [crossing(excess, size, size + side * FAR, 0.02, 1e-5) for side in (-1.0, 1.0)]
        low, high = (None if end is None else float(np.exp(end)) for end in ends)
        found.append((best, Interval(best.params, low, high, low is not None and high is not None)))
    return found


def _tied(
    size: float, product: float, centre: tuple[float, float], row: Array
) -> tuple[Array, Array]:
    """The row with the a that makes ln N = size compute-optimal at ln(N·D) = product, and the slopes (6,) of a."""
    tied, (n, d) = row.copy(), centre
    _, _, b, p, q, gamma = np.maximum(
        row, [-np.inf, -np.inf, -np.inf, EXPONENT[0], EXPONENT[0], GAMMA[0]]
    )
    tied[1] = b + p * (size - n) - q * (product - size - d) - gamma * np.log(p / q)
    return tied, np.array(
        [0, 0, 1, size - n - gamma / p, size + d - product + gamma / q, -np.log(p / q)]
    )


def quantities(rows: Array, centre: tuple[float, float]) -> dict[str, Array]:
    """What rows (R, 6) say, by the names of QUANTITIES; E, A and B as logarithms."""
    e, a, b, p, q, gamma = rows.T
    return {
        "E": e,
        "A": (a + p * centre[0]) / gamma,
        "B": (b + q * centre[1]) / gamma,
        "alpha": p / gamma,
        "beta": q / gamma,
        "gamma": gamma,
        "params_exponent": q / (p + q),
    }


def _sought(rows: Array, centre: tuple[float, float]) -> dict[str, Array]:
    """The same, but E itself: the root of its excess is nearly straight in E, not in ln E."""
    found = quantities(rows, centre)
    return found | {"E": np.exp(found["E"])}


def _condition(name: str, value: float, centre: tuple[float, float]) -> tuple[Array, float]:
    """The quantity has this value where normal (6,)·row = constant; affine in the value, for E in its logarithm."""
    normal = np.zeros(6)
    if name in ("E", "gamma"):
        normal[0 if name == "E" else 5] = 1.0
        return normal, float(np.log(value)) if name == "E" else value
    if name == "params_exponent":
        normal[3:5] = -value, 1 - value
    elif name in ("alpha", "beta"):
        normal[[3 if name == "alpha" else 4, 5]] = 1.0, -value
    else:
        term = "AB".index(name)
        normal[[1 + term, 3 + term, 5]] = 1.0, centre[term], -value
    return normal, 0.0


def _ends(
    cloud: Cloud,
    weights: Array,
    columns: Sequence[int],
    row: Array,
    levels: tuple[float, float],
    names: Sequence[str],
) -> list[list[float | None]]:
    """Where the profile of each quantity crosses from the least objective to the limit: [low, high], None if open.

    The root of the excess is nearly straight in the quantity: from the best outwards by secants, then between.
    """
    column = list(columns)
    metric: Array = np.linalg.inv(_ridged(cloud.hessian(row, weights, column))).astype(float)
    tasks = [(name, side) for name in names for side in (-1.0, 1.0)]
    values = _sought(row[None], cloud.centre)
    best = np.array([values[name][0] for name, _ in tasks])
    first = np.array(
        [side * _reach(name, row, cloud.centre, metric, levels) for name, side in tasks]
    )
    bounds = [
        (np.exp(cloud.lowest), cloud.losses.max()) if name == "E" else QUANTITIES[name]
        for name, _ in tasks
    ]
    low, high = np.array(bounds).T
    near, depth, rows = best.copy(), np.zeros(len(tasks)), np.tile(row, (len(tasks), 1))
    far, beyond = np.full(len(tasks), np.nan), np.full(len(tasks), np.nan)
    for _ in range(ROUNDS):
        u = np.clip(_next(best, first, near, depth, far, beyond), low, high)
        moved, normals = _moved(
            cloud, rows, [(name, own) for (name, _), own in zip(tasks, u)], metric
        )
        moved, objectives = descend(cloud, moved, np.tile(weights, (len(u), 1)), column, normals)
        excess = np.sqrt(np.maximum(objectives - levels[0], 0) / (levels[1] - levels[0]))
        inside = excess <= 1
        near, depth = np.where(inside, u, near), np.where(inside, excess, depth)
        far, beyond = np.where(inside, far, u), np.where(inside, beyond, excess)
        rows = np.where(inside[:, None], moved, rows)
    crossed = near + (1 - depth) / (beyond - depth) * (far - near)
    found = [None if np.isnan(end) else float(end) for end in crossed]
    return [found[k : k + 2] for k in range(0, len(found), 2)]


def _moved(
    cloud: Cloud, rows: Array, values: Sequence[tuple[str, float]], metric: Array
) -> tuple[Array, Array]:
    """The nearest rows in a metric of the first columns that have these values, and the normals of what is held."""
    conditions = [_condition(name, value, cloud.centre) for name, value in values]
    normals, width, moved = np.array([normal for normal, _ in conditions]), len(metric), rows.copy()
    missing = (normals * rows).sum(1) - [constant for _, constant in conditions]
    pull = normals[:, :width] @ metric
    moved[:, :width] -= pull * (missing / (pull * normals[:, :width]).sum(1))[:, None]
    # Not along ln E: it goes far where E hardly counts, and would take the exponents out of those looked at.
    floors = np.array([name == "E" for name, _ in values])
    moved[floors] = rows[floors]
    moved[floors, 0] -= missing[floors]
    moved[:, 0] = np.clip(moved[:, 0], cloud.lowest, np.log(cloud.losses.max()))
    return moved, normals


def _next(best: Array, first: Array, near: Array, depth: Array, far: Array, beyond: Array) -> Array:
    """Where to look next: outwards while nothing is beyond, else where a straight line crosses."""
    gone = np.abs(near - best)
    pace = np.where(depth > 0.05, gone / np.maximum(depth, 0.05), np.inf)
    stride = np.clip(pace * (1.02 - depth), 0.1 * gone, 3 * np.maximum(gone, np.abs(first)))
    stride = np.where(gone > 0, stride, np.abs(first))
    # Far beyond, the root of the excess is no longer straight.
    between = near + np.clip((1 - depth) / (np.minimum(beyond, BENT) - depth), 0.02, 0.98) * (
        far - near
    )
    return np.where(np.isnan(far), near + np.sign(first) * stride, between)


def _reach(
    name: str, row: Array, centre: tuple[float, float], metric: Array, levels: tuple[float, float]
) -> float:
    """How far the interval of a quantity would reach, were the objective a parabola."""
    value = float(_sought(row[None], centre)[name][0])
    normal, _ = _condition(name, value, centre)
    half = value / 1000 if name == "E" else 0.5
    (more, constant), (less, other) = (
        _condition(name, value + step, centre) for step in (half, -half)
    )
    rate = abs((more - less) @ row - (constant - other)) / (2 * half)
    own = normal[: len(metric)]
    return float(np.sqrt(2 * (levels[1] - levels[0]) * (own @ metric @ own)) / rate)


def _ridged(hessian: Array) -> Array:
    return np.asarray(hessian + 1e-9 * np.trace(hessian) * np.eye(len(hessian)))
