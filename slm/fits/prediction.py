"""Predictions of further runs, with intervals and how far beyond their runs they are validated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from slm.fits.intervals import Interval
from slm.fits.types import to_json


@dataclass(frozen=True)
class Target:
    """A run to predict: the compute-optimal one at some compute, or one model."""

    flops: float
    """Training compute, FLOPs."""
    depth: int | None = None
    """Layers of a named model."""
    params: float | None = None
    """N of the model, by the convention of the fit."""
    tokens: float | None = None
    """D of the model."""


@dataclass(frozen=True)
class Prediction:
    """The prediction of one target."""

    target: Target
    model: str
    """Form of the law or surface that predicts."""
    loss: Interval
    """Loss of one further run, in the unit of the runs."""
    core: Interval | None
    """CORE of one further run; None without a curve of CORE."""
    factor: float
    """Compute over that of the largest run."""
    validated_factor: float
    """Largest factor at which the curve has predicted held-out runs correctly."""

    @property
    def beyond_validated(self) -> bool:
        """Whether the target lies further out than hold-outs have validated."""
        return self.factor > max(self.validated_factor, 1.0) * 1.001

    def document(self) -> dict[str, Any]:
        """Return the JSON document."""
        return {
            **to_json(self.target),
            "model": self.model,
            "loss": to_json(self.loss),
            "core": to_json(self.core),
            "times_largest": self.factor,
            "validated_to": self.validated_factor,
            "beyond_validated": self.beyond_validated,
        }
