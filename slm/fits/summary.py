"""Fits, comparisons and designs as text and tables for a terminal, the answer first."""

from __future__ import annotations

from collections.abc import Sequence

from slm.fits.checks.diagnostics import lowers_loss
from slm.fits.compare.result import Comparison
from slm.fits.core_fit import CoreFit
from slm.fits.curve import CurveFit
from slm.fits.design import Design
from slm.fits.intervals import Interval
from slm.fits.parametric import ParametricFit
from slm.fits.power_law import PURE, REACH, Law
from slm.fits.prediction import Prediction
from slm.text import plural

Table = tuple[list[str], list[list[str]]]
"""Headers, and rows of strings."""

MIXED = "Mixed axes, combined by --allow-mixed:"
"""Introduction to results of runs on several axes."""


def summary(fit: CurveFit) -> str:
    """Return what doubling compute buys and how the optimum grows, or why neither is known."""
    sentences = [MIXED] if fit.mixed else []
    if isinstance(fit.core, CoreFit):
        sentences.append(_describe_core(fit.core))
    if fit.law:
        sentences.append(_describe_gain(fit.law, fit.loss))
    if fit.isoflop and fit.isoflop.params_exponent and fit.isoflop.tokens_exponent:
        params = fit.isoflop.params_exponent.text(".2f")
        tokens = fit.isoflop.tokens_exponent.text(".2f")
        sentences.append(
            f"The optimal model size grows as C^{params}, its tokens as C^{tokens} "
            f"(N counts {fit.convention})."
        )
    if not fit.law:
        sentences.append(f"No law L(C): {fit.selection.why}.")
    return " ".join(sentences)


def _describe_core(core: CoreFit) -> str:
    largest = core.law.largest
    return (
        f"{core.name} is {core.at(largest).text('.3f')} at the compute of the largest run and, "
        f"extrapolated to {REACH:g} times that, {core.at(REACH * largest).text('.3f')}."
    )


def _describe_gain(law: Law, metric: str) -> str:
    gain = law.gain(law.largest).text(".2f", 100)
    extrapolated = law.gain(REACH * law.largest).text(".2f", 100)
    doubt = "" if lowers_loss(law) or law.free < 2 else "The runs do not show that compute helps. "
    condition = " without a floor" if law.form == PURE else ""
    return (
        f"{doubt}Doubling compute lowers {metric} by {gain} % at the largest run, "
        f"{law.largest:.2g} FLOPs, and, extrapolated{condition} to {REACH:g} times that, by "
        f"{extrapolated} %."
    )


def tables(fit: CurveFit, predictions: Sequence[Prediction] = ()) -> list[Table]:
    """Return the tables of a fit: predictions, laws, isoFLOP minima, surfaces and hold-outs."""
    results = []
    if predictions:
        results.append(_predictions(fit, predictions))
    if fit.law:
        results.append(_laws(fit))
    if fit.isoflop:
        results.append(_minima(fit))
    if fit.parametric.surface:
        results.append(_surfaces(fit.parametric))
    if fit.selection.hold_outs:
        results.append(_hold_outs(fit))
    return results


def _predictions(fit: CurveFit, predictions: Sequence[Prediction]) -> Table:
    headers = [
        "prediction",
        "FLOPs",
        f"{fit.loss} of a run [95 %]",
        fit.core.name if fit.core else "CORE",
        "model",
        "x largest",
        "validated to",
        "",
    ]
    rows = [
        [
            f"d{prediction.target.depth}" if prediction.target.depth else "optimum",
            f"{prediction.target.flops:.3g}",
            prediction.loss.text(".4f"),
            prediction.core.text() if prediction.core else "",
            prediction.model,
            f"{prediction.factor:.3g}",
            f"{prediction.validated_factor:.3g}",
            "beyond validated compute" if prediction.beyond_validated else "",
        ]
        for prediction in predictions
    ]
    return headers, rows


def _hold_outs(fit: CurveFit) -> Table:
    headers = [
        "fitted to FLOPs <=",
        "runs + held out",
        "law",
        "reach",
        "error",
        "bias",
        "inside 90 %",
    ]
    rows = [
        [
            f"{hold_out.flops:.3g}",
            f"{hold_out.fitted} + {len(hold_out.predicted)}",
            hold_out.form,
            f"{hold_out.factor:.3g}",
            f"{100 * hold_out.error:.2g} %",
            f"{100 * hold_out.bias:+.2g} %",
            f"{hold_out.covered:.0%}",
        ]
        for hold_out in fit.selection.hold_outs
    ]
    return headers, rows


