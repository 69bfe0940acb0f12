"""Figure of a comparison: the losses of both recipes, and the compute multiplier at each depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from slm.figures import style
from slm.fits import Comparison, DepthEffect, Interval, Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AXES = {"flops": "training compute (FLOPs)", "seconds": "training time (s)"}
CUT = 3.0
"""Largest ratio of an interval's reach to that of the estimates, in logarithms; a longer interval
is cut."""


def plot_comparison(comparison: Comparison) -> Figure:
    """Plot two recipes under the verdict.

    Left: the loss of every run against FLOPs or seconds. Right: the multiplier per depth with its
    95 % interval, an open end as an arrow, over that of all depths.
    """
    with style.page(style.PAGE_WIDTH, 3.6, comparison.decision.sentence) as figure:
        losses, multipliers = figure.subplots(1, 2)
        trials = _draw_losses(losses, comparison)
        if comparison.per_depth:
            _draw_multipliers(multipliers, comparison.per_depth, comparison.multiplier)
            name = "compute" if comparison.axis == "flops" else "time"
            multipliers.set_ylabel(f"{name} multiplier")
            multipliers.set_title(f"over all depths: {comparison.multiplier.text('.3g')}")
        else:
            multipliers.remove()
        style.legend(figure)
        style.freeze_layout(figure)
        by_loss = sorted(trials, key=lambda drawn: -drawn[1].loss)
        lowest = {trial.depth: (x, trial.loss) for x, trial in by_loss}
        labels = [(f"d{depth}", *lowest[depth]) for depth in sorted(lowest)]
        style.place_labels(losses, labels, [(x, trial.loss) for x, trial in trials])
        return figure


def _draw_losses(axes: Axes, comparison: Comparison) -> list[tuple[float, Trial]]:
    """Draw every run of both recipes; return each with its x."""
    axes.set_xscale("log")
    axes.set_xlabel(AXES[comparison.axis])
    axes.set_ylabel("validation loss")
    hollow = style.markers(style.INK, comparison.base, mfc="white", mec=style.INK, ms=5.5)
    filled = style.markers(style.SURFACE, comparison.candidate)
    drawn: list[tuple[float, Trial]] = []
    for trials, look in (
        (comparison.base_trials, hollow),
        (comparison.candidate_trials, filled),
    ):
        located = [
            (x, trial) for trial in trials if (x := getattr(trial, comparison.axis)) is not None
        ]
        losses = [trial.loss for _, trial in located]
        axes.plot([x for x, _ in located], losses, "o", **look)
        drawn += located
    x = np.array([x for x, _ in drawn])
    y = np.array([trial.loss for _, trial in drawn])
    height = np.ptp(y) or 0.1 * y.max()
    axes.set_xlim(x.min() / 2, x.max() * 1.6)
    axes.set_ylim(y.min() - 0.2 * height, y.max() + 0.08 * height)
    style.flops_ticks(axes)
    return drawn


def _draw_multipliers(axes: Axes, rows: Sequence[DepthEffect], overall: Interval) -> None:
    """Draw the multiplier of each depth, its FLOPs below it, over that of all depths."""
    axes.set_yscale("log")
    axes.set_ylim(*_multiplier_limits(rows, overall))
    _tick_factors(axes)
    axes.set_xlim(-0.6, len(rows) - 0.4)
    ticks = [f"d{row.depth}\n{style.one_digit(row.flops)}" for row in rows]
    axes.set_xticks(range(len(rows)), ticks)
    axes.set_xlabel("depth, FLOPs")
    line: dict[str, Any] = {"linewidth": 0.9, "zorder": 1}
    axes.axhline(1, color=style.TEXT, linestyle=style.DASHED, label="no difference", **line)
    if overall.estimate is not None:
        low = overall.low or axes.get_ylim()[0]
        high = overall.high or axes.get_ylim()[1]
        band = style.band(style.SURFACE_BAND, "over all depths") | {"alpha": 0.6, "zorder": 0}
        axes.axhspan(low, high, **band)
        axes.axhline(overall.estimate, color=style.SURFACE, **line)
    label = "at a depth, 95 % interval"
    look = style.markers(style.INK, label, ms=5, marker="o", linestyle="")
    for k, row in enumerate(rows):
        style.draw_interval(axes, k, row.multiplier, look)


def _multiplier_limits(rows: Sequence[DepthEffect], overall: Interval) -> tuple[float, float]:
    """Return limits that hold all estimates, and intervals up to CUT times as far from 1."""
    intervals = [row.multiplier for row in rows]
    estimates = [one.estimate for one in (*intervals, overall) if one.estimate is not None]
    reach = CUT * max([0.05, *np.abs(np.log(estimates))])
    ends = [end for one in intervals for end in (one.low, one.high) if end]
    spread = np.clip(np.log([1.0, *estimates, *ends]), -reach, reach)
    room = 0.12 * np.ptp(spread) + 0.01
    return float(np.exp(spread.min() - room)), float(np.exp(spread.max() + room))


def _tick_factors(axes: Axes) -> None:
    """Tick a logarithmic axis of factors near 1 like a linear one."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"×{value:.4g}"))
