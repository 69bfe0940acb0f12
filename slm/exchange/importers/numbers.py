"""Numbers as people print them: 1.14B, 2.15e18, 9:56h, 1.6 hrs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

EMPTY = {"", "-", "–", "—", "na", "n/a", "nan", "none", "null", "?", "inf", "-inf", "infinity"}
"""Cells that hold no value, in lower case."""
SCALES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
SECONDS = {
    "ms": 0.001,
    "s": 1.0,
    "sec": 1.0,
    "m": 60.0,
    "min": 60.0,
    "h": 3600.0,
    "hr": 3600.0,
    "d": 86400.0,
}
SECONDS |= {
    "secs": 1.0,
    "seconds": 1.0,
    "mins": 60.0,
    "minutes": 60.0,
    "hour": 3600.0,
    "hours": 3600.0,
}
SECONDS |= {"second": 1.0, "minute": 60.0, "hrs": 3600.0, "day": 86400.0, "days": 86400.0}
_NUMBER = re.compile(
    r"[~≈$]?\s*([+-]?(?:\d[\d,_]*(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,4})?)\s*([a-zA-Z%]*)", re.ASCII
)


@dataclass(frozen=True)
class Number:
    """A number read."""

    value: float
    """Its value; an int where it was printed as one."""
    unit: float
    """Unit of its last digit."""

    def times(self, factor: float) -> Number:
        """The number in another unit; whole where it comes out whole."""
        if factor == 1.0:
            return self
        scaled = self.value * factor
        return Number(
            int(scaled) if factor > 1 and float(scaled).is_integer() else scaled, self.unit * factor
        )


def number(text: str) -> Number | None:
    """The number of a cell, its letter of scale (1.14B) applied; None where it is none.

    >>> number("1.14B")
    Number(value=1140000000, unit=10000000.0)
    """
    match = _NUMBER.fullmatch(text.strip())
    if not match or match[2].lower() not in (*SCALES, "%"):
        return None
    exact = Decimal(match[1].replace(",", "").replace("_", ""))
    exponent = exact.as_tuple().exponent
    assert isinstance(exponent, int)
    if abs(exact.adjusted()) > 99:  # and so no product of two is infinite
        return None
    value = (
        int(exact) if exact == exact.to_integral_value() and "." not in match[1] else float(exact)
    )
    scale = 0.01 if match[2] == "%" else SCALES[match[2].lower()]
    return Number(value, float(Decimal(1).scaleb(exponent))).times(scale)


def seconds(text: str, factor: float) -> Number | None:
    """The duration of a cell in seconds; `factor` is the unit where the cell names none.

    >>> seconds("9:56h", 1.0)
    Number(value=35760, unit=60)
    """
    match = re.fullmatch(r"(\d+):(\d\d)(?::(\d\d))?\s*h?", text.strip(), re.ASCII)
    if match:
        hours, minutes, rest = int(match[1]), int(match[2]), int(match[3] or 0)
        return Number(3600 * hours + 60 * minutes + rest, 1 if match[3] else 60)
    match = re.fullmatch(r"(.*?\d\.?)\s*([a-zA-Z]+)", text.strip())
    if match and match[2].lower() in SECONDS:
        found = number(match[1])
        return found.times(SECONDS[match[2].lower()]) if found else None
    found = number(text)
    return found.times(factor) if found else None
