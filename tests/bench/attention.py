"""Attention: one layer with a short window, forward and backward, beside SDPA with the whole mask; all cores.

Medians of nine, the two taking turns, in float32, on queries laid out as the trainer's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from slm.hardware.devices import cores
from slm.model.attention import attend

HEADERS = ("rows", "heads", "tokens", "window", "head size", "ours ms", "SDPA ms", "times faster")
SHAPES = (
    (16, 2, 256, 128, 64),
    (16, 4, 512, 128, 64),
    (8, 8, 1024, 256, 32),
    (4, 4, 2048, 512, 64),
)


def rows() -> Iterator[tuple[float, ...]]:
    """The shape, the milliseconds of both, and their ratio."""
    torch.set_num_threads(cores())
    for shape in SHAPES:
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(10):
            for kind, found in zip((attend, masked), times):
                found.append(seconds(kind, *shape))
        ours, plain = (1000 * median(found[1:]) for found in times)
        yield *shape, ours, plain, plain / ours


def seconds(
    attention: Callable[..., Tensor], rows: int, heads: int, length: int, window: int, head_dim: int
) -> float:
    """Of one forward and one backward pass."""
    query, key, value = (
        torch.randn(rows, length, heads, head_dim, requires_grad=True) for _ in range(3)
    )
    began = time.perf_counter()
    attended = attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), window)
    attended.transpose(1, 2).flatten(2).sum().backward()
    return time.perf_counter() - began


def masked(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """torch's attention under a (T, T) mask."""
    place = torch.arange(query.size(2))
    age = place[:, None] - place
    return F.scaled_dot_product_attention(query, key, value, attn_mask=(age >= 0) & (age <= window))
