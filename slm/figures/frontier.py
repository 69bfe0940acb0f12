"""The compute-optimal model against compute: parameters and tokens, by the minima, the surface and the ladder."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from slm.figures import style
from slm.figures.style import Array
from slm.fits import CurveFit, Interval, IsoFlop, Point, Surface
from slm.fits.power_law import REACH

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOM = 2.0
"""Factor over what is drawn up to which an interval of the surface's optimum is shown; a wider one is cut."""
LABELS = 6
"""Depths named at most."""


def has_frontier(fit: CurveFit) -> bool:
    """Whether an optimum is known: a valley's minimum, or a surface of which the runs hold N*'s exponent."""
    return bool(fit.isoflop and fit.isoflop.minima) or _surface(fit) is not None


def draw_frontier(fit: CurveFit, stem: str | Path, title: str) -> tuple[Path, Path]:
    """Optimal parameters (left) and tokens (right) against FLOPs into `stem`.png and .svg; gives both paths.

    Stars are the valleys' minima with their 95 % intervals, the line through them their power law, blue the surface's
    optimum with its interval, dots the runs of the ladder; dashed beyond the runs.
    """
    runs = [point for point in fit.points if point.budget is None]
    with style.page(style.PAGE, 3.5, style.titled(title, fit.mixed)) as figure:
        panels = figure.subplots(1, 2)
        for axes, name in zip(panels, ("params", "tokens")):
            _panel(axes, fit, runs, name)
        style.legend(figure)
        style.settle(figure)
        for axes, name in zip(panels, ("params", "tokens")):
            labels = style.depth_labels(runs, attrgetter(name), LABELS)
            lines = np.concatenate([line.get_xydata() for line in axes.lines])
            style.place(axes, labels, lines, rising=True)
        return style.save(figure, stem)


def _panel(axes: Axes, fit: CurveFit, runs: list[Point], name: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("training compute (FLOPs)")
    axes.set_ylabel(f"parameters N ({fit.convention})" if name == "params" else "tokens D")
    every = [point.flops for point in fit.points]
    axes.set_xlim(min(every) / 1.8, REACH * max(every))
    style.flops_axis(axes)
    style.beyond(axes, max(every) * 1.12)
    if runs:
        color = style.INK if style.dialled(runs) else style.FAINT
        look = style.dots(color, style.runs_word(runs), zorder=3)
        axes.plot([run.flops for run in runs], [getattr(run, name) for run in runs], "o", **look)
    within = np.geomspace(min(every), max(every), 60)
    beyond = np.geomspace(max(every), REACH * max(every), 30)
    surface = _surface(fit)
    if surface:
        _optimum(axes, surface, fit, name, within, beyond)
    if fit.isoflop:
        _minima(axes, fit.isoflop, name, within, beyond)
    drawn = np.concatenate([line.get_ydata() for line in axes.lines])
    axes.set_ylim(drawn.min() / ROOM, drawn.max() * ROOM)
    style.count_axis(axes.yaxis)
    axes.set_title(_exponents(fit, name))


def _minima(axes: Axes, grid: IsoFlop, name: str, within: Array, beyond: Array) -> None:
    """The minima and, of two or more, the power law through them."""
    found = [(valley, valley.minimum) for valley in grid.valleys if valley.minimum]
    look = style.dots(
        style.LAW, "isoFLOP minimum, 95 % interval", ms=8, marker="*", linestyle="", zorder=7
    )
    for valley, _ in found:
        own = grid.interval(valley) if name == "params" else grid.intervals(valley)["tokens"]
        style.whiskers(axes, valley.flops, own, look)
    exponent = grid.params_exponent if name == "params" else grid.tokens_exponent
    if exponent is None or exponent.estimate is None:
        return
    middle = np.log([best.flops for _, best in found]).mean()
    level = np.log([getattr(best, name) for _, best in found]).mean()
    for flops, dashes in ((within, "-"), (beyond, style.DASHED)):
        line = np.exp(level + exponent.estimate * (np.log(flops) - middle))
        word = "power law of the minima" if dashes == "-" else None
        axes.plot(
            flops, line, color=style.LAW, linewidth=1.2, linestyle=dashes, zorder=5, label=word
        )


def _optimum(
    axes: Axes, surface: Surface, fit: CurveFit, name: str, within: Array, beyond: Array
) -> None:
    """The surface's, with its interval."""
    every = np.concatenate([within, beyond])
    low, high = _band(fit, every)
    if name == "tokens":
        low, high = every / surface.kappa / high, every / surface.kappa / low
    axes.fill_between(every, low, high, **style.band(style.SURFACE_BAND))
    for flops, dashes in ((within, "-"), (beyond, style.DASHED)):
        line = [getattr(surface.optimum(own), name) for own in flops]
        word = f"{surface.form} surface's optimum, 95 % interval" if dashes == "-" else None
        axes.plot(
            flops, line, color=style.SURFACE, linewidth=1.2, linestyle=dashes, zorder=4, label=word
        )


def _band(fit: CurveFit, flops: Array) -> tuple[Array, Array]:
    """Ends of the interval of N*, straight between those of the fit in logarithms; nothing beside an open end."""
    optima = fit.parametric.frontier
    ends = np.array(
        [[np.nan if end is None else end for end in (own.low, own.high)] for _, own in optima]
    )
    known = np.log([best.flops for best, _ in optima])
    low, high = (np.exp(np.interp(np.log(flops), known, np.log(side))) for side in ends.T)
    return low, high


def _exponents(fit: CurveFit, name: str) -> str:
    """Of both ways, in words; N·D = C/kappa on a surface, so that its two sum to 1."""
    symbol, letter = ("N* ∝ Cᵃ", "a") if name == "params" else ("D* ∝ Cᵇ", "b")
    surface, found = _surface(fit), []
    minima = getattr(fit.isoflop, f"{name}_exponent", None)
    if minima:
        found.append(f"minima: {letter} = {minima.text('.2f')}")
    if surface:
        own = surface.intervals["params_exponent"]
        if name == "tokens":
            estimate, low, high = (
                None if end is None else 1 - end for end in (own.estimate, own.high, own.low)
            )
            own = Interval(estimate, low, high, True)
        found.append(f"surface: {letter} = {own.text('.2f')}")
    return "\n".join([symbol, *found]) if found else f"{symbol}: one minimum holds no exponent"


def _surface(fit: CurveFit) -> Surface | None:
    """The surface chosen, where the runs hold what its optimum is made of."""
    surface = fit.parametric.surface
    return surface if surface and surface.intervals["params_exponent"].identifiable else None
