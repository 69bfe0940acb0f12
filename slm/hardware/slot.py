"""Slot: the devices one run trains on, and how much each rank computes at once."""

from __future__ import annotations

from dataclasses import dataclass

from slm.hardware.memory import EVALUATION_TOKENS
from slm.recipe import Hyperparameters


@dataclass(frozen=True)
class Slot:
    """What one run trains on; not identity."""

    device: str
    """"cpu", "cuda" or "mps"."""
    ranks: int
    """Processes over all nodes, at most: one a GPU, or one a core."""
    threads: int
    """Threads a process."""
    device_name: str = ""
    """The device, for people and for estimates."""
    ids: tuple[str, ...] = ()
    """Its own GPUs, as CUDA_VISIBLE_DEVICES names them, or cores of this machine; () where Slurm gives them."""
    nodes: int = 1
    """Machines, each with an equal share of the ranks."""
    memory: int | None = None
    """Bytes of a rank; None where that is not known."""

    def ranks_of(self, given: Hyperparameters) -> int:
        """Processes of a run here: no more than its batch has rows."""
        return min(self.ranks, given.batch_rows)


@dataclass(frozen=True)
class MicroBatch:
    """How much one rank computes at once."""

    training: int
    """Rows of one forward pass."""
    evaluation_tokens: int = EVALUATION_TOKENS
    """Tokens of one forward pass of an evaluation, at most (at least one row)."""
