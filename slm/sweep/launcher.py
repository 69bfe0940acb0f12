"""Launcher: what starts attempts somewhere and knows how they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from slm.hardware.slot import Slot
from slm.recipe import Hyperparameters
from slm.run import ExitDocument

if TYPE_CHECKING:
    from slm.hardware.runtime import RuntimeModel
    from slm.sweep.micro_batch import MicroBatches


class Launcher(Protocol):
    """What starts attempts somewhere and knows how they are."""

    name: str
    seconds: RuntimeModel
    """Of a run on a slot."""
    memory: MicroBatches
    """What fits on a slot."""

    def places(
        self, waiting: Sequence[Waiting], working: Sequence[Working]
    ) -> list[tuple[str, Slot]]:
        """The runs to start now, by run_id, each with its slot, given those that wait and those at work."""

    def start(self, attempt: Path) -> None:
        """Start an attempt whose folder is made."""

    def living(self, attempts: Iterable[Path]) -> set[Path]:
        """Those attempts that wait in a queue or work, or whose run another attempt works at."""

    def stop(self, attempt: Path, at_once: bool = False) -> None:
        """Ask an attempt to checkpoint and end, or to end at once."""

    def reap(self, attempt: Path) -> ExitDocument:
        """Record the end of an attempt that ended without a word; its exit.json."""


@dataclass(frozen=True)
class Waiting:
    """A run that waits for a place."""

    name: str
    """Its run_id."""
    given: Hyperparameters
    """What it is."""
    devices: int | None
    """Devices that it began on, which equal bits ask for again; None while it has not begun."""
    left: float
    """Share of its steps that is left, by its newest checkpoint."""


@dataclass(frozen=True)
class Working:
    """A run at work."""

    ids: tuple[str, ...]
    """The devices that are its own."""
    seconds_left: float
    """Estimated."""
