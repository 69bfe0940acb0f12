"""Selection of a form by leave-largest-out: fit the smaller runs, predict the larger ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from slm.fits.intervals import Interval
from slm.fits.power_law import root_mean_square
from slm.fits.types import Array, to_json

HOLD_OUT_LEVEL = 0.9
"""Level of the intervals in which held-out runs should lie."""
VALIDATED_SHARE = 0.8
"""Share of the held-out runs inside their 90 % intervals that validates a prediction."""
SAME_COMPUTE = 0.01
"""Computes whose logarithms differ by less count as one: replicates, or rounded steps."""

T = TypeVar("T")


@dataclass(frozen=True)
class HeldOutRun:
    """A held-out run and its prediction."""

    flops: float
    loss: float
    """Measured loss."""
    prediction: Interval
    """Loss of a further run at this compute, with its 90 % interval."""

    @property
    def covered(self) -> bool:
        """Whether the measured loss lies in the interval; an open end contains everything."""
        low, high = self.prediction.low, self.prediction.high
        return (low is None or low <= self.loss) and (high is None or self.loss <= high)


@dataclass(frozen=True)
class HoldOut:
    """A form fitted to the runs up to some compute, and its predictions of all larger runs."""

    flops: float
    """Largest compute among the fitted runs, FLOPs."""
    fitted: int
    """Number of fitted runs."""
    form: str
    predicted: tuple[HeldOutRun, ...]

    @property
    def factor(self) -> float:
        """Compute of the largest held-out run over that of the largest fitted run."""
        return max(run.flops for run in self.predicted) / self.flops

    @property
    def covered(self) -> float:
        """Share of the held-out runs inside their intervals."""
        return sum(run.covered for run in self.predicted) / len(self.predicted)

    @property
    def log_errors(self) -> Array:
        """Errors of ln loss, (held,); positive where the prediction is too high."""
        return np.log([(run.prediction.estimate or 0.0) / run.loss for run in self.predicted])

    @property
    def error(self) -> float:
        """Root mean square error of ln loss."""
        return root_mean_square(self.log_errors)

    @property
    def bias(self) -> float:
        """Mean error of ln loss; positive predicts too high a loss."""
        return self.log_errors.mean()

    def document(self) -> dict[str, Any]:
        """Return the JSON document, without the single runs."""
        return {
            "flops": self.flops,
            "kept": self.fitted,
            "held": len(self.predicted),
            "factor": self.factor,
            "form": self.form,
            "error": self.error,
            "bias": self.bias,
            "covered": self.covered,
            "level": HOLD_OUT_LEVEL,
        }

    def run_documents(self) -> list[dict[str, Any]]:
        """Return the JSON documents of the held-out runs."""
        return [
            {
                "flops": run.flops,
                "loss": run.loss,
                "covered": run.covered,
                **to_json(run.prediction),
            }
            for run in self.predicted
        ]


def validated_factor(hold_outs: Sequence[HoldOut]) -> float:
    """Return the greatest factor beyond the fitted runs up to which predictions are validated.

    Up to it, VALIDATED_SHARE of the held-out runs are inside their intervals; 1 if there is none.
    """
    runs = [
        (run.flops / hold_out.flops, run.covered)
        for hold_out in hold_outs
        for run in hold_out.predicted
    ]
    validated = 1.0
    inside = 0
    for count, (factor, covered) in enumerate(sorted(runs), 1):
        inside += covered
        if covered and inside >= VALIDATED_SHARE * count:
            validated = factor
    return validated


def preferred_form(
    errors: Mapping[str, float] | None,
    criteria: Mapping[str, float | None],
    sigma: float,
    held_out: str,
    simplest: str,
) -> tuple[str, str]:
    """Return the form that predicts held-out runs better, and the reason.

    Errors that differ by less than `sigma`, the noise of a run, decide nothing. Then the lower AICc
    in `criteria` decides or, if the runs are too few for one (None), the `simplest` form is taken.
    `held_out` describes the runs in the reason; `errors` is None if none could be held out.
    """
    tie = f"no {held_out} could be held out"
    if errors:
        percents = ", ".join(f"{form} {100 * error:.2g} %" for form, error in errors.items())
        if max(errors.values()) - min(errors.values()) > sigma:
            best = min(errors, key=errors.__getitem__)
            return best, f"lower error on the {held_out}, held out: {percents}"
        tie = f"errors on the {held_out}, held out, differ by less than the noise ({percents})"
    if None in criteria.values():
        return simplest, f"{tie}; the runs are too few for AICc, so the simpler form"
    return min(criteria, key=lambda form: criteria[form] or 0.0), f"{tie}; lower AICc"


def count_computes(flops: Array) -> int:
    """Return the number of distinct computes; those within SAME_COMPUTE count as one."""
    return len(flops) and 1 + len(hold_out_limits(flops))


def hold_out_limits(flops: Array) -> Array:
    """Return the upper end of each distinct compute but the largest, ascending.

    A hold-out fits the runs up to such a limit and predicts the rest.
    """
    rising = np.sort(flops)
    return rising[:-1][np.diff(np.log(rising)) > SAME_COMPUTE]


def evenly_chosen(values: Sequence[T], count: int) -> list[T]:
    """Return at most `count` of the values, evenly spaced, with the first and the last."""
    indices = np.linspace(0, len(values) - 1, min(count, len(values))).round().astype(int)
    return [values[index] for index in np.unique(indices)]
