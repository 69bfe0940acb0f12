"""Style shared by all figures: fonts and colours, axis ticks, label placement, and writing
files."""

from __future__ import annotations

import os
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from slm.fits import Interval, Point
from slm.fits.power_law import REACH
from slm.fits.select import evenly_chosen

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Array = NDArray[np.float64]

Label = tuple[str, float, float]
"""Text and the point that it names, in data coordinates."""

PAGE_WIDTH = 7.0
"""Inches. Text is never below 7 points at this width."""
PANEL_WIDTH = 4.6
"""Inches, for a figure of one panel."""
DPI = 250
"""Resolution of the PNG, and of the layout: hinted letters are narrower at a lower one."""
SMALL = 7.5
"""Font size in points of labels inside a panel."""
MAX_LABELS = 14
"""Depths labelled at most; of more, an even selection."""
RC: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.frameon": False,
    "legend.fontsize": SMALL,
    "svg.fonttype": "none",
    "svg.hashsalt": "slm",
}
INK = "#222222"
FAINT = "#9A9A9A"
TEXT = "#5A5A5A"
SHADE = "#F2F2F2"
NOISE = "#E4E4E4"
# Okabe and Ito's vermilion and blue. With viridis for budgets they survive colour blindness and
# grey print.
LAW = "#D55E00"
LAW_BAND = "#F3C9A9"
SURFACE = "#0072B2"
SURFACE_BAND = "#B5D5EA"
DASHED = (0, (4, 2))
"""Line style beyond the runs."""
COMPUTE = "training compute (FLOPs)"
"""Label of the axis of compute."""


def markers(color: str | Array, label: str | None = None, **more: Any) -> dict[str, Any]:
    """Return the plot options of runs and minima; `more` overrides them."""
    look = {"color": color, "ms": 4, "mec": "white", "mew": 0.5, "zorder": 5, "label": label}
    return look | more


def line(color: str | Array, width: float, zorder: float, **more: Any) -> dict[str, Any]:
    """Return the plot options of a line, whose width is in points."""
    return {"color": color, "linewidth": width, "zorder": zorder, **more}


def band(color: str, label: str | None = None) -> dict[str, Any]:
    """Return the `fill_between` options of an interval over a range."""
    return {"color": color, "alpha": 0.7, "linewidth": 0, "zorder": 2, "label": label}


def offset_text(dx: float, dy: float) -> dict[str, Any]:
    """Return the `annotate` options of a small text at an offset, in points, from its anchor."""
    return {"xytext": (dx, dy), "textcoords": "offset points", "va": "center", "fontsize": SMALL}


@contextmanager
def page(width: float, height: float, title: str, mixed: Sequence[str] = ()) -> Iterator[Figure]:
    """Yield an empty figure in this style; sizes in inches, the title wrapped to the width.

    The title says so if the runs are on several axes, `mixed`.
    """
    import matplotlib

    from slm.figures.page import Page

    with matplotlib.rc_context(RC):
        figure = Page(RC, figsize=(width, height), dpi=DPI, layout="constrained")
        if mixed:
            title += " (mixed axes)"
        lines = textwrap.fill(title, round(11.5 * width))
        figure.suptitle(lines, x=0.01, ha="left", fontweight="bold", fontsize=9.5)
        yield figure


def save(figure: Figure, stem: str | Path) -> list[Path]:
    """Write `stem`.png and `stem`.svg and return their paths; if one fails, neither is left
    behind."""
    import matplotlib

    paths = [Path(f"{stem}.png"), Path(f"{stem}.svg")]
    png, svg = temporary = [path.with_name(f".{path.name}.{os.getpid()}") for path in paths]
    try:
        with matplotlib.rc_context(RC):
            figure.savefig(png, format="png", metadata={"Software": None})
        save_svg(figure, svg)
        return [made.replace(path) for made, path in zip(temporary, paths)]
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


def save_svg(figure: Figure, file: Path | IO[bytes]) -> None:
    """Write a figure as SVG, the same bytes every time."""
    import matplotlib

    with matplotlib.rc_context(RC):
        figure.savefig(file, format="svg", metadata={"Date": None})


def lay_out(figure: Figure) -> None:
    """Draw the legend, lay everything out once, and switch the layout engine off.

    Labels that are placed afterwards stay where they are.
    """
    draw_legend(figure)
    freeze_layout(figure)


