"""Warnings about a fit: what its runs do not determine, one cause per function.

Tests are at the 1 % level, so that sound runs seldom give a warning.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from slm.fits.checks.influence import Influence, influences
from slm.fits.checks.misfit import Misfit, centring_bias, lack_of_fit, structure
from slm.fits.checks.residuals import (
    NEGLIGIBLE,
    SIGNIFICANCE,
    half_width,
    law_residuals,
    surface_residuals,
)
from slm.fits.checks.sensitivity import SensitivityRow
from slm.fits.intervals import Interval
from slm.fits.isoflop import IsoFlopFit
from slm.fits.ladder import Selection, columns_of
from slm.fits.parametric import ParametricFit
from slm.fits.points import Point
from slm.fits.power_law import ADDITIVE, REACH, Law
from slm.fits.surface import Surface
from slm.fits.types import FitWarning

ONE_DIAL = "one_dial_no_exponents"
MAX_WIDTH_RATIO = 1.5
"""Ratio of the widths of profile and bootstrap intervals that needs no warning."""


def fit_warnings(
    points: Sequence[Point],
    selection: Selection,
    isoflop: IsoFlopFit | None,
    parametric: ParametricFit,
    rows: Sequence[SensitivityRow],
) -> list[FitWarning]:
    """Return the limits of a fit that a reader must know before using its numbers."""
    influential = influences(points, selection.law, isoflop, parametric)
    return [
        *_law_warnings(selection, points),
        *_unresolved_budgets(isoflop),
        *_centring(isoflop, parametric.surface),
        *_surface_warnings(parametric, isoflop, points),
        *_influential_runs(influential),
        *_sensitive_numbers(rows, selection.law, isoflop, parametric, bool(influential)),
    ]


def lowers_loss(law: Law) -> bool:
    """Whether compute lowers the loss at the largest run, by the whole interval."""
    low = law.gain(law.largest).low
    return low is not None and low > 1e-9  # a smaller share is rounding


def _law_warnings(selection: Selection, points: Sequence[Point]) -> Iterator[FitWarning]:
    law = selection.law
    if law is None:
        yield FitWarning(selection.code or "", selection.why)
        return
    yield from _floor(selection)
    yield from _gain(law)
    yield from _extrapolation(selection.validated_factor)
    yield from _law_lack_of_fit(law, [point for point in points if point.budget is None])


def _floor(selection: Selection) -> Iterator[FitWarning]:
    laws = [law for law in (selection.law, selection.rival) if law and law.form == ADDITIVE]
    if laws and laws[0].E.identifiable:
        return
    reason = selection.why
    if laws:
        reason = "the runs do not determine the irreducible loss E: its interval reaches 0"
    yield FitWarning("E_unidentified", f"{reason}; how far the gains continue is open")


def _gain(law: Law) -> Iterator[FitWarning]:
    if lowers_loss(law):
        return
    if law.free < 2:
        message = (
            f"the law has {law.n} computes and {law.n - law.free} parameters: further depths or "
            "budgets would narrow it"
        )
        yield FitWarning("law_loose", message)
    else:
        gain = law.gain(law.largest).text(".2g", 100)
        message = f"the runs do not show that compute lowers the loss: a doubling gives {gain} %"
        yield FitWarning("no_gain", message)


def _extrapolation(validated: float) -> Iterator[FitWarning]:
    if validated >= 0.99 * REACH:
        return
    extent = f"up to {validated:.3g} times beyond" if validated > 1 else "not beyond any run"
    message = (
        f"values up to {REACH:g} times the largest run are extrapolated; held-out runs validate "
        f"predictions {extent}"
    )
    yield FitWarning("extrapolation", message)


def _law_lack_of_fit(law: Law, ladder: Sequence[Point]) -> Iterator[FitWarning]:
    if len(ladder) != law.n:
        return
    residuals, jacobian = law_residuals(law, *columns_of(ladder))
    misfit = lack_of_fit(ladder, residuals, len(jacobian))
    if misfit is None or misfit.p > SIGNIFICANCE:
        return
    message = (
        f"depths scatter {100 * misfit.spread:.2g} % around the law {law.form} where seeds scatter "
        f"{100 * misfit.noise:.2g} % around their mean ({_f_test(misfit)}): "
        f"{_largest_misfit(ladder, misfit, 'the law')}; its intervals take a wrong form for noise, "
        "so fit a narrower range of compute or look for what changed between the depths"
    )
    yield FitWarning("law_lack_of_fit", message)


def _unresolved_budgets(isoflop: IsoFlopFit | None) -> Iterator[FitWarning]:
    for curve in isoflop.curves if isoflop else ():
        if curve.code:
            message = f"budget {curve.budget:.3g} is unresolved: {curve.reason}"
            yield FitWarning(curve.code, message)


def _centring(isoflop: IsoFlopFit | None, surface: Surface | None) -> Iterator[FitWarning]:
    """Bias of the minima's exponent by more than a quarter of its interval."""
    if not isoflop or not isoflop.params_exponent or not surface:
        return
    exponent = isoflop.params_exponent
    result = centring_bias(isoflop, surface)
    if not exponent.estimate or not result:
        return
    offsets, bias = result
    if abs(bias) <= max(half_width(exponent) / 2, NEGLIGIBLE * exponent.estimate):
        return
    resolved = [curve for curve in isoflop.curves if curve.minimum]
    multiples = [
        f"{np.exp(offset):.2g} at {curve.budget:.3g}" for offset, curve in zip(offsets, resolved)
    ]
    centres = [f"{minimum.params:.3g}" for minimum in isoflop.minima]
    message = (
        f"the minima are at these multiples of the centres of their sizes: {', '.join(multiples)} "
        f"FLOPs; by the surface this alone makes the exponent of the minima, "
        f"{exponent.text('.2f')}, {abs(bias):.2g} too {'large' if bias > 0 else 'small'}: use the "
        f"surface's, or centre the sizes of the budgets on {', '.join(centres)} parameters"
    )
    yield FitWarning("centring_drift", message)


