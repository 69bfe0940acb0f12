"""CORE against compute: a sigmoid of the loss, and the loss by its law of compute.

    CORE(L) = floor + (top - floor) / (1 + e^-(a + b·(L0 - L)))

Two steps, as in Gadre et al. 2024 (arXiv 2403.08540) and Llama 3 (2407.21783). Given its loss, a
run's CORE says nothing more about the law (seeds move the two independently), so the joint
likelihood is a product and the joint covariance has two blocks: the draws of both are independent.
Small models determine neither end of the sigmoid. The floor is estimated with prior knowledge of
chance as one more run; the top is profiled over a band. The fit minimises Huber losses of residuals
in units of a run's noise; the scale of that noise pools the residuals with what is known
beforehand.

The mean of another bundle, such as pocket-core, is fitted alike, with its own evaluation error; its
chance level, 0, is within the prior of chance used here.

Every interval comes from one set of draws. CORE rises with compute, so {CORE x is reached by C} is
{CORE(C) >= x}: the distribution of the compute that reaches x is the band read sideways.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress
from typing import Any

import numpy as np
from scipy import special, stats

from slm.fits.core_sigmoid import (
    CHANCE_LIMIT,
    TAIL,
    TOPS,
    CoreDraws,
    at_chance,
    draw_jointly,
    fit_sigmoid,
    run_error,
    sigmoid,
)
from slm.fits.intervals import Interval, crossing, exponential_end
from slm.fits.points import Axes, Point, check
from slm.fits.power_law import Law, root_mean_square
from slm.fits.types import Array, FitWarning, to_json

GPT2 = {
    "GPT-2 124M": 0.113891,
    "GPT-2 355M": 0.184903,
    "GPT-2 774M": 0.214641,
    "GPT-2 1.5B": 0.256525,
}
"""CORE published with the bundle, by its baselines; all but the first at 1,000 examples per
task."""
NOISE_FREE = 10
"""Degrees of freedom of the prior of a run's noise, pooled with those of the residuals: families
differ by a third."""
MIN_RUNS = 3
"""Runs above chance that a curve takes."""
QUANTILES = (TAIL, 0.5, 1 - TAIL)
"""Quantiles of the draws: low, median, high."""
BELOW = 1e3
"""Factor below the smallest run down to which a CORE is looked for."""
BEYOND = 1e6
"""Factor beyond the largest run up to which a CORE is looked for."""


@dataclass(frozen=True)
class Reach:
    """The compute at which a family reaches a CORE."""

    core: float
    flops: Interval
    """Median and 95 % interval in FLOPs. An end is None if it is outside the range looked at."""
    probability_never: float | None
    """Probability that no compute suffices because of the floor E; None if the law has none."""
    extrapolated: bool
    """Whether part of the interval is beyond the largest run."""

    def document(self) -> dict[str, Any]:
        """Return the reach as JSON."""
        return {
            "core": self.core,
            **to_json(self.flops),
            "probability_never": self.probability_never,
            "extrapolated": self.extrapolated,
        }


@dataclass(frozen=True)
class NoCoreFit:
    """The reason why there is no curve of CORE."""

    code: str
    """Stable name."""
    why: str
    name: str = "CORE"
    """Name of the metric: CORE, or the mean of another bundle."""

    @property
    def warnings(self) -> list[FitWarning]:
        """The reason as a warning."""
        return [FitWarning(self.code, f"no curve of {self.name}: {self.why}")]

    def document(self) -> dict[str, Any]:
        """Return the reason as JSON."""
        return {"refused": self.code, "why": self.why}


@dataclass(frozen=True)
class CoreFit:
    """CORE of one family against loss and compute; intervals are 95 %."""

    points: tuple[Point, ...]
    """Runs with a CORE."""
    at_chance: tuple[Point, ...]
    """Points that the sigmoid cannot tell from chance. Together they weigh as one run."""
    law: Law
    """Loss from compute."""
    centre: float
    """L0, the mean loss of the points."""
    draws: CoreDraws
    scale: float
    """Noise of a run around the sigmoid, in units of `run_error`."""
    misfit: float
    """Probability of residuals as large as these if `run_error` is right."""
    name: str = "CORE"
    """Name of the metric: CORE, or the mean of another bundle."""
    evaluation: float | None = None
    """Standard error of a point over examples; None for that of the CORE tasks."""

    def core(self, loss: Array | float) -> Array:
        """Return the median CORE at a loss; any shape."""
        losses = np.asarray(loss, float)
        cores = self._at_loss(losses.reshape(1, -1))
        return np.median(cores, 0).reshape(losses.shape)

    def at(self, flops: float) -> Interval:
        """Return CORE of the family at C."""
        return _interval(self._at_compute(np.array([flops])))

    def curve(self, flops: Array) -> Array:
        """Return the medians of `at`, (n,)."""
        return np.median(self._at_compute(flops), 0)

    def band(self, flops: Array) -> tuple[Array, Array]:
        """Return the ends of `at`, (n,) each."""
        low, high = np.quantile(self._at_compute(flops), (TAIL, 1 - TAIL), axis=0)
        return low, high

    def prediction(self, flops: float) -> Interval:
        """Return CORE of one further run at C, with the noise of its seed and evaluation."""
        cores = self._at_compute(np.array([flops]))[:, 0]
        unit = np.random.default_rng(1).standard_normal(len(cores))
        noise = self.draws.noise * run_error(cores, self.evaluation)
        return _interval(cores + noise * unit)

    def reach(self, core: float) -> Reach:
        """Return the compute at which the family reaches a CORE.

        Raises ValueError for a CORE that is not above chance and below 1.
        """
        if not CHANCE_LIMIT < core < 1:
            raise ValueError(
                f"core is {core}; it must be above chance, {CHANCE_LIMIT:g}, and below 1"
            )
        first = np.log(self.law.smallest / BELOW)
        last = np.log(self.law.largest * BEYOND)

        def end(quantile: float) -> float | None:
            def excess(logc: float) -> float:
                cores = self._at_compute(np.exp([logc]))
                return np.quantile(cores, quantile) - core

            if excess(first) > 0:
                return None
            return exponential_end(crossing(excess, first, last, 2.0))

        high, middle, low = map(end, QUANTILES)
        largest = min(self._largest, self.law.largest)
        return Reach(
            core=core,
            flops=Interval.of_ends(middle, low, high),
            probability_never=self._share_below(core),
            extrapolated=high is None or high > largest,
        )

    @property
    def mixed(self) -> list[str]:
        """Axes of the points, if they are on several."""
        return Axes.of_points(self.points).mixed

    @property
    def floor(self) -> Interval:
        """CORE at chance."""
        return _interval(self.draws.parameters[:, 2])

    @property
    def top(self) -> Interval:
        """CORE at no loss, within TOPS; identifiable if the runs exclude both ends of it."""
        top = _interval(self.draws.parameters[:, 3])
        held = (top.low or 0.0) > TOPS[0] and (top.high or 1.0) < TOPS[-1]
        return replace(top, identifiable=bool(held))

    @property
    def midpoint(self) -> Interval:
        """Loss halfway from floor to top; identifiable if the runs have it on both sides."""
        a, b, _, _ = self.draws.parameters.T
        middle = _interval(self.centre + a / b)
        losses = [point.loss for point in self.points]
        held = min(losses) < (middle.estimate or 0.0) < max(losses)
        return replace(middle, identifiable=held)

    @property
    def gain(self) -> Interval:
        """CORE per unit of loss at the lowest loss of the points: -dCORE/dL."""
        a, b, floor, top = self.draws.parameters.T
        share = special.expit(a + b * (self.centre - self._lowest))
        return _interval((top - floor) * b * share * (1 - share))

    @property
    def warnings(self) -> list[FitWarning]:
        """Limits of the fit that a reader must know before using its numbers."""
        highest = max(point.core or 0.0 for point in self.points)
        warnings = []
        if self.at_chance:
            message = (
                f"{len(self.at_chance)} of {len(self.points)} runs cannot be told from chance: "
                "they determine the chance level and weigh as one run"
            )
            warnings.append(FitWarning("chance_level", message))
        if not (self.top.identifiable and self.midpoint.identifiable):
            message = (
                f"runs up to {self.name} {highest:.3f} do not determine the top of the sigmoid, "
                f"assumed between {TOPS[0]:g} and {TOPS[-1]:g}"
            )
            warnings.append(FitWarning("core_unidentified", message))
        if self.misfit < 0.01:
            message = f"the runs scatter {self.scale:.2g} times their noise around the sigmoid"
            warnings.append(FitWarning("core_misfit", message))
        message = (
            f"{self.name} was measured up to {highest:.3f}, at {self._largest:.3g} FLOPs; "
            "larger values are extrapolated"
        )
        return [*warnings, FitWarning("core_extrapolation", message)]

    def document(self) -> dict[str, Any]:
        """Return the fit as JSON; null is unknown, compute in FLOPs."""
        flops = np.geomspace(self.law.smallest, 10 * self.law.largest, 41)
        low, high = self.band(flops)
        band = {"flops": flops, "core": self.curve(flops), "low": low, "high": high}
        levels = GPT2 if self.name == "CORE" else {}
        return to_json(
            {
                "metric": self.name,
                "core_key": self.points[0].core_key,
                "n": len(self.points),
                "at_chance": sorted(point.run_id for point in self.at_chance),
                "floor": self.floor,
                "top": self.top,
                "midpoint": self.midpoint,
                "gain": self.gain,
                "noise": self.scale * run_error(self.core(self._lowest), self.evaluation),
                "noise_scale": self.scale,
                "band": band | {"extrapolated_from": self._largest},
                "reach": {name: self.reach(core) for name, core in levels.items()},
            }
        )

    def _at_loss(self, losses: Array) -> Array:
        """Return draws of CORE at losses, (1 or DRAWS, n) -> (DRAWS, n)."""
        return sigmoid(self.draws.parameters.T[..., None], self.centre - losses)

    def _at_compute(self, flops: Array) -> Array:
        """Return draws of CORE at compute, (n,) -> (DRAWS, n)."""
        low, high = self.law.band(flops)
        return self._at_loss(self._losses(self.law.loss(flops), low, high))

    def _losses(self, best: Array, low: Array, high: Array) -> Array:
        """Return losses (DRAWS, n) with the law's 95 % interval, a t distribution per side."""
        position = self.draws.law_t / stats.t.ppf(1 - TAIL, self.law.free)
        width = np.where(position > 0, high - best, best - low)
        return np.maximum(best + position * width, 0.0)

    def _share_below(self, core: float) -> float | None:
        """Return the share of draws that never reach `core`; None for a law without a floor."""
        floor = self.law.E
        if floor.estimate is None or floor.low is None or floor.high is None:
            return None
        losses = self._losses(*np.array([[floor.estimate], [floor.low], [floor.high]]))
        return (self._at_loss(losses) < core).mean()

    @property
    def _lowest(self) -> float:
        return min(point.loss for point in self.points)

    @property
    def _largest(self) -> float:
        return max(point.flops for point in self.points)