def draw_legend(figure: Figure) -> None:
    """Draw one legend under all panels, each label once, in as few rows as fit."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    if not handles:
        return
    widths = np.array([4.0 * len(label) + 30 for label in handles])
    columns = 1
    for count in range(1, len(handles) + 1):
        needed = sum(part.max() for part in np.array_split(widths, count))
        if needed < 72 * figure.get_figwidth():
            columns = count
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower left",
        ncols=columns,
        columnspacing=1.3,
        handlelength=1.8,
    )


def freeze_layout(figure: Figure) -> None:
    """Lay everything out once and switch the layout engine off."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def ladder_of(points: Iterable[Point]) -> list[Point]:
    """Return the runs without a budget."""
    return [point for point in points if point.budget is None]


def is_depth_ladder(points: Sequence[Point]) -> bool:
    """Whether depth sets the runs' compute; in a file without depths, all runs have depth 1."""
    depths = {point.depth for point in points}
    return len(depths) > 1 or len({point.flops for point in points}) == 1


def ladder_label(points: Sequence[Point]) -> str:
    """Return the legend's name of runs without a budget."""
    return "compute-optimal runs" if is_depth_ladder(points) else "runs"


def depth_labels(
    points: Sequence[Point], height: Callable[[Point], float], limit: int = MAX_LABELS
) -> list[Label]:
    """Return a label per depth and compute of the runs without a budget, at the lowest of them.

    At most `limit`, evenly chosen.
    """
    ladder = ladder_of(points)
    if not is_depth_ladder(ladder):
        return []
    heights: dict[tuple[float, int], list[float]] = defaultdict(list)
    for point in ladder:
        heights[point.flops, point.depth].append(height(point))
    labels = []
    for (flops, depth), values in evenly_chosen(sorted(heights.items()), limit):
        text = f"d{depth} ×{len(values)}" if len(values) > 1 else f"d{depth}"
        labels.append((text, flops, min(values)))
    return labels


def place_labels(
    axes: Axes,
    labels: Sequence[Label],
    obstacles: Iterable[tuple[float, float]],
    rising: bool = False,
) -> None:
    """Write each label near its point without covering another label or an obstacle.

    Below and to the left first (to the right if `rising`), where a falling law leaves room;
    further down while that is inside the panel, else above on the other side. A distant label gets
    a line to its point. The layout must be frozen.
    """
    unit = 72 / axes.figure.dpi
    side = 1 if rising else -1
    points = np.array([axes.transData.transform(xy) for xy in obstacles]).reshape(-1, 2) * unit
    left_edge = axes.bbox.x0 * unit
    bottom = axes.bbox.y0 * unit + 5
    steps = 9 + 3 * np.arange(60)
    leader = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.5, "shrinkB": 4}
    placed = np.empty((0, 3))
    for text, x, y in labels:
        half = 2.3 * len(text) + 1
        anchor = axes.transData.transform((x, y)) * unit
        shift = np.full(60, side * (half + 3))
        below = anchor + np.stack([shift, -steps], 1)
        above = anchor + np.stack([-shift, steps], 1)
        spots = np.concatenate([below[below[:, 1] > bottom], above])
        spots[:, 0] = np.maximum(spots[:, 0], left_edge + half + 1)
        spot = next(spot for spot in spots if _is_free(spot, half, points, placed))
        placed = np.vstack([placed, (*spot, half)])
        is_distant = abs(spot[1] - anchor[1]) > 18
        axes.annotate(
            text,
            (x, y),
            ha="center",
            arrowprops=leader if is_distant else None,
            zorder=7,
            **offset_text(*(spot - anchor)),
        )


def label_column(
    axes: Axes,
    x: float,
    labels: Iterable[tuple[float, str, str | Array]],
    offset: float,
    spacing: float,
) -> None:
    """Write labels, each a height with its text and colour, in a column right of x.

    Each is moved up to cover no other. Offset and spacing are in points; the layout must be known.
    """
    unit = 72 / axes.figure.dpi
    lowest = -np.inf
    for y, text, color in sorted(labels, key=lambda label: label[0]):
        height = axes.transData.transform((x, y))[1] * unit
        lowest = max(height, lowest + spacing)
        shifted = offset_text(offset, lowest - height)
        axes.annotate(text, (x, y), color=color, annotation_clip=False, **shifted)


