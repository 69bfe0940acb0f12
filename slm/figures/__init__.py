"""Figures of fits and comparisons, PNG and SVG, the same bytes for the same fit. Nothing is drawn that is not known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slm.figures.comparison import draw_comparison
from slm.figures.core_curve import draw_core
from slm.figures.curve import Curve, draw_curve
from slm.figures.frontier import draw_frontier, has_frontier
from slm.figures.residuals import draw_residuals
from slm.fits import CoreFit, CurveFit

__all__ = [
    "Curve",
    "draw_comparison",
    "draw_core",
    "draw_curve",
    "draw_fit",
    "draw_frontier",
    "draw_residuals",
]


def draw_fit(
    fit: CurveFit,
    stem: str | Path,
    curves: Sequence[Curve] | None = None,
    title: str = "What more compute buys",
) -> list[Path]:
    """Draw all that a fit knows: `stem` always; `stem`-frontier, -residuals and -core where there is something to show.

    Gives the paths, each figure's .png before its .svg. `curves` are those of `draw_curve`.
    """
    drawn = [*draw_curve(fit, stem, curves, title)]
    if has_frontier(fit):
        drawn += draw_frontier(fit, f"{stem}-frontier", title)
    if fit.law or fit.parametric.surface:
        drawn += draw_residuals(fit, f"{stem}-residuals", title)
    if isinstance(fit.core, CoreFit):
        drawn += draw_core(fit.core, f"{stem}-core", title)
    return drawn
