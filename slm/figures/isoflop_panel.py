"""Panel of isoFLOP curves: loss against size at each budget, the minima with their intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from slm.figures import style
from slm.figures.style import Array
from slm.fits import CurveFit, IsoFlopCurve, IsoFlopFit, Point
from slm.text import flops as flops_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_isoflop(axes: Axes, grid: IsoFlopFit, fit: CurveFit) -> None:
    """Draw loss against size per budget: star and bar for a resolved minimum, hollow runs without
    one."""
    axes.set_xscale("log")
    axes.set_xlabel(f"parameters ({fit.convention})")
    axes.set_ylabel(style.loss_label(fit.metric))
    curves = grid.curves
    for curve, shade in zip(curves, style.shades(len(curves))):
        _draw_curve(axes, grid, curve, shade)
    runs = [run for curve in curves for run in _runs(curve)]
    sizes = np.array([run.params for run in runs])
    losses = np.array([run.loss for run in runs])
    width = sizes.max() / sizes.min()
    height = np.ptp(losses) or 0.1 * losses.max()
    # the labels of budgets stand right of the runs; "no minimum" makes them longer
    room = 0.5 if all(curve.minimum for curve in curves) else 1.1
    axes.set_xlim(sizes.min() / width**0.06, sizes.max() * width**room)
    axes.set_ylim(losses.min() - 0.12 * height, losses.max() + 0.08 * height)
    style.count_ticks(axes.xaxis)
    axes.set_title(_exponents(grid))


def label_budgets(axes: Axes, grid: IsoFlopFit) -> None:
    """Label the budgets in a column right of all runs, each at its largest run, moved up to cover
    no other.

    The layout must be frozen.
    """
    curves = grid.curves
    largest = [max(_runs(curve), key=lambda run: run.params) for curve in curves]
    edge = max(run.params for run in largest)
    unit = 72 / axes.figure.dpi
    floor = -np.inf
    rows = zip(largest, curves, style.shades(len(curves)))
    for run, curve, shade in sorted(rows, key=lambda row: row[0].loss):
        height = axes.transData.transform((edge, run.loss))[1] * unit
        floor = max(height, floor + 10)
        text = f"{flops_text(curve.budget)} FLOPs"
        if not curve.minimum:
            text += ": no minimum"
        spot = style.offset_text(9, floor - height)
        axes.annotate(text, (edge, run.loss), color=shade, **spot)
        line: dict[str, Any] = {"color": shade, "linewidth": 0.6, "linestyle": ":", "zorder": 1}
        axes.plot([run.params, edge], [run.loss] * 2, **line)


def _runs(curve: IsoFlopCurve) -> list[Point]:
    return [*curve.points, *curve.left_out]


def _draw_curve(axes: Axes, grid: IsoFlopFit, curve: IsoFlopCurve, shade: Array) -> None:
    best = curve.minimum
    sizes = [run.params for run in _runs(curve)]
    losses = [run.loss for run in _runs(curve)]
    face = shade if best else "white"
    axes.plot(sizes, losses, "o", ms=4, mec=shade, mfc=face, zorder=3)
    if not (best and curve.parabola):
        return
    grid_of_sizes = np.linspace(curve.parabola.lowest, curve.parabola.highest, 100)
    heights = curve.parabola.at(grid_of_sizes)
    axes.plot(np.exp(grid_of_sizes), heights, color=shade, linewidth=1.1, zorder=2)
    _draw_size_interval(axes, grid, curve, best.loss)
    look = style.markers(style.LAW, "minimum of a budget, 95 % interval", ms=8)
    axes.plot([best.params], [best.loss], "*", **look)


def _draw_size_interval(axes: Axes, grid: IsoFlopFit, curve: IsoFlopCurve, height: float) -> None:
    """Draw the interval of the best size, six points below the minimum; nothing with an open
    end."""
    from matplotlib.transforms import ScaledTranslation

    interval = grid.interval(curve)
    if not (interval.low and interval.high):
        return
    below = axes.transData + ScaledTranslation(0, -6 / 72, axes.figure.dpi_scale_trans)
    line: dict[str, Any] = {"color": style.LAW, "linewidth": 1.4, "ms": 5, "mew": 1.4, "zorder": 4}
    axes.plot([interval.low, interval.high], [height] * 2, "|-", transform=below, **line)


def _exponents(grid: IsoFlopFit) -> str:
    if grid.params_exponent is None or grid.tokens_exponent is None:
        return "fewer than two minima: no exponents"
    return (
        f"optimal size ∝ Cᵃ, a = {grid.params_exponent.text('.2f')}\n"
        f"its tokens ∝ Cᵇ, b = {grid.tokens_exponent.text('.2f')}"
    )
