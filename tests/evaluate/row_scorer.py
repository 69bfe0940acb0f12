"""A scorer that reads every row by itself: the plain counterpart of shared prefixes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slm.evaluate.batching import PAD, Batch
from slm.evaluate.core import Scorer, score_logits


@dataclass(frozen=True)
class RowScorer(Scorer):
    """Scorer whose model is any callable from token ids (B, T) to logits (B, T, V)."""

    row_length: int = 10**9
    """Maximum tokens of a row."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def context(self) -> int:
        return self.row_length

    def score(self, batch: Batch) -> Tensor:
        rows, cells = unpack(batch)
        logits = self.model(torch.from_numpy(rows)).flatten(0, 1)
        return score_logits(logits[cells[batch.scored]], torch.from_numpy(batch.targets))


def unpack(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of a batch, padded with 0 (R, T), and the cell in R·T of every token (N,)."""
    rows: list[np.ndarray] = []
    for sequence in range(len(batch.prefixes)):
        prefix = batch.prefixes[sequence][batch.prefixes[sequence] != PAD]
        suffixes = batch.suffixes[sequence][batch.suffixes[sequence] != PAD]
        rows.append(prefix)
        for number in np.unique(batch.pieces[suffixes]):
            rows.append(np.append(prefix, suffixes[batch.pieces[suffixes] == number]))
    length = max(map(len, rows))
    ids = np.zeros((len(rows), length), np.int64)
    cells = np.zeros(len(batch.ids), np.int64)
    for row, tokens in enumerate(rows):
        positions = np.arange(len(tokens))
        assert (batch.positions[tokens] == positions).all()
        ids[row, positions] = batch.ids[tokens]
        cells[tokens] = row * length + positions
    return ids, cells
