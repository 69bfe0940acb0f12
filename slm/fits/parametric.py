"""Selection of a surface L(N, D): every form fitted, held out by compute, and resampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slm.fits.intervals import Ends, Interval
from slm.fits.isoflop import Minimum
from slm.fits.points import Point
from slm.fits.power_law import REACH, Noise, aicc
from slm.fits.select import (
    HOLD_OUT_LEVEL,
    HeldOutRun,
    HoldOut,
    evenly_chosen,
    hold_out_limits,
    preferred_form,
    validated_factor,
)
from slm.fits.surface import (
    FORMS,
    Surface,
    fit_row,
    fit_surface,
    frontier,
    loss_data,
    noise_around,
    obstacle,
    predict_runs,
    quantities,
    refit_rows,
)
from slm.fits.types import to_json

MIN_RESAMPLED_RUNS = 30
"""Fewer runs are not resampled."""
RESAMPLES = 1000
MAX_HOLD_OUTS = 8
DECISIVE_SHARE = 0.2
"""Share of the runs, those of the largest compute, whose prediction selects the form."""

HoldOuts = Mapping[str, HoldOut]
"""Hold-outs of the same runs, by form."""


@dataclass(frozen=True)
class Bootstrap:
    """Fits to runs drawn with replacement, within their budgets if they have one."""

    resamples: int
    strata: int
    """Number of budgets drawn within; 1 if the runs have none."""
    errors: dict[str, float | None]
    """Standard errors of QUANTITIES; those of A and B have long tails, or are None."""
    ends: dict[str, Ends]
    """2.5 and 97.5 % quantiles of QUANTITIES; None if unbounded."""


@dataclass(frozen=True)
class ParametricFit:
    """The selected surface, or why there is none."""

    surface: Surface | None = None
    """None if the runs cannot hold one."""
    surfaces: tuple[Surface, ...] = ()
    """All forms."""
    why: str = ""
    """Reason for this form, or for none."""
    code: str | None = None
    """Stable name of the reason for none."""
    hold_outs: tuple[HoldOuts, ...] = ()
    """Leave-largest-out fits, by compute."""
    bootstrap: Bootstrap | None = None
    """Resampling of the selected form; None with fewer than MIN_RESAMPLED_RUNS."""
    frontier: tuple[tuple[Minimum, Interval], ...] = ()
    """Compute-optimal models with the intervals of their N, up to REACH times the largest run."""

    @property
    def validated_factor(self) -> float:
        """Factor beyond its runs up to which the selected form has predicted correctly."""
        form = self.surface.form if self.surface else "additive"
        return validated_factor([by_form[form] for by_form in self.hold_outs])

    @property
    def decisive(self) -> HoldOuts | None:
        """The hold-out whose errors select the form; None if none could be made."""
        return _decisive(self.hold_outs)

    @property
    def validation(self) -> list[dict[str, Any]]:
        """JSON documents of the hold-outs of the selected form, with the errors of all forms."""
        if self.surface is None:
            return []
        return [
            by_form[self.surface.form].document() | {"errors": _errors(by_form)}
            for by_form in self.hold_outs
        ]

    def document(self) -> dict[str, Any]:
        """Return the JSON document: the selected form, all forms as `alternatives`, or why none."""
        if self.surface is None:
            return {
                "form": None,
                "identifiable": False,
                "code": self.code,
                "why": self.why,
                "alternatives": [],
            }
        frontier = []
        for model, interval in self.frontier:
            frontier.append(to_json(model) | {"params_interval": interval})
        return self.surface.document() | to_json(
            {
                "why": self.why,
                "validation": self.validation,
                "bootstrap": self.bootstrap,
                "frontier": frontier,
                "alternatives": self.surfaces,
            }
        )


def fit_parametric(
    points: Sequence[Point],
    delta: float | None = None,
    form: str | None = None,
    resamples: int = RESAMPLES,
) -> ParametricFit:
    """Fit every form, and select `form` or the better predictor of the largest compute.

    Too few runs are no error: the fit has no surface and says why.
    """
    problem = obstacle(points)
    if problem:
        return ParametricFit(why=problem[1], code=problem[0])
    noise = noise_around(points)
    surfaces = {name: fit_surface(points, name, delta, noise=noise) for name in FORMS}
    hold_outs = hold_out(points, surfaces["additive"].delta)
    why = "requested"
    if form not in surfaces:
        form, why = _select_form(surfaces, hold_outs, noise)
    selected = surfaces[form]
    flops = [point.flops for point in points]
    models = frontier(points, selected, np.geomspace(min(flops), REACH * max(flops), 5))
    enough = len(points) >= MIN_RESAMPLED_RUNS
    return ParametricFit(
        surface=selected,
        surfaces=tuple(surfaces.values()),
        why=why,
        hold_outs=hold_outs,
        bootstrap=bootstrap(points, selected, resamples) if enough else None,
        frontier=tuple(models),
    )


def hold_out(points: Sequence[Point], delta: float) -> tuple[HoldOuts, ...]:
    """Hold out the larger runs at every compute, or budget, up to which the runs hold a surface.

    MAX_HOLD_OUTS at most, the decisive one among them.
    """
    computes = np.array([point.budget or point.flops for point in points])
    fitted = []
    for limit in hold_out_limits(computes):
        below = computes <= limit * 1.001
        smaller = list(compress(points, below))
        if obstacle(smaller) is None and len(smaller) > FORMS["coupled"]:
            fitted.append(below)
    if len(fitted) > MAX_HOLD_OUTS:
        decisive = [k for k, below in enumerate(fitted) if (~below).mean() >= DECISIVE_SHARE][-1:]
        spaced = evenly_chosen(range(len(fitted)), MAX_HOLD_OUTS - 1)
        fitted = [fitted[k] for k in sorted({*decisive, *spaced})]
    return tuple(_hold_out(points, below, delta) for below in fitted)


def _hold_out(points: Sequence[Point], fitted: NDArray[np.bool_], delta: float) -> HoldOuts:
    """Fit every form to some of the runs and predict the others."""
    data = loss_data(points, delta)
    data = replace(data, weights=np.where(fitted, data.weights, 0.0))
    count = int(fitted.sum())
    largest = max(point.flops for point in compress(points, fitted))
    by_form = {}
    for form, parameters in FORMS.items():
        row, objective, *_ = fit_row(data, form)
        hessian = data.hessian(row, range(parameters))
        predicted = predict_runs(data, row, hessian, objective, count - parameters, HOLD_OUT_LEVEL)
        held_out = [
            HeldOutRun(point.flops, point.loss, prediction)
            for point, prediction in compress(zip(points, predicted), ~fitted)
        ]
        by_form[form] = HoldOut(largest, count, form, tuple(held_out))
    return by_form


def _select_form(
    surfaces: Mapping[str, Surface], hold_outs: Sequence[HoldOuts], noise: Noise
) -> tuple[str, str]:
    criteria = {
        form: aicc(surface.objective, surface.n, FORMS[form]) for form, surface in surfaces.items()
    }
    decisive = _decisive(hold_outs)
    errors = None
    held_out = "runs of the largest compute"
    if decisive:
        errors = _errors(decisive)
        held_out = f"{len(decisive['additive'].predicted)} {held_out}"
    return preferred_form(errors, criteria, noise.sigma, held_out, "additive")


def _decisive(hold_outs: Sequence[HoldOuts]) -> HoldOuts | None:
    """Return the smallest hold-out of at least DECISIVE_SHARE of the runs."""
    for by_form in reversed(hold_outs):
        hold_out = by_form["additive"]
        held = len(hold_out.predicted)
        if held >= DECISIVE_SHARE * (held + hold_out.fitted):
            return by_form
    return None


def _errors(by_form: HoldOuts) -> dict[str, float]:
    return {form: hold_out.error for form, hold_out in by_form.items()}


def bootstrap(points: Sequence[Point], surface: Surface, resamples: int = RESAMPLES) -> Bootstrap:
    """Refit the surface to resampled runs, all draws in one batch that starts from the surface."""
    # 1) draw run counts, within the budgets if all runs have one
    budgets = np.array([point.budget or 0.0 for point in points])
    if not budgets.all():
        budgets[:] = 0.0
    strata = np.unique(budgets)
    draw = np.random.default_rng(0)
    counts = np.zeros((resamples, len(points)))
    for budget in strata:
        members = np.flatnonzero(budgets == budget)
        shares = np.full(len(members), 1 / len(members))
        counts[:, members] = draw.multinomial(len(members), shares, resamples)
    # 2) fit all draws, counts being weights
    data = loss_data(points, surface.delta, surface.raw)
    rows = refit_rows(surface, data, counts * data.weights)
    # 3) spread of the quantities; A and B from their logarithms, which may overflow
    errors: dict[str, float | None] = {}
    ends: dict[str, Ends] = {}
    with np.errstate(over="ignore", invalid="ignore"):
        for name, values in quantities(rows, surface.centre).items():
            if name in "AB":
                values = np.exp(values)
            low, high = np.quantile(values, (0.025, 0.975))
            errors[name] = to_json(values.std())
            ends[name] = (to_json(low), to_json(high))
    return Bootstrap(resamples, len(strata), errors, ends)
