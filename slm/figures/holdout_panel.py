"""Panel of hold-outs: predictions by the laws of smaller runs against the losses of larger ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from slm.figures import style
from slm.figures.style import Array
from slm.fits import Law
from slm.fits.select import HoldOut, evenly_chosen

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DODGE = 0.012
"""Share of the axis between the predictions of one run, where there is room."""
MAX_HOLD_OUTS = 6
"""Hold-outs drawn at most; of more, an even selection."""
CUT = 6.0
"""Largest ratio of an interval's reach to that of estimates and runs; an interval that is also far
wider than most is cut there."""


def draw_hold_outs(axes: Axes, above: Axes, law: Law, hold_outs: Sequence[HoldOut]) -> None:
    """Draw predictions and losses of held-out runs in per cent of the law of all runs, under the
    panel `above`.

    One bar per hold-out and compute, side by side, darker the fewer runs were fitted.
    """
    style.log_axis(axes, *above.get_xlim())
    above.tick_params(labelbottom=False)
    above.set_xlabel("")
    axes.set_ylabel("off the law (%)")
    axes.axhline(0, **style.line(style.LAW, 1.0, 1))
    style.shade_beyond(axes, law.largest)

    predicted = [run for hold_out in hold_outs for run in hold_out.predicted]
    flops, losses = np.array(list(dict.fromkeys((run.flops, run.loss) for run in predicted))).T
    off_law = style.percent_off(losses, law.loss(flops))
    axes.plot(flops, off_law, "o", **style.markers(style.INK))

    by_compute = sorted(hold_outs, key=lambda hold_out: hold_out.flops)
    selected = evenly_chosen(by_compute, MAX_HOLD_OUTS)
    low, high, estimates = _draw_bars(axes, law, selected)
    reaches = np.abs([low, high])
    centre = max(np.abs(off_law).max(), np.abs(estimates).max())
    widest = max(CUT * centre, 1.5 * np.median(reaches))
    reach = max(centre, min(reaches.max(), widest))
    axes.set_ylim(-1.1 * reach, 1.1 * reach)
    covered = sum(run.covered for run in predicted)
    axes.set_title(f"held out: {covered} of {len(predicted)} inside the predicted interval")


def _draw_bars(axes: Axes, law: Law, hold_outs: Sequence[HoldOut]) -> Array:
    """Draw a bar per hold-out and compute; return all low ends, high ends and estimates, (3, n)."""
    computes = np.unique([run.flops for hold_out in hold_outs for run in hold_out.predicted])
    gap = np.diff(np.log(computes)).min() if len(computes) > 1 else np.inf
    first, last = axes.get_xlim()
    step = min(DODGE * np.log(last / first), 0.8 * gap / len(hold_outs))
    bars = []
    for order, (hold_out, shade) in enumerate(zip(hold_outs, style.shades(len(hold_outs)))):
        missed = {run.flops for run in hold_out.predicted if not run.covered}
        for flops, run in {run.flops: run for run in hold_out.predicted}.items():
            prediction = run.prediction
            ends = np.array([prediction.low, prediction.high, prediction.estimate], float)
            low, high, estimate = style.percent_off(ends, law.loss(flops))
            bars.append((low, high, estimate))
            # bars of one run are centred on its compute
            siblings = sum(flops > other.flops for other in hold_outs)
            x = flops * np.exp(step * (order - (siblings - 1) / 2))
            color, label = shade, "predicted, 90 % interval"
            if flops in missed:
                color, label = style.LAW, "predicted, missed"
            axes.vlines(x, low, high, color=color, linewidth=1.2, zorder=3, label=label)
            axes.plot(x, estimate, "_", color=color, ms=4, mew=1.2, zorder=3)
    return np.array(bars).T
