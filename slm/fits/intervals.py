"""Profile-likelihood intervals: {φ : S(φ) <= S_min·(1 + F_.95(1, n-p)/(n-p))}."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

LEVEL = 0.95

Ends = tuple[float | None, float | None]
"""Low and high end; None if unbounded or unknown."""


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval. An unknown value is None, never a number."""

    estimate: float | None
    low: float | None = None
    """Lower end; None if unbounded or unknown."""
    high: float | None = None
    """Upper end; None if unbounded or unknown."""
    identifiable: bool = False
    """Whether the data bound the value on both sides."""

    @classmethod
    def of_ends(cls, estimate: float | None, low: float | None, high: float | None) -> Interval:
        """Return an interval that is identifiable if it has both ends."""
        return cls(estimate, low, high, low is not None and high is not None)

    def text(self, form: str = ".3g", scale: float = 1.0) -> str:
        """Format as `1.2 [1.1, 1.4]`, an open end as `?`."""
        if self.estimate is None:
            return "not known"
        return f"{self.estimate * scale:{form}} {self.ends(form, scale)}"

    def ends(self, form: str = ".3g", scale: float = 1.0) -> str:
        """Format the ends as `[1.1, 1.4]`, an open end as `?`."""
        low, high = (
            "?" if end is None else format(end * scale, form) for end in (self.low, self.high)
        )
        return f"[{low}, {high}]"


def exponential_end(end: float | None) -> float | None:
    """Return e^end; None for an open end, and for one that overflows."""
    return None if end is None or abs(end) > 600 else float(np.exp(end))


def allowance(free: int, level: float = LEVEL) -> float:
    """Return the factor over the least objective up to which a value is inside.

    `free` is n - p, the degrees of freedom.
    """
    assert free > 0
    return 1 + stats.f.ppf(level, 1, free) / free


def prediction_interval(curve: Interval, sigma: float, free: int, level: float = LEVEL) -> Interval:
    """Return the interval of a further run: y ± t·sqrt(g'Vg + sigma²) in ln y, each side by itself.

    `curve` is the interval of the curve, g'Vg; `sigma` the standard deviation of ln y around it,
    from `free` degrees of freedom. An open end of the curve stays open.
    """
    if curve.estimate is None:
        return curve
    estimate = curve.estimate
    noise = stats.t.ppf((1 + level) / 2, free) * sigma

    def widened(end: float | None, side: float) -> float | None:
        if end is None:
            return None
        return estimate * math.exp(side * math.hypot(math.log(end / estimate), noise))

    return Interval.of_ends(estimate, widened(curve.low, -1.0), widened(curve.high, 1.0))


def crossing(
    excess: Callable[[float], float],
    start: float,
    end: float,
    stride: float,
    tolerance: float = 1e-14,
) -> float | None:
    """Return where `excess`, <= 0 at `start`, turns positive on the way to `end`; None if nowhere.

    Doubles the stride until outside, then uses Brent's method.
    """
    inside = start
    while inside != end:
        outside = min(inside + stride, end) if end > start else max(inside - stride, end)
        if excess(outside) > 0:
            return optimize.brentq(excess, inside, outside, xtol=tolerance, rtol=1e-9)
        inside = outside
        stride *= 2
    return None
