"""Ranks: which process of a training or evaluation this is, and how many there are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ranks:
    """This process among the processes that share a model's work."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone writes events, checkpoints and results."""
        return self.rank == 0