def _is_free(spot: Array, half: float, points: Array, labels: Array) -> bool:
    """Whether a label of this half width centred at `spot` covers nothing; all in points of the
    page."""
    dx, dy = np.abs(points - spot).T
    if ((dx < half + 3) & (dy < 8)).any():
        return False
    dx, dy = np.abs(labels[:, :2] - spot).T
    return not ((dx < half + labels[:, 2]) & (dy < 9.5)).any()


def draw_interval(axes: Axes, x: float, interval: Interval, look: dict[str, Any]) -> None:
    """Draw an estimate and its interval upright at x; an open end is an arrow, no estimate is
    nothing."""
    if interval.estimate is None:
        return
    axes.plot([x], [interval.estimate], **look)
    ends = [interval.estimate if end is None else end for end in (interval.low, interval.high)]
    color = look["color"]
    axes.plot([x, x], ends, solid_capstyle="butt", **line(color, 1.4, look["zorder"] - 1))
    arrow = {"arrowstyle": "<-", "color": color, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
    for end, length in ((interval.low, -20), (interval.high, 20)):
        if end is None:
            tail = (0, length)
            anchor = (x, interval.estimate)
            axes.annotate("", anchor, tail, textcoords="offset points", arrowprops=arrow)


def draw_runs(
    axes: Axes, runs: Sequence[Any], y: str, marker: str, look: dict[str, Any], x: str = "flops"
) -> None:
    """Draw runs or minima; `x` and `y` name their attributes."""
    if runs:
        axes.plot(
            [getattr(run, x) for run in runs], [getattr(run, y) for run in runs], marker, **look
        )


def draw_curve(
    axes: Axes, ends: tuple[float, float], curve: Callable[[Array], Array], look: dict[str, Any]
) -> Array:
    """Draw a curve of compute, solid between its ends and dashed to REACH times the larger.

    Returns the FLOPs at which it is drawn.
    """
    smallest, largest = ends
    within = np.geomspace(smallest, largest, 80)
    beyond = np.geomspace(largest, REACH * largest, 40)
    axes.plot(within, curve(within), **look)
    axes.plot(beyond, curve(beyond), **look | {"linestyle": DASHED, "label": None})
    return np.concatenate([within, beyond])


def shade_beyond(axes: Axes, largest: float) -> float:
    """Shade the panel right of the largest run; return the FLOPs at which the shade begins."""
    edge = 1.12 * largest
    axes.axvspan(edge, axes.get_xlim()[1], color=SHADE, linewidth=0, zorder=0)
    return edge


def shades(count: int) -> Array:
    """Return colours of viridis without its yellow, dark first: (count, 4)."""
    from matplotlib import colormaps

    return np.asarray(colormaps["viridis"](np.linspace(0, 0.72, count)))


def loss_label(metric: str) -> str:
    """Return the axis label of the loss that was fitted."""
    return "validation loss" if metric == "loss" else "validation loss (bits per byte)"


def percent_off(losses: Sequence[float] | Array, expected: Array) -> Array:
    """Return how far losses lie from the expected ones, in per cent of a natural logarithm."""
    return np.asarray(100 * np.log(np.asarray(losses) / expected))


def leave_room(axes: Axes, values: Sequence[float] | Array, below: float, above: float) -> None:
    """Set the limits of y to hold the values, with these shares of their range free."""
    lowest, highest = np.min(values), np.max(values)
    height = highest - lowest or 0.1 * highest
    axes.set_ylim(lowest - below * height, highest + above * height)


def log_axis(axes: Axes, low: float, high: float, label: str = COMPUTE) -> None:
    """Make x a logarithmic axis, ticked at powers of ten, over a narrow range also at 2 and 5 times
    them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_xlabel(label)
    axes.xaxis.set_minor_formatter(NullFormatter())
    if high / low < 50:
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: one_digit(value)))


def count_ticks(axis: Axis) -> None:
    """Tick a logarithmic axis of parameters or tokens: 50M, 1B; the limits must be set."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    multiples = (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
    axis.set_major_locator(LogLocator(subs=multiples))
    axis.set_major_formatter(FuncFormatter(lambda value, _: count_text(value)))
    axis.set_minor_formatter(NullFormatter())


def one_digit(flops: float) -> str:
    """Return FLOPs with one digit: "2e18"."""
    return f"{flops:.0e}".replace("e+", "e")


def count_text(count: float) -> str:
    """Return a count with three digits in units of k, M, B and T: "1.3B"."""
    power = int(np.clip(np.log10(count) // 3, 0, 4))
    unit = "kMBT"[power - 1] if power else ""
    return f"{count / 1000**power:.3g}{unit}"
