"""Figure of loss against training compute: runs, law, hold-outs below it, and isoFLOP curves to its
right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from slm.figures import style
from slm.figures.holdout_panel import draw_hold_outs
from slm.figures.isoflop_panel import draw_isoflop, label_budgets
from slm.figures.style import Array
from slm.fits import ADDITIVE, CurveFit, Law, Point
from slm.fits.power_law import REACH

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = tuple[int, Array, Array]
"""Depth, training FLOPs and loss of one run during training."""


def plot_curve(fit: CurveFit, curves: Sequence[Curve] = (), title: str = "") -> Figure:
    """Plot a fit.

    Left: validation loss against training compute, the law with its 95 % interval, dashed to ten
    times the largest run. Below it, where runs were held out: the predictions of smaller runs, in
    per cent of the law of all runs. Right, with an isoFLOP grid: the curve and minimum of each
    budget. `curves` are drawn faint behind the runs; their loss must be in the unit of the points.
    """
    grid = fit.isoflop
    hold_outs = fit.selection.hold_outs if fit.law else ()
    mosaic: list[list[Any]] = [["law"], ["held out"]] if hold_outs else [["law"]]
    width = style.PANEL_WIDTH
    if grid:
        mosaic = [[*row, "grid"] for row in mosaic]
        width = style.PAGE_WIDTH
    height = 4.7 if hold_outs else 3.5
    with style.page(width, height, title, fit.mixed) as figure:
        panels = figure.subplot_mosaic(mosaic, height_ratios=[3, 1.15][: len(mosaic)])
        _draw_compute_panel(panels["law"], fit, curves)
        if fit.law and hold_outs:
            draw_hold_outs(panels["held out"], panels["law"], fit.law, hold_outs)
        if grid:
            draw_isoflop(panels["grid"], grid, fit)
        style.lay_out(figure)
        _label_depths(panels["law"], fit.points, fit.law)
        if grid:
            label_budgets(panels["grid"], grid)
        return figure


def plot_runs(
    points: Sequence[Point],
    curves: Sequence[Curve] = (),
    metric: str = "val_bpb",
    title: str = "",
) -> Figure:
    """Plot validation loss against training compute without a law; `curves` as in `plot_curve`."""
    with style.page(style.PANEL_WIDTH, 3.5, title) as figure:
        axes = figure.subplots()
        _draw_runs(axes, points, None, metric, curves)
        style.lay_out(figure)
        _label_depths(axes, points, None)
        return figure


def _draw_compute_panel(axes: Axes, fit: CurveFit, curves: Sequence[Curve]) -> None:
    _draw_runs(axes, fit.points, fit.law, fit.metric, curves)
    minima = fit.isoflop.minima if fit.isoflop else []
    look = style.markers(style.INK, "isoFLOP minima", ms=8, zorder=6)
    style.draw_runs(axes, minima, "loss", "*", look)
    if fit.law:
        _draw_law(axes, fit.law)
    axes.set_title(_formula(fit.law) if fit.law else "too few computes for a law")


def _draw_runs(
    axes: Axes,
    points: Sequence[Point],
    law: Law | None,
    metric: str,
    curves: Sequence[Curve],
) -> None:
    """Set up the axes, with room for the law, and draw the runs and their training curves."""
    _set_limits(axes, points, law)
    axes.set_ylabel(style.loss_label(metric))
    faint = style.line(style.FAINT, 0.7, 1, alpha=0.45)
    for _, flops, loss in curves:
        axes.plot(flops, loss, label="training loss", **faint)
    at_budget = [point for point in points if point.budget]
    look = style.markers(style.FAINT, "runs at a budget", zorder=2)
    style.draw_runs(axes, at_budget, "loss", "o", look)
    ladder = style.ladder_of(points)
    label = style.ladder_label(ladder)
    depths = {run.depth for run in ladder}
    if style.is_depth_ladder(ladder) and len(depths) < len(ladder):
        label += " (×n: seeds)"
    look = style.markers(style.INK, label, ms=4.5, alpha=0.75)
    style.draw_runs(axes, ladder, "loss", "o", look)


def _set_limits(axes: Axes, points: Sequence[Point], law: Law | None) -> None:
    """Leave room for the runs and the law beyond them; cut a wide interval rather than squeeze the
    runs."""
    flops = [point.flops for point in points]
    losses = [point.loss for point in points]
    highest = 2 * max(flops)
    below = 0.22
    if law:
        reach = REACH * law.largest
        highest = max(highest, reach)
        losses.append(min(*losses, float(law.loss(reach))))
        below = 0.15
    style.log_axis(axes, min(flops) / 2.5, highest)
    style.leave_room(axes, losses, below, 0.12)


def _draw_law(axes: Axes, law: Law) -> None:
    """Draw the law and its interval: solid among the runs, dashed and shaded beyond them."""
    look = style.line(style.LAW, 1.5, 4, label="law")
    flops = style.draw_curve(axes, (law.smallest, law.largest), law.loss, look)
    axes.fill_between(flops, *law.band(flops), **style.band(style.LAW_BAND, "its 95 % interval"))
    edge = style.shade_beyond(axes, law.largest)
    axes.text(
        float(np.sqrt(edge * axes.get_xlim()[1])),
        0.975,
        "beyond\nthe runs",
        color=style.TEXT,
        size=style.SMALL,
        transform=axes.get_xaxis_transform(),
        ha="center",
        va="top",
    )


def _formula(law: Law) -> str:
    exponent = law.p.text(".3f")
    lines = [f"L = K·C⁻ᵖ, p = {exponent}"]
    if law.form == ADDITIVE:
        lines = [f"L = E + K·C⁻ᵖ, p = {exponent}", f"E ≤ {law.E.high:.2f}, not identified"]
        if law.E.identifiable:
            lines[1] = f"E = {law.E.text('.2f')}"
    lines.append(f"2× the largest compute: {law.gain(law.largest).text('.1f', 100)} % less loss")
    return "\n".join(lines)


def _label_depths(axes: Axes, points: Sequence[Point], law: Law | None) -> None:
    """Label the compute-optimal runs, below them and the law. The layout must be frozen."""

    def height(run: Point) -> float:
        return min(run.loss, float(law.loss(run.flops))) if law else run.loss

    runs = [(run.flops, run.loss) for run in points]
    style.place_labels(axes, style.depth_labels(points, height), runs)
