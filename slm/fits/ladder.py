"""Selection of a law L(C): both forms fitted, and one selected by predicting larger compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slm.fits.isoflop import IsoFlopCurve, Minimum, minima_of
from slm.fits.points import Point
from slm.fits.power_law import (
    ADDITIVE,
    PARAMETERS,
    PURE,
    Law,
    Noise,
    aicc,
    best_law,
    fit_law,
    noise_of,
    root_mean_square,
)
from slm.fits.select import (
    HOLD_OUT_LEVEL,
    SAME_COMPUTE,
    HeldOutRun,
    HoldOut,
    count_computes,
    evenly_chosen,
    hold_out_limits,
    preferred_form,
    validated_factor,
)
from slm.fits.types import Array

MAX_HOLD_OUTS = 12

Run = Point | Minimum


@dataclass(frozen=True)
class Selection:
    """The selected form of L(C), and why it was selected."""

    law: Law | None
    """None with too few distinct computes."""
    rival: Law | None
    """The other form; None if the runs cannot hold it."""
    why: str
    """Reason for this form, or for none."""
    code: str | None = None
    """Stable name of the reason for none."""
    errors: dict[str, float] | None = None
    """Root mean square error of ln loss at the largest compute, held out, by form."""
    hold_outs: tuple[HoldOut, ...] = ()
    """Leave-largest-out fits, by compute."""

    @property
    def validated_factor(self) -> float:
        """Factor beyond its runs up to which the law has predicted correctly."""
        return validated_factor(self.hold_outs)


def select_law(runs: Sequence[Run], through: str) -> Selection:
    """Fit both forms of L(C) and select the better predictor of the largest compute.

    `through` describes the runs in messages. Too few runs are no error: the selection has no law.
    """
    flops, losses = columns_of(runs)
    computes = count_computes(flops)
    if computes <= PARAMETERS[PURE]:
        why = (
            f"{computes} different compute{'s' * (computes != 1)} among the {through}; a law takes "
            "3, one with a floor 4: run more depths or budgets"
        )
        return Selection(None, None, why, "too_few_runs")
    noise = _noise(runs)
    form, why, errors = _select_form(flops, losses, noise)
    rival = PURE if form == ADDITIVE else ADDITIVE
    return Selection(
        law=fit_law(form, flops, losses, noise),
        rival=fit_law(rival, flops, losses, noise) if errors else None,
        why=why,
        errors=errors,
        hold_outs=_hold_outs(runs, flops),
    )


def law_runs(
    points: Sequence[Point], curves: Sequence[IsoFlopCurve]
) -> list[Point] | list[Minimum]:
    """Return the runs that L(C) is fitted to: those without a budget, else the resolved minima."""
    ladder = [point for point in points if point.budget is None]
    return ladder or minima_of(curves)


def columns_of(runs: Sequence[Run]) -> tuple[Array, Array]:
    """Return FLOPs and losses of the runs, (n,) each."""
    flops = np.array([run.flops for run in runs], float)
    losses = np.array([run.loss for run in runs], float)
    return flops, losses


def _noise(runs: Sequence[Run]) -> Noise:
    flops, losses = columns_of(runs)
    widest = ADDITIVE if count_computes(flops) > PARAMETERS[ADDITIVE] else PURE
    return noise_of([run for run in runs if isinstance(run, Point)], flops, losses, widest)


def _select_form(
    flops: Array, losses: Array, noise: Noise
) -> tuple[str, str, dict[str, float] | None]:
    """Return a form, the reason, and each form's error at the largest compute, held out."""
    if count_computes(flops) <= PARAMETERS[ADDITIVE]:
        return PURE, "3 computes do not hold a floor: that takes 4", None
    held = np.log(flops.max() / flops) <= SAME_COMPUTE
    errors = {}
    criteria = {}
    for form, parameters in PARAMETERS.items():
        smaller = best_law(form, flops[~held], losses[~held], noise)
        errors[form] = root_mean_square(np.log(smaller.loss(flops[held]) / losses[held]))
        law = best_law(form, flops, losses, noise)
        criteria[form] = aicc(law.objective, law.n, parameters)
        if form == ADDITIVE:
            floor, scale, _ = law.best
    if floor == 0:
        return PURE, "the best floor is 0", errors
    if scale == 0:
        return PURE, "the loss does not fall with compute", errors
    held_out = "runs of the largest compute"
    form, why = preferred_form(errors, criteria, noise.sigma, held_out, PURE)
    return form, why, errors


def _hold_outs(runs: Sequence[Run], flops: Array) -> tuple[HoldOut, ...]:
    """Hold out the larger runs at every compute that leaves a law two degrees of freedom.

    With one, an interval is so wide that covering a run proves nothing.
    """
    limits = [
        limit
        for limit in hold_out_limits(flops)[PARAMETERS[PURE] :].tolist()
        if (flops <= limit).sum() >= PARAMETERS[PURE] + 2
    ]
    return tuple(_hold_out(runs, limit) for limit in evenly_chosen(limits, MAX_HOLD_OUTS))


def _hold_out(runs: Sequence[Run], limit: float) -> HoldOut:
    smaller = [run for run in runs if run.flops <= limit]
    flops, losses = columns_of(smaller)
    noise = _noise(smaller)
    form, *_ = _select_form(flops, losses, noise)
    law = fit_law(form, flops, losses, noise, level=HOLD_OUT_LEVEL)
    predicted = [
        HeldOutRun(run.flops, run.loss, law.prediction(run.flops))
        for run in runs
        if run.flops > limit
    ]
    return HoldOut(limit, law.n, form, tuple(predicted))