def _surface_warnings(
    parametric: ParametricFit, isoflop: IsoFlopFit | None, points: Sequence[Point]
) -> Iterator[FitWarning]:
    surface = parametric.surface
    if surface is None:
        message = parametric.why
        if parametric.code == ONE_DIAL:
            remedy = "run several sizes at each of two or more FLOPs budgets"
            message = f"{message}: only L(C) is known; {remedy}"
        if parametric.code:
            yield FitWarning(parametric.code, message)
        return
    yield from _unidentified(surface)
    yield from _not_converged(surface)
    yield from _forms_disagree(parametric, surface)
    yield from _approaches_disagree(surface, isoflop)
    yield from _intervals_differ(parametric, surface)
    yield from _surface_misfit(surface, points)


def _unidentified(surface: Surface) -> Iterator[FitWarning]:
    if not surface.unidentified:
        return
    names = ", ".join(surface.unidentified)
    message = f"the runs do not bound {names} of the {surface.form} surface on both sides"
    yield FitWarning("surface_unidentified", message)


def _not_converged(surface: Surface) -> Iterator[FitWarning]:
    converged = surface.status == "converged"
    if converged and surface.starts_agreeing >= 0.1:
        return
    status = "" if converged else f"{surface.status}; "
    message = (
        f"{status}{surface.starts_agreeing:.0%} of the starts end at the selected surface: "
        "look at its residuals"
    )
    yield FitWarning("surface_not_converged", message)


def _forms_disagree(parametric: ParametricFit, surface: Surface) -> Iterator[FitWarning]:
    """Parameters whose intervals differ by form, if no held-out run selected the form."""
    if parametric.decisive is not None:
        return
    for other in parametric.surfaces:
        parts = [
            f"{name} {surface.intervals[name].text()} and {other.intervals[name].text()}"
            for name in ("E", "alpha", "beta", "params_exponent")
            if not _overlap(surface.intervals[name], other.intervals[name])
        ]
        if parts:
            message = (
                f"no held-out run selected between the {surface.form} and the {other.form} "
                f"surface, which disagree: {'; '.join(parts)}; run a third, larger budget"
            )
            yield FitWarning("forms_disagree", message)


def _approaches_disagree(surface: Surface, isoflop: IsoFlopFit | None) -> Iterator[FitWarning]:
    exponent = surface.intervals["params_exponent"]
    minima = isoflop.params_exponent if isoflop else None
    if not minima or _overlap(exponent, minima):
        return
    message = (
        f"N* grows as C^{exponent.text('.2f')} on the surface and as C^{minima.text('.2f')} by the "
        "isoFLOP minima"
    )
    yield FitWarning("approaches_disagree", message)


def _intervals_differ(parametric: ParametricFit, surface: Surface) -> Iterator[FitWarning]:
    bootstrap = parametric.bootstrap
    if not bootstrap:
        return
    names = [
        name
        for name in ("E", "alpha", "beta")
        if _widths_differ(surface.intervals[name], bootstrap.ends[name])
    ]
    if not names:
        return
    message = (
        f"profile and bootstrap intervals of {', '.join(names)} differ by more than "
        f"{MAX_WIDTH_RATIO:g} times"
    )
    yield FitWarning("intervals_differ", message)


