"""CORE against compute: a sigmoid of the loss, the loss by its law of compute, and when a family reaches a CORE.

    CORE(L) = floor + (top - floor) / (1 + e^-(a + b·(L0 - L)))

Two steps, as in Gadre et al. 2024 (arXiv 2403.08540) and Llama 3 (2407.21783). Given its loss a run's CORE says nothing
more of the law (seeds move the two independently), so the joint likelihood is a product and the joint covariance has
two blocks: a draw of both is a draw of each. Small models hold neither end of the sigmoid. The floor is estimated
with what is known of chance as one more run; the top is profiled over a band. Least Huber loss, residuals in units of
a run's noise, of which the scale is that of the residuals and of what is known beforehand, pooled.

The mean of another bundle, such as pocket-core, is fitted alike, with its own evaluation error; its chance level, 0, is
within what is known of chance here.

Every interval is of one set of draws. CORE rises with compute, so {CORE x is reached by C} is {CORE(C) >= x}: the
distribution of the compute that reaches x is the band read sideways.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

from slm.fits.intervals import LEVEL, Interval, crossing
from slm.fits.points import Point, axes_of, check, differences, parts_of
from slm.fits.power_law import PARAMETERS, Array, Law
from slm.fits.warning import FitWarning

TASKS = {
    "hellaswag_zeroshot": (10042, 0.25),
    "jeopardy": (2117, 0.0),
    "bigbench_qa_wikidata": (20321, 0.0),
    "arc_easy": (2376, 0.25),
    "arc_challenge": (1172, 0.25),
    "copa": (100, 0.5),
    "commonsense_qa": (1221, 0.2),
    "piqa": (1838, 0.5),
    "openbook_qa": (500, 0.25),
    "lambada_openai": (5153, 0.0),
    "hellaswag": (10042, 0.25),
    "winograd": (273, 0.5),
    "winogrande": (1267, 0.5),
    "bigbench_dyck_languages": (1000, 0.0),
    "agi_eval_lsat_ar": (230, 0.2),
    "bigbench_cs_algorithms": (1320, 0.0),
    "bigbench_operators": (210, 0.0),
    "bigbench_repeat_copy_logic": (32, 0.0),
    "squad": (10570, 0.0),
    "coqa": (7983, 0.0),
    "boolq": (3270, 0.62),
    "bigbench_language_identification": (10000, 0.091),
}
"""Examples and baseline of each of the 22 tasks, as in nanochat's `eval_bundle.zip`."""
SEEDS = 0.0057
"""Standard deviation of CORE over seeds: four sets of nanochat's d24, 35 runs, pooled (.0034 to .0062 each)."""
KNOWN = 10
"""Degrees of freedom that a run's noise counts as where the residuals have theirs: families differ by a third."""
CHANCE, CHANCE_SPREAD = -0.01, 0.02
"""CORE at chance. Uniform guesses give -.001 with the bundle's baselines and -.026 with DCLM's corrected ones; two
baselines are majority rates, so that small models lie from -.045 to .02 by the answer they prefer. A floor of 0 puts
Gadre et al.'s 1.4B model on C4 at .23 to .41 by the smaller runs, where .174 was measured and this floor gives .19."""
LEAVES_CHANCE = CHANCE + 2 * CHANCE_SPREAD
"""CORE above which a model is no longer one at chance."""
TOPS = np.linspace(0.6, 1, 5)
"""CORE at no loss at all: not below the best model of 7B parameters (Phi-3, .61, in DCLM-7B's model card), not above
every answer right."""
GPT2 = {
    "GPT-2 124M": 0.113891,
    "GPT-2 355M": 0.184903,
    "GPT-2 774M": 0.214641,
    "GPT-2 1.5B": 0.256525,
}
"""Published with the bundle, by its baselines; all but the first at 1,000 examples a task."""
LEAST = 3
"""Runs above chance that a curve takes."""
DELTA = 1.345
"""Where the Huber loss turns linear, in units of a run's noise."""
RIDGE = 1e-9
"""Added to the curvature, so that what the runs do not bend at all has a large variance and not none."""
DRAWS = 4000
"""Of the law and the sigmoid together."""
TAIL = (1 - LEVEL) / 2
"""Share of the draws beyond each end of an interval."""
QUANTILES = (TAIL, 0.5, 1 - TAIL)
"""Of the draws: low, median, high."""
BELOW, BEYOND = 1e3, 1e6
"""How far below the smallest and beyond the largest run a CORE is looked for."""


