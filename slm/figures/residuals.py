"""What the law and the surface leave unexplained, against compute, size and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from slm.figures import style
from slm.figures.style import Array
from slm.fits import CurveFit, Law, Minimum, Point, Surface

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AXES = {"flops": "training compute (FLOPs)", "params": "parameters N", "tokens": "tokens D"}
CUT = 10.0
"""How many times the noise a residual is from zero at most; one further is a triangle at the edge."""
EDGE = 0.95
"""Where that is, of the panel's half."""


def draw_residuals(fit: CurveFit, stem: str | Path, title: str) -> tuple[Path, Path]:
    """Residuals of the law against compute, of the surface against compute, size and tokens, into `stem`.png and .svg.

    In per cent of the loss expected, positive is worse, over a band of twice the noise; a pattern is what the form does
    not hold. Gives both paths. The fit must have a law or a surface.
    """
    law, surface = fit.law, fit.parametric.surface
    rows, columns = {(True, False): (1, 1), (False, True): (1, 3), (True, True): (2, 2)}[
        bool(law), bool(surface)
    ]
    width, title = style.PAGE if surface else style.PANEL, style.titled(title, fit.mixed)
    with style.page(width, 0.9 + 2.0 * rows, title) as figure:
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
        if surface:
            for axes, name in zip(panels[-3:], AXES):
                _surface_panel(axes, surface, fit.points, name)
        labels = _law_panel(panels[0], law, fit) if law else []
        style.legend(figure)
        style.settle(figure)
        style.place(panels[0], labels, [(x, y) for _, x, y in labels])
        return style.save(figure, stem)


def _law_panel(axes: Axes, law: Law, fit: CurveFit) -> list[style.Label]:
    """Of the runs that the law goes through, or of the minima; gives the labels of their depths."""
    ladder = [point for point in fit.points if point.budget is None]
    minima = fit.isoflop.minima if fit.isoflop else []
    runs: Sequence[Point | Minimum] = ladder or minima
    flops = np.array([run.flops for run in runs])
    off = _off(runs, law.loss(flops))
    _frame(axes, flops, off, law.noise.sigma)
    _dots(axes, flops, off, style.INK, style.runs_word(ladder) if ladder else "isoFLOP minima")
    axes.set_xlabel(AXES["flops"])
    axes.set_title("law " + law.form.replace("*C^-p", "·C⁻ᵖ"))
    heights = dict(zip([run.run_id for run in ladder], off.tolist()))
    return style.depth_labels(ladder, lambda run: heights[run.run_id])


def _surface_panel(axes: Axes, surface: Surface, points: Sequence[Point], name: str) -> None:
    """Of all runs, each budget in its shade."""
    sizes, tokens, x = (
        np.array([getattr(point, key) for point in points]) for key in ("params", "tokens", name)
    )
    off = _off(points, surface.loss(sizes, tokens))
    _frame(axes, x, off, surface.noise.sigma)
    budgets = np.array([point.budget or 0.0 for point in points])
    known = sorted({point.budget for point in points if point.budget})
    others = style.runs_word([point for point in points if point.budget is None])
    for budget, shade in zip([0.0, *known], [style.INK, *style.shades(len(known))]):
        word = f"{style.flops_text(budget)} FLOPs" if budget else others
        _dots(axes, x[budgets == budget], off[budgets == budget], shade, word)
    axes.set_xlabel(AXES[name])
    if name != "flops":
        style.count_axis(axes.xaxis)
    axes.set_title(f"{surface.form} surface")


def _frame(axes: Axes, x: Array, off: Array, sigma: float) -> None:
    """Limits and the band of the noise."""
    band = 200 * sigma
    reach = max(min(float(np.abs(off).max()), CUT * band / 2 or np.inf), band, 1e-6)
    axes.set_xscale("log")
    axes.set_xlim(x.min() / 1.4, x.max() * 1.4)
    axes.set_ylim(-1.25 * reach, 1.25 * reach)
    style.flops_axis(axes)
    axes.set_ylabel("residual (%)")
    axes.axhspan(-band, band, color=style.NOISE, linewidth=0, zorder=0, label="twice the noise")
    axes.axhline(0, color=style.FAINT, linewidth=0.8, zorder=1)
    if (np.abs(off) > EDGE * axes.get_ylim()[1]).any():
        axes.plot([], [], "^", color=style.INK, ms=4, label="beyond the panel")


def _dots(axes: Axes, x: Array, off: Array, color: str | Array, word: str) -> None:
    edge = EDGE * axes.get_ylim()[1]
    for marker, chosen in (("o", np.abs(off) <= edge), ("^", off > edge), ("v", off < -edge)):
        if chosen.any():
            look = style.dots(color, word if marker == "o" else None)
            axes.plot(x[chosen], np.clip(off[chosen], -edge, edge), marker, **look)


def _off(runs: Sequence[Point | Minimum], expected: Array) -> Array:
    """Log residuals, per cent."""
    return np.asarray(100 * np.log([run.loss for run in runs] / expected))
