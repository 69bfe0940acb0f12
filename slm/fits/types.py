"""Types shared by all fits: arrays, warnings, and the conversion of records to JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class FitWarning:
    """A limit of a fit that a reader must know before using its numbers."""

    code: str
    """Stable name."""
    message: str
    """Sentence with the values and what to do."""


def to_json(value: Any) -> Any:
    """Convert a record to JSON: fields in their order, arrays as lists, NaN and infinity as None.

    A nested record whose keys are not its field names has a `document()` method, which is used.
    """
    if hasattr(value, "document"):
        return value.document()
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return to_json(value.tolist())
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
