"""Figures of fits and comparisons, as matplotlib figures or as PNG and SVG files.

The same fit gives the same bytes. A quantity that is not known is not drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slm.figures.comparison import plot_comparison
from slm.figures.core_curve import plot_core
from slm.figures.curve import Curve, plot_curve, plot_runs
from slm.figures.frontier import has_frontier, plot_frontier
from slm.figures.residuals import plot_residuals
from slm.figures.style import save, save_svg
from slm.fits import Comparison, CoreFit, CurveFit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Curve",
    "draw_comparison",
    "draw_fit",
    "figure_names",
    "plot_comparison",
    "plot_core",
    "plot_curve",
    "plot_fit",
    "plot_frontier",
    "plot_residuals",
    "plot_runs",
    "save",
    "save_svg",
]
TITLE = "What more compute buys"


def figure_names(fit: CurveFit) -> list[str]:
    """Return the names of a fit's figures: "curve" always; "frontier", "residuals" and "core" where
    known."""
    names = ["curve"]
    if has_frontier(fit):
        names.append("frontier")
    if fit.law or fit.parametric.surface:
        names.append("residuals")
    if isinstance(fit.core, CoreFit):
        names.append("core")
    return names


def plot_fit(
    fit: CurveFit, name: str = "curve", curves: Sequence[Curve] = (), title: str = TITLE
) -> Figure:
    """Plot one figure of a fit.

    `curves` are drawn behind the runs of the figure "curve". Raises ValueError for a figure that
    the fit does not have.
    """
    if name not in figure_names(fit):
        raise ValueError(f"figure {name!r}: this fit has {', '.join(figure_names(fit))}")
    if name == "frontier":
        return plot_frontier(fit, title)
    if name == "residuals":
        return plot_residuals(fit, title)
    if name == "core" and isinstance(fit.core, CoreFit):
        return plot_core(fit.core, title)
    return plot_curve(fit, curves, title)


def draw_fit(
    fit: CurveFit, stem: str | Path, curves: Sequence[Curve] = (), title: str = TITLE
) -> list[Path]:
    """Write all figures of a fit: `stem` and, where known, `stem`-frontier, `stem`-residuals,
    `stem`-core.

    Returns the paths, each figure's .png before its .svg.
    """
    paths = []
    for name in figure_names(fit):
        path = stem if name == "curve" else f"{stem}-{name}"
        paths += save(plot_fit(fit, name, curves, title), path)
    return paths


def draw_comparison(comparison: Comparison, stem: str | Path) -> list[Path]:
    """Write the figure of a comparison to `stem`.png and `stem`.svg and return both paths."""
    return save(plot_comparison(comparison), stem)