def _laws(fit: CurveFit) -> Table:
    headers = ["law", "", "E [95 %]", "K [95 %]", "p [95 %]", "residual", "error held out"]
    errors = fit.selection.errors or {}
    rows = [
        [
            law.form,
            "selected" if law is fit.law else "",
            "0" if law.form == PURE else law.E.text(),
            law.K.text(),
            law.p.text(),
            f"{100 * law.residual_rms:.2g} %",
            _held_out(errors.get(law.form)),
        ]
        for law in (fit.law, fit.selection.rival)
        if law
    ]
    return headers, rows


def _held_out(error: float | None) -> str:
    return "not tested" if error is None else f"{100 * error:.2g} %"


def _minima(fit: CurveFit) -> Table:
    headers = ["budget (FLOPs)", "optimal N [95 %]", "tokens", "tokens/N", fit.loss, "status"]
    rows = []
    assert fit.isoflop is not None
    for curve in fit.isoflop.curves:
        cells = ["", "", "", "", f"unresolved: {curve.reason}"]
        if curve.minimum:
            intervals = fit.isoflop.intervals(curve)
            cells = [intervals[name].text() for name in ("params", "tokens", "ratio")]
            cells += [intervals["loss"].text(".4f"), "ok"]
        rows.append([f"{curve.budget:.3g}", *cells])
    return headers, rows


def _surfaces(parametric: ParametricFit) -> Table:
    names = ["E", "alpha", "beta", "gamma", "N* ~ C^"]
    headers = ["surface", "", *(f"{name} [95 %]" for name in names), "residual", "error held out"]
    decisive, bootstrap = parametric.decisive, parametric.bootstrap
    rows = []
    for surface in parametric.surfaces:
        intervals = surface.intervals
        rows.append(
            [
                surface.form,
                "selected" if surface is parametric.surface else "",
                *(intervals[name].text() for name in ("E", "alpha", "beta")),
                "1" if surface.form == "additive" else intervals["gamma"].text(),
                intervals["params_exponent"].text(),
                f"{100 * surface.residual_rms:.2g} %",
                _held_out(decisive[surface.form].error if decisive else None),
            ]
        )
    if bootstrap and parametric.surface:
        ends = [
            Interval(None, *bootstrap.ends[name]).ends(".3g")
            for name in ("E", "alpha", "beta", "gamma", "params_exponent")
        ]
        rows.append([f"{parametric.surface.form}, bootstrap", "", *ends, "", ""])
    return headers, rows


def comparison_table(comparison: Comparison) -> Table:
    """Return the table of a comparison: a row per depth, then all depths."""
    headers = [
        "depth",
        "FLOPs",
        "seeds",
        "ln loss, % [95 %]",
        "multiplier [95 %]",
        "e-value (claim from 20)",
        "",
    ]
    rows = [
        [
            f"d{effect.depth}",
            f"{effect.flops:.3g}",
            f"{effect.base_runs} : {effect.candidate_runs}",
            effect.difference.text("+.2f", 100),
            effect.multiplier.text(".3f"),
            f"{effect.e_value:.2g}",
            effect.claim or "",
        ]
        for effect in comparison.per_depth
    ]
    base = sum(effect.base_runs for effect in comparison.per_depth)
    candidate = sum(effect.candidate_runs for effect in comparison.per_depth)
    pooled = [
        "all",
        "",
        f"{base} : {candidate}",
        comparison.difference.text("+.2f", 100),
        comparison.multiplier.text(".3f"),
        f"{comparison.evidence.pooled:.2g}",
        "",
    ]
    return headers, [*rows, pooled]


def design_summary(design: Design) -> str:
    """Return the target's uncertainty now, with the chosen runs, and with evenly spaced ones."""
    mixed = f"{MIXED} " if design.mixed else ""
    return (
        f"{mixed}{design.target.text} is {design.estimate:.4g} ± {design.before:.2g} now and would "
        f"be ± {design.after:.2g} with these {plural(len(design.runs), 'run')} "
        f"({design.flops:.3g} of {design.budget:.3g} FLOPs), or ± {design.evenly_spaced:.2g} with "
        "evenly spaced runs (one standard deviation)."
    )


def design_table(design: Design) -> Table:
    """Return the table of a design: a row per run, by variance removed per FLOP."""
    headers = ["depth", "horizon", "N", "tokens", "FLOPs", "", f"± of {design.target.text}"]
    rows = [
        [
            f"d{run.candidate.depth}",
            run.candidate.horizon,
            f"{run.candidate.params:.3g}",
            f"{run.candidate.tokens:.3g}",
            f"{run.candidate.flops:.3g}",
            "further seed" if run.repeat else "new",
            f"{run.before:.2g} -> {run.after:.2g}",
        ]
        for run in design.runs
    ]
    return headers, rows
