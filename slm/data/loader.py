"""Rows of a step as tensors: which ones follows from seed and step alone, whatever the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from slm.data.dataset import Prepared

Pair = tuple[torch.Tensor, torch.Tensor]
Indices = NDArray[np.int64]
MAPPED = 16
"""Files that are held open."""


class Rows:
    """Files of rows of T+1 tokens, one after another; those that were read last are mapped."""

    def __init__(self, paths: Sequence[Path], row_tokens: int, dtype: str) -> None:
        self._paths, self._row_tokens, self._dtype = paths, row_tokens, np.dtype(dtype)
        sizes = [path.stat().st_size // (row_tokens * self._dtype.itemsize) for path in paths]
        self._starts = np.cumsum([0, *sizes])
        self._mapped: dict[int, NDArray[Any]] = {}

    @classmethod
    def of(cls, prepared: Prepared, part: str) -> Rows:
        """The "train" or "validation" rows of a prepared corpus."""
        paths = [prepared.folder / file["file"] for file in prepared.files(part) if file["rows"]]
        return cls(paths, prepared.manifest["row_tokens"], prepared.manifest["dtype"])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def pair(self, indices: Indices) -> Pair:
        """Inputs and targets of some rows, each (rows, T) int64, on the CPU."""
        files = np.searchsorted(self._starts, indices, "right") - 1
        rows = np.empty((len(indices), self._row_tokens), np.int64)
        for file in np.unique(files).tolist():
            own = files == file
            rows[own] = self._file(file)[indices[own] - self._starts[file]]
        both = torch.from_numpy(rows)
        return both[:, :-1], both[:, 1:]

    def _file(self, number: int) -> NDArray[Any]:
        """The rows of a file; a corpus may have more files than a process may hold open."""
        if number not in self._mapped:
            if len(self._mapped) == MAPPED:
                del self._mapped[next(iter(self._mapped))]
            rows = np.memmap(self._paths[number], dtype=self._dtype, mode="r").reshape(
                -1, self._row_tokens
            )
            self._mapped[number] = rows
        return self._mapped[number]


class Order:
    """The order of training rows: blocks one after another, each permuted by (seed, epoch, block)."""

    def __init__(self, blocks: Sequence[int], seed: int) -> None:
        """Of blocks of so many rows each."""
        self._starts = np.cumsum([0, *blocks])
        self._seed = seed
        self._permutations: dict[tuple[int, int], Indices] = {}

    def step(self, step: int, batch_rows: int) -> Indices:
        """Indices (batch_rows,) of the rows of a step, counted from 0."""
        epochs, places = np.divmod(
            np.arange(step * batch_rows, (step + 1) * batch_rows), self._starts[-1]
        )
        blocks = np.searchsorted(self._starts, places, "right") - 1
        rows = np.empty(batch_rows, np.int64)
        for turn in np.unique(epochs * len(self._starts) + blocks).tolist():
            epoch, block = divmod(turn, len(self._starts))
            own, start = (epochs == epoch) & (blocks == block), self._starts[block]
            rows[own] = start + self._permutation(epoch, block)[places[own] - start]
        return rows

    def _permutation(self, epoch: int, block: int) -> Indices:
        """Sorts raw 64-bit draws, which numpy keeps the same for all versions (its own permutation it does not)."""
        if (epoch, block) not in self._permutations:
            size = self._starts[block + 1] - self._starts[block]
            draws = np.random.PCG64(np.random.SeedSequence([self._seed, epoch, block])).random_raw(
                size
            )
            self._permutations = {(epoch, block): np.argsort(draws, kind="stable")} | dict(
                list(self._permutations.items())[:1]
            )
        return self._permutations[epoch, block]


def share(indices: Indices, rank: int, ranks: int) -> Indices:
    """The rows of one rank: contiguous, as even as can be."""
    return np.array_split(indices, ranks)[rank]
