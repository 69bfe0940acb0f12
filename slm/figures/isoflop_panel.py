"""IsoFLOP valleys: loss against size at each budget, the minima with their intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from slm.figures import style
from slm.figures.style import Array
from slm.fits import CurveFit, IsoFlop, Valley

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def valley_panel(axes: Axes, grid: IsoFlop, fit: CurveFit) -> None:
    """Loss against size at each budget; star and bar for a minimum and its interval, hollow runs where it has none."""
    axes.set_xscale("log")
    axes.set_xlabel(f"parameters ({fit.convention})")
    axes.set_ylabel(style.loss_axis(fit.metric))
    for valley, shade in zip(grid.valleys, style.shades(len(grid.valleys))):
        _valley(axes, grid, valley, shade)
    runs = [point for valley in grid.valleys for point in (*valley.points, *valley.left_out)]
    sizes, losses = (
        np.array([point.params for point in runs]),
        np.array([point.loss for point in runs]),
    )
    width, height = sizes.max() / sizes.min(), np.ptp(losses) or 0.1 * losses.max()
    room = 0.5 if all(valley.minimum for valley in grid.valleys) else 1.1
    axes.set_xlim(sizes.min() / width**0.06, sizes.max() * width**room)
    axes.set_ylim(losses.min() - 0.12 * height, losses.max() + 0.08 * height)
    style.count_axis(axes.xaxis)
    axes.set_title(_exponents(grid))


def label_budgets(axes: Axes, grid: IsoFlop) -> None:
    """The budgets in a column right of all runs, each at its largest run, moved up until it covers no other.

    The layout must be settled.
    """
    ends = [
        max((*own.points, *own.left_out), key=lambda point: point.params) for own in grid.valleys
    ]
    edge, unit, floor = max(end.params for end in ends), 72 / axes.figure.dpi, -np.inf
    rows = zip(ends, grid.valleys, style.shades(len(ends)))
    for end, own, shade in sorted(rows, key=lambda row: row[0].loss):
        height = axes.transData.transform((edge, end.loss))[1] * unit
        floor = max(height, floor + 10)
        text = f"{style.flops_text(own.budget)} FLOPs" + ("" if own.minimum else ": no minimum")
        axes.annotate(text, (edge, end.loss), color=shade, **style.beside(9, floor - height))
        axes.plot(
            [end.params, edge], [end.loss] * 2, color=shade, linewidth=0.6, linestyle=":", zorder=1
        )


def _valley(axes: Axes, grid: IsoFlop, valley: Valley, shade: Array) -> None:
    from matplotlib.transforms import ScaledTranslation

    best = valley.minimum
    runs = [*valley.points, *valley.left_out]
    face = shade if best else "white"
    axes.plot(
        [p.params for p in runs], [p.loss for p in runs], "o", ms=4, mec=shade, mfc=face, zorder=3
    )
    if best and valley.parabola:
        sizes = np.linspace(valley.parabola.lowest, valley.parabola.highest, 100)
        axes.plot(np.exp(sizes), valley.parabola.at(sizes), color=shade, linewidth=1.1, zorder=2)
        ends = grid.interval(valley)
        if ends.low and ends.high:
            under = axes.transData + ScaledTranslation(0, -6 / 72, axes.figure.dpi_scale_trans)
            span = [ends.low, ends.high], [best.loss] * 2
            axes.plot(
                *span,
                "|-",
                color=style.LAW,
                linewidth=1.4,
                ms=5,
                mew=1.4,
                zorder=4,
                transform=under,
            )
        word = "minimum of a budget, 95 % interval"
        axes.plot([best.params], [best.loss], "*", **style.dots(style.LAW, word, ms=8))


def _exponents(grid: IsoFlop) -> str:
    if grid.params_exponent is None or grid.tokens_exponent is None:
        return "fewer than two minima: no exponents"
    return (
        f"optimal size ∝ Cᵃ, a = {grid.params_exponent.text('.2f')}\n"
        f"its tokens ∝ Cᵇ, b = {grid.tokens_exponent.text('.2f')}"
    )
