"""Rows of a step as tensors; which rows follows from seed and step alone, whatever the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
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
        row_bytes = row_tokens * self._dtype.itemsize
        rows = [path.stat().st_size // row_bytes for path in paths]
        self._starts = np.cumsum([0, *rows])
        self._file = lru_cache(MAX_MAPPED)(self._map)

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
        offsets = indices - self._starts[files]
        rows = np.empty((len(indices), self._row_tokens), np.int64)
        for file in np.unique(files).tolist():
            selected = files == file
            mapped = self._file(file)
            rows[selected] = mapped[offsets[selected]]
        tokens = torch.from_numpy(rows)
        return tokens[:, :-1], tokens[:, 1:]

    def _map(self, file: int) -> NDArray[Any]:
        rows = np.memmap(self._paths[file], dtype=self._dtype, mode="r")
        return rows.reshape(-1, self._row_tokens)


class Order:
    """Order of training rows: one block after another, each permuted by (seed, epoch, block)."""

    def __init__(self, block_rows: Sequence[int], seed: int) -> None:
        self._starts = np.cumsum([0, *block_rows])
        self._seed = seed
        # A step reads the end of one block and the beginning of the next.
        self._permutation = lru_cache(2)(self._permute)

    def step(self, step: int, batch_rows: int) -> Indices:
        """Return the indices (batch_rows,) of the rows of a step, counted from 0."""
        numbers = np.arange(step * batch_rows, (step + 1) * batch_rows)
        epochs, positions = np.divmod(numbers, self._starts[-1])
        blocks = np.searchsorted(self._starts, positions, "right") - 1
        starts = self._starts[blocks]
        rows = np.empty(batch_rows, np.int64)
        turns = {*zip(epochs.tolist(), blocks.tolist())}
        for epoch, block in sorted(turns):
            selected = (epochs == epoch) & (blocks == block)
            offsets = positions[selected] - starts[selected]
            permutation = self._permutation(epoch, block)
            rows[selected] = permutation[offsets]
        return starts + rows

    def _permute(self, epoch: int, block: int) -> Indices:
        """Return the permutation of a block.

        It sorts raw 64-bit draws, which are the same in all versions of numpy, unlike its own
        permutations.
        """
        size = self._starts[block + 1] - self._starts[block]
        seeds = np.random.SeedSequence([self._seed, epoch, block])
        draws = np.random.PCG64(seeds).random_raw(size)
        return np.argsort(draws, kind="stable")
