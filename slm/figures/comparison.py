"""Two recipes: what their runs came to, and how much compute the change is worth at each depth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from slm.figures import style
from slm.fits import Interval
from slm.fits.compare.comparison import AtDepth, Comparison, Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AXES = {"flops": "training compute (FLOPs)", "seconds": "training time (s)"}
CUT = 3.0
"""How many times further from 1 than the estimates an interval is drawn; one that goes further is cut."""


def draw_comparison(comparison: Comparison, stem: str | Path) -> tuple[Path, Path]:
    """Two recipes into `stem`.png and .svg, the verdict above; gives both paths.

    Left: the loss of every run against FLOPs or seconds. Right: the multiplier per depth with its 95 % interval, an
    open end as an arrow, over that of all depths together.
    """
    name = "compute" if comparison.axis == "flops" else "time"
    with style.page(style.PAGE, 3.6, comparison.verdict.sentence) as figure:
        left, right = figure.subplots(1, 2)
        trials = _losses(left, comparison)
        if comparison.per_depth:
            _multipliers(right, comparison.per_depth, comparison.multiplier)
            right.set_ylabel(f"{name} multiplier")
            right.set_title(f"over all depths: {comparison.multiplier.text('.3g')}")
        else:
            right.remove()
        style.legend(figure)
        style.settle(figure)
        lowest = {
            trial.depth: (x, trial.loss)
            for x, trial in sorted(trials, key=lambda own: -own[1].loss)
        }
        labels = [(f"d{depth}", *lowest[depth]) for depth in sorted(lowest)]
        style.place(left, labels, [(x, trial.loss) for x, trial in trials])
        return style.save(figure, stem)


def _losses(axes: Axes, comparison: Comparison) -> list[tuple[float, Trial]]:
    """Every run of both; gives what was drawn, each with its place on the axis."""
    axes.set_xscale("log")
    axes.set_xlabel(AXES[comparison.axis])
    axes.set_ylabel("validation loss")
    drawn: list[tuple[float, Trial]] = []
    sides = (
        (comparison.base, comparison.base_trials),
        (comparison.candidate, comparison.candidate_trials),
    )
    looks = style.dots(style.INK, mfc="white", mec=style.INK, ms=5.5), style.dots(style.SURFACE)
    for (word, trials), look in zip(sides, looks):
        known = [
            (x, trial) for trial in trials if (x := getattr(trial, comparison.axis)) is not None
        ]
        axes.plot(
            [x for x, _ in known],
            [trial.loss for _, trial in known],
            "o",
            **{**look, "label": word},
        )
        drawn += known
    x, y = np.array([own for own, _ in drawn]), np.array([trial.loss for _, trial in drawn])
    height = np.ptp(y) or 0.1 * y.max()
    axes.set_xlim(x.min() / 2, x.max() * 1.6)
    axes.set_ylim(y.min() - 0.2 * height, y.max() + 0.08 * height)
    style.flops_axis(axes)
    return drawn


def _multipliers(axes: Axes, rows: Sequence[AtDepth], over_all: Interval) -> None:
    """Depths side by side, their FLOPs under them."""
    known = [end for row in rows if (end := row.multiplier.estimate) is not None]
    known += [over_all.estimate] if over_all.estimate is not None else []
    reach = CUT * max([abs(float(np.log(own))) for own in known] + [0.05])
    ends = [end for row in rows for end in (row.multiplier.low, row.multiplier.high) if end]
    spread = np.clip(np.log([1.0, *known, *ends]), -reach, reach)
    room = 0.12 * np.ptp(spread) + 0.01
    axes.set_yscale("log")
    axes.set_ylim(float(np.exp(spread.min() - room)), float(np.exp(spread.max() + room)))
    _factor_ticks(axes)
    axes.set_xlim(-0.6, len(rows) - 0.4)
    axes.set_xticks(
        range(len(rows)), [f"d{row.depth}\n{row.flops:.0e}".replace("e+", "e") for row in rows]
    )
    axes.set_xlabel("depth, FLOPs")
    axes.axhline(
        1, color=style.WORDS, linewidth=0.9, linestyle=style.DASHED, zorder=1, label="no difference"
    )
    if over_all.estimate is not None:
        low, high = over_all.low or axes.get_ylim()[0], over_all.high or axes.get_ylim()[1]
        axes.axhspan(
            low,
            high,
            color=style.SURFACE_BAND,
            alpha=0.6,
            linewidth=0,
            zorder=0,
            label="over all depths",
        )
        axes.axhline(over_all.estimate, color=style.SURFACE, linewidth=0.9, zorder=1)
    look = style.dots(style.INK, "at a depth, 95 % interval", ms=5, marker="o", linestyle="")
    for k, row in enumerate(rows):
        style.whiskers(axes, k, row.multiplier, look)


def _factor_ticks(axes: Axes) -> None:
    """A logarithmic axis of factors near 1, ticked as a linear one."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"×{value:.4g}"))
