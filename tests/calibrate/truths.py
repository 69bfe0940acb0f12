"""Known truths, and designs of runs drawn from them.

The loss is L(N, D) = E + (A·N^-alpha + B·D^-beta)^gamma with C = 6·N·D. On its optimum
L(C) = E + K·C^-p exactly, with p = gamma·alpha·beta/(alpha + beta): a ladder of compute-optimal
runs is a law, a grid around it a surface.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from slm.fits import Point

Array = NDArray[np.float64]
Noise = Callable[[np.random.Generator, Array], Array]
"""FLOPs of the runs -> noise of ln loss."""

WIDTH = 10.0
"""Ratio of the largest to the smallest size at a budget, as in nanochat's grid."""
RUNG = 2.8
"""Factor in compute from one depth to the next."""


@dataclass(frozen=True)
class Truth:
    """A surface of known parameters."""

    E: float
    """Irreducible loss."""
    A: float
    """Coefficient of the term in N."""
    B: float
    """Coefficient of the term in D."""
    alpha: float
    """Exponent of parameters."""
    beta: float
    """Exponent of tokens."""
    gamma: float = 1.0
    """1 for the additive form."""
    bend: float = np.inf
    """FLOPs beyond which the law of a ladder falls half as steeply."""

    def loss(self, params: Array | float, tokens: Array | float) -> Array:
        """Return L(N, D)."""
        reducible = (
            self.A * np.asarray(params) ** -self.alpha + self.B * np.asarray(tokens) ** -self.beta
        )
        return np.asarray(self.E + reducible**self.gamma)

    @property
    def params_exponent(self) -> float:
        """a of N* ∝ C^a."""
        return self.beta / (self.alpha + self.beta)

    def optimum(self, flops: Array | float) -> Array:
        """Return N*(C)."""
        ratio = self.alpha * self.A / (self.beta * self.B)
        return np.asarray(
            ratio ** (1 / (self.alpha + self.beta))
            * (np.asarray(flops) / 6) ** self.params_exponent
        )

    def best(self, flops: Array | float) -> Array:
        """Return L*(C), beyond the bend the flatter law."""
        smooth = np.minimum(flops, self.bend)
        params = self.optimum(smooth)
        reducible = self.loss(params, smooth / 6 / params) - self.E
        return np.asarray(
            self.E + reducible * (np.asarray(flops) / smooth) ** (-self._smooth_p / 2)
        )

    @property
    def _smooth_p(self) -> float:
        return self.gamma * self.alpha * self.beta / (self.alpha + self.beta)

    @property
    def p(self) -> float:
        """Exponent p of the law at large compute."""
        return self._smooth_p / (1 if np.isinf(self.bend) else 2)

    def scale(self, flops: float) -> float:
        """Return K of the law at C."""
        return float((self.best(flops) - self.E) * flops**self.p)

    def gain(self, flops: float) -> float:
        """Return the share of the loss that doubling compute saves, by the slope at C."""
        return float(1 - 2 ** (-self.p * (1 - self.E / self.best(flops))))


@dataclass(frozen=True)
class Design:
    """Runs without noise, their noise, and the warnings that a fit of them should give."""

    name: str
    truth: Truth
    points: tuple[Point, ...]
    """Runs with losses free of noise."""
    noise: Noise
    """Noise, drawn anew at each repetition."""
    sound: frozenset[str]
    """Groups of intervals whose assumptions hold, so that they must cover."""
    must: frozenset[str]
    """Codes of warnings that should fire."""
    may: frozenset[str]
    """Codes of warnings that may fire, depending on the noise."""

    def draw(self, generator: np.random.Generator) -> list[Point]:
        """Return the runs of one repetition."""
        return noisy(self.points, self.noise, generator)


def noisy(points: Sequence[Point], noise: Noise, generator: np.random.Generator) -> list[Point]:
    """Return the runs with noise on their losses."""
    factors = np.exp(noise(generator, np.array([point.flops for point in points])))
    return [
        replace(point, loss=point.loss * factor) for point, factor in zip(points, factors.tolist())
    ]


def grid(
    truth: Truth,
    budgets: Sequence[float],
    sizes: int,
    seeds: int = 1,
    width: float = WIDTH,
    off: float = 1.0,
) -> list[Point]:
    """Return an isoFLOP grid: sizes `width` apart, centred `off` times the optimum."""
    points = []
    for budget in budgets:
        params = off * truth.optimum(budget) * np.geomspace(width**-0.5, width**0.5, sizes)
        points += [
            _point(
                depth,
                size,
                budget / 6 / size,
                float(truth.loss(size, budget / 6 / size)),
                seed,
                budget,
            )
            for depth, size in enumerate(params.tolist())
            for seed in range(seeds)
        ]
    return points


