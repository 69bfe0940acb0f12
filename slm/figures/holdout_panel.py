"""What the laws of the smaller runs foretold of the larger, against what came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from slm.figures import style
from slm.figures.style import Array
from slm.fits import Law
from slm.fits.ladder import HoldOut, Predicted

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DODGE = 0.012
"""Share of the axis between the predictions of one run, where there is room."""
RUNGS = 6
"""Hold-outs drawn at most; of more, some evenly chosen."""
WIDE = 6.0
"""How many times further than estimates and runs an interval is drawn, if it is far wider than most; then it is cut."""


def held_panel(axes: Axes, above: Axes, law: Law, hold_outs: Sequence[HoldOut]) -> None:
    """Each prediction with its interval, and what came, in per cent of the law of all runs, under the panel `above`.

    A bar for every hold-out that a compute was predicted from, side by side, darker the fewer runs were kept.
    """
    axes.set_xscale("log")
    axes.set_xlim(above.get_xlim())
    style.flops_axis(axes)
    above.tick_params(labelbottom=False)
    axes.set_xlabel(above.get_xlabel())
    above.set_xlabel("")
    axes.set_ylabel("off the law (%)")
    axes.axhline(0, color=style.LAW, linewidth=1.0, zorder=1)
    style.beyond(axes, law.largest * 1.12)
    every = [own for hold_out in hold_outs for own in hold_out.predicted]
    came = list({(own.flops, own.loss): own for own in every}.values())
    off = _off(law, came, [own.loss for own in came])
    axes.plot([own.flops for own in came], off, "o", **style.dots(style.INK))
    ordered = sorted(hold_outs, key=lambda own: own.flops)
    chosen = np.linspace(0, len(ordered) - 1, min(RUNGS, len(ordered))).round().astype(int)
    ends, centres = _bars(axes, law, [ordered[k] for k in chosen])
    centre = max(np.abs(off).max(), np.abs(centres).max())
    reach = max(centre, min(np.abs(ends).max(), max(WIDE * centre, 1.5 * np.median(np.abs(ends)))))
    axes.set_ylim(-1.1 * reach, 1.1 * reach)
    axes.set_title(
        f"held out: {sum(own.covered for own in every)} of {len(every)} inside the predicted interval"
    )


def _bars(axes: Axes, law: Law, hold_outs: Sequence[HoldOut]) -> tuple[Array, Array]:
    """A bar and its estimate for every hold-out and compute; gives their ends and estimates."""
    computes = np.unique([own.flops for hold_out in hold_outs for own in hold_out.predicted])
    gap = np.diff(np.log(computes)).min() if len(computes) > 1 else np.inf
    step = min(DODGE * np.log(np.divide(*axes.get_xlim()[::-1])), 0.8 * gap / len(hold_outs))
    drawn = []
    for order, (hold_out, shade) in enumerate(zip(hold_outs, style.shades(len(hold_outs)))):
        runs = list({own.flops: own for own in hold_out.predicted}.values())
        missed = {own.flops for own in hold_out.predicted if not own.covered}
        low, middle, high = (
            _off(law, runs, [getattr(own.said, key) for own in runs])
            for key in ("low", "estimate", "high")
        )
        asked = [sum(own.flops > kept.flops for kept in hold_outs) for own in runs]
        x = np.array([own.flops for own in runs]) * np.exp(
            step * (order - (np.array(asked) - 1) / 2)
        )
        hit = np.array([own.flops not in missed for own in runs])
        for which, color, word in (
            (hit, shade, "predicted, 90 % interval"),
            (~hit, style.LAW, "predicted, missed"),
        ):
            if which.any():
                axes.vlines(
                    x[which],
                    low[which],
                    high[which],
                    color=color,
                    linewidth=1.2,
                    zorder=3,
                    label=word,
                )
                axes.plot(x[which], middle[which], "_", color=color, ms=4, mew=1.2, zorder=3)
        drawn.append(np.stack([low, high, middle]))
    columns = np.concatenate(drawn, 1)
    return columns[:2], columns[2]


def _off(law: Law, runs: Sequence[Predicted], losses: Sequence[float]) -> Array:
    """Losses from the law's at the runs, per cent."""
    return np.asarray(
        100 * np.log(np.array(losses) / law.loss(np.array([own.flops for own in runs])))
    )
