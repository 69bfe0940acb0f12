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
    curves = grid.curves
    runs = [run for curve in curves for run in _runs(curve)]
    sizes = np.array([run.params for run in runs])
    width = sizes.max() / sizes.min()
    # the labels of budgets stand right of the runs; "no minimum" makes them longer
    room = 0.5 if all(curve.minimum for curve in curves) else 1.1
    label = f"parameters ({fit.convention})"
    style.log_axis(axes, sizes.min() / width**0.06, sizes.max() * width**room, label)
    style.count_ticks(axes.xaxis)
    axes.set_ylabel(style.loss_label(fit.metric))
    style.leave_room(axes, [run.loss for run in runs], 0.12, 0.08)
    for curve, shade in zip(curves, style.shades(len(curves))):
        _draw_curve(axes, grid, curve, shade)
    axes.set_title(_exponents(grid))


def label_budgets(axes: Axes, grid: IsoFlopFit) -> None:
    """Label the budgets in a column right of all runs, each at its largest run.

    The layout must be frozen.
    """
    largest = [max(_runs(curve), key=lambda run: run.params) for curve in grid.curves]
    edge = max(run.params for run in largest)
    labels = []
    for curve, run, shade in zip(grid.curves, largest, style.shades(len(largest))):
        text = f"{flops_text(curve.budget)} FLOPs"
        if not curve.minimum:
            text += ": no minimum"
        labels.append((run.loss, text, shade))
        axes.plot([run.params, edge], [run.loss] * 2, ":", **style.line(shade, 0.6, 1))
    style.label_column(axes, edge, labels, 9, 10)


def _runs(curve: IsoFlopCurve) -> list[Point]:
    return [*curve.points, *curve.left_out]


def _draw_curve(axes: Axes, grid: IsoFlopFit, curve: IsoFlopCurve, shade: Array) -> None:
    best = curve.minimum
    face = shade if best else "white"
    look: dict[str, Any] = {"ms": 4, "mec": shade, "mfc": face, "zorder": 3}
    style.draw_runs(axes, _runs(curve), "loss", "o", look, "params")
    if not (best and curve.parabola):
        return
    log_sizes = np.linspace(curve.parabola.lowest, curve.parabola.highest, 100)
    heights = curve.parabola.at(log_sizes)
    axes.plot(np.exp(log_sizes), heights, **style.line(shade, 1.1, 2))
    _draw_size_interval(axes, grid, curve, best.loss)
    look = style.markers(style.LAW, "minimum of a budget, 95 % interval", ms=8)
    style.draw_runs(axes, [best], "loss", "*", look, "params")


def _draw_size_interval(axes: Axes, grid: IsoFlopFit, curve: IsoFlopCurve, height: float) -> None:
    """Draw the interval of the best size, six points below the minimum; nothing with an open
    end."""
    from matplotlib.transforms import ScaledTranslation

    interval = grid.intervals(curve)["params"]
    if not (interval.low and interval.high):
        return
    below = axes.transData + ScaledTranslation(0, -6 / 72, axes.figure.dpi_scale_trans)
    look = style.line(style.LAW, 1.4, 4, ms=5, mew=1.4, transform=below)
    axes.plot([interval.low, interval.high], [height] * 2, "|-", **look)


def _exponents(grid: IsoFlopFit) -> str:
    if grid.params_exponent is None or grid.tokens_exponent is None:
        return "fewer than two minima: no exponents"
    return (
        f"optimal size ∝ Cᵃ, a = {grid.params_exponent.text('.2f')}\n"
        f"its tokens ∝ Cᵇ, b = {grid.tokens_exponent.text('.2f')}"
    )
