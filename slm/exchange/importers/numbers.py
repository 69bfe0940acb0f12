"""Parse numbers as people print them: 1.14B, 2.15e18, 9:56h, 1.6 hrs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

EMPTY = {"", "-", "–", "—", "na", "n/a", "nan", "none", "null", "?", "inf", "-inf", "infinity"}
"""Cells without a value, in lower case."""
SCALES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
TIME_UNITS = {
    0.001: "ms",
    1.0: "s sec secs second seconds",
    60.0: "m min mins minute minutes",
    3600.0: "h hr hrs hour hours",
    86400.0: "d day days",
}
SECONDS = {name: size for size, names in TIME_UNITS.items() for name in names.split()}
"""Seconds of each unit of time, by its spelling."""
_NUMBER = re.compile(
    r"[~≈$]?\s*([+-]?(?:\d[\d,_]*(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,4})?)\s*([a-zA-Z%]*)", re.ASCII
)
LARGEST_EXPONENT = 99
"""Larger numbers are refused, so that no product of two is infinite."""


@dataclass(frozen=True)
class Number:
    """A parsed number."""

    value: float
    """An int where it was printed as one."""
    unit: float
    """Value of the last printed digit."""

    def times(self, factor: float) -> Number:
        """Return the number in another unit, as an int where the result is whole."""
        if factor == 1.0:
            return self
        scaled = self.value * factor
        is_whole = factor > 1 and float(scaled).is_integer()
        return Number(int(scaled) if is_whole else scaled, self.unit * factor)


def number(text: str) -> Number | None:
    """Parse a number, with its suffix of scale; None if the text is not a number.

    >>> number("1.14B")
    Number(value=1140000000, unit=10000000.0)
    """
    match = _NUMBER.fullmatch(text.strip())
    if not match:
        return None
    suffix = match[2].lower()
    if suffix not in SCALES and suffix != "%":
        return None
    exact = Decimal(match[1].replace(",", "").replace("_", ""))
    exponent = exact.as_tuple().exponent
    assert isinstance(exponent, int)
    if abs(exact.adjusted()) > LARGEST_EXPONENT:
        return None
    is_whole = exact == exact.to_integral_value() and "." not in match[1]
    value = int(exact) if is_whole else float(exact)
    scale = 0.01 if suffix == "%" else SCALES[suffix]
    return Number(value, float(Decimal(1).scaleb(exponent))).times(scale)


def seconds(text: str, factor: float) -> Number | None:
    """Parse a duration in seconds; `factor` is the unit of a bare number.

    >>> seconds("9:56h", 1.0)
    Number(value=35760, unit=60)
    """
    clock = re.fullmatch(r"(\d+):(\d\d)(?::(\d\d))?\s*h?", text.strip(), re.ASCII)
    if clock:
        total = 3600 * int(clock[1]) + 60 * int(clock[2]) + int(clock[3] or 0)
        return Number(total, 1 if clock[3] else 60)
    with_unit = re.fullmatch(r"(.*?\d\.?)\s*([a-zA-Z]+)", text.strip())
    if with_unit and with_unit[2].lower() in SECONDS:
        text, factor = with_unit[1], SECONDS[with_unit[2].lower()]
    parsed = number(text)
    return parsed.times(factor) if parsed else None