@dataclass(frozen=True)
class Reach:
    """When a family reaches a CORE."""

    core: float
    """The CORE asked for."""
    flops: Interval
    """Compute, FLOPs: median and 95 % interval. An end is None where it lies nowhere that was looked at."""
    probability_never: float | None
    """That no compute is enough, the loss being bounded by its floor E; None where the law has no floor."""
    extrapolated: bool
    """Whether some of the interval lies beyond the largest run."""

    def document(self) -> dict[str, Any]:
        """As JSON."""
        own = {"probability_never": self.probability_never, "extrapolated": self.extrapolated}
        return {"core": self.core, **self.flops.document(), **own}


@dataclass(frozen=True)
class NoCoreFit:
    """Why there is no curve of CORE."""

    code: str
    """Stable name."""
    why: str
    """One sentence."""
    name: str = "CORE"
    """What the runs have, or should have."""

    @property
    def cautions(self) -> list[FitWarning]:
        """The refusal as a warning."""
        return [FitWarning(self.code, f"no curve of {self.name}: {self.why}")]

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {"refused": self.code, "why": self.why}


@dataclass(frozen=True)
class CoreFit:
    """CORE of one family against loss and compute."""

    points: tuple[Point, ...]
    """Runs with a CORE."""
    law: Law
    """Loss from compute."""
    at_chance: tuple[Point, ...]
    """Of the points, those that the sigmoid cannot tell from chance. Together they weigh as one run."""
    centre: float
    """L0, the mean loss of the points."""
    draws: Array
    """(DRAWS, 6): a, b, floor, top, a run's noise in units of `run_error`, and the law's place in its band."""
    scale: float
    """A run's noise around the sigmoid, in units of `run_error`."""
    misfit: float
    """Probability of residuals as large as these if `run_error` is right."""
    name: str = "CORE"
    """What the points have: CORE, or the mean of another bundle."""
    evaluation: float | None = None
    """Standard error of a point from the examples drawn, over all points; None: as CORE's tasks give it."""

    def core(self, loss: Array | float) -> Array:
        """The sigmoid: median CORE at a loss; any shape."""
        losses = np.asarray(loss, float)
        return np.asarray(np.median(self._sigmoid(losses.reshape(1, -1)), 0).reshape(losses.shape))

    def at(self, flops: float) -> Interval:
        """CORE of the family at C, in FLOPs: median and 95 % interval."""
        low, middle, high = np.quantile(self._cores(np.array([flops])), QUANTILES)
        return Interval(float(middle), float(low), float(high), True)

    def curve(self, flops: Array) -> Array:
        """Medians of `at`, (n,)."""
        return np.asarray(np.median(self._cores(flops), 0))

    def band(self, flops: Array) -> tuple[Array, Array]:
        """Ends of `at`, (n,) each."""
        low, high = np.quantile(self._cores(flops), (TAIL, 1 - TAIL), axis=0)
        return low, high

    def prediction(self, flops: float) -> Interval:
        """CORE of one further run at C: the family's, and the noise of its seed and of its evaluation."""
        cores = self._cores(np.array([flops]))[:, 0]
        unit = np.random.default_rng(1).standard_normal(len(cores))
        low, middle, high = np.quantile(
            cores + self.draws[:, 4] * self._error(cores) * unit, QUANTILES
        )
        return Interval(float(middle), float(low), float(high), True)

    def reach(self, core: float) -> Reach:
        """When the family reaches a CORE. Raises ValueError for one that is not above chance and below 1."""
        if not LEAVES_CHANCE < core < 1:
            raise ValueError(
                f"core is {core}; what can be reached lies above chance, {LEAVES_CHANCE:g}, and below 1"
            )
        first, last = np.log(self.law.smallest / BELOW), np.log(self.law.largest * BEYOND)

        def end(quantile: float) -> float | None:
            def excess(logc: float) -> float:
                return float(np.quantile(self._cores(np.exp([logc])), quantile)) - core

            found = crossing(excess, first, last, 2.0) if excess(first) <= 0 else None
            return None if found is None else float(np.exp(found))

        low, middle, high = (end(quantile) for quantile in reversed(QUANTILES))
        flops = Interval(middle, low, high, None not in (low, middle, high))
        return Reach(
            core,
            flops,
            self._never(core),
            high is None or high > min(self._largest, self.law.largest),
        )

    @property
    def mixed(self) -> list[str]:
        """Axes of the points, where they are on several; none on one."""
        return axes_of([point.parts for point in self.points])

    @property
    def floor(self) -> Interval:
        """CORE at chance."""
        return self._interval(self.draws[:, 2])

    @property
    def top(self) -> Interval:
        """CORE at no loss, within TOPS; identifiable where the runs exclude both ends of it."""
        own = self._interval(self.draws[:, 3])
        held = bool((own.low or 0.0) > TOPS[0] and (own.high or 1.0) < TOPS[-1])
        return Interval(own.estimate, own.low, own.high, held)

    @property
    def midpoint(self) -> Interval:
        """Loss halfway from floor to top; identifiable where the runs have it on both sides."""
        own = self._interval(self.centre + self.draws[:, 0] / self.draws[:, 1])
        losses = [point.loss for point in self.points]
        return Interval(
            own.estimate, own.low, own.high, min(losses) < (own.estimate or 0.0) < max(losses)
        )

    @property
    def gain(self) -> Interval:
        """CORE that a unit of loss is worth, at the lowest loss of the points: -dCORE/dL."""
        share = special.expit(self.draws[:, 0] + self.draws[:, 1] * (self.centre - self._lowest))
        return self._interval(
            (self.draws[:, 3] - self.draws[:, 2]) * self.draws[:, 1] * share * (1 - share)
        )

    @property
    def cautions(self) -> list[FitWarning]:
        """What a reader must know before using a number."""
        highest, found = max(point.core or 0.0 for point in self.points), []
        if self.at_chance:
            count = f"{len(self.at_chance)} of {len(self.points)} runs cannot be told from chance"
            found.append(
                FitWarning(
                    "chance_level", f"{count}: they say where chance lies and weigh as one run"
                )
            )
        if not (self.top.identifiable and self.midpoint.identifiable):
            ends = f"{TOPS[0]:g} to {TOPS[-1]:g}"
            message = f"runs up to {self.name} {highest:.3f} do not hold the top of the sigmoid, taken to lie from {ends}"
            found.append(FitWarning("core_unidentified", message))
        if self.misfit < 0.01:
            message = f"the runs lie {self.scale:.2g} times as far from one sigmoid of the loss as their noise"
            found.append(FitWarning("core_misfit", message))
        message = f"{self.name} was measured up to {highest:.3f}, at {self._largest:.3g} FLOPs; beyond, it is extrapolated"
        return [*found, FitWarning("core_extrapolation", message)]

    def document(self) -> dict[str, Any]:
        """As JSON, without NaN: null is what is not known. Compute in FLOPs."""
        flops = np.geomspace(self.law.smallest, 10 * self.law.largest, 41)
        low, high = self.band(flops)
        columns = {"flops": flops, "core": self.curve(flops), "low": low, "high": high}
        return {
            "metric": self.name,
            "core_key": self.points[0].core_key,
            "n": len(self.points),
            "at_chance": sorted(point.run_id for point in self.at_chance),
            **{
                name: getattr(self, name).document()
                for name in ("floor", "top", "midpoint", "gain")
            },
            "noise": self.scale * float(self._error(self.core(self._lowest))),
            "noise_scale": self.scale,
            "band": {name: column.tolist() for name, column in columns.items()}
            | {"extrapolated_from": self._largest},
            "reach": {
                name: self.reach(core).document()
                for name, core in GPT2.items()
                if self.name == "CORE"
            },
        }

    @property
    def _lowest(self) -> float:
        return min(point.loss for point in self.points)

    @property
    def _largest(self) -> float:
        return max(point.flops for point in self.points)

    def _error(self, core: Array) -> Array:
        return (
            run_error(core)
            if self.evaluation is None
            else np.full_like(core, np.hypot(self.evaluation, SEEDS))
        )

    def _interval(self, values: Array) -> Interval:
        low, middle, high = np.quantile(values, QUANTILES)
        return Interval(float(middle), float(low), float(high), True)

    def _sigmoid(self, losses: Array) -> Array:
        return _sigmoid(self.draws[:, :4].T[..., None], self.centre - losses)

    def _cores(self, flops: Array) -> Array:
        """(DRAWS, n) CORE at C."""
        return self._sigmoid(self._spread(self.law.loss(flops), *self.law.band(flops)))

    def _spread(self, best: Array, low: Array, high: Array) -> Array:
        """(DRAWS, n) losses of which the 95 % interval is the law's, by a t distribution on either side."""
        place = self.draws[:, 5:] / stats.t.ppf(1 - TAIL, self.law.n - PARAMETERS[self.law.form])
        return np.maximum(best + place * np.where(place > 0, high - best, best - low), 0.0)

    def _never(self, core: float) -> float | None:
        floor = self.law.E
        if floor.estimate is None or floor.low is None or floor.high is None:
            return None
        losses = self._spread(*(np.array([end]) for end in (floor.estimate, floor.low, floor.high)))
        return float((self._sigmoid(losses) < core).mean())