def _interval(values: Array) -> Interval:
    low, middle, high = map(float, np.quantile(values, QUANTILES))
    return Interval.of_ends(middle, low, high)


def fit_core(
    points: Sequence[Point], law: Law | None, allow_mixed: bool = False
) -> CoreFit | NoCoreFit:
    """Fit CORE to the loss of the runs with a CORE, of any budget; the law gives the loss.

    If the runs do not determine a curve, or their CORE is of several core keys, the result says
    why; `allow_mixed` accepts several keys. Raises NotComparable (a ValueError) for several
    comparison keys or recipes unless `allow_mixed`, ValueError for no run or a repeated run.
    """
    # 1) runs with a CORE, of one kind
    check(points, allow_mixed)
    measured = tuple(point for point in points if point.core is not None)
    keys = [point.core_key or "" for point in measured]
    name = " and ".join(sorted({point.core_name for point in measured})) or "CORE"
    refuse = partial(NoCoreFit, name=name)
    count = len(set(keys))
    if count > 1 and not allow_mixed:
        differences = Axes.of_keys(keys).differences
        why = f"the runs have {count} evaluation settings and are not one curve: {differences}"
        return refuse("several_core_keys", why)
    if law is None:
        return refuse("too_few_runs", f"there is no law of the loss, so no {name} of compute")
    if len(measured) < MIN_RUNS:
        why = (
            f"{len(measured)} of {len(points)} runs have a {name}; "
            f"a curve takes {MIN_RUNS} above chance"
        )
        return refuse("too_few_core_runs", why)

    # 2) runs at chance agree on the answers they prefer, so together they weigh as one run
    losses = np.array([point.loss for point in measured])
    cores = np.array([point.core for point in measured], float)
    centre = losses.mean()
    gained = centre - losses
    errors = np.array([run_error(point.core or 0.0, point.core_error) for point in measured])
    chance = at_chance(gained, cores, errors)
    above = int((~chance).sum())
    if above < MIN_RUNS:
        why = (
            f"{above} of {len(measured)} runs can be told from chance, {name} {CHANCE_LIMIT:g}; "
            f"a curve takes {MIN_RUNS}: train larger models"
        )
        return refuse("chance_level", why)
    errors = errors * np.where(chance, np.sqrt(chance.sum()), 1.0)

    # 3) profile the top; residuals are the runs above chance, those at chance as one, and the prior
    # of chance, less the parameters a, b and floor
    fits = [fit_sigmoid(gained, cores, errors, top) for top in TOPS]
    free = above + int(chance.any()) + 1 - 3
    pooled_free = NOISE_FREE + free
    least = min(fit.objective for fit in fits)
    scale = np.sqrt((NOISE_FREE + least) / pooled_free)
    steepness = min(fit.steepness for fit in fits)
    if steepness < scale * stats.t.ppf(1 - TAIL, pooled_free):
        return refuse("core_flat", f"the runs do not show that a lower loss gives a higher {name}")
    return CoreFit(
        points=measured,
        at_chance=tuple(compress(measured, chance)),
        law=law,
        centre=centre,
        draws=draw_jointly(fits, scale, pooled_free, law.free),
        scale=scale,
        misfit=stats.chi2.sf(least, free),
        name=name,
        evaluation=_evaluation(measured),
    )


def _evaluation(measured: Sequence[Point]) -> float | None:
    """Return the root mean square of the points' standard errors; None if a point has none."""
    errors = [point.core_error for point in measured if point.core_error is not None]
    return root_mean_square(np.array(errors)) if len(errors) == len(measured) else None
