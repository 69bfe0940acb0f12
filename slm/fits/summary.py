"""Fits, comparisons and designs in words and tables for a terminal: the answer first."""

from __future__ import annotations

from collections.abc import Sequence

from slm.fits.checks.diagnostics import gains
from slm.fits.compare.result import Comparison
from slm.fits.core_fit import CoreFit
from slm.fits.curve import CurveFit
from slm.fits.design import Design
from slm.fits.intervals import Interval
from slm.fits.parametric import ParametricFit
from slm.fits.power_law import PURE, REACH, Law
from slm.fits.prediction import Prediction

Table = tuple[list[str], list[list[str]]]

MIXED = "Mixed axes, on your word:"
"""Before what is said of runs of several axes."""


def summary(fit: CurveFit) -> str:
    """What doubling compute buys and how the optimum grows, with intervals, or why neither is known."""
    sentences = [MIXED] if fit.mixed else []
    sentences += [_core(fit.core)] if isinstance(fit.core, CoreFit) else []
    sentences += [_gain(fit.law, fit.loss)] if fit.law else []
    if fit.isoflop and fit.isoflop.params_exponent and fit.isoflop.tokens_exponent:
        params, tokens = fit.isoflop.params_exponent, fit.isoflop.tokens_exponent
        sentences.append(
            f"The optimal size grows as C^{params.text('.2f')}, its tokens as C^{tokens.text('.2f')} "
            f"(N: {fit.convention})."
        )
    sentences += [] if fit.law else [f"No law L(C): {fit.selection.why}."]
    return " ".join(sentences)


def _core(core: CoreFit) -> str:
    now, later = (core.at(times * core.law.largest).text(".3f") for times in (1.0, REACH))
    return f"{core.name} at the compute of the largest run is {now}; at {REACH:g} times that, extrapolated, {later}."


def _gain(law: Law, metric: str) -> str:
    now, later = (law.gain(times * law.largest).text(".2f", 100) for times in (1.0, REACH))
    lead = "" if gains(law) or law.free < 2 else "The runs do not show that compute helps. "
    beyond = "extrapolated, if there is no floor," if law.form == PURE else "extrapolated,"
    return (
        f"{lead}Doubling compute lowers {metric} by {now} % at the largest run, {law.largest:.2g} FLOPs; "
        f"at {REACH:g} times that, {beyond} by {later} %."
    )


def tables(fit: CurveFit, predictions: Sequence[Prediction] = ()) -> list[Table]:
    """(headers, rows) of strings: predictions, laws, isoFLOP minima, surfaces, hold-outs; those that there are."""
    laws = [law for law in (fit.law, fit.selection.rival) if law]
    found = [_predictions(fit, predictions)] if predictions else []
    found += [_laws(fit, laws)] if laws else []
    found += [_minima(fit)] if fit.isoflop else []
    found += [_surfaces(fit.parametric)] if fit.parametric.surface else []
    return found + ([_hold_outs(fit)] if fit.selection.hold_outs else [])


def _predictions(fit: CurveFit, predictions: Sequence[Prediction]) -> Table:
    rows = [
        [
            f"d{own.target.depth}" if own.target.depth else "optimum",
            f"{own.target.flops:.3g}",
            own.loss.text(".4f"),
            own.core.text() if own.core else "",
            own.model,
            f"{own.factor:.3g}",
            f"{own.validated_factor:.3g}",
            "beyond what was validated" if own.beyond_validated else "",
        ]
        for own in predictions
    ]
    headers = [
        "prediction",
        "FLOPs",
        f"{fit.loss} of a run [95 %]",
        fit.core.name if fit.core else "CORE",
        "by",
        "x largest",
        "right to",
        "",
    ]
    return headers, rows


def _hold_outs(fit: CurveFit) -> Table:
    documents = [own.document() for own in fit.selection.hold_outs]
    rows = [
        [
            f"{own['flops']:.3g}",
            f"{own['kept']} + {own['held']}",
            own["form"],
            f"{own['factor']:.3g}",
            f"{100 * own['error']:.2g} %",
            f"{100 * own['bias']:+.2g} %",
            f"{own['covered']:.0%}",
        ]
        for own in documents
    ]
    return [
        "fitted to FLOPs <=",
        "runs + held out",
        "law",
        "reach",
        "error",
        "bias",
        "inside 90 %",
    ], rows


