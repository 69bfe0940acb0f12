"""Figures of fits: loss against training compute, isoFLOP valleys. PNG and SVG, the same bytes for the same fit."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from slm.fits import ADDITIVE, CurveFit, IsoFlop, Law, Point, Valley

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[np.float64]
Curve = tuple[int, Array, Array]
"""Depth, training FLOPs and loss of one run while it trained."""

Label = tuple[str, float, float]
"""Text, training FLOPs and loss."""

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "slm",
}
INK, LAW, BAND, FAINT = "#222222", "#D55E00", "#F3C9A9", "#9A9A9A"
"""The law is Okabe and Ito's vermilion; budgets are shades of viridis: colour-blindness and grey print keep both."""


def draw_curve(
    fit: CurveFit,
    points: Sequence[Point],
    path_stem: str | Path,
    curves: Sequence[Curve] | None = None,
    title: str = "What more compute buys",
) -> tuple[Path, Path]:
    """Draw a fit into `path_stem`.png and .svg; gives both paths.

    Left: validation loss against training compute, the law with its 95 % interval, dashed to ten times the largest
    run. Right, with an isoFLOP grid: the valleys and their minima. `curves` are drawn faint behind the runs; their
    loss must be in the unit of the points. Files appear whole or not at all.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.5 if fit.isoflop else 6.8, 4.6), layout="constrained")
        axes = figure.subplots(1, 2 if fit.isoflop else 1, squeeze=False)[0]
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
        _compute_panel(axes[0], fit, points, curves or [])
        if fit.isoflop:
            _valley_panel(axes[1], fit.isoflop, fit.convention)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(
            handles,
            labels,
            loc="outside lower left",
            ncols=6 if fit.isoflop else 4,
            columnspacing=1.4,
            handlelength=1.8,
        )
        figure.draw_without_rendering()
        _label(axes[0], _depth_labels(points, fit.law), points)
        if fit.isoflop:
            _budget_labels(axes[1], fit.isoflop)
        return _save(figure, path_stem, "png"), _save(figure, path_stem, "svg")


def _save(figure: Figure, path_stem: str | Path, kind: str) -> Path:
    """Write under a temporary name, then rename."""
    path = Path(f"{path_stem}.{kind}")
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    figure.savefig(partial, format=kind, dpi=200, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return partial.replace(path)


def _compute_panel(axes: Axes, fit: CurveFit, points: Sequence[Point], curves: Sequence[Curve]) -> None:
    ladder = [point for point in points if point.budget is None]
    grid = [point for point in points if point.budget is not None]
    axes.set_xscale("log")
    axes.set_xlabel("training compute (FLOPs)")
    axes.set_ylabel("validation loss (bits per byte)")
    _limits(axes, points, fit.law)
    _compute_ticks(axes)
    for order, (_, flops, loss) in enumerate(curves):
        label = "training loss" if order == 0 else None
        axes.plot(flops, loss, color=FAINT, alpha=0.45, linewidth=0.8, zorder=1, label=label)
    if grid:
        label = "runs at a budget"
        axes.plot(*_columns(grid), "o", color=FAINT, markersize=3.5, alpha=0.8, linestyle="", zorder=2, label=label)
    if ladder:
        label = (
            "compute-optimal runs (×n: seeds)"
            if len({p.depth for p in ladder}) < len(ladder)
            else "compute-optimal runs"
        )
        axes.plot(
            *_columns(ladder), "o", color=INK, markersize=5, alpha=0.75, mec="white", mew=0.6, zorder=5, label=label
        )
    if fit.isoflop and any(valley.minimum for valley in fit.isoflop.valleys):
        minima = [(valley.flops, valley.minimum.loss) for valley in fit.isoflop.valleys if valley.minimum]
        axes.plot(*zip(*minima), "*", color=INK, markersize=9, mec="white", mew=0.5, zorder=6, label="isoFLOP minima")
    if fit.law:
        _law(axes, fit.law)
        axes.set_title(_sentence(fit.law), loc="left")
    else:
        axes.set_title("too few computes for a law", loc="left")


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [point.flops for point in points], [point.loss for point in points]


def _limits(axes: Axes, points: Sequence[Point], law: Law | None) -> None:
    """Room for the runs and, beyond them, for the law; a wide interval is cut rather than the runs squeezed."""
    flops, losses = (np.array(column) for column in _columns(points))
    reach = 10 * law.largest if law else flops.max()
    low, high = losses.min(), losses.max()
    floor = min(float(law.loss(reach)) if law else low, low)
    height = high - floor or 0.1 * high
    axes.set_xlim(flops.min() / 2.5, max(flops.max() * 2, reach))
    axes.set_ylim(floor - (0.1 if law else 0.22) * height, high + 0.12 * height)


def _law(axes: Axes, law: Law) -> None:
    """The law and its interval: solid among the runs, dashed and shaded beyond them."""
    within, beyond = np.geomspace(law.smallest, law.largest, 80), np.geomspace(law.largest, 10 * law.largest, 40)
    every = np.concatenate([within, beyond])
    axes.fill_between(every, *law.band(every), color=BAND, alpha=0.7, linewidth=0, zorder=3, label="95 % interval")
    axes.plot(within, law.loss(within), color=LAW, linewidth=1.6, zorder=4, label="law")
    axes.plot(beyond, law.loss(beyond), color=LAW, linewidth=1.6, linestyle=(0, (4, 2)), zorder=4)
    axes.axvspan(law.largest * 1.12, axes.get_xlim()[1], color="#F2F2F2", linewidth=0, zorder=0)
    middle = float(np.sqrt(law.largest * 1.12 * axes.get_xlim()[1]))
    place = axes.get_xaxis_transform()
    axes.text(middle, 0.975, "beyond the runs", transform=place, ha="center", va="top", color="#666666", fontsize=8)


def _sentence(law: Law) -> str:
    formula = "L = E + K·C⁻ᵖ" if law.form == ADDITIVE else "L = K·C⁻ᵖ"
    floor = ""
    if law.form == ADDITIVE:
        floor = f", E = {law.E.text('.2f')}" if law.E.identifiable else f", E ≤ {law.E.high:.2f}, not identified"
    gain = law.gain(law.largest)
    return (
        f"{formula}, p = {law.p.text('.3f')}{floor}\n"
        f"doubling compute at the largest run: {gain.text('.1f', 100)} % less loss"
    )


def _depth_labels(points: Sequence[Point], law: Law | None) -> list[Label]:
    """One label for the compute-optimal runs of a depth, placed at the lowest of them and the law."""
    groups: dict[tuple[int, float], list[Point]] = defaultdict(list)
    for point in points:
        if point.budget is None:
            groups[point.depth, point.flops].append(point)
    labels = []
    for (depth, flops), runs in sorted(groups.items()):
        losses = [run.loss for run in runs] + ([float(law.loss(flops))] if law else [])
        labels.append((f"d{depth} ×{len(runs)}" if len(runs) > 1 else f"d{depth}", flops, min(losses)))
    return labels


def _label(axes: Axes, labels: Sequence[Label], points: Sequence[Point]) -> None:
    """Write each text under its run, left of a falling law; further down until it covers no other text and no run."""
    unit = 72 / axes.figure.dpi
    runs = [axes.transData.transform(place) * unit for place in zip(*_columns(points))]
    centres: list[tuple[float, float, float]] = []
    for text, x, y in labels:
        half = 2.7 * len(text) + 2
        anchor = axes.transData.transform((x, y)) * unit
        across, down = anchor[0] - half - 3, anchor[1] - 10
        while any(abs(across - x) < half + wide and abs(down - y) < 11 for x, y, wide in centres) or any(
            abs(across - x) < half + 3 and abs(down - y) < 9 for x, y in runs
        ):
            down -= 3
        centres.append((across, down, half))
        offset = (across - anchor[0], down - anchor[1])
        line = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.6, "shrinkB": 4} if offset[1] < -20 else None
        axes.annotate(
            text, (x, y), offset, textcoords="offset points", ha="center", va="center", arrowprops=line, zorder=7
        ).set_in_layout(False)


def _valley_panel(axes: Axes, grid: IsoFlop, convention: str) -> None:
    """Loss against size at each budget; star and bar for a minimum and its interval, hollow runs where it has none."""
    axes.set_xscale("log")
    axes.set_xlabel(f"parameters ({convention})")
    axes.set_ylabel("validation loss (bits per byte)")
    for valley, shade in zip(grid.valleys, _shades(grid)):
        _valley(axes, grid, valley, shade)
    runs = [point for valley in grid.valleys for point in (*valley.points, *valley.left_out)]
    sizes, losses = np.array([point.params for point in runs]), np.array([point.loss for point in runs])
    width, height = sizes.max() / sizes.min(), np.ptp(losses) or 0.1 * losses.max()
    axes.set_xlim(
        sizes.min() / width**0.06,
        sizes.max() * width ** (0.38 if all(valley.minimum for valley in grid.valleys) else 0.7),
    )
    axes.set_ylim(losses.min() - 0.12 * height, losses.max() + 0.08 * height)
    _size_ticks(axes)
    axes.set_title(_exponents(grid), loc="left")


def _valley(axes: Axes, grid: IsoFlop, valley: Valley, shade: Array) -> None:
    best = valley.minimum
    runs = [*valley.points, *valley.left_out]
    face = shade if best else "white"
    axes.plot([p.params for p in runs], [p.loss for p in runs], "o", ms=5, mec=shade, mfc=face, zorder=3)
    if best and valley.parabola:
        sizes = np.linspace(valley.parabola.lowest, valley.parabola.highest, 100)
        axes.plot(np.exp(sizes), valley.parabola.at(sizes), color=shade, linewidth=1.2, zorder=2)
        ends = grid.interval(valley)
        if ends.low and ends.high:
            axes.plot([ends.low, ends.high], [best.loss] * 2, color=LAW, linewidth=2, marker="|", ms=8, zorder=4)
        axes.plot([best.params], [best.loss], "*", color=LAW, ms=11, mec="white", mew=0.6, zorder=5)


def _budget_labels(axes: Axes, grid: IsoFlop) -> None:
    """Each budget beside its largest run, moved up until it covers no other."""
    ends = [max((*own.points, *own.left_out), key=lambda point: point.params) for own in grid.valleys]
    unit, floor = 72 / axes.figure.dpi, -np.inf
    for end, own, shade in sorted(zip(ends, grid.valleys, _shades(grid)), key=lambda row: row[0].loss):
        height = axes.transData.transform((end.params, end.loss))[1] * unit
        floor = max(height, floor + 11)
        text = f"{own.budget:.3g} FLOPs".replace("e+", "e") + ("" if own.minimum else ": no minimum")
        axes.annotate(
            text, (end.params, end.loss), (8, floor - height), textcoords="offset points", va="center", color=shade
        ).set_in_layout(False)


def _shades(grid: IsoFlop) -> Array:
    from matplotlib import colormaps

    return colormaps["viridis"](np.linspace(0, 0.72, len(grid.valleys)))


def _compute_ticks(axes: Axes) -> None:
    """Whole powers of ten; over a narrow range 1, 2 and 5 times them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.xaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_xlim()
    if high / low < 50:
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}".replace("e+", "e")))


def _size_ticks(axes: Axes) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _exponents(grid: IsoFlop) -> str:
    if grid.params_exponent is None or grid.tokens_exponent is None:
        return "fewer than two minima: no exponents"
    return (
        f"optimal size ∝ Cᵃ, a = {grid.params_exponent.text('.2f')}\n"
        f"its tokens ∝ Cᵇ, b = {grid.tokens_exponent.text('.2f')}"
    )
