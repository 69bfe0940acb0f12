"""Validation loss in bits per byte, a unit that does not depend on the tokeniser."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from slm.data.loader import Rows
from slm.data.tokenizer import Tokenizer
from slm.hardware.block_sizes import EVALUATION_TOKENS
from slm.model.gpt import GPT
from slm.model.ranks import Ranks


@torch.no_grad()
def validation_loss(
    model: GPT,
    rows: Rows,
    token_bytes: torch.Tensor,
    ranks: Ranks,
    tokens: int = EVALUATION_TOKENS,
    report: Callable[[int], None] = lambda read: None,
) -> tuple[float, float]:
    """Return val_bpb and the loss in nats per token over all rows, on every rank.

    Bits per byte are the summed nats over the summed bytes of the targets, special tokens excluded,
    over ln 2. `token_bytes` (V,) holds the bytes of each token, 0 for special ones. Sums are
    float64 over all ranks. A forward pass reads at most `tokens` tokens, but at least one row;
    `report` is called with the number of rows that this rank has read.
    """
    sequence_length = model.hp.sequence_length
    batch_rows = max(1, tokens // sequence_length)
    device = model.wte.device
    wide = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    sums = torch.zeros(3, dtype=wide, device=device)
    indices = ranks.share(np.arange(len(rows)))
    for start in range(0, len(indices), batch_rows):
        pair = rows.pair(indices[start : start + batch_rows])
        ids, targets = (tensor.to(device) for tensor in pair)
        loss = model.losses(ids, targets).to(wide)
        sizes = token_bytes[targets]
        text_loss = loss * (sizes > 0)
        sums += torch.stack([text_loss.sum(), sizes.sum().to(wide), loss.sum()])
        report(start + len(ids))
    ranks.sum(sums)
    nats, size, total = sums.tolist()
    bpb = nats / size / math.log(2)
    return bpb, total / (len(rows) * sequence_length)


def bytes_of(tokenizer: Tokenizer, vocab_size: int, device: torch.device) -> torch.Tensor:
    """Return the bytes of each token (V,), 0 for special tokens and for the padded vocabulary."""
    sizes = tokenizer.token_bytes
    return torch.tensor(sizes + [0] * (vocab_size - len(sizes)), device=device)
