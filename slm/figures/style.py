"""What all figures share: their look, their ticks, where their words go, and how they become files."""

from __future__ import annotations

import os
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from slm.fits import Interval, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Array = NDArray[np.float64]

Label = tuple[str, float, float]
"""Text and the place it speaks of, in data."""

PAGE, PANEL = 7.0, 4.6
"""Widths in inches: of a page, and of a figure that is one panel. Text is never below 7 points at these."""
DPI = 250
"""Of the PNG, and of the layout: hinted letters are narrower at fewer."""
SMALL = 7.5
"""Points, of labels inside a panel."""
LABELS = 14
"""Depths named at most; of more, some evenly chosen."""
STYLE: dict[Any, Any] = {
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
INK, FAINT, WORDS, SHADE, NOISE = "#222222", "#9A9A9A", "#5A5A5A", "#F2F2F2", "#E4E4E4"
LAW, LAW_BAND = "#D55E00", "#F3C9A9"
SURFACE, SURFACE_BAND = "#0072B2", "#B5D5EA"
"""Okabe and Ito's vermilion and blue; budgets are shades of viridis: colour-blindness and grey print keep them."""
DASHED = (0, (4, 2))
"""Of lines beyond the runs."""


def dots(color: str | Array, word: str | None = None, **more: Any) -> dict[str, Any]:
    """How runs and minima look."""
    return {"color": color, "ms": 4, "mec": "white", "mew": 0.5, "zorder": 5, "label": word, **more}


def band(color: str, word: str | None = None) -> dict[str, Any]:
    """How an interval over a range looks."""
    return {"color": color, "alpha": 0.7, "linewidth": 0, "zorder": 2, "label": word}


def beside(across: float, up: float) -> dict[str, Any]:
    """Where a small text stands from the place it speaks of, in points."""
    return {
        "xytext": (across, up),
        "textcoords": "offset points",
        "va": "center",
        "fontsize": SMALL,
    }


def titled(title: str, mixed: Sequence[str]) -> str:
    """A title that says of what is drawn where its runs are of several axes."""
    return f"{title} (mixed axes)" if mixed else title


@contextmanager
def page(width: float, height: float, title: str) -> Iterator[Figure]:
    """An empty figure of so many inches in our style, its title wrapped."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        lines = textwrap.fill(title, round(11.5 * width))
        figure.suptitle(lines, x=0.01, ha="left", fontweight="bold", fontsize=9.5)
        yield figure


def save(figure: Figure, stem: str | Path) -> tuple[Path, Path]:
    """Write `stem`.png and .svg under temporary names, then rename both; nothing is left of a drawing that fails."""
    png, svg = Path(f"{stem}.png"), Path(f"{stem}.svg")
    partial = [path.with_name(f".{path.name}.{os.getpid()}") for path in (png, svg)]
    try:
        figure.savefig(partial[0], format="png", metadata={"Software": None})
        figure.savefig(partial[1], format="svg", metadata={"Date": None})
        return partial[0].replace(png), partial[1].replace(svg)
    finally:
        for path in partial:
            path.unlink(missing_ok=True)


def legend(figure: Figure) -> None:
    """One legend under all panels, each word once, in as few rows as fit."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        found |= {
            word: handle
            for handle, word in zip(*axes.get_legend_handles_labels())
            if word not in found
        }
    widths, page = np.array([4.0 * len(word) + 30 for word in found]), 72 * figure.get_figwidth()
    fits = [
        n
        for n in range(1, len(found) + 1)
        if sum(own.max() for own in np.array_split(widths, n)) < page
    ]
    if found:
        columns = max([1, *fits])
        figure.legend(
            list(found.values()),
            list(found),
            loc="outside lower left",
            ncols=columns,
            columnspacing=1.3,
            handlelength=1.8,
        )


def settle(figure: Figure) -> None:
    """Lay everything out and keep it so: what is placed afterwards stays where it is, and saving is quick."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def dialled(points: Sequence[Point]) -> bool:
    """Whether depth is what sets the runs' compute; several computes of one depth are of a file that says none."""
    return len({point.depth for point in points}) > 1 or len({point.flops for point in points}) == 1


def runs_word(points: Sequence[Point]) -> str:
    """What runs without a budget are."""
    return "compute-optimal runs" if dialled(points) else "runs"


def depth_labels(
    points: Sequence[Point], height: Callable[[Point], float], most: int = LABELS
) -> list[Label]:
    """One label for the runs of a depth at a compute, placed at the lowest of them; `most`, evenly chosen."""
    if not dialled(points):
        return []
    groups: dict[tuple[float, int], list[float]] = defaultdict(list)
    for point in points:
        groups[point.flops, point.depth].append(height(point))
    chosen = np.linspace(0, len(groups) - 1, min(most, len(groups))).round().astype(int)
    found = [sorted(groups.items())[k] for k in chosen]
    return [
        (f"d{depth} ×{len(heights)}" if len(heights) > 1 else f"d{depth}", flops, min(heights))
        for (flops, depth), heights in found
    ]


