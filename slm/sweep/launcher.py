"""Runs as a launcher sees them: those that wait for a slot, and those that occupy devices."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slm.hardware.runtime import STARTUP_SECONDS, RuntimeModel
from slm.hardware.slot import Slot
from slm.recipe import Hyperparameters
from slm.run import attempt_slot, checkpoint_step, last_attempt


@dataclass(frozen=True)
class WaitingRun:
    """A run that waits for a slot."""

    name: str
    """The run_id, or its position in the sweep while it has no plan."""
    hp: Hyperparameters
    devices: int | None = None
    """Number of devices of its last attempt, which equal bits require again; None for a new run."""
    remaining: float = 1.0
    """Share of its steps after the newest checkpoint."""

    @classmethod
    def read(cls, folder: Path, hp: Hyperparameters) -> WaitingRun:
        """Return the run of a folder, from its newest attempt and checkpoint."""
        attempt = last_attempt(folder)
        devices = len(attempt_slot(attempt).ids) or None if attempt else None
        return cls(folder.name, hp, devices, 1 - checkpoint_step(folder) / hp.steps)

    def seconds(self, runtime: RuntimeModel, slot: Slot) -> float:
        """Return the time that its next attempt takes on a slot."""
        work = runtime(self.hp, slot) - STARTUP_SECONDS
        return STARTUP_SECONDS + self.remaining * work


@dataclass(frozen=True)
class RunningRun:
    """A run that occupies devices."""

    ids: tuple[str, ...]
    """Devices that it occupies, as in `Slot.ids`."""
    seconds_left: float
    """Estimated time until it ends."""
