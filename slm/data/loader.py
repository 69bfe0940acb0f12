"""Rows of a step as tensors; which rows follows from seed and step alone, whatever the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from slm.data.dataset import PreparedDataset

Pair = tuple[torch.Tensor, torch.Tensor]
"""Inputs and targets."""
Indices = NDArray[np.int64]
MAX_MAPPED = 16
"""Files mapped at a time: a corpus may have more than a process may open."""


class Rows:
    """Rows of T+1 tokens in consecutive files; the last files read stay mapped."""

    def __init__(self, paths: Sequence[Path], row_tokens: int, dtype: str) -> None:
        self._paths = paths
        self._row_tokens = row_tokens
        self._dtype = np.dtype(dtype)
        sizes = [path.stat().st_size // (row_tokens * self._dtype.itemsize) for path in paths]
        self._starts = np.cumsum([0, *sizes])
        self._mapped: dict[int, NDArray[Any]] = {}

    @classmethod
    def open(cls, dataset: PreparedDataset, part: str) -> Rows:
        """Open the "train" or "validation" rows of a dataset."""
        paths = [dataset.folder / file["file"] for file in dataset.files(part) if file["rows"]]
        return cls(paths, dataset.manifest["row_tokens"], dataset.manifest["dtype"])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def pair(self, indices: Indices) -> Pair:
        """Return inputs and targets of some rows, each (rows, T) int64, on the CPU."""
        files = np.searchsorted(self._starts, indices, "right") - 1
        rows = np.empty((len(indices), self._row_tokens), np.int64)
        for file in np.unique(files).tolist():
            selected = files == file
            rows[selected] = self._file(file)[indices[selected] - self._starts[file]]
        tokens = torch.from_numpy(rows)
        return tokens[:, :-1], tokens[:, 1:]

    def _file(self, number: int) -> NDArray[Any]:
        if number not in self._mapped:
            if len(self._mapped) == MAX_MAPPED:
                del self._mapped[next(iter(self._mapped))]
            rows = np.memmap(self._paths[number], dtype=self._dtype, mode="r")
            self._mapped[number] = rows.reshape(-1, self._row_tokens)
        return self._mapped[number]


class Order:
    """Order of training rows: one block after another, each permuted by (seed, epoch, block)."""

    def __init__(self, block_rows: Sequence[int], seed: int) -> None:
        self._starts = np.cumsum([0, *block_rows])
        self._seed = seed
        self._permutations: dict[tuple[int, int], Indices] = {}

    def step(self, step: int, batch_rows: int) -> Indices:
        """Return the indices (batch_rows,) of the rows of a step, counted from 0."""
        numbers = np.arange(step * batch_rows, (step + 1) * batch_rows)
        epochs, positions = np.divmod(numbers, self._starts[-1])
        blocks = np.searchsorted(self._starts, positions, "right") - 1
        rows = np.empty(batch_rows, np.int64)
        for turn in np.unique(epochs * len(self._starts) + blocks).tolist():
            epoch, block = divmod(turn, len(self._starts))
            selected = (epochs == epoch) & (blocks == block)
            start = self._starts[block]
            rows[selected] = start + self._permutation(epoch, block)[positions[selected] - start]
        return rows

    def _permutation(self, epoch: int, block: int) -> Indices:
        """Return the permutation of a block, and keep it with the one used before.

        It sorts raw 64-bit draws, which are the same in all versions of numpy, unlike its own
        permutations.
        """
        if (epoch, block) not in self._permutations:
            size = self._starts[block + 1] - self._starts[block]
            seeds = np.random.SeedSequence([self._seed, epoch, block])
            draws = np.random.PCG64(seeds).random_raw(size)
            newest = list(self._permutations.items())[:1]
            self._permutations = {(epoch, block): np.argsort(draws, kind="stable"), **dict(newest)}
        return self._permutations[epoch, block]
