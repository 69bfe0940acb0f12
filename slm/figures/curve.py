"""Loss against training compute: the runs, their law, what it foretold of runs held out; beside it the valleys."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slm.figures import style
from slm.figures.holdout_panel import held_panel
from slm.figures.isoflop_panel import label_budgets, valley_panel
from slm.figures.style import Array
from slm.fits import ADDITIVE, CurveFit, Law, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = tuple[int, Array, Array]
"""Depth, training FLOPs and loss of one run while it trained."""


def draw_curve(
    fit: CurveFit,
    path_stem: str | Path,
    curves: Sequence[Curve] | None = None,
    title: str = "What more compute buys",
) -> tuple[Path, Path]:
    """Draw a fit into `path_stem`.png and .svg; gives both paths.

    Left: validation loss against training compute, the law with its 95 % interval, dashed to ten times the largest
    run. Below it, where runs were held out: what the laws of the smaller runs foretold, in per cent of the law of all.
    Right, with an isoFLOP grid: the valleys and their minima. `curves` are drawn faint behind the runs; their loss must
    be in the unit of the points. Files appear whole or not at all.
    """
    held, grid = bool(fit.law and fit.choice.hold_outs), fit.isoflop
    columns = ["law", "held"][: 1 + held], ["grid"] * (1 + held)
    with style.page(
        style.PAGE if grid else style.PANEL, 3.5 + 1.2 * held, style.titled(title, fit.mixed)
    ) as figure:
        mosaic: list[Any] = [list(row) for row in zip(*columns[: 2 if grid else 1])]
        panels = figure.subplot_mosaic(mosaic, height_ratios=[3, 1.15][: 1 + held])
        _compute_panel(panels["law"], fit, curves or [])
        if held and fit.law:
            held_panel(panels["held"], panels["law"], fit.law, fit.choice.hold_outs)
        if grid:
            valley_panel(panels["grid"], grid, fit)
        style.legend(figure)
        style.settle(figure)
        style.place(
            panels["law"],
            _depths(fit.points, fit.law),
            [(run.flops, run.loss) for run in fit.points],
        )
        if grid:
            label_budgets(panels["grid"], grid)
        return style.save(figure, path_stem)


def _compute_panel(axes: Axes, fit: CurveFit, curves: Sequence[Curve]) -> None:
    axes.set_xscale("log")
    axes.set_xlabel("training compute (FLOPs)")
    axes.set_ylabel(style.loss_axis(fit.metric))
    _limits(axes, fit.points, fit.law)
    style.flops_axis(axes)
    for _, flops, loss in curves:
        axes.plot(
            flops,
            loss,
            color=style.FAINT,
            alpha=0.45,
            linewidth=0.7,
            zorder=1,
            label="training loss",
        )
    _runs(axes, fit.points)
    minima = fit.isoflop.minima if fit.isoflop else []
    if minima:
        places = [own.flops for own in minima], [own.loss for own in minima]
        axes.plot(*places, "*", **style.dots(style.INK, "isoFLOP minima", ms=8, zorder=6))
    if fit.law:
        _law(axes, fit.law)
    axes.set_title(_sentence(fit.law) if fit.law else "too few computes for a law")


def _runs(axes: Axes, points: Sequence[Point]) -> None:
    grid, ladder = [own for own in points if own.budget], [own for own in points if not own.budget]
    if grid:
        look = style.dots(style.FAINT, "runs at a budget", zorder=2)
        axes.plot([own.flops for own in grid], [own.loss for own in grid], "o", **look)
    if ladder:
        seeds = style.dialled(ladder) and len({own.depth for own in ladder}) < len(ladder)
        word = style.runs_word(ladder) + (" (×n: seeds)" if seeds else "")
        look = style.dots(style.INK, word, ms=4.5, alpha=0.75)
        axes.plot([own.flops for own in ladder], [own.loss for own in ladder], "o", **look)


def _limits(axes: Axes, points: Sequence[Point], law: Law | None) -> None:
    """Room for the runs and, beyond them, for the law; a wide interval is cut rather than the runs squeezed."""
    flops, losses = np.array([own.flops for own in points]), np.array([own.loss for own in points])
    reach = 10 * law.largest if law else flops.max()
    low, high = losses.min(), losses.max()
    floor = min(float(law.loss(reach)) if law else low, low)
    height = high - floor or 0.1 * high
    axes.set_xlim(flops.min() / 2.5, max(flops.max() * 2, reach))
    axes.set_ylim(floor - (0.15 if law else 0.22) * height, high + 0.12 * height)


def _law(axes: Axes, law: Law) -> None:
    """The law and its interval: solid among the runs, dashed and shaded beyond them."""
    within, beyond = (
        np.geomspace(law.smallest, law.largest, 80),
        np.geomspace(law.largest, 10 * law.largest, 40),
    )
    every = np.concatenate([within, beyond])
    axes.plot(within, law.loss(within), color=style.LAW, linewidth=1.5, zorder=4, label="law")
    axes.fill_between(every, *law.band(every), **style.band(style.LAW_BAND, "its 95 % interval"))
    axes.plot(
        beyond, law.loss(beyond), color=style.LAW, linewidth=1.5, linestyle=style.DASHED, zorder=4
    )
    edge = law.largest * 1.12
    style.beyond(axes, edge)
    middle = float(np.sqrt(edge * axes.get_xlim()[1]))
    top, look = axes.get_xaxis_transform(), {"color": style.WORDS, "size": style.SMALL}
    axes.text(middle, 0.975, "beyond\nthe runs", look, transform=top, ha="center", va="top")


def _sentence(law: Law) -> str:
    formula = "L = E + K·C⁻ᵖ" if law.form == ADDITIVE else "L = K·C⁻ᵖ"
    lines = [f"{formula}, p = {law.p.text('.3f')}"]
    if law.form == ADDITIVE:
        lines.append(
            f"E = {law.E.text('.2f')}"
            if law.E.identifiable
            else f"E ≤ {law.E.high:.2f}, not identified"
        )
    lines.append(f"2× the largest compute: {law.gain(law.largest).text('.1f', 100)} % less loss")
    return "\n".join(lines)


def _depths(points: Sequence[Point], law: Law | None) -> list[style.Label]:
    """Under the compute-optimal runs and the law."""
    ladder = [point for point in points if point.budget is None]
    return style.depth_labels(
        ladder, lambda run: min(run.loss, float(law.loss(run.flops))) if law else run.loss
    )
