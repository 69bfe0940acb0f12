"""Validation loss in bits per byte: comparable across vocabularies, since bytes are what every tokeniser covers."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from slm.data.loader import Rows, share
from slm.data.tokenizer import Tokenizer
from slm.model.gpt import GPT

TOKENS = 2**13
"""Tokens of one forward pass."""


@torch.no_grad()
def validation_loss(
    model: GPT,
    rows: Rows,
    token_bytes: torch.Tensor,
    rank: int = 0,
    ranks: int = 1,
    tokens: int = TOKENS,
    report: Callable[[int], None] = lambda read: None,
) -> tuple[float, float]:
    """val_bpb and the loss in nats a token over every row.

    Bits per byte: summed nats over the summed bytes of the targets, special tokens left out, over ln 2.
    `token_bytes` (V,) holds the bytes of each token, 0 for special ones. Sums are in float64, over all ranks. A forward
    pass reads so many `tokens` at most, but a row at least; `report` is told how many rows of this rank are read.
    """
    batch_rows = max(1, tokens // model.given.sequence_length)
    device = model.wte.device
    wide = torch.float32 if device.type == "mps" else torch.float64  # which that device lacks
    sums = torch.zeros(3, dtype=wide, device=device)
    mine = share(np.arange(len(rows)), rank, ranks)
    for start in range(0, len(mine), batch_rows):
        ids, targets = (tensor.to(device) for tensor in rows.pair(mine[start : start + batch_rows]))
        loss = model.losses(ids, targets).to(wide)
        sizes = token_bytes[targets]
        sums += torch.stack([(loss * (sizes > 0)).sum(), sizes.sum().to(wide), loss.sum()])
        report(start + len(ids))
    if ranks > 1:
        dist.all_reduce(sums)
    nats, size, total = sums.tolist()
    return nats / size / math.log(2), total / (len(rows) * model.given.sequence_length)


def bytes_of(tokenizer: Tokenizer, vocab_size: int, device: torch.device) -> torch.Tensor:
    """Bytes of each token (V,), 0 for special ones and for the padding of the vocabulary."""
    sizes = tokenizer.token_bytes
    return torch.tensor(sizes + [0] * (vocab_size - len(sizes)), device=device)