def _laws(fit: CurveFit, laws: list[Law]) -> Table:
    errors = fit.selection.errors or {}
    rows = [
        [
            law.form,
            "chosen" if law is fit.law else "",
            "0" if law.form == PURE else law.E.text(),
            law.K.text(),
            law.p.text(),
            f"{100 * law.residual_rms:.2g} %",
            f"{100 * errors[law.form]:.2g} %" if law.form in errors else "not tested",
        ]
        for law in laws
    ]
    return ["law", "", "E [95 %]", "K [95 %]", "p [95 %]", "residual", "error held out"], rows


def _minima(fit: CurveFit) -> Table:
    rows = []
    assert fit.isoflop is not None
    for valley in fit.isoflop.curves:
        intervals = fit.isoflop.intervals(valley)
        known = [intervals[name].text() for name in ("params", "tokens", "ratio")] + [
            intervals["loss"].text(".4f")
        ]
        row = [*known, "ok"] if valley.minimum else ["", "", "", "", f"unresolved: {valley.reason}"]
        rows.append([f"{valley.budget:.3g}", *row])
    return ["budget (FLOPs)", "optimal N [95 %]", "tokens", "tokens/N", fit.loss, "status"], rows


def _surfaces(parametric: ParametricFit) -> Table:
    rows = [
        [
            surface.form,
            "chosen" if surface is parametric.surface else "",
            *(surface.intervals[name].text() for name in ("E", "alpha", "beta")),
            "1" if surface.form == "additive" else surface.intervals["gamma"].text(),
            surface.intervals["params_exponent"].text(),
            f"{100 * surface.residual_rms:.2g} %",
            f"{100 * parametric.decisive[surface.form].error:.2g} %"
            if parametric.decisive
            else "not tested",
        ]
        for surface in parametric.surfaces
    ]
    drawn = parametric.bootstrap
    if drawn and parametric.surface:
        names = ["E", "alpha", "beta", "gamma", "params_exponent"]
        ends = [Interval(None, *drawn.ends[name]).ends(".3g") for name in names]
        rows.append([f"{parametric.surface.form}, resampled", "", *ends, "", ""])
    names = ["E", "alpha", "beta", "gamma", "N* ~ C^"]
    return [
        "surface",
        "",
        *(f"{name} [95 %]" for name in names),
        "residual",
        "error held out",
    ], rows


def comparison_table(found: Comparison) -> Table:
    """(headers, rows) of strings: a row a depth, then all depths."""
    rows = [
        [
            f"d{own.depth}",
            f"{own.flops:.3g}",
            f"{own.base_runs} : {own.candidate_runs}",
            own.difference.text("+.2f", 100),
            own.multiplier.text(".3f"),
            f"{own.e_value:.2g}",
            own.claim or "",
        ]
        for own in found.per_depth
    ]
    runs = f"{sum(own.base_runs for own in found.per_depth)} : {sum(own.candidate_runs for own in found.per_depth)}"
    overall = [
        found.difference.text("+.2f", 100),
        found.multiplier.text(".3f"),
        f"{found.evidence.pooled:.2g}",
    ]
    rows.append(["all", "", runs, *overall, ""])
    headers = [
        "depth",
        "FLOPs",
        "seeds",
        "ln loss, % [95 %]",
        "multiplier [95 %]",
        "evidence (20 claims)",
        "",
    ]
    return headers, rows


def design_summary(design: Design) -> str:
    """What is known of the target now, and what the runs chosen and evenly spaced ones would leave."""
    now, after, evenly = (f"± {own:.2g}" for own in (design.before, design.after, design.evenly_spaced))
    runs = f"{len(design.runs)} run{'s' * (len(design.runs) != 1)}"
    spent = f"{design.flops:.3g} of {design.budget:.3g} FLOPs"
    mixed = f"{MIXED} " if design.mixed else ""
    return (
        f"{mixed}{design.target.text} is {design.estimate:.4g} {now} now and {after} after these {runs}, {spent}; "
        f"evenly spaced runs would leave {evenly} (one standard deviation)."
    )


def design_table(design: Design) -> Table:
    """(headers, rows) of strings: a row a run, by what it removes per FLOP."""
    rows = [
        [
            f"d{pick.candidate.depth}",
            pick.candidate.horizon,
            f"{pick.candidate.params:.3g}",
            f"{pick.candidate.tokens:.3g}",
            f"{pick.candidate.flops:.3g}",
            "a further seed" if pick.repeat else "new",
            f"{pick.before:.2g} -> {pick.after:.2g}",
        ]
        for pick in design.runs
    ]
    return ["depth", "horizon", "N", "tokens", "FLOPs", "", f"± of {design.target.text}"], rows
