"""Two recipes: how many times its compute the base needs for the candidate's loss, at every depth, and how surely.

Gaps of ln loss within each depth become multipliers m by the base's own slope (`gaps`). The m of all depths solves all
gaps by least squares, weighted by runs: one number where they agree, else the mean of ln m weighted by information.
Noise is pooled over depths and recipes: for one depth alone that of replicate seeds, for all of them the scatter of the
gaps around one m too, so that one seed a depth has an interval, and one that widens where depths disagree. Intervals
are nominal 95 % of one look. Claims never follow from them, but from evidence that holds under any number of looks with
runs added in between (`evidence`): all claims of all looks are right in 95 % of comparisons.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from slm.fits.compare.decision import Advice, Verdict, advise, decide, spoken
from slm.fits.compare.e_values import ENOUGH, e_value, joint, radius, shown
from slm.fits.compare.effects import (
    Curve,
    Effect,
    Gaps,
    Rung,
    at_depths,
    common,
    measure,
    quantile,
    solve,
)
from slm.fits.intervals import Interval
from slm.fits.points import ALLOW, NotComparable, axes_of, differences, mixture, parts_of
from slm.fits.power_law import Noise
from slm.fits.warning import FitWarning

Array = NDArray[np.float64]

AXES = {"flops": "FLOPs", "seconds": "training time"}
"""What compute may be, and its name."""
SAME = 0.03
"""FLOPs of the runs of one recipe and depth differ by less; so do those of two recipes whose slope is not known."""
FAR = 0.1
"""FLOPs of two recipes at a depth that differ by more are told."""
FEW = 4
"""Degrees of freedom below which the noise is hardly known."""
UNLIKELY = 0.05
"""Share below which chance is told to be an unlikely reason."""
BEYOND = 2.0
"""How many times outside the base's compute a multiplier may lead without a word."""