def evaluation_error(core: Array | float, per_task: int | None = None) -> Array:
    """Standard error of a CORE from the examples drawn, `per_task` of each task at most: binomial over the 22 tasks.

    Every task is put at the centred accuracy of the whole. The accuracies that GPT-2 1.5B has would give .0065 on all
    examples, .0081 at 500 and .0143 at 100 a task; this gives .0072, .0086 and .0147.
    """
    examples, base = np.array(list(TASKS.values())).T
    accuracy = base + (1 - base) * np.clip(np.asarray(core, float)[..., None], 0, 1)
    variance = (
        accuracy * (1 - accuracy) / np.minimum(examples, per_task or np.inf) / (1 - base) ** 2
    )
    return np.asarray(np.sqrt(variance.sum(-1)) / len(TASKS))


def run_error(core: Array | float) -> Array:
    """Standard deviation of a run's CORE around its family's: of the evaluation on all examples, and over seeds."""
    return np.hypot(evaluation_error(core), SEEDS)


def fit_core(points: Sequence[Point], law: Law | None, mixed: bool = False) -> CoreFit | NoCoreFit:
    """CORE from loss through the runs that have a CORE, whatever their budget; loss from compute by the law.

    Raises NotComparable (a ValueError) for several comparison keys or recipes unless they are to be `mixed`, ValueError
    for no run or one given twice. Where the runs do not hold a curve, or what they have is of several core keys and not
    to be mixed, the answer says why.
    """
    check(points, mixed)
    measured = tuple(point for point in points if point.core is not None)
    keys = sorted({point.core_key or "" for point in measured})
    name = " and ".join(sorted({point.core_name for point in measured})) or "CORE"
    if len(keys) > 1 and not mixed:
        told = differences([parts_of(point.core_key or "") for point in measured])
        why = f"the runs have {len(keys)} settings of evaluation and are not one curve: {told}"
        return NoCoreFit("several_core_keys", why, name)
    if law is None:
        return NoCoreFit(
            "too_few_runs", f"there is no law of the loss, so no {name} of compute", name
        )
    if len(measured) < LEAST:
        count = f"{len(measured)} of {len(points)} runs have a {name}"
        return NoCoreFit("too_few_core_runs", f"{count}; a curve takes {LEAST} above chance", name)
    losses, cores = (
        np.array([point.loss for point in measured]),
        np.array([point.core for point in measured]),
    )
    gained = losses.mean() - losses
    errors, chance = _weighed(gained, cores, _errors(measured))
    if (~chance).sum() < LEAST:
        count = f"{(~chance).sum()} of {len(measured)} runs can be told from chance, {name} {LEAVES_CHANCE:g}"
        return NoCoreFit(
            "chance_level", f"{count}; a curve takes {LEAST}: larger models would tell", name
        )
    fits = [_fit(gained, cores, errors, float(top)) for top in TOPS]
    # Residuals: the runs above chance, those at chance as one, and what is known of chance; less a, b and the floor.
    free = int((~chance).sum()) + int(chance.any()) + 1 - 3
    least = min(fit.objective for fit in fits)
    scale = float(np.sqrt((KNOWN + least) / (KNOWN + free)))
    if min(fit.steepness for fit in fits) < scale * stats.t.ppf(1 - TAIL, KNOWN + free):
        return NoCoreFit(
            "core_flat", f"the runs do not show that a lower loss gives a higher {name}", name
        )
    return CoreFit(
        points=measured,
        law=law,
        at_chance=tuple(point for point, own in zip(measured, chance) if own),
        centre=float(losses.mean()),
        draws=_draw(fits, scale, KNOWN + free, law),
        scale=scale,
        misfit=float(stats.chi2.sf(least, free)),
        name=name,
        evaluation=_evaluation(measured),
    )


