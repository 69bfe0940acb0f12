"""What a reader must know before using a number."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FitWarning:
    """One thing that the runs do not hold, or that a number rests on."""

    code: str
    """Stable name."""
    message: str
    """One sentence: the values, and the way out."""
