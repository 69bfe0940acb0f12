"""Profile-likelihood intervals: {φ : S(φ) <= S_min·(1 + F_.95(1, n-p)/(n-p))}, an open end said to be open."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from scipy import optimize, stats

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval. What is not known is None, never a number."""

    estimate: float | None
    """The best value."""
    low: float | None = None
    """Lower end; None when unbounded or not known."""
    high: float | None = None
    """Upper end; None when unbounded or not known."""
    identifiable: bool = False
    """Whether the data bound the value on both sides."""

    def document(self) -> dict[str, float | bool | None]:
        """As JSON."""
        return {
            "estimate": self.estimate,
            "low": self.low,
            "high": self.high,
            "identifiable": self.identifiable,
        }

    def text(self, form: str = ".3g", scale: float = 1.0) -> str:
        """`1.2 [1.1, 1.4]`, an open end as `?`."""
        if self.estimate is None:
            return "not known"
        return f"{self.estimate * scale:{form}} {self.ends(form, scale)}"

    def ends(self, form: str = ".3g", scale: float = 1.0) -> str:
        """`[1.1, 1.4]`, an open end as `?`."""
        low, high = (
            format(end * scale, form) if end is not None else "?" for end in (self.low, self.high)
        )
        return f"[{low}, {high}]"


def allowance(free: int, level: float = LEVEL) -> float:
    """Factor over the least objective up to which a value is inside, with `free` = n - p degrees of freedom."""
    assert free > 0
    return 1 + float(stats.f.ppf(level, 1, free)) / free


def further(curve: Interval, scatter: float, free: int, level: float = LEVEL) -> Interval:
    """The interval of one further run, given that of the curve: y ± t·sqrt(g'Vg + sigma²) in ln y, side by side.

    `scatter` is sigma, the standard deviation of ln y around the curve, from `free` degrees of freedom. An end that the
    curve has not, the run has not.
    """
    if curve.estimate is None:
        return curve
    own = float(stats.t.ppf((1 + level) / 2, free)) * scatter

    def end(edge: float | None, side: float) -> float | None:
        if edge is None or curve.estimate is None:
            return None
        return curve.estimate * math.exp(side * math.hypot(math.log(edge / curve.estimate), own))

    low, high = end(curve.low, -1.0), end(curve.high, 1.0)
    return Interval(curve.estimate, low, high, low is not None and high is not None)


def crossing(
    excess: Callable[[float], float], start: float, end: float, first: float, within: float = 1e-14
) -> float | None:
    """Where `excess` (<= 0 at `start`) turns positive on the way to `end`: doubling strides from `first`, then Brent.

    None when it does not: the interval is open on that side.
    """
    inside, stride, way = start, first, 1.0 if end > start else -1.0
    while inside != end:
        outside = min(inside + stride, end) if way > 0 else max(inside - stride, end)
        if excess(outside) > 0:
            return float(optimize.brentq(excess, inside, outside, xtol=within, rtol=1e-9))
        inside, stride = outside, 2 * stride
    return None
