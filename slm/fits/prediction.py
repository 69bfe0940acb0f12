"""Runs not yet made: what the curves say of them, how sure, and how far beyond their runs they have been tested."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from slm.fits.intervals import Interval


@dataclass(frozen=True)
class Target:
    """What is asked about: the compute-optimal run at some compute, or one model."""

    flops: float
    """Training compute, FLOPs."""
    depth: int | None = None
    """Layers of a model named."""
    params: float | None = None
    """Its N, by the convention of the fit."""
    tokens: float | None = None
    """Its D."""


@dataclass(frozen=True)
class Prediction:
    """One answer."""

    target: Target
    """The question."""
    model: str
    """Which curve answers: the form of a law or a surface."""
    loss: Interval
    """Of one further run, in the unit of the runs."""
    core: Interval | None
    """CORE of one further run; None where no CORE curve is known."""
    factor: float
    """Compute, as a multiple of the largest run's."""
    tested: float
    """How far beyond its runs the curve has been right when runs were held out."""

    @property
    def beyond(self) -> bool:
        """Whether the answer reaches further than has been validated."""
        return self.factor > max(self.tested, 1.0) * 1.001

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            **vars(self.target),
            "model": self.model,
            "loss": self.loss.document(),
            "core": self.core.document() if self.core else None,
            "times_largest": self.factor,
            "validated_to": self.tested,
            "beyond_validated": self.beyond,
        }
