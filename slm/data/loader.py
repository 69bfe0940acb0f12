"""Rows of a step as tensors: which ones follows from seed and step alone, whatever the ranks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from slm.data.prepare import Prepared

Pair = tuple[torch.Tensor, torch.Tensor]


class Rows:
    """A memory-mapped file of rows of T+1 tokens."""

    def __init__(self, path: Path, row_tokens: int, dtype: str) -> None:
        self._rows = np.memmap(path, dtype=dtype, mode="r").reshape(-1, row_tokens)

    @classmethod
    def of(cls, prepared: Prepared, name: str) -> Rows:
        """The "train" or "validation" rows of a prepared corpus."""
        part = prepared.manifest[name]
        return cls(prepared.folder / f"{name}.bin", part["row_tokens"], part["dtype"])

    def __len__(self) -> int:
        return len(self._rows)

    def pair(self, indices: npt.NDArray[np.int64]) -> Pair:
        """Inputs and targets of some rows, each (rows, T) int64, on the CPU."""
        rows = torch.from_numpy(self._rows[indices].astype(np.int64))
        return rows[:, :-1], rows[:, 1:]


class Order:
    """The order of training rows: blocks one after another, each permuted by (seed, epoch, block)."""

    def __init__(self, rows: int, block_rows: int, seed: int) -> None:
        self._rows = rows
        self._block_rows = block_rows
        self._seed = seed
        self._permutations: dict[tuple[int, int], npt.NDArray[np.int64]] = {}

    def step(self, step: int, batch_rows: int) -> npt.NDArray[np.int64]:
        """Indices (batch_rows,) of the rows of a step, counted from 0."""
        return np.array([self._row(k) for k in range(step * batch_rows, (step + 1) * batch_rows)], dtype=np.int64)

    def _row(self, k: int) -> int:
        epoch, place = divmod(k, self._rows)
        block, offset = divmod(place, self._block_rows)
        return block * self._block_rows + int(self._permutation(epoch, block)[offset])

    def _permutation(self, epoch: int, block: int) -> npt.NDArray[np.int64]:
        """Sorts raw 64-bit draws, which numpy keeps the same for all versions (its own permutation it does not)."""
        if (epoch, block) not in self._permutations:
            size = min(self._block_rows, self._rows - block * self._block_rows)
            draws = np.random.PCG64(np.random.SeedSequence([self._seed, epoch, block])).random_raw(size)
            self._permutations = {(epoch, block): np.argsort(draws, kind="stable")} | dict(
                list(self._permutations.items())[:1]
            )
        return self._permutations[epoch, block]


def share(indices: npt.NDArray[np.int64], rank: int, ranks: int) -> npt.NDArray[np.int64]:
    """The rows of one rank: contiguous, as even as can be."""
    return np.array_split(indices, ranks)[rank]