def _surface_misfit(surface: Surface, points: Sequence[Point]) -> Iterator[FitWarning]:
    """Structure of second order, which is more specific; lack of fit only without it."""
    misfit = structure(points, surface)
    if misfit and misfit.p < SIGNIFICANCE:
        message = (
            f"the residuals of the {surface.form} surface have structure in ln N and ln D, "
            f"{100 * misfit.spread:.2g} % of the loss over noise of {100 * misfit.noise:.2g} % "
            f"({_f_test(misfit)}): {_largest_misfit(points, misfit, 'it')}; its intervals take a "
            "wrong form for noise, so fit a narrower range of N and D before using the exponents"
        )
        yield FitWarning("surface_structure", message)
        return
    residuals, jacobian = surface_residuals(surface, points)
    misfit = lack_of_fit(points, residuals, len(jacobian))
    if misfit is None or misfit.p > SIGNIFICANCE:
        return
    message = (
        f"settings scatter {100 * misfit.spread:.2g} % around the {surface.form} surface where "
        f"seeds scatter {100 * misfit.noise:.2g} % around their mean ({_f_test(misfit)}): "
        f"{_largest_misfit(points, misfit, 'it')}; look for what else changed between the runs, or "
        "fit a narrower range of N and D"
    )
    yield FitWarning("surface_lack_of_fit", message)


def _f_test(misfit: Misfit) -> str:
    return f"F = {misfit.F:.3g}, p = {misfit.p:.1g}"


def _largest_misfit(points: Sequence[Point], misfit: Misfit, model: str) -> str:
    k = int(np.abs(misfit.pattern).argmax())
    point = points[k]
    side = "above" if misfit.pattern[k] > 0 else "below"
    size = f" (N {point.params:.3g}, D {point.tokens:.3g})" if point.sized else ""
    return f"{model} is {100 * abs(misfit.pattern[k]):.2g} % {side} run {point.run_id}{size}"


def _influential_runs(influential: Sequence[Influence]) -> Iterator[FitWarning]:
    for influence in influential:
        largest = ", the largest," if influence.largest else ""
        side = "above" if influence.deleted < 0 else "below"
        moves = [
            f"{name} from {without:.3g} to {fitted:.3g}"
            for name, (fitted, without) in influence.moved.items()
        ]
        message = (
            f"{influence.run}{largest} is {100 * abs(influence.deleted):.2g} % {side} what the "
            f"others predict (p = {influence.p_value:.1g}), and moves {', '.join(moves)}: repeat "
            "it with another seed, or mark it as an outlier if its log says why"
        )
        yield FitWarning("influential_run", message)


def _sensitive_numbers(
    rows: Sequence[SensitivityRow],
    law: Law | None,
    isoflop: IsoFlopFit | None,
    parametric: ParametricFit,
    influential: bool,
) -> Iterator[FitWarning]:
    """Numbers that leave their intervals under a change, changes of what N counts apart.

    A change without the worst runs counts only if there is no warning of an influential run.
    """
    surface = parametric.surface
    intervals = {
        "params_exponent": surface.intervals["params_exponent"] if surface else None,
        "minima_exponent": isoflop.params_exponent if isoflop else None,
        "p": law.p if law else None,
    }
    changes: dict[bool, list[str]] = {False: [], True: []}
    for row in rows:
        outside = _outside(row, intervals)
        explained = influential and row.changed.startswith("without")
        if outside and not explained:
            changes[row.convention].append(f"{', '.join(outside)} with {row.changed}")
    for code, convention, remedy in (
        ("estimator_matters", False, "look at the worst runs and quote the range"),
        ("convention_matters", True, "name the count of N with every exponent"),
    ):
        if changes[convention]:
            message = f"headline exponents leave their intervals: {'; '.join(changes[convention])}"
            yield FitWarning(code, f"{message}; {remedy}")


def _outside(row: SensitivityRow, intervals: dict[str, Interval | None]) -> list[str]:
    outside = []
    for name, interval in intervals.items():
        value = getattr(row, name)
        if value is None or interval is None:
            continue
        if interval.estimate is None or not interval.identifiable:
            continue
        inside = (interval.low or 0) <= value <= (interval.high or 0)
        change = abs(value - interval.estimate)
        if not inside and change > NEGLIGIBLE * abs(interval.estimate):
            outside.append(f"{name} is {value:.3g} against {interval.text('.3g')}")
    return outside


def _overlap(first: Interval, second: Interval) -> bool:
    low = max(-np.inf if end is None else end for end in (first.low, second.low))
    high = min(np.inf if end is None else end for end in (first.high, second.high))
    return low <= high


def _widths_differ(profile: Interval, bootstrap: tuple[float | None, float | None]) -> bool:
    low, high = bootstrap
    if low is None or high is None or profile.low is None or profile.high is None:
        return False
    narrow, wide = sorted((profile.high - profile.low, high - low))
    return wide > MAX_WIDTH_RATIO * narrow