def _evaluation(measured: Sequence[Point]) -> float | None:
    """Root mean square of the points' own standard errors; None where one has none."""
    known = [point.core_error for point in measured if point.core_error is not None]
    return float(np.sqrt(np.mean(np.square(known)))) if len(known) == len(measured) else None


def _errors(measured: Sequence[Point]) -> Array:
    """Standard deviation of each run's CORE (n,): of its evaluation, and over seeds."""
    known = (
        evaluation_error(own.core or 0.0) if own.core_error is None else own.core_error
        for own in measured
    )
    return np.hypot(np.array([float(own) for own in known]), SEEDS)


def _weighed(gained: Array, cores: Array, errors: Array) -> tuple[Array, NDArray[np.bool_]]:
    """Noise of each run (n,), and which are at chance: by the curve, for a run that is drawn low is not one of them.

    Those at chance agree on the answers they prefer, so that however many they are one measurement of the floor.
    """
    top = float(TOPS.mean())
    chance = _sigmoid(np.append(_fit(gained, cores, errors, top).best, top), gained) < LEAVES_CHANCE
    return errors * np.where(chance, np.sqrt(chance.sum()), 1.0), chance


@dataclass(frozen=True)
class _Sigmoid:
    """A fit with its top given."""

    best: Array
    """(a, b, floor)."""
    covariance: Array
    """Of those, for residuals of variance one."""
    objective: float
    """Twice the sum of Huber losses: a chi square."""
    top: float
    """CORE at no loss."""

    @property
    def steepness(self) -> float:
        """b in units of its standard error."""
        return float(self.best[1] / np.sqrt(self.covariance[1, 1]))


