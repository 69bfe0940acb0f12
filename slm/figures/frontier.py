"""Figure of the compute-optimal model: parameters and tokens against compute, by minima, surface
and ladder."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING

import numpy as np

from slm.figures import style
from slm.figures.style import Array
from slm.fits import CurveFit, Interval, IsoFlopFit, Surface
from slm.fits.power_law import REACH

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOM = 2.0
"""Factor beyond the lines up to which an interval of the surface's optimum is shown; a wider one is
cut."""
MAX_LABELS = 6
"""Depths labelled at most."""


def has_frontier(fit: CurveFit) -> bool:
    """Whether an optimum is known: a budget's minimum, or a surface that determines the exponent of
    N*."""
    return bool(fit.isoflop and fit.isoflop.minima) or _surface(fit) is not None


def plot_frontier(fit: CurveFit, title: str = "") -> Figure:
    """Plot optimal parameters (left) and tokens (right) against FLOPs.

    Stars are the minima of budgets with their 95 % intervals, the line through them their power
    law, blue the surface's optimum with its interval, dots the runs of the ladder; dashed beyond
    the runs.
    """
    with style.page(style.PAGE_WIDTH, 3.5, title, fit.mixed) as figure:
        panels = dict(zip(("params", "tokens"), figure.subplots(1, 2)))
        for name, axes in panels.items():
            _draw_panel(axes, fit, name)
        style.lay_out(figure)
        for name, axes in panels.items():
            labels = style.depth_labels(fit.points, attrgetter(name), MAX_LABELS)
            lines = np.concatenate([line.get_xydata() for line in axes.lines])
            style.place_labels(axes, labels, lines, rising=True)
        return figure


def _draw_panel(axes: Axes, fit: CurveFit, name: str) -> None:
    """Draw one panel; `name` is "params" or "tokens"."""
    flops = [point.flops for point in fit.points]
    ends = min(flops), max(flops)
    style.log_axis(axes, ends[0] / 1.8, REACH * ends[1])
    axes.set_yscale("log")
    axes.set_ylabel(f"parameters N ({fit.convention})" if name == "params" else "tokens D")
    style.shade_beyond(axes, ends[1])
    ladder = style.ladder_of(fit.points)
    color = style.INK if style.is_depth_ladder(ladder) else style.FAINT
    look = style.markers(color, style.ladder_label(ladder), zorder=3)
    style.draw_runs(axes, ladder, name, "o", look)
    surface = _surface(fit)
    if surface:
        _draw_surface_optimum(axes, surface, fit, name, ends)
    if fit.isoflop:
        _draw_minima(axes, fit.isoflop, name, ends)
    heights = np.concatenate([line.get_ydata() for line in axes.lines])
    axes.set_ylim(heights.min() / ROOM, heights.max() * ROOM)
    style.count_ticks(axes.yaxis)
    axes.set_title(_exponents(fit, name))


def _draw_minima(axes: Axes, grid: IsoFlopFit, name: str, ends: tuple[float, float]) -> None:
    """Draw the minima and, through two or more, their power law."""
    label = "isoFLOP minimum, 95 % interval"
    look = style.markers(style.LAW, label, ms=8, marker="*", linestyle="", zorder=7)
    for curve in grid.curves:
        style.draw_interval(axes, curve.flops, grid.intervals(curve)[name], look)
    exponent = grid.params_exponent if name == "params" else grid.tokens_exponent
    if exponent is None or exponent.estimate is None:
        return
    estimate = exponent.estimate
    centre = np.log([best.flops for best in grid.minima]).mean()
    level = np.log([getattr(best, name) for best in grid.minima]).mean()

    def law(flops: Array) -> Array:
        return np.asarray(np.exp(level + estimate * (np.log(flops) - centre)))

    line = style.line(style.LAW, 1.2, 5, label="power law of the minima")
    style.draw_curve(axes, ends, law, line)


def _draw_surface_optimum(
    axes: Axes, surface: Surface, fit: CurveFit, name: str, ends: tuple[float, float]
) -> None:
    """Draw the surface's optimum with its interval."""

    def optimum(flops: Array) -> Array:
        return np.array([getattr(surface.optimum(compute), name) for compute in flops])

    label = f"{surface.form} surface's optimum, 95 % interval"
    look = style.line(style.SURFACE, 1.2, 4, label=label)
    flops = style.draw_curve(axes, ends, optimum, look)
    low, high = _interval_of_optimum(fit, flops)
    if name == "tokens":
        product = flops / surface.kappa
        low, high = product / high, product / low
    axes.fill_between(flops, low, high, **style.band(style.SURFACE_BAND))


def _interval_of_optimum(fit: CurveFit, flops: Array) -> tuple[Array, Array]:
    """Return the ends of N*'s interval, interpolated in logarithms; NaN next to an open end."""
    optima = fit.parametric.frontier
    known = np.log([best.flops for best, _ in optima])
    ends = np.array([[interval.low, interval.high] for _, interval in optima], float)
    low, high = (np.interp(np.log(flops), known, end) for end in np.log(ends).T)
    return np.exp(low), np.exp(high)


def _exponents(fit: CurveFit, name: str) -> str:
    """Return the exponents by minima and surface; N·D = C/kappa on a surface, so its two sum to
    1."""
    symbol, letter = ("N* ∝ Cᵃ", "a") if name == "params" else ("D* ∝ Cᵇ", "b")
    lines = [symbol]
    of_minima = getattr(fit.isoflop, f"{name}_exponent", None)
    if of_minima:
        lines.append(f"minima: {letter} = {of_minima.text('.2f')}")
    surface = _surface(fit)
    if surface:
        exponent = surface.intervals["params_exponent"]
        if name == "tokens":
            exponent = _one_minus(exponent)
        lines.append(f"surface: {letter} = {exponent.text('.2f')}")
    return "\n".join(lines) if len(lines) > 1 else f"{symbol}: one minimum holds no exponent"


def _one_minus(interval: Interval) -> Interval:
    ends = (interval.estimate, interval.high, interval.low)
    return Interval.of_ends(*(None if end is None else 1 - end for end in ends))


def _surface(fit: CurveFit) -> Surface | None:
    """Return the chosen surface if the runs determine the exponent of its optimum."""
    surface = fit.parametric.surface
    return surface if surface and surface.intervals["params_exponent"].identifiable else None