def ladder(truth: Truth, smallest: float, depths: int, seeds: int = 1) -> list[Point]:
    """Return compute-optimal runs from `smallest` FLOPs on."""
    flops = smallest * RUNG ** np.arange(depths)
    sizes = zip(flops.tolist(), truth.optimum(flops).tolist(), truth.best(flops).tolist())
    return [
        _point(depth, size, c / 6 / size, loss, seed, None)
        for depth, (c, size, loss) in enumerate(sizes)
        for seed in range(seeds)
    ]


def _point(
    depth: int, params: float, tokens: float, loss: float, seed: int, budget: float | None
) -> Point:
    name = f"{budget or 'ladder'}-{depth}-{seed}"
    return Point(
        name, "known", depth + 2, params, tokens, 6 * params * tokens, loss, seed, budget, "known"
    )


def gauss(sigma: float) -> Noise:
    """Return Gaussian noise, independent of compute."""
    return lambda generator, flops: sigma * generator.standard_normal(flops.size)


def heavy(sigma: float) -> Noise:
    """Return noise of Student's t with three degrees of freedom."""
    return lambda generator, flops: sigma * generator.standard_t(3, flops.size)


def shrinking(first: float, last: float) -> Noise:
    """Return Gaussian noise that falls as a power of compute from `first` to `last`."""

    def draw(generator: np.random.Generator, flops: Array) -> Array:
        share = np.log(flops / flops.min()) / np.log(flops.max() / flops.min())
        return np.asarray(first * (last / first) ** share * generator.standard_normal(flops.size))

    return draw


LARGE, SMALL = 0.0007, 0.0025
"""Standard deviations of ln loss over seeds: at nanochat's scale, at pocket's."""
SEEDS = gauss(SMALL)
EPOCH = Truth(1.8172, 477.8, 2143.4, 0.3473, 0.3672)
"""Besiroglu et al. 2024."""
NANOCHAT = Truth(0.5534, 3551.0, 25950.0, 0.604, 0.6298, 0.4592)
"""The coupled surface of nanochat's 28 runs."""
EVEN = replace(EPOCH, alpha=0.357, beta=0.357)
"""Surface whose isoFLOP curves are symmetric."""
POCKET = Truth(0.95, 28.0, 89.0, 0.347, 0.367)
"""Losses near those of pocket's depths 2 to 6."""
CENTURIES = (1e18, 1e19, 1e20, 1e21)
DOUBLINGS = (1e18, 2.15e18, 4.64e18, 1e19)
TINY = (3e11, 1e12, 3e12, 1e13)
"""Budgets in FLOPs: Chinchilla's range, nanochat's, pocket's."""
LAW = ("law with a floor", "law chosen", "predictions")
SLOPES = ("exponents of the minima",)
MINIMA = ("minima", *SLOPES)
"""A parabola's vertex is the minimum only for equal exponents; otherwise the slopes alone cover."""
FORM = ("additive surface", "coupled surface", "surface chosen", "bootstrap", "predictions")


def _ladder(
    name: str,
    truth: Truth,
    depths: int,
    seeds: int = 1,
    noise: Noise = SEEDS,
    sound: Sequence[str] = LAW,
    must: str = "",
    may: str = "",
) -> Design:
    """Return a ladder at pocket's scale. Its validated factor depends on the noise."""
    points = ladder(truth, 3e10, depths, seeds)
    return Design(
        f"ladder: {name}",
        truth,
        tuple(points),
        noise,
        frozenset(sound),
        must=frozenset({"one_dial_no_exponents", *must.split()}),
        may=frozenset({"extrapolation", *may.split()}),
    )


def _grid(
    name: str,
    truth: Truth,
    points: Sequence[Point],
    noise: Noise,
    sound: Sequence[str] = (*SLOPES, *FORM),
    must: str = "",
    may: str = "",
) -> Design:
    """Return an isoFLOP grid. The additive form is wrong for a coupled truth."""
    wrong = {"additive surface"} if truth.gamma != 1 else set()
    return Design(
        f"grid: {name}",
        truth,
        tuple(points),
        noise,
        frozenset(sound) - wrong,
        frozenset(must.split()),
        frozenset(may.split()),
    )


