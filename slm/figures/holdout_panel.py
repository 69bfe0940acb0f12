"""Panel of hold-outs: predictions by the laws of smaller runs against the losses of larger ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from slm.figures import style
from slm.figures.style import Array
from slm.fits import Law
from slm.fits.select import HeldOutRun, HoldOut

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
    axes.set_xscale("log")
    axes.set_xlim(above.get_xlim())
    style.flops_ticks(axes)
    above.tick_params(labelbottom=False)
    axes.set_xlabel(above.get_xlabel())
    above.set_xlabel("")
    axes.set_ylabel("off the law (%)")
    axes.axhline(0, color=style.LAW, linewidth=1.0, zorder=1)
    style.shade_beyond(axes, law.largest * 1.12)

    predicted = [run for hold_out in hold_outs for run in hold_out.predicted]
    runs = list({(run.flops, run.loss): run for run in predicted}.values())
    losses = _off_law(law, runs, [run.loss for run in runs])
    axes.plot([run.flops for run in runs], losses, "o", **style.markers(style.INK))

    by_compute = sorted(hold_outs, key=lambda hold_out: hold_out.flops)
    selected = [by_compute[k] for k in style.evenly(len(by_compute), MAX_HOLD_OUTS)]
    ends, centres = _draw_bars(axes, law, selected)
    centre = max(np.abs(losses).max(), np.abs(centres).max())
    widest = max(CUT * centre, 1.5 * np.median(np.abs(ends)))
    reach = max(centre, min(np.abs(ends).max(), widest))
    axes.set_ylim(-1.1 * reach, 1.1 * reach)
    covered = sum(run.covered for run in predicted)
    axes.set_title(f"held out: {covered} of {len(predicted)} inside the predicted interval")


def _draw_bars(axes: Axes, law: Law, hold_outs: Sequence[HoldOut]) -> tuple[Array, Array]:
    """Draw a bar per hold-out and compute; return all ends (2, n) and estimates (n,)."""
    computes = np.unique([run.flops for hold_out in hold_outs for run in hold_out.predicted])
    gap = np.diff(np.log(computes)).min() if len(computes) > 1 else np.inf
    low, high = axes.get_xlim()
    step = min(DODGE * np.log(high / low), 0.8 * gap / len(hold_outs))
    drawn = []
    for order, (hold_out, shade) in enumerate(zip(hold_outs, style.shades(len(hold_outs)))):
        runs = list({run.flops: run for run in hold_out.predicted}.values())
        missed = {run.flops for run in hold_out.predicted if not run.covered}
        bars = np.stack(
            [
                _off_law(law, runs, [getattr(run.prediction, end) for run in runs])
                for end in ("low", "high", "estimate")
            ]
        )
        # bars of one run are centred on its compute
        flops = np.array([run.flops for run in runs])
        siblings = np.array([sum(run.flops > one.flops for one in hold_outs) for run in runs])
        x = flops * np.exp(step * (order - (siblings - 1) / 2))
        is_hit = np.array([run.flops not in missed for run in runs])
        _draw_bar_group(axes, x[is_hit], bars[:, is_hit], shade, "predicted, 90 % interval")
        _draw_bar_group(axes, x[~is_hit], bars[:, ~is_hit], style.LAW, "predicted, missed")
        drawn.append(bars)
    columns = np.concatenate(drawn, 1)
    return columns[:2], columns[2]


def _draw_bar_group(axes: Axes, x: Array, bars: Array, color: str | Array, label: str) -> None:
    if not len(x):
        return
    low, high, estimate = bars
    axes.vlines(x, low, high, color=color, linewidth=1.2, zorder=3, label=label)
    axes.plot(x, estimate, "_", color=color, ms=4, mew=1.2, zorder=3)


def _off_law(law: Law, runs: Sequence[HeldOutRun], losses: Sequence[float]) -> Array:
    """Return how far losses lie from the law at the runs' compute, in per cent."""
    expected = law.loss(np.array([run.flops for run in runs]))
    return np.asarray(100 * np.log(np.array(losses) / expected))
