"""Parse numbers as people print them: 1.14B, 2.15e18, 9:56h, 1.6 hrs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal

EMPTY = {"", "-", "–", "—", "na", "n/a", "nan", "none", "null", "?", "inf", "-inf", "infinity"}
"""Texts of cells without a value, in lower case."""
SCALES = {"": 1.0, "%": 0.01, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
"""Factors of the suffixes of a number."""
UNIT_NAMES = {
    0.001: "ms",
    1.0: "s sec secs second seconds",
    60.0: "m min mins minute minutes",
    3600.0: "h hr hrs hour hours",
    86400.0: "d day days",
}
SECONDS = {name: size for size, names in UNIT_NAMES.items() for name in names.split()}
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


def is_empty(cell: object) -> bool:
    """Whether a cell has no value."""
    return str(cell).strip().lower() in EMPTY


def number(text: str, factor: float = 1.0, suffixes: Mapping[str, float] = SCALES) -> Number | None:
    """Parse a number times that of its suffix and a factor; None if the text is not a number.

    >>> number("1.14B")
    Number(value=1140000000, unit=10000000.0)
    """
    match = _NUMBER.fullmatch(text.strip())
    scale = suffixes.get(match[2].lower()) if match else None
    if not match or scale is None:
        return None
    digits = re.sub("[,_]", "", match[1])
    exact = Decimal(digits)
    exponent = exact.as_tuple().exponent
    assert isinstance(exponent, int)
    if abs(exact.adjusted()) > LARGEST_EXPONENT:
        return None
    is_whole = exact == exact.to_integral_value() and "." not in digits
    value = int(exact) if is_whole else float(exact)
    last_digit = float(Decimal(1).scaleb(exponent))
    return Number(value, last_digit).times(scale).times(factor)


def value_of(cell: object) -> float | None:
    """Return a cell's number, an int where it was printed as one; None without one."""
    parsed = number(str(cell))
    return parsed.value if parsed else None


def seconds(text: str, factor: float) -> Number | None:
    """Parse a duration in seconds; `factor` is the unit of a bare number.

    >>> seconds("9:56h", 1.0)
    Number(value=35760, unit=60)
    """
    clock = re.fullmatch(r"(\d+):(\d\d)(?::(\d\d))?\s*h?", text.strip(), re.ASCII)
    if clock:
        minutes = 60 * int(clock[1]) + int(clock[2])
        rest = int(clock[3] or 0)
        return Number(60 * minutes + rest, 1 if clock[3] else 60)
    return number(text, suffixes=SECONDS) or number(text, factor)