@dataclass(frozen=True)
class Trial:
    """The end of one run of a ladder: one size and horizon at each depth."""

    run_id: str
    """Identity of the run."""
    depth: int
    """Layers."""
    seed: int
    """Seed; runs of one recipe and depth are replicates."""
    flops: float
    """C, training FLOPs as counted."""
    loss: float
    """Final validation loss, bits per byte."""
    seconds: float | None = None
    """Training time on the devices of the comparison; None where it is not known."""
    comparison_key: str = ""
    """Losses of two different keys are not one axis; `name=value` parts joined by blanks."""

    def __post_init__(self) -> None:
        """Refuse what has no logarithm, by name: ValueError."""
        for name in ("depth", "flops", "loss", "seconds"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(
                    f"run {self.run_id}: {name} is {value}; a comparison needs positive finite numbers"
                )


@dataclass(frozen=True)
class AtDepth:
    """One depth that both recipes have."""

    depth: int
    """Layers."""
    flops: float
    """FLOPs of the candidate's runs."""
    base: int
    """Runs of the base."""
    candidate: int
    """Runs of the candidate."""
    difference: Interval
    """ln loss, candidate minus base, at the candidate's compute; no ends without replicate seeds."""
    multiplier: Interval
    """m of this depth alone."""
    evidence: float
    """e-value of a difference at this depth; 1 says nothing."""
    claim: str | None
    """`better` or `worse` where shown at this depth, all depths' claims being right together in 95 %."""


@dataclass(frozen=True)
class Homogeneity:
    """Whether one multiplier fits all depths: scatter of the gaps over that of replicate seeds."""

    statistic: float
    """F."""
    degrees: list[int]
    """Of freedom, between the depths and within."""
    p: float
    """Share of such ladders that scatter more."""


@dataclass(frozen=True)
class Trend:
    """How ln m moves with compute."""

    slope: Interval
    """d ln m / d ln C."""
    p: float | None
    """Of no slope, two-sided, for one look."""
    evidence: float
    """e-value of a slope."""
    ends: list[float]
    """m of the straight line at the smallest and the largest compute."""


@dataclass(frozen=True)
class Evidence:
    """What stands behind a claim about all depths."""

    whole: float
    """e-value of a multiplier other than 1 over all depths."""
    any: float
    """e-value of any difference, over all or at one depth: claims are made from 20 on."""
    p: float | None
    """Of m = 1, two-sided, for one look alone; None without noise."""
    always: Interval
    """m; in 95 % of sequences of looks no such interval leaves the truth out."""
    free: int
    """Degrees of freedom of the noise."""


@dataclass(frozen=True)
class Comparison:
    """The answer of `compare`."""

    base: str
    """Name of the base."""
    candidate: str
    """Name of the candidate."""
    axis: str
    """`flops` or `seconds`: what m multiplies."""
    base_trials: tuple[Trial, ...]
    """Runs of the base."""
    candidate_trials: tuple[Trial, ...]
    """Runs of the candidate."""
    multiplier: Interval
    """m over all shared depths; unknown where the base's loss is not known to fall with compute."""
    difference: Interval
    """Mean ln loss over all shared depths, candidate minus base."""
    per_depth: tuple[AtDepth, ...]
    """Shared depths, smallest first."""
    homogeneity: Homogeneity | None
    """None without replicate seeds, or at one depth."""
    trend: Trend | None
    """None with fewer than three depths."""
    evidence: Evidence
    """Of the verdict."""
    curve: Curve
    """Of the base."""
    gaps: Gaps
    """What the numbers stand on."""
    test: Effect
    """ln m as read where it is 0, which needs no slope; minus the difference of ln loss where there is none."""

    @property
    def noise(self) -> Noise | None:
        """Of ln loss of a run; None where nothing holds it."""
        if self.gaps.sigma is not None:
            return Noise(self.gaps.sigma, "replicate seeds")
        unit = self.test.error * np.sqrt(self.gaps.weight @ self.gaps.slope**2)
        return Noise(float(unit), "scatter of the gaps") if self.test.free else None

    @property
    def mixed(self) -> list[str]:
        """Axes of the runs, where they are on several; none on one."""
        return axes_of(_parts(self))

    @property
    def verdict(self) -> Verdict:
        """The answer; of several axes it says so."""
        found = self._verdict
        return replace(found, sentence=f"Mixed axes: {found.sentence}") if self.mixed else found

    @property
    def _verdict(self) -> Verdict:
        return decide(
            (self.base, self.candidate),
            _amount(self),
            {own.depth: own.claim for own in self.per_depth},
            _whole(self),
            _shrinking(self),
            _within(self.evidence.always),
            self.test.free > 0,
            _advice(self),
        )

    @property
    def cautions(self) -> list[FitWarning]:
        """What a reader must know before using a number, `warnings` of the document."""
        return [*mixture(_parts(self)), *_data_cautions(self), *_claim_cautions(self)]

    @property
    def missing(self) -> dict[str, list[int]]:
        """Depths that only the other recipe has, by recipe's side."""
        own, other = (
            {trial.depth for trial in side} for side in (self.base_trials, self.candidate_trials)
        )
        return {"base": sorted(other - own), "candidate": sorted(own - other)}

    def document(self) -> dict[str, Any]:
        """As JSON, without NaN: null is what is not known. Differences of ln loss; m multiplies the base's compute."""
        always, noise = self.evidence.always, self.noise
        return {
            "base": {"name": self.base, "run_ids": sorted(own.run_id for own in self.base_trials)},
            "candidate": {
                "name": self.candidate,
                "run_ids": sorted(own.run_id for own in self.candidate_trials),
            },
            "comparison_key": None if self.mixed else self.base_trials[0].comparison_key,
            "mixed": self.mixed,
            "axis": self.axis,
            "compute_multiplier": {
                **self.multiplier.document(),
                "always": [always.low, always.high],
            },
            "difference": self.difference.document(),
            "per_depth": [_depth(own) for own in self.per_depth],
            "homogeneity": asdict(self.homogeneity) if self.homogeneity else None,
            "trend": asdict(self.trend) if self.trend else None,
            "verdict": asdict(self.verdict),
            "evidence": {
                "e_value": self.evidence.any,
                "e_value_over_all": self.evidence.whole,
                "needed": ENOUGH,
                "p_of_one_look": self.evidence.p,
                "degrees_of_freedom": self.evidence.free,
            },
            "noise": {
                "sigma": noise.sigma if noise else None,
                "source": noise.source if noise else None,
                "seed_correlation": self.gaps.correlation,
            },
            "missing": self.missing,
            "warnings": [vars(caution) for caution in self.cautions],
        }


def compare(
    base: Sequence[Trial],
    candidate: Sequence[Trial],
    names: tuple[str, str],
    axis: str = "flops",
    mixed: bool = False,
) -> Comparison:
    """How many times its compute, FLOPs or seconds by `axis`, the base needs for the candidate's loss.

    `names` are those of base and candidate. Depths of one side alone are not compared, the base's still shape its
    curve. Where that curve is not known to fall, m is not known and the claims are about the losses. `mixed` takes
    several comparison keys as one axis, on the caller's word. Raises NotComparable for several comparison keys
    otherwise, no shared depth, or compute that differs and cannot be accounted for;
    ValueError for no run, a run given twice, FLOPs that differ among the seeds of a depth, an unknown axis, or a run
    without seconds.
    """
    _check(base, candidate, names, axis, mixed)
    ladders = _ladder(base, names[0], axis), _ladder(candidate, names[1], axis)
    shared = _shared(ladders, names)
    curve, gaps = measure(*ladders)
    if not curve.falls:
        _same_compute(ladders, shared, axis)
    h = common(gaps) if curve.falls else None
    (test, _), (best, between) = solve(curve, gaps, 0.0), solve(curve, gaps, h or 0.0)
    evidence, parts = _evidence(gaps, test, None if h is None else best)
    return Comparison(
        base=names[0],
        candidate=names[1],
        axis=axis,
        base_trials=tuple(base),
        candidate_trials=tuple(candidate),
        multiplier=Interval(None) if h is None else _powers(best.interval(quantile(best.free))),
        difference=_difference(curve, gaps),
        per_depth=_per_depth(shared, ladders, curve, gaps, parts, shown(parts, evidence.any)),
        homogeneity=None if h is None else _homogeneity(gaps, between),
        trend=None if h is None else _trend(curve, gaps, h),
        evidence=evidence,
        curve=curve,
        gaps=gaps,
        test=test,
    )


def _check(
    base: Sequence[Trial],
    candidate: Sequence[Trial],
    names: tuple[str, str],
    axis: str,
    mixed: bool,
) -> None:
    if axis not in AXES:
        raise ValueError(f"axis is {axis!r}; known are {', '.join(AXES)}")
    for name, side in zip(names, (base, candidate)):
        if not side:
            raise ValueError(f"{name} has no finished run to compare")
    ids = Counter(trial.run_id for trial in (*base, *candidate))
    name, count = ids.most_common(1)[0]
    if count > 1:
        raise ValueError(f"run {name} is given twice; a run belongs to one recipe, once")
    told = differences([parts_of(trial.comparison_key) for trial in (*base, *candidate)])
    if told and not mixed:
        raise NotComparable(
            f"the runs are not on one axis: {told}; name runs of one axis, or {ALLOW}"
        )


def _ladder(trials: Sequence[Trial], name: str, axis: str) -> dict[int, Rung]:
    """Depth -> its runs."""
    runs = defaultdict(list)
    for trial in sorted(trials, key=lambda own: (own.depth, own.seed)):
        if getattr(trial, axis) is None:
            raise ValueError(
                f"run {trial.run_id}: {axis} is not known, so {AXES[axis]} cannot be compared"
            )
        runs[trial.depth].append(trial)
    for depth, own in runs.items():
        least, most = min(trial.flops for trial in own), max(trial.flops for trial in own)
        if most > least * (1 + SAME):
            raise ValueError(
                f"{name} has runs of {least:.3g} and of {most:.3g} FLOPs at d{depth}: compare one ladder"
            )
    return {
        depth: Rung(
            compute=fmean(math.log(getattr(trial, axis)) for trial in own),
            flops=fmean(trial.flops for trial in own),
            losses=np.log([trial.loss for trial in own]),
            seeds=tuple(trial.seed for trial in own),
        )
        for depth, own in runs.items()
    }


def _shared(ladders: tuple[dict[int, Rung], dict[int, Rung]], names: tuple[str, str]) -> list[int]:
    shared = sorted(ladders[0].keys() & ladders[1].keys())
    if not shared:
        owned = " and ".join(f"{name} has {spoken(list(own))}" for name, own in zip(names, ladders))
        raise NotComparable(f"{owned}: no depth is shared, so there is nothing to compare")
    return shared


def _same_compute(
    ladders: tuple[dict[int, Rung], dict[int, Rung]], shared: Sequence[int], axis: str
) -> None:
    """Refuse gaps at different compute where the slope that would account for it is not known."""
    for depth in shared:
        times = float(np.exp(ladders[1][depth].compute - ladders[0][depth].compute))
        if abs(np.log(times)) > np.log1p(SAME):
            raise NotComparable(
                f"at d{depth} the recipes differ {times:.3g} times in {AXES[axis]}, and how the base's loss falls with "
                "it is not known: run the base at more depths"
            )


def _parts(found: Comparison) -> list[dict[str, str]]:
    return [
        parts_of(trial.comparison_key) for trial in (*found.base_trials, *found.candidate_trials)
    ]


def _evidence(gaps: Gaps, test: Effect, best: Effect | None) -> tuple[Evidence, Array]:
    """Over all depths and, as an array, of each depth; `best` is the effect that a multiplier is of."""
    information = float(gaps.weight.sum())
    whole = float(e_value(test.t, test.free, information))
    spread = np.maximum(
        gaps.variance or 1.0, gaps.own
    )  # a depth noisier than the others is judged by its own seeds
    parts = e_value(gaps.gap * np.sqrt(gaps.weight / spread), gaps.free, gaps.weight)
    always = _powers(best.interval(radius(best.free, information))) if best else Interval(None)
    return Evidence(whole, joint(whole, parts), test.p, always, test.free), parts


def _per_depth(
    shared: Sequence[int],
    ladders: tuple[dict[int, Rung], dict[int, Rung]],
    curve: Curve,
    gaps: Gaps,
    parts: Array,
    claimed: NDArray[np.bool_],
) -> tuple[AtDepth, ...]:
    reach, error = quantile(gaps.free), np.sqrt(gaps.variance / gaps.weight)
    effects, found = at_depths(curve, gaps), []
    for k, depth in enumerate(shared):
        base, candidate = (ladder[depth] for ladder in ladders)
        effect, gap = effects[k], float(gaps.gap[k])
        found.append(
            AtDepth(
                depth=depth,
                flops=candidate.flops,
                base=len(base.seeds),
                candidate=len(candidate.seeds),
                difference=Effect(gap, float(error[k]), gaps.free).interval(reach),
                multiplier=_powers(effect.interval(reach)) if effect else Interval(None),
                evidence=float(parts[k]),
                claim=("better" if gap < 0 else "worse") if claimed[k] else None,
            )
        )
    return tuple(found)


def _powers(logs: Interval) -> Interval:
    """Of ln m -> of m; what overflows is open."""
    ends = [
        None if end is None or abs(end) > 600 else math.exp(end)
        for end in (logs.estimate, logs.low, logs.high)
    ]
    return Interval(ends[0], ends[1], ends[2], None not in ends)


def _difference(curve: Curve, gaps: Gaps) -> Interval:
    """Of ln loss over all depths: minus what h is where the slope is -1 and known."""
    plain = replace(gaps, slope=-np.ones(len(gaps.gap)), bend=0.0)
    own, _ = solve(curve, plain, 0.0)
    return replace(own, estimate=-own.estimate).interval(quantile(own.free))


def _homogeneity(gaps: Gaps, between: float) -> Homogeneity | None:
    degrees = [len(gaps.gap) - 1, gaps.free]
    if min(degrees) < 1:
        return None
    statistic = between / degrees[0] / gaps.variance
    return Homogeneity(statistic, degrees, float(special.fdtrc(degrees[0], degrees[1], statistic)))


def _trend(curve: Curve, gaps: Gaps, h: float) -> Trend | None:
    if len(gaps.gap) < 3 or np.ptp(gaps.compute) < 0.01:
        return None
    own, _ = solve(curve, gaps, h, trend=True)
    line = h + own.estimate * (gaps.compute[[0, -1]] - gaps.middle(h))
    evidence = float(e_value(own.t, own.free, gaps.weight.sum()))
    return Trend(own.interval(quantile(own.free)), own.p, evidence, np.exp(line).tolist())


def _whole(found: Comparison) -> str | None:
    """What is shown over all depths."""
    if min(found.evidence.whole, found.evidence.any) < ENOUGH:
        return None
    return "better" if found.test.estimate > 0 else "worse"


def _amount(found: Comparison) -> str:
    if found.multiplier.estimate is not None:
        return (
            f"{found.base} would need {found.multiplier.text('.3g')} times the {AXES[found.axis]}"
        )
    return f"its ln loss differs by {found.difference.text('+.2g', 100)} %"


def _shrinking(found: Comparison) -> str | None:
    if not found.trend or found.trend.evidence < ENOUGH or (found.trend.slope.estimate or 0.0) >= 0:
        return None
    first, last = (own.depth for own in (found.per_depth[0], found.per_depth[-1]))
    return f"from {found.trend.ends[0]:.3g} at d{first} to {found.trend.ends[1]:.3g} at d{last}"


def _within(always: Interval) -> float | None:
    """How far from 1 m may be, as a share of compute."""
    return max(1 / always.low, always.high) - 1 if always.low and always.high else None


def _advice(found: Comparison) -> Advice | None:
    if found.evidence.any >= ENOUGH:
        return None
    runs = np.array([[own.base, own.candidate] for own in found.per_depth], float).T
    base = {own.depth: own.flops for own in found.base_trials}
    flops = np.array([own.flops + base[own.depth] for own in found.per_depth])
    return advise(found.gaps, found.test, runs, flops, [own.depth for own in found.per_depth])


def _data_cautions(found: Comparison) -> list[FitWarning]:
    cautions = [
        FitWarning(
            "missing_depths", f"{name} has no run at {spoken(missing)}, where nothing is compared"
        )
        for name, missing in zip((found.base, found.candidate), found.missing.values())
        if missing
    ]
    if not found.gaps.free:
        message = "no seed is repeated: noise is how far the depths disagree, and no depth can be judged alone"
        cautions.append(FitWarning("no_replicates", message))
    if found.test.free < FEW:
        message = f"the noise has {found.test.free} degrees of freedom: further seeds would narrow every interval"
        cautions.append(FitWarning("noise_uncertain", message))
    if not found.curve.falls:
        message = f"the loss of {found.base} is not known to fall with {AXES[found.axis]}, so losses alone are compared"
        cautions.append(FitWarning("no_slope", message))
    elif found.multiplier.estimate is None:
        cautions.append(
            FitWarning(
                "out_of_reach", f"the curve of {found.base} never comes to the candidate's losses"
            )
        )
    base = {own.depth: own.flops for own in found.base_trials}
    far = [
        own.depth
        for own in found.per_depth
        if abs(math.log(own.flops / base[own.depth])) > math.log1p(FAR)
    ]
    if far:
        message = f"the recipes' FLOPs differ by more than {FAR:.0%} at {spoken(far)}; the base's slope accounts for it"
        cautions.append(FitWarning("compute_differs", message))
    return cautions


def _claim_cautions(found: Comparison) -> list[FitWarning]:
    cautions = []
    flops = [own.flops for own in found.base_trials]
    reached = [
        own.flops * own.multiplier.estimate for own in found.per_depth if own.multiplier.estimate
    ]
    if (
        found.axis == "flops"
        and reached
        and (max(reached) > BEYOND * max(flops) or BEYOND * min(reached) < min(flops))
    ):
        message = f"multipliers lead more than {BEYOND:g} times outside the compute of {found.base}: extrapolated"
        cautions.append(FitWarning("multiplier_extrapolated", message))
    if found.homogeneity and found.homogeneity.p < UNLIKELY:
        message = f"one multiplier does not fit all depths (p = {found.homogeneity.p:.2g}): it is their mean"
        cautions.append(FitWarning("depths_differ", message))
    if found.trend and found.trend.evidence >= ENOUGH:
        message = "the multiplier changes with compute: beyond the depths compared it is not known"
        cautions.append(FitWarning("trend", message))
    if found.evidence.p is not None and found.evidence.p < UNLIKELY and found.evidence.any < ENOUGH:
        message = (
            f"in one planned look the difference is significant (p = {found.evidence.p:.2g}), but seeds added until "
            f"it is make that so too: a claim takes an e-value of {ENOUGH:g}, this is {found.evidence.any:.2g}"
        )
        cautions.append(FitWarning("one_look_only", message))
    return cautions


def _depth(own: AtDepth) -> dict[str, Any]:
    counts = {
        "depth": own.depth,
        "flops": own.flops,
        "base_runs": own.base,
        "candidate_runs": own.candidate,
    }
    return {**counts, **own.multiplier.document(), "difference": own.difference.document()} | {
        "e_value": own.evidence,
        "claim": own.claim,
    }
