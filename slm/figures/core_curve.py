"""CORE, or the mean of another bundle, against training compute; CORE beside what GPT-2 and GPT-3 reach."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from slm.figures import style
from slm.fits import Point
from slm.fits.compare.paired_core import NORMAL
from slm.fits.core_fit import GPT2, CoreFit
from slm.fits.power_law import REACH

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
"""CORE by karpathy/nanochat discussion #420: of GPT-2 as calculated there, of GPT-3 as estimated there."""


def draw_core(core: CoreFit, stem: str | Path, title: str) -> tuple[Path, Path]:
    """CORE against FLOPs into `stem`.png and .svg: runs, the fit with its interval, published levels near the axis.

    Hollow runs are at chance; dashed to ten times the largest run. Gives both paths.
    """
    with style.page(style.PANEL + 0.4, 3.5, style.titled(title, core.mixed)) as figure:
        axes = figure.subplots()
        _panel(axes, core)
        style.legend(figure)
        figure.draw_without_rendering()
        if core.name == "CORE":
            _levels(axes)
        style.settle(figure)
        runs = _runs(core)
        labels = style.depth_labels(
            [run for run in runs if run.budget is None], lambda run: run.core or 0.0
        )
        style.place(axes, labels, [(run.flops, run.core or 0.0) for run in runs], rising=True)
        return style.save(figure, stem)


def _panel(axes: Axes, core: CoreFit) -> None:
    law, runs = core.law, _runs(core)
    within, beyond = (
        np.geomspace(law.smallest, law.largest, 80),
        np.geomspace(law.largest, REACH * law.largest, 40),
    )
    every = np.concatenate([within, beyond])
    low, high = core.band(every)
    middle = core.curve(every)
    axes.set_xscale("log")
    axes.set_xlabel("training compute (FLOPs)")
    axes.set_ylabel(core.name)
    values = np.array([run.core for run in runs] + [middle[-1]], float)
    axes.set_xlim(min(run.flops for run in runs) / 1.8, REACH * law.largest)
    axes.set_ylim(values.min() - 0.14 * np.ptp(values), values.max() + 0.14 * np.ptp(values))
    style.flops_axis(axes)
    style.beyond(axes, law.largest * 1.12)
    axes.plot(
        within,
        middle[: len(within)],
        color=style.LAW,
        linewidth=1.5,
        zorder=3,
        label=f"{core.name} from the law",
    )
    axes.plot(
        beyond,
        middle[len(within) :],
        color=style.LAW,
        linewidth=1.5,
        linestyle=style.DASHED,
        zorder=3,
    )
    axes.fill_between(every, low, high, **style.band(style.LAW_BAND, "its 95 % interval"))
    for chance, face, word in ((False, style.INK, "runs"), (True, "white", "runs at chance")):
        chosen = [run for run in runs if (run in core.at_chance) == chance]
        if chosen:
            look = style.dots(
                style.INK, word, ms=4.5, mfc=face, mec=style.INK if chance else "white"
            )
            axes.plot(
                [run.flops for run in chosen],
                np.array([run.core for run in chosen], float),
                "o",
                **look,
            )
    _errors(axes, runs)
    now, later = (core.at(times * law.largest).text(".3f") for times in (1.0, REACH))
    axes.set_title(
        f"at the largest run's compute {now},\nat {REACH:g} times that, extrapolated, {later}"
    )


def _errors(axes: Axes, runs: list[Point]) -> None:
    """What another draw of examples would do to each run: 95 %, where it is known."""
    word: str | None = "95 % over examples"
    for run in runs:
        if run.core is not None and run.core_error is not None:
            ends = run.core - NORMAL * run.core_error, run.core + NORMAL * run.core_error
            axes.plot([run.flops] * 2, ends, color=style.INK, linewidth=1, zorder=4, label=word)
            word = None


def _levels(axes: Axes) -> None:
    """Published levels inside the panel, named right of it, each moved up until it covers no other."""
    (low, high), unit, floor = axes.get_ylim(), 72 / axes.figure.dpi, -np.inf
    edge = axes.get_xlim()[1]
    for name, level in sorted(LEVELS.items(), key=lambda own: own[1]):
        if not low < level < high:
            continue
        dashes = ":" if name.startswith("GPT-2") else "-."
        axes.axhline(level, color=style.FAINT, linewidth=0.8, linestyle=dashes, zorder=1)
        height = axes.transData.transform((edge, level))[1] * unit
        floor = max(height, floor + 9)
        spot = style.beside(4, floor - height)
        axes.annotate(
            f"{name}  {level:.3f}", (edge, level), color=style.WORDS, annotation_clip=False, **spot
        )


def _runs(core: CoreFit) -> list[Point]:
    every = {point.run_id: point for point in (*core.points, *core.at_chance)}
    return [point for point in every.values() if point.core is not None]
