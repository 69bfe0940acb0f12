"""Figure of residuals of the law and of the surface against compute, size and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from slm.figures import style
from slm.figures.style import Array
from slm.fits import CurveFit, Law, Point, Surface
from slm.fits.ladder import columns_of, law_runs
from slm.text import flops as flops_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AXES = {"flops": style.COMPUTE, "params": "parameters N", "tokens": "tokens D"}
CUT = 10.0
"""Largest residual drawn, in multiples of the noise; one beyond it is a triangle at the edge."""
EDGE = 0.95
"""Height of those triangles, as a share of the panel's half."""


def plot_residuals(fit: CurveFit, title: str = "") -> Figure:
    """Plot residuals of the law against compute, and of the surface against compute, size and
    tokens.

    In per cent of the expected loss, positive is worse, over a band of twice the noise; a pattern
    is a misfit of the form. The fit must have a law or a surface.
    """
    law = fit.law
    surface = fit.parametric.surface
    rows, columns, width = 1, 1, style.PANEL_WIDTH
    if surface:
        rows, columns = (2, 2) if law else (1, 3)
        width = style.PAGE_WIDTH
    with style.page(width, 0.9 + 2.0 * rows, title, fit.mixed) as figure:
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
        if surface:
            for axes, name in zip(panels[-3:], AXES):
                _draw_surface_panel(axes, surface, fit.points, name)
        labels = _draw_law_panel(panels[0], law, fit) if law else []
        style.lay_out(figure)
        style.place_labels(panels[0], labels, [(x, y) for _, x, y in labels])
        return figure


def _draw_law_panel(axes: Axes, law: Law, fit: CurveFit) -> list[style.Label]:
    """Draw residuals of the fitted runs, or of the minima, and return the labels of their
    depths."""
    ladder = style.ladder_of(fit.points)
    flops, losses = columns_of(law_runs(fit.points, fit.isoflop.curves if fit.isoflop else ()))
    residuals = style.percent_off(losses, law.loss(flops))
    _draw_frame(axes, flops, residuals, law.noise.sigma, AXES["flops"])
    label = style.ladder_label(ladder) if ladder else "isoFLOP minima"
    _draw_runs(axes, flops, residuals, style.INK, label)
    axes.set_title("law " + law.form.replace("*C^-p", "·C⁻ᵖ"))
    heights = dict(zip([run.run_id for run in ladder], residuals))
    return style.depth_labels(ladder, lambda run: heights[run.run_id])


def _draw_surface_panel(axes: Axes, surface: Surface, points: Sequence[Point], name: str) -> None:
    """Draw residuals of all runs against one of AXES, each budget in its shade."""
    columns = np.array([(point.params, point.tokens, point.loss) for point in points])
    sizes, tokens, losses = columns.T
    x = np.array([getattr(point, name) for point in points])
    residuals = style.percent_off(losses, surface.loss(sizes, tokens))
    _draw_frame(axes, x, residuals, surface.noise.sigma, AXES[name])
    if name != "flops":
        style.count_ticks(axes.xaxis)
    budgets = np.array([point.budget or 0.0 for point in points])
    in_ladder = budgets == 0
    label = style.ladder_label(style.ladder_of(points))
    _draw_runs(axes, x[in_ladder], residuals[in_ladder], style.INK, label)
    known = np.unique(budgets[~in_ladder])
    for budget, shade in zip(known, style.shades(len(known))):
        at_budget = budgets == budget
        label = f"{flops_text(budget)} FLOPs"
        _draw_runs(axes, x[at_budget], residuals[at_budget], shade, label)
    axes.set_title(f"{surface.form} surface")


def _draw_frame(axes: Axes, x: Array, residuals: Array, sigma: float, label: str) -> None:
    """Set the limits and draw the band of twice the noise."""
    noise = 200 * sigma
    largest = min(float(np.abs(residuals).max()), CUT * noise / 2 or np.inf)
    reach = max(largest, noise, 1e-6)
    style.log_axis(axes, x.min() / 1.4, x.max() * 1.4, label)
    axes.set_ylim(-1.25 * reach, 1.25 * reach)
    axes.set_ylabel("residual (%)")
    axes.axhspan(-noise, noise, color=style.NOISE, linewidth=0, zorder=0, label="twice the noise")
    axes.axhline(0, **style.line(style.FAINT, 0.8, 1))
    if (np.abs(residuals) > EDGE * axes.get_ylim()[1]).any():
        axes.plot([], [], "^", color=style.INK, ms=4, label="beyond the panel")


def _draw_runs(axes: Axes, x: Array, residuals: Array, color: str | Array, label: str) -> None:
    edge = EDGE * axes.get_ylim()[1]
    heights = np.clip(residuals, -edge, edge)
    above = residuals > edge
    below = residuals < -edge
    inside = ~(above | below)
    for marker, chosen in (("o", inside), ("^", above), ("v", below)):
        if chosen.any():
            look = style.markers(color, label if marker == "o" else None)
            axes.plot(x[chosen], heights[chosen], marker, **look)
