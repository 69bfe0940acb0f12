"""Figures of a report: every figure of a fit, with its description and caption."""

from __future__ import annotations

from collections.abc import Sequence

from slm import figures
from slm.figures import Curve
from slm.fits import CurveFit
from slm.report.render import Drawing
from slm.text import flops, plural

ALTS = {
    "frontier": "Best parameters and best tokens against training compute.",
    "residuals": "Residuals of the fit, run by run, in per cent.",
    "core": "The benchmark's score against training compute, with its 95 % interval.",
}
CAPTIONS = {
    "frontier": (
        "The best split of a budget: compute-optimal parameters (left) and tokens (right), with "
        "95 % intervals."
    ),
    "residuals": (
        "Residuals of the fit. A pattern is a misfit of its form; grey is twice the noise."
    ),
    "core": (
        "The score, fitted through the loss. Hollow runs are at chance; dashed is beyond the runs."
    ),
}


def drawings(fit: CurveFit, suffix: str, curves: Sequence[Curve]) -> list[Drawing]:
    """Return all figures of a fit, with file names that end in `suffix` and the name of the
    figure."""
    alts = {**ALTS, "curve": _alt(fit)}
    captions = {**CAPTIONS, "curve": _caption(fit)}
    drawn = []
    for name in figures.figure_names(fit):
        figure = figures.plot_fit(fit, name, curves, title="")
        ending = suffix if name == "curve" else f"{suffix}-{name}"
        drawn.append(Drawing(name, ending, figure, alts[name], captions[name]))
    return drawn


def _alt(fit: CurveFit) -> str:
    """Describe the curve in a sentence."""
    compute = [point.flops for point in fit.points]
    losses = [point.loss for point in fit.points]
    law = ""
    if fit.law:
        law = f", and the law {fit.law.form} through them with its 95 % interval"
    return (
        f"Validation loss of {plural(len(fit.points), 'run')} against training compute, "
        f"{flops(min(compute))} to {flops(max(compute))} FLOPs: the highest {max(losses):.4g}, "
        f"the lowest {min(losses):.4g}{law}."
    )


def _caption(fit: CurveFit) -> str:
    sentences = ["Dots are finished runs, faint lines their training loss."]
    if fit.law:
        sentences.append(
            "The line is the law, the band its 95 % interval; both are dashed beyond the runs."
        )
        if fit.selection.hold_outs:
            sentences.append(
                "Below, predictions of larger runs by the laws of the smaller ones, against their "
                "losses."
            )
    if fit.isoflop:
        sentences.append(
            "The other panel shows loss against size at each FLOPs budget, with the best size as a "
            "star."
        )
    return " ".join(sentences)