def _fit(gained: Array, cores: Array, errors: Array, top: float) -> _Sigmoid:
    """(a, b, floor) from what each run's loss lies below L0, `gained` (n,); chance itself is one more residual."""

    def residuals(theta: Array) -> Array:
        own = (_sigmoid(np.append(theta, top), gained) - cores) / errors
        return np.append(own, (theta[2] - CHANCE) / CHANCE_SPREAD)

    def slopes(theta: Array) -> Array:
        share = special.expit(theta[0] + theta[1] * gained)
        steep = (top - theta[2]) * share * (1 - share)
        own = np.stack([steep, steep * gained, 1 - share], 1) / errors[:, None]
        return np.vstack([own, [0, 0, 1 / CHANCE_SPREAD]])

    def bent(theta: Array) -> Array:
        """Of which the squares sum to twice the Huber loss: least squares, which Levenberg-Marquardt is made for."""
        size = np.abs(residuals(theta))
        inner = np.minimum(size, DELTA)
        return np.asarray(np.sign(residuals(theta)) * np.sqrt(inner * (2 * size - inner)))

    def bent_slopes(theta: Array) -> Array:
        size = np.maximum(np.abs(residuals(theta)), DELTA)
        return np.asarray(slopes(theta) * np.sqrt(DELTA / (2 * size - DELTA))[:, None])

    share = np.clip((cores - CHANCE) / (top - CHANCE), 0.01, 0.99)
    start = [special.logit(share).mean(), 1 / gained.std() if np.ptp(gained) > 0 else 1.0, CHANCE]
    best = optimize.least_squares(bent, start, bent_slopes, method="lm", x_scale="jac")
    own, within = (
        slopes(best.x),
        np.minimum(1, DELTA / np.maximum(np.abs(residuals(best.x)), DELTA)),
    )
    covariance: Array = np.linalg.inv((own.T * within) @ own + RIDGE * np.eye(3)).astype(float)
    return _Sigmoid(best.x, covariance, float(2 * best.cost), top)


def _sigmoid(parameters: Array, gained: Array) -> Array:
    """(a, b, floor, top) and L0 - L -> CORE."""
    a, b, floor, top = parameters
    return np.asarray(floor + (top - floor) * special.expit(a + b * gained))


def _draw(fits: Sequence[_Sigmoid], scale: float, free: int, law: Law) -> Array:
    """Rows of `CoreFit.draws`: a top by its likelihood, (a, ln b, floor) by a t distribution, the law apart."""
    random = np.random.default_rng(0)
    likelihood = np.exp(-np.array([fit.objective for fit in fits]) / scale**2 / 2)
    chosen = random.choice(len(fits), DRAWS, p=likelihood / likelihood.sum())
    noise = scale * np.sqrt(free / random.chisquare(free, DRAWS))
    roots = np.array([np.linalg.cholesky(fit.covariance) for fit in fits])[chosen]
    moved = noise[:, None] * np.einsum("mij,mj->mi", roots, random.standard_normal((DRAWS, 3)))
    a, b, floor = np.array([fit.best for fit in fits])[chosen].T
    place = random.standard_t(law.n - PARAMETERS[law.form], DRAWS)
    tops = np.array([fit.top for fit in fits])[chosen]
    return np.column_stack(
        [a + moved[:, 0], b * np.exp(moved[:, 1] / b), floor + moved[:, 2], tops, noise, place]
    )
