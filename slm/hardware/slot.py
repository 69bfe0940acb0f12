"""Slot: the devices one run trains on, and its micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from slm.hardware.block_sizes import EVALUATION_TOKENS

if TYPE_CHECKING:  # a supervisor loads this file
    from slm.recipe import Hyperparameters


@dataclass(frozen=True)
class Slot:
    """The devices one run trains on; not part of its identity."""

    device: str
    """"cpu", "cuda" or "mps"."""
    ranks: int
    """Maximum processes over all nodes: one a GPU, or one a core."""
    threads: int
    """Threads of each process."""
    device_name: str = ""
    """The device's name, for people and for estimates."""
    ids: tuple[str, ...] = ()
    """GPUs as CUDA_VISIBLE_DEVICES names them, or cores of this machine; () where Slurm assigns
    them."""
    nodes: int = 1
    """Machines, each with an equal share of the ranks."""
    memory: int | None = None
    """Bytes of a rank; None where they are not known."""

    def ranks_of(self, hp: Hyperparameters) -> int:
        """Return the processes of a run: no more than its batch has rows."""
        return min(self.ranks, hp.batch_rows)


@dataclass(frozen=True)
class MicroBatch:
    """Rows and tokens that one rank computes at once."""

    training: int
    """Rows of one forward pass."""
    evaluation_tokens: int = EVALUATION_TOKENS
    """Maximum tokens of one forward pass of an evaluation (at least one row)."""
