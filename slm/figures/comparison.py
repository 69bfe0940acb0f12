"""Figure of a comparison: the losses of both recipes, and the compute multiplier at each depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from slm.figures import style
from slm.fits import Comparison, DepthEffect, Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AXES = {"flops": style.COMPUTE, "seconds": "training time (s)"}
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
        _draw_losses(losses, comparison)
        _draw_multipliers(multipliers, comparison)
        style.lay_out(figure)
        _label_depths(losses, comparison)
        return figure


def _draw_losses(axes: Axes, comparison: Comparison) -> None:
    """Draw every run of both recipes."""
    x = comparison.axis
    trials = (*comparison.base_trials, *comparison.candidate_trials)
    compute = [getattr(trial, x) for trial in trials]
    style.log_axis(axes, min(compute) / 2, max(compute) * 1.6, AXES[x])
    axes.set_ylabel("validation loss")
    style.leave_room(axes, [trial.loss for trial in trials], 0.2, 0.08)
    hollow = style.markers(style.INK, comparison.base, mfc="white", mec=style.INK, ms=5.5)
    style.draw_runs(axes, comparison.base_trials, "loss", "o", hollow, x)
    filled = style.markers(style.SURFACE, comparison.candidate)
    style.draw_runs(axes, comparison.candidate_trials, "loss", "o", filled, x)


def _label_depths(axes: Axes, comparison: Comparison) -> None:
    """Label each depth at its lowest run."""
    lowest: dict[int, tuple[float, float]] = {}
    runs = []
    for trial in (*comparison.base_trials, *comparison.candidate_trials):
        run = getattr(trial, comparison.axis), trial.loss
        runs.append(run)
        if trial.depth not in lowest or trial.loss <= lowest[trial.depth][1]:
            lowest[trial.depth] = run
    labels = [(f"d{depth}", *run) for depth, run in sorted(lowest.items())]
    style.place_labels(axes, labels, runs)


def _draw_multipliers(axes: Axes, comparison: Comparison) -> None:
    """Draw the multiplier of each depth, its FLOPs below it, over that of all depths."""
    rows = comparison.per_depth
    overall = comparison.multiplier
    axes.set_yscale("log")
    axes.set_ylim(*_multiplier_limits(rows, overall))
    _tick_factors(axes)
    axes.set_ylabel("compute multiplier" if comparison.axis == "flops" else "time multiplier")
    axes.set_xlim(-0.6, len(rows) - 0.4)
    ticks = [f"d{row.depth}\n{style.one_digit(row.flops)}" for row in rows]
    axes.set_xticks(range(len(rows)), ticks)
    axes.set_xlabel("depth, FLOPs")
    axes.set_title(f"over all depths: {overall.text('.3g')}")
    dashed = style.line(style.TEXT, 0.9, 1, linestyle=style.DASHED)
    axes.axhline(1, label="no difference", **dashed)
    if overall.estimate is not None:
        low, high = axes.get_ylim()
        band = style.band(style.SURFACE_BAND, "over all depths") | {"alpha": 0.6, "zorder": 0}
        axes.axhspan(overall.low or low, overall.high or high, **band)
        axes.axhline(overall.estimate, **style.line(style.SURFACE, 0.9, 1))
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
