"""Figure of CORE, or the mean of another bundle, against training compute, with the CORE of GPT-2
and GPT-3."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from slm.figures import style
from slm.fits import Point
from slm.fits.compare.paired_core import NORMAL
from slm.fits.core_fit import GPT2, CoreFit
from slm.fits.power_law import REACH

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEVELS = {
    **GPT2,
    "GPT-3 125M": 0.148,
    "GPT-3 350M": 0.216,
    "GPT-3 760M": 0.266,
    "GPT-3 1.3B": 0.291,
    "GPT-3 2.7B": 0.329,
    "GPT-3 6.7B": 0.361,
    "GPT-3 13B": 0.385,
    "GPT-3 175B": 0.427,
}
"""CORE by karpathy/nanochat discussion #420: GPT-2 as calculated there, GPT-3 as estimated
there."""


def plot_core(core: CoreFit, title: str = "") -> Figure:
    """Plot CORE against FLOPs: runs, the fit with its interval, published levels within the panel.

    Hollow runs are at chance; the curve is dashed to ten times the largest run.
    """
    with style.page(style.PANEL_WIDTH + 0.4, 3.5, title, core.mixed) as figure:
        axes = figure.subplots()
        _draw_panel(axes, core)
        style.draw_legend(figure)
        figure.draw_without_rendering()
        if core.name == "CORE":
            _draw_levels(axes)
        style.freeze_layout(figure)
        runs = [(run.flops, _core(run)) for run in core.points]
        labels = style.depth_labels(core.points, _core)
        style.place_labels(axes, labels, runs, rising=True)
        return figure


def _core(run: Point) -> float:
    assert run.core is not None
    return run.core


def _draw_panel(axes: Axes, core: CoreFit) -> None:
    largest = core.law.largest
    reach = REACH * largest
    style.log_axis(axes, min(run.flops for run in core.points) / 1.8, reach)
    axes.set_ylabel(core.name)
    values = [*map(_core, core.points), *core.curve(np.array([reach]))]
    style.leave_room(axes, values, 0.14, 0.14)
    style.shade_beyond(axes, largest)
    look = style.line(style.LAW, 1.5, 3, label=f"{core.name} from the law")
    flops = style.draw_curve(axes, (core.law.smallest, largest), core.curve, look)
    axes.fill_between(flops, *core.band(flops), **style.band(style.LAW_BAND, "its 95 % interval"))
    _draw_runs(axes, core)
    axes.set_title(
        f"at the largest run's compute {core.at(largest).text('.3f')},\n"
        f"at {REACH:g} times that, extrapolated, {core.at(reach).text('.3f')}"
    )


def _draw_runs(axes: Axes, core: CoreFit) -> None:
    """Draw the runs, with the 95 % interval over examples where their standard error is known."""
    above = [run for run in core.points if run not in core.at_chance]
    look = style.markers(style.INK, "runs", ms=4.5)
    style.draw_runs(axes, above, "core", "o", look)
    look |= {"label": "runs at chance", "mfc": "white", "mec": style.INK}
    style.draw_runs(axes, core.at_chance, "core", "o", look)
    bar = style.line(style.INK, 1, 4, label="95 % over examples")
    for run in core.points:
        if run.core_error is not None:
            half = NORMAL * run.core_error
            axes.plot([run.flops] * 2, [_core(run) - half, _core(run) + half], **bar)


def _draw_levels(axes: Axes) -> None:
    """Draw published levels inside the panel, and label them right of it."""
    low, high = axes.get_ylim()
    labels = []
    for name, level in LEVELS.items():
        if low < level < high:
            dashes = ":" if name.startswith("GPT-2") else "-."
            axes.axhline(level, linestyle=dashes, **style.line(style.FAINT, 0.8, 1))
            labels.append((level, f"{name}  {level:.3f}", style.TEXT))
    style.label_column(axes, axes.get_xlim()[1], labels, 4, 9)
