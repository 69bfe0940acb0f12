"""Launcher protocol: assign runs to slots, start their attempts, and report which are alive."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from slm.hardware.runtime import STARTUP_SECONDS, RuntimeModel
from slm.hardware.slot import Slot
from slm.recipe import Hyperparameters
from slm.run import ExitDocument, attempt_slot, checkpoint_step, last_attempt

if TYPE_CHECKING:
    from slm.sweep.micro_batch import MicroBatches


class Launcher(Protocol):
    """A way to start attempts: on this machine or on a cluster."""

    name: str
    runtime: RuntimeModel
    micro_batches: MicroBatches

    def assign(
        self, waiting: Sequence[WaitingRun], running: Sequence[RunningRun]
    ) -> list[tuple[str, Slot]]:
        """Return the names of the runs to start now, each with its slot."""

    def start(self, attempt: Path) -> None:
        """Start an attempt whose folder exists."""

    def alive(self, attempts: Iterable[Path]) -> set[Path]:
        """Return the attempts that are queued or running, or whose run another attempt holds."""

    def stop(self, attempt: Path, at_once: bool = False) -> None:
        """Ask an attempt to checkpoint and stop, or to stop at once."""

    def reap(self, attempt: Path) -> ExitDocument:
        """Write and return exit.json for an attempt that ended without writing it."""


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
