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
    mosaic: list[list[Any]] = [["law", "grid"] if grid else ["law"]]
    if hold_outs:
        mosaic.append(["held out", "grid"] if grid else ["held out"])
    width = style.PAGE_WIDTH if grid else style.PANEL_WIDTH
    height = 4.7 if hold_outs else 3.5
    with style.page(width, height, style.titled(title, fit.mixed)) as figure:
        panels = figure.subplot_mosaic(mosaic, height_ratios=[3, 1.15][: len(mosaic)])
        _draw_compute_panel(panels["law"], fit, curves)
        if fit.law and hold_outs:
            draw_hold_outs(panels["held out"], panels["law"], fit.law, hold_outs)
        if grid:
            draw_isoflop(panels["grid"], grid, fit)
        style.legend(figure)
        style.freeze_layout(figure)
        runs = [(run.flops, run.loss) for run in fit.points]
        style.place_labels(panels["law"], _depth_labels(fit.points, fit.law), runs)
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
        _draw_frame(axes, points, None, metric, curves)
        _draw_runs(axes, points)
        style.legend(figure)
        style.freeze_layout(figure)
        runs = [(run.flops, run.loss) for run in points]
        style.place_labels(axes, _depth_labels(points, None), runs)
        return figure


def _draw_frame(
    axes: Axes,
    points: Sequence[Point],
    law: Law | None,
    metric: str,
    curves: Sequence[Curve],
) -> None:
    """Set up the axes and draw the training curves."""
    style.compute_axis(axes)
    axes.set_ylabel(style.loss_label(metric))
    _set_limits(axes, points, law)
    style.flops_ticks(axes)
    faint: dict[str, Any] = {"color": style.FAINT, "alpha": 0.45, "linewidth": 0.7, "zorder": 1}
    for _, flops, loss in curves:
        axes.plot(flops, loss, label="training loss", **faint)


def _draw_compute_panel(axes: Axes, fit: CurveFit, curves: Sequence[Curve]) -> None:
    _draw_frame(axes, fit.points, fit.law, fit.metric, curves)
    _draw_runs(axes, fit.points)
    minima = fit.isoflop.minima if fit.isoflop else []
    if minima:
        look = style.markers(style.INK, "isoFLOP minima", ms=8, zorder=6)
        axes.plot([best.flops for best in minima], [best.loss for best in minima], "*", **look)
    if fit.law:
        _draw_law(axes, fit.law)
    axes.set_title(_formula(fit.law) if fit.law else "too few computes for a law")


def _draw_runs(axes: Axes, points: Sequence[Point]) -> None:
    grid = [point for point in points if point.budget]
    ladder = [point for point in points if not point.budget]
    if grid:
        look = style.markers(style.FAINT, "runs at a budget", zorder=2)
        axes.plot([run.flops for run in grid], [run.loss for run in grid], "o", **look)
    if ladder:
        label = style.ladder_label(ladder)
        depths = {run.depth for run in ladder}
        if style.is_depth_ladder(ladder) and len(depths) < len(ladder):
            label += " (×n: seeds)"
        look = style.markers(style.INK, label, ms=4.5, alpha=0.75)
        axes.plot([run.flops for run in ladder], [run.loss for run in ladder], "o", **look)


def _set_limits(axes: Axes, points: Sequence[Point], law: Law | None) -> None:
    """Leave room for the runs and the law beyond them; cut a wide interval rather than squeeze the
    runs."""
    flops = np.array([point.flops for point in points])
    losses = np.array([point.loss for point in points])
    reach = 10 * law.largest if law else flops.max()
    floor = losses.min()
    if law:
        floor = min(float(law.loss(reach)), floor)
    height = losses.max() - floor or 0.1 * losses.max()
    axes.set_xlim(flops.min() / 2.5, max(flops.max() * 2, reach))
    axes.set_ylim(floor - (0.15 if law else 0.22) * height, losses.max() + 0.12 * height)


def _draw_law(axes: Axes, law: Law) -> None:
    """Draw the law and its interval: solid among the runs, dashed and shaded beyond them."""
    within = np.geomspace(law.smallest, law.largest, 80)
    beyond = np.geomspace(law.largest, 10 * law.largest, 40)
    flops = np.concatenate([within, beyond])
    line: dict[str, Any] = {"color": style.LAW, "linewidth": 1.5, "zorder": 4}
    axes.plot(within, law.loss(within), label="law", **line)
    axes.fill_between(flops, *law.band(flops), **style.band(style.LAW_BAND, "its 95 % interval"))
    axes.plot(beyond, law.loss(beyond), linestyle=style.DASHED, **line)
    edge = law.largest * 1.12
    style.shade_beyond(axes, edge)
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
    if law.form == ADDITIVE:
        lines = [f"L = E + K·C⁻ᵖ, p = {law.p.text('.3f')}"]
        if law.E.identifiable:
            lines.append(f"E = {law.E.text('.2f')}")
        else:
            lines.append(f"E ≤ {law.E.high:.2f}, not identified")
    else:
        lines = [f"L = K·C⁻ᵖ, p = {law.p.text('.3f')}"]
    lines.append(f"2× the largest compute: {law.gain(law.largest).text('.1f', 100)} % less loss")
    return "\n".join(lines)


def _depth_labels(points: Sequence[Point], law: Law | None) -> list[style.Label]:
    """Return labels below the compute-optimal runs and the law."""

    def height(run: Point) -> float:
        return min(run.loss, float(law.loss(run.flops))) if law else run.loss

    return style.depth_labels([point for point in points if point.budget is None], height)
