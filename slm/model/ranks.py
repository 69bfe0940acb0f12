"""Ranks: which process of a training or evaluation this is, and what the processes exchange."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """Rank and world size of this process; alone by default."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def from_environment(cls) -> Ranks:
        """Return the rank and world size that torchrun put into the environment."""
        return cls(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone writes events, checkpoints and results."""
        return self.rank == 0

    def share(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return this rank's share of row indices: contiguous, and as even as can be."""
        return np.array_split(indices, self.world_size)[self.rank]

    def broadcast_from_rank0(
        self,
        compute: Callable[[], Result],
        device: torch.device,
        errors: tuple[type[Exception], ...] = (ValueError, OSError),
    ) -> Result:
        """Call `compute` on rank 0 and return its result on every rank.

        One of `errors` that rank 0 raises is raised on every rank; any other error ends rank 0
        alone, and torchrun then kills the other ranks.
        """
        outcome: list[Any] = [None, None]  # the result, or the error
        if self.is_first:
            try:
                outcome[0] = compute()
            except errors as error:
                outcome[1] = error
        if self.world_size > 1:
            dist.broadcast_object_list(outcome, device=device)
        if outcome[1] is not None:
            raise outcome[1]
        return cast(Result, outcome[0])

    def sum(self, tensor: torch.Tensor) -> None:
        """Replace a tensor by its sum over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)

    def maximum(self, value: int, device: torch.device) -> int:
        """Return the greatest of the values that the ranks hold."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor(value, device=device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def barrier(self) -> None:
        """Wait until every rank has come this far."""
        if self.world_size > 1:
            dist.barrier()


ALONE = Ranks()
"""The only process."""


def local_device(kind: str) -> torch.device:
    """Return this rank's "cpu", "cuda" or "mps" device, and make it the current one."""
    if kind != "cuda":
        return torch.device(kind)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device
