"""Figure of CORE, or the mean of another bundle, against training compute, with the CORE of GPT-2
and GPT-3."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
    width = style.PANEL_WIDTH + 0.4
    with style.page(width, 3.5, style.titled(title, core.mixed)) as figure:
        axes = figure.subplots()
        runs = _measured_runs(core)
        _draw_panel(axes, core, runs)
        style.legend(figure)
        figure.draw_without_rendering()
        if core.name == "CORE":
            _draw_levels(axes)
        style.freeze_layout(figure)
        ladder = [run for run in runs if run.budget is None]
        labels = style.depth_labels(ladder, lambda run: run.core or 0.0)
        obstacles = [(run.flops, run.core or 0.0) for run in runs]
        style.place_labels(axes, labels, obstacles, rising=True)
        return figure


def _measured_runs(core: CoreFit) -> list[Point]:
    runs = {point.run_id: point for point in (*core.points, *core.at_chance)}
    return [point for point in runs.values() if point.core is not None]


def _draw_panel(axes: Axes, core: CoreFit, runs: list[Point]) -> None:
    law = core.law
    within = np.geomspace(law.smallest, law.largest, 80)
    beyond = np.geomspace(law.largest, REACH * law.largest, 40)
    flops = np.concatenate([within, beyond])
    curve = core.curve(flops)
    style.compute_axis(axes)
    axes.set_ylabel(core.name)
    values = np.array([*(run.core for run in runs), curve[-1]], float)
    room = 0.14 * np.ptp(values)
    axes.set_xlim(min(run.flops for run in runs) / 1.8, REACH * law.largest)
    axes.set_ylim(values.min() - room, values.max() + room)
    style.flops_ticks(axes)
    style.shade_beyond(axes, law.largest * 1.12)
    line: dict[str, Any] = {"color": style.LAW, "linewidth": 1.5, "zorder": 3}
    split = len(within)
    axes.plot(within, curve[:split], label=f"{core.name} from the law", **line)
    axes.plot(beyond, curve[split:], linestyle=style.DASHED, **line)
    axes.fill_between(flops, *core.band(flops), **style.band(style.LAW_BAND, "its 95 % interval"))
    _draw_runs(axes, core, runs)
    _draw_errors(axes, runs)
    at_largest = core.at(law.largest).text(".3f")
    extrapolated = core.at(REACH * law.largest).text(".3f")
    axes.set_title(
        f"at the largest run's compute {at_largest},\n"
        f"at {REACH:g} times that, extrapolated, {extrapolated}"
    )


def _draw_runs(axes: Axes, core: CoreFit, runs: list[Point]) -> None:
    above = [run for run in runs if run not in core.at_chance]
    at_chance = [run for run in runs if run in core.at_chance]
    for group, look in (
        (above, style.markers(style.INK, "runs", ms=4.5)),
        (at_chance, style.markers(style.INK, "runs at chance", ms=4.5, mfc="white", mec=style.INK)),
    ):
        if group:
            scores = np.array([run.core for run in group], float)
            axes.plot([run.flops for run in group], scores, "o", **look)


def _draw_errors(axes: Axes, runs: list[Point]) -> None:
    """Draw the 95 % interval over examples of each run whose standard error is known."""
    label: str | None = "95 % over examples"
    for run in runs:
        if run.core is not None and run.core_error is not None:
            reach = NORMAL * run.core_error
            ends = [run.core - reach, run.core + reach]
            axes.plot([run.flops] * 2, ends, color=style.INK, linewidth=1, zorder=4, label=label)
            label = None


def _draw_levels(axes: Axes) -> None:
    """Draw published levels inside the panel, labelled right of it, each moved up to cover no
    other."""
    low, high = axes.get_ylim()
    edge = axes.get_xlim()[1]
    unit = 72 / axes.figure.dpi
    floor = -np.inf
    for name, level in sorted(LEVELS.items(), key=lambda item: item[1]):
        if not low < level < high:
            continue
        dashes = ":" if name.startswith("GPT-2") else "-."
        axes.axhline(level, color=style.FAINT, linewidth=0.8, linestyle=dashes, zorder=1)
        height = axes.transData.transform((edge, level))[1] * unit
        floor = max(height, floor + 9)
        look: dict[str, Any] = {"color": style.TEXT, "annotation_clip": False}
        spot = style.offset_text(4, floor - height)
        axes.annotate(f"{name}  {level:.3f}", (edge, level), **look, **spot)
