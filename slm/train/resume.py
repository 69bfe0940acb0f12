"""Checkpointer: writes checkpoints of a run in time, and resumes from the newest good one."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from slm.model import checkpoints
from slm.train.attempt import AttemptEnded
from slm.train.progress import Progress, WallClock
from slm.train.session import Session

COST_RATIO = 20
"""Checkpoints take at most one part in so many of the time."""


@dataclass
class Checkpointer:
    """Checkpoints of a run, written by rank 0 and read by every rank."""

    session: Session
    progress: Progress
    clock: WallClock
    last_good: Path | None = None
    """The newest checkpoint that is known to be good."""

    def __post_init__(self) -> None:
        self._folder = self.session.attempt.run_folder / "checkpoints"
        self._written = time.monotonic()
        self._cost = 0.0

    def resume(self) -> list[str]:
        """Restore model, optimiser and progress; return a line for each damaged checkpoint.

        Raises AttemptEnded for a checkpoint of another run.
        """
        session = self.session
        self.last_good, damaged = session.attempt.ranks.broadcast_from_rank0(
            lambda: checkpoints.newest(self._folder), session.device
        )
        if self.last_good is None:
            return damaged
        tensors, metadata = checkpoints.read(self.last_good)
        if metadata["run_id"] != session.plan.run_id:
            raise AttemptEnded("data", f"{self.last_good} belongs to run {metadata['run_id']}")
        with torch.no_grad():
            for name, parameter in session.model.named_parameters():
                parameter.copy_(tensors.pop(f"model.{name}"))
        self.progress.restore(metadata)
        session.optimizer.load(tensors)
        return damaged

    def is_due(self) -> bool:
        """Whether it is time for the next checkpoint, on rank 0.

        The pause is `checkpoint_seconds` at least, or the cost of a checkpoint times COST_RATIO;
        with `checkpoint_seconds` of 0 one is due at every step.
        """
        pause = self.session.settings["checkpoint_seconds"]
        if pause:
            pause = max(pause, COST_RATIO * self._cost)
        return self.session.attempt.ranks.is_first and time.monotonic() - self._written >= pause

    def save(self) -> None:
        """Write a checkpoint, on rank 0; training continues if it cannot be written."""
        started = self.clock.count()
        session = self.session
        event = session.attempt.event
        step = self.progress.step
        state = session.optimizer.state()  # on every rank: rank 0 gathers their parts
        if not session.attempt.ranks.is_first:
            return
        weights = {f"model.{name}": tensor for name, tensor in session.parameters().items()}
        metadata = self.progress.metadata() | {"run_id": session.plan.run_id}
        event("working", step=step, what="checkpoint", share=None)
        try:
            path = checkpoints.write(self._folder, step, weights | state, metadata, self.last_good)
        except OSError as error:
            last = "there is none yet"
            if self.last_good:
                last = f"the last good one is {self.last_good.name}"
            message = (
                f"checkpoint at step {step} could not be written ({error.strerror}): {last}; "
                "free some space"
            )
            event("warning", step=step, message=message)
            return
        finally:
            self._written = time.monotonic()
            self._cost = self._written - started
        self.last_good = path
        size = path.stat().st_size
        event("checkpoint", step=step, file=path.name, bytes=size, seconds=self._cost)
