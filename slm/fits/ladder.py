"""Which law L(C) the runs of one dial hold: both forms fitted, each asked for larger compute than it has seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slm.fits.intervals import Interval
from slm.fits.isoflop import Minimum, Valley, minima_of
from slm.fits.points import Point
from slm.fits.power_law import (
    ADDITIVE,
    PARAMETERS,
    PURE,
    Array,
    Law,
    Noise,
    aicc,
    fit_law,
    least,
    noise_of,
    predict,
)

TESTED = 0.9
"""Level of the intervals that held-out runs are asked to lie in."""
RIGHT = 0.8
"""Share of 90 % intervals that must hold what came for a prediction to count as validated."""
RUNGS = 12
"""Hold-outs at most."""
SAME = 0.01
"""Computes whose logarithms are nearer than this are one."""

Run = Point | Minimum


@dataclass(frozen=True)
class Predicted:
    """One run held out."""

    flops: float
    """Compute, FLOPs."""
    loss: float
    """What came."""
    said: Interval
    """What was predicted, with the 90 % interval of a further run."""

    @property
    def covered(self) -> bool:
        """Whether what came lies inside."""
        low, high = self.said.low, self.said.high
        return (low is None or low <= self.loss) and (high is None or self.loss <= high)


@dataclass(frozen=True)
class HoldOut:
    """Runs up to some compute kept, the law they hold chosen and fitted as ever, and asked for the rest."""

    flops: float
    """Largest compute kept, FLOPs."""
    kept: int
    """Runs kept."""
    form: str
    """The law they held."""
    predicted: tuple[Predicted, ...]
    """Runs held out, all of larger compute."""

    @property
    def factor(self) -> float:
        """How far the largest held out is beyond the largest kept."""
        return max(run.flops for run in self.predicted) / self.flops

    @property
    def covered(self) -> float:
        """Share of the runs inside their interval."""
        return sum(run.covered for run in self.predicted) / len(self.predicted)

    def document(self) -> dict[str, Any]:
        """As JSON: errors of ln loss, positive where too high a loss was predicted."""
        errors = np.log([(run.said.estimate or 0.0) / run.loss for run in self.predicted])
        return {
            "flops": self.flops,
            "kept": self.kept,
            "held": len(self.predicted),
            "factor": self.factor,
            "form": self.form,
            "error": float(np.sqrt(np.mean(errors**2))),
            "bias": float(errors.mean()),
            "covered": self.covered,
            "level": TESTED,
            "predicted": [
                {
                    "flops": run.flops,
                    "loss": run.loss,
                    "covered": run.covered,
                    **run.said.document(),
                }
                for run in self.predicted
            ],
        }


@dataclass(frozen=True)
class Choice:
    """One form of L(C), and how it was chosen."""

    law: Law | None
    """The law chosen; None with too few computes."""
    rival: Law | None
    """The other form; None where the runs could not hold it."""
    why: str
    """Why this form, or why none."""
    code: str | None
    """Stable name of why there is none."""
    errors: dict[str, float] | None
    """Root mean square log error at the largest compute, held out, by form; None when too few are left."""
    hold_outs: tuple[HoldOut, ...]
    """By the compute kept."""

    @property
    def tested(self) -> float:
        """How far beyond its runs the law has been right."""
        return validated(
            [
                (run.flops / own.flops, run.covered)
                for own in self.hold_outs
                for run in own.predicted
            ]
        )


def validated(predicted: Sequence[tuple[float, bool]]) -> float:
    """The greatest factor up to which RIGHT of the runs held out were inside their interval; 1 for none.

    `predicted` are how far a run lay beyond those kept, and whether it was inside.
    """
    reach, inside = 1.0, 0
    for number, (factor, covered) in enumerate(sorted(predicted), 1):
        inside += covered
        if covered and inside >= RIGHT * number:
            reach = factor
    return reach


def choose(runs: Sequence[Run], through: str) -> Choice:
    """The form that predicts the largest compute better, fitted; the other beside it. `through` names the runs."""
    flops, losses = columns_of(runs)
    if computes(flops) <= PARAMETERS[PURE]:
        count = (
            f"{computes(flops)} different compute{'s' * (computes(flops) != 1)} among the {through}"
        )
        why = f"{count}; a law takes 3, one with a floor 4: run more depths or budgets"
        return Choice(None, None, why, "too_few_runs", None, ())
    noise = _noise(runs)
    form, why, errors = _form(flops, losses, noise)
    rival = {ADDITIVE: PURE, PURE: ADDITIVE}[form] if errors else None
    return Choice(
        law=fit_law(form, flops, losses, noise),
        rival=fit_law(rival, flops, losses, noise) if rival else None,
        why=why,
        code=None,
        errors=errors,
        hold_outs=_hold_outs(runs, flops),
    )


def law_runs(points: Sequence[Point], valleys: Sequence[Valley]) -> list[Point] | list[Minimum]:
    """What L(C) goes through: the runs without a budget, else the resolved minima."""
    ladder = [point for point in points if point.budget is None]
    return ladder or minima_of(valleys)


def columns_of(runs: Sequence[Run]) -> tuple[Array, Array]:
    """FLOPs and losses, (n,) each."""
    return np.array([run.flops for run in runs], float), np.array([run.loss for run in runs], float)


def computes(flops: Array) -> int:
    """Different computes; replicates and the rounding of steps aside, one within a percent."""
    return len(flops) and 1 + len(tops(flops))


def tops(flops: Array) -> Array:
    """The largest of each different compute, but of the last: up to where runs may be kept, and the rest held out."""
    rising = np.sort(flops)
    return np.asarray(rising[:-1][np.diff(np.log(rising)) > SAME])


def _noise(runs: Sequence[Run]) -> Noise:
    flops, losses = columns_of(runs)
    widest = ADDITIVE if computes(flops) > PARAMETERS[ADDITIVE] else PURE
    return noise_of([run for run in runs if isinstance(run, Point)], flops, losses, widest)


def _form(flops: Array, losses: Array, noise: Noise) -> tuple[str, str, dict[str, float] | None]:
    """The form, why, and each form's error at the largest compute, held out."""
    if computes(flops) <= PARAMETERS[ADDITIVE]:
        return PURE, "3 computes do not hold a floor: that takes 4", None
    held, found = (
        np.log(flops.max() / flops) <= SAME,
        {form: least(form, flops, losses, noise) for form in PARAMETERS},
    )
    missed = {
        form: predict(form, flops[~held], losses[~held], noise, flops[held]) for form in PARAMETERS
    }
    errors = {
        form: float(np.sqrt(np.mean(np.log(own / losses[held]) ** 2)))
        for form, own in missed.items()
    }
    floor, scale, _ = found[ADDITIVE][1]
    if min(floor, scale) == 0:
        return (
            PURE,
            "the best floor is 0" if floor == 0 else "the loss does not fall with compute",
            errors,
        )
    said = ", ".join(f"{form} {100 * error:.2g} %" for form, error in errors.items())
    if abs(errors[ADDITIVE] - errors[PURE]) > noise.sigma:
        return (
            min(errors, key=errors.__getitem__),
            f"error at the largest compute, held out: {said}",
            errors,
        )
    criteria = {
        form: aicc(objective, len(flops), PARAMETERS[form])
        for form, (_, _, objective) in found.items()
    }
    tie = f"held out, the largest compute tells them apart by less than the noise ({said})"
    if None in criteria.values():
        return PURE, f"{tie} and {len(flops)} runs are too few for AICc: the simpler law", errors
    return min(criteria, key=lambda form: criteria[form] or 0.0), f"{tie}; the lower AICc", errors


def _hold_outs(runs: Sequence[Run], flops: Array) -> tuple[HoldOut, ...]:
    """Leave-largest-out at every compute that keeps a law with two degrees of freedom, RUNGS of them at most.

    With one, an interval is so wide that what came proves nothing.
    """
    able = np.array(
        [
            top
            for top in tops(flops)[PARAMETERS[PURE] :]
            if (flops <= top).sum() >= PARAMETERS[PURE] + 2
        ]
    )
    chosen = able[
        np.unique(np.linspace(0, len(able) - 1, min(RUNGS, len(able))).round().astype(int))
    ]
    return tuple(_hold_out(runs, flops, float(top)) for top in chosen)


def _hold_out(runs: Sequence[Run], flops: Array, top: float) -> HoldOut:
    kept = [run for run, own in zip(runs, flops) if own <= top]
    columns, noise = columns_of(kept), _noise(kept)
    form, *_ = _form(*columns, noise)
    law = fit_law(form, *columns, noise, level=TESTED)
    beyond = [(run, law.prediction(run.flops)) for run, own in zip(runs, flops) if own > top]
    return HoldOut(
        top, len(kept), form, tuple(Predicted(run.flops, run.loss, said) for run, said in beyond)
    )