def place(
    axes: Axes, labels: Sequence[Label], taken: Iterable[tuple[float, float]], rising: bool = False
) -> None:
    """Write each text at its place, covering no other text and none of the places `taken`; the layout must be done.

    Under and to the left first (`rising`: the right), where a falling law leaves room; further down as long as that is
    inside the panel, else above on the other side. A text far from its place has a line to it.
    """
    unit, side = 72 / axes.figure.dpi, 1 if rising else -1
    points = np.array([axes.transData.transform(own) for own in taken]).reshape(-1, 2) * unit
    left, floor, texts = axes.bbox.x0 * unit, axes.bbox.y0 * unit + 5, np.empty((0, 3))
    for text, x, y in labels:
        half = 2.3 * len(text) + 1
        anchor = axes.transData.transform((x, y)) * unit
        steps = 9 + 3 * np.arange(60)
        below = anchor + np.stack([np.full(60, side * (half + 3)), -steps], 1)
        above = anchor + np.stack([np.full(60, -side * (half + 3)), steps], 1)
        spots = np.concatenate([below[below[:, 1] > floor], above])
        spots[:, 0] = np.maximum(spots[:, 0], left + half + 1)
        spot = next(own for own in spots if _free(own, half, points, texts))
        texts = np.vstack([texts, (*spot, half)])
        far = abs(spot[1] - anchor[1]) > 18
        line = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.5, "shrinkB": 4} if far else None
        axes.annotate(
            text, (x, y), ha="center", arrowprops=line, zorder=7, **beside(*(spot - anchor))
        )


def _free(spot: Array, half: float, points: Array, texts: Array) -> bool:
    """Whether a text of this half width, centred there, covers no point and no text; all in points of the page."""
    across, down = np.abs(points - spot).T
    if ((across < half + 3) & (down < 8)).any():
        return False
    across, down = np.abs(texts[:, :2] - spot).T
    return not ((across < half + texts[:, 2]) & (down < 9.5)).any()


def whiskers(axes: Axes, x: float, own: Interval, look: dict[str, Any]) -> None:
    """An estimate, looking like this, and its interval upright at x; an open end is an arrow, none is nothing."""
    if own.estimate is None:
        return
    axes.plot([x], [own.estimate], **look)
    low, high = (own.estimate if end is None else end for end in (own.low, own.high))
    axes.plot(
        [x, x],
        [low, high],
        color=look["color"],
        linewidth=1.4,
        solid_capstyle="butt",
        zorder=look["zorder"] - 1,
    )
    arrow = {
        "arrowstyle": "<-",
        "color": look["color"],
        "linewidth": 1.2,
        "shrinkA": 0,
        "shrinkB": 0,
    }
    for end, way in ((own.low, -20), (own.high, 20)):
        if end is None:
            axes.annotate(
                "", (x, own.estimate), (0, way), textcoords="offset points", arrowprops=arrow
            )


def beyond(axes: Axes, edge: float) -> None:
    """Shade what lies right of the runs."""
    axes.axvspan(edge, axes.get_xlim()[1], color=SHADE, linewidth=0, zorder=0)


def shades(count: int) -> Array:
    """Of viridis without its yellow, dark first: (count, 4)."""
    from matplotlib import colormaps

    return np.asarray(colormaps["viridis"](np.linspace(0, 0.72, count)))


def loss_axis(metric: str) -> str:
    """The name of an axis of the loss that a fit is of."""
    return "validation loss" if metric == "loss" else "validation loss (bits per byte)"


def flops_axis(axes: Axes) -> None:
    """Logarithmic: whole powers of ten, over a narrow range 1, 2 and 5 times them; the limits must be set."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.xaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_xlim()
    if high / low < 50:
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:.0e}".replace("e+", "e"))
        )


def count_axis(axis: Axis) -> None:
    """A logarithmic axis of parameters or tokens: 50M, 1B; the limits must be set."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 300 else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: count_text(value)))
    axis.set_minor_formatter(NullFormatter())


def count_text(count: float) -> str:
    """1.3B."""
    power = int(np.clip(np.log10(count) // 3, 0, 4))
    return f"{count / 1000**power:.3g}{'kMBT'[power - 1] if power else ''}"


def flops_text(flops: float) -> str:
    """2.15e18."""
    mantissa, _, power = f"{flops:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(power)}"