NO_FLOOR, BARE = replace(POCKET, E=0.0), replace(EPOCH, E=0.0)
BENT = replace(POCKET, bend=3e10 * RUNG**5)
FEW = "too_few_runs"
"""Two minima are too few for a law."""
THREE = "E_unidentified extrapolation"
"""Three minima give a law without a floor."""
FOUR = "E_unidentified extrapolation law_loose"
"""Four minima hardly hold a floor, and the last is REACH times the third but for rounding."""
LOOSE = "law_loose"
"""A law of few minima may be loose."""
WILD = "influential_run estimator_matters"
"""Heavy tails may give influential runs."""
BIASED = "centring_drift approaches_disagree"
"""Asymmetric isoFLOP curves may bias the parabolas."""
DRIFTING = f"{LOOSE} {BIASED}"
TWO_BUDGETS, THREE_BUDGETS = grid(EPOCH, CENTURIES[1:3], 6), grid(EPOCH, CENTURIES[:3], 7)
OFF, FAR_OFF = grid(EPOCH, CENTURIES[:3], 7, off=2), grid(EPOCH, CENTURIES[1:3], 7, off=5)
BROAD, FLOORLESS = grid(EPOCH, CENTURIES[:3], 7, width=100), grid(BARE, CENTURIES[:3], 7)
LADDER_AND_GRID = [*ladder(POCKET, 3e10, 6), *grid(POCKET, TINY[:3], 6)]
ENDS, FOUR_BUDGETS = grid(NANOCHAT, DOUBLINGS[::3], 6), grid(NANOCHAT, DOUBLINGS, 7)
NORMAL = gauss(LARGE)

DESIGNS = (
    _ladder("4 depths", POCKET, 4, may="E_unidentified"),
    _ladder("4 depths x 3 seeds", POCKET, 4, 3, may="E_unidentified"),
    _ladder("6 depths", POCKET, 6, may="E_unidentified"),
    _ladder("6 depths x 2 seeds", POCKET, 6, 2, may="E_unidentified"),
    _ladder("10 depths", POCKET, 10),
    _ladder("10 depths x 3 seeds", POCKET, 10, 3),
    _ladder("10 depths, heavy tails", POCKET, 10, noise=heavy(SMALL), sound=(), may=WILD),
    _ladder(
        "10 depths, noise shrinks", POCKET, 10, noise=shrinking(4 * SMALL, SMALL / 4), sound=()
    ),
    _ladder("10 depths, no floor", NO_FLOOR, 10, must="E_unidentified", sound=()),
    _ladder("10 depths, a bend", BENT, 10, sound=(), may="influential_run"),
    _grid("additive, 2 x 6", EPOCH, TWO_BUDGETS, NORMAL, must=FEW, may="surface_unidentified"),
    _grid("additive, 3 x 7", EPOCH, THREE_BUDGETS, NORMAL, must=THREE, may=LOOSE),
    _grid("additive, 4 x 7 x 2 seeds", EPOCH, grid(EPOCH, CENTURIES, 7, 2), NORMAL, may=FOUR),
    _grid("even, 4 x 7", EVEN, grid(EVEN, CENTURIES, 7), NORMAL, (*MINIMA, *FORM), may=FOUR),
    _grid("pocket, 2 x 5 x 2 seeds", POCKET, grid(POCKET, TINY[:2], 5, 2), SEEDS, must=FEW),
    _grid(
        "pocket, ladder of 6 and 3 x 6",
        POCKET,
        LADDER_AND_GRID,
        SEEDS,
        (*LAW, *SLOPES, *FORM),
        may="E_unidentified extrapolation",
    ),
    _grid("coupled, 2 x 6", NANOCHAT, ENDS, NORMAL, must=f"{FEW} forms_disagree"),
    _grid(
        "coupled, 4 x 7",
        NANOCHAT,
        grid(NANOCHAT, DOUBLINGS, 7),
        NORMAL,
        must="extrapolation",
        may=f"{FOUR} {BIASED}",
    ),
    _grid("heavy tails, 3 x 7", EPOCH, THREE_BUDGETS, heavy(LARGE), (), THREE, f"{LOOSE} {WILD}"),
    _grid(
        "noise shrinks, 3 x 7",
        EPOCH,
        THREE_BUDGETS,
        shrinking(4 * LARGE, LARGE / 4),
        (),
        THREE,
        LOOSE,
    ),
    _grid("off-centre by 2, 3 x 7", EPOCH, OFF, NORMAL, FORM, THREE, DRIFTING),
    _grid(
        "off-centre by 5, 2 x 7",
        EPOCH,
        FAR_OFF,
        NORMAL,
        FORM,
        "vertex_outside too_few_runs",
        BIASED,
    ),
    _grid("100 wide, 3 x 7", EPOCH, BROAD, NORMAL, FORM, THREE, DRIFTING),
    _grid("no floor, 3 x 7", BARE, FLOORLESS, NORMAL, SLOPES, THREE, DRIFTING),
)
