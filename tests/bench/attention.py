"""Attention: one layer with a short window, forward and backward, next to SDPA with a full mask.

Medians of nine on all cores, the two alternating, in float32, on queries laid out as in the
trainer. SLM_BENCH_SMALL=1 measures the smallest shape once.
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
from tests.bench.trainer import SMALL

HEADERS = ("rows", "heads", "tokens", "window", "head size", "ours ms", "SDPA ms", "times faster")
SHAPES = (
    (16, 2, 256, 128, 64),
    (16, 4, 512, 128, 64),
    (8, 8, 1024, 256, 32),
    (4, 4, 2048, 512, 64),
)
REPEATS = 1 if SMALL else 9


def rows() -> Iterator[tuple[float, ...]]:
    """Yield each shape, the milliseconds of both methods, and their ratio."""
    torch.set_num_threads(cores())
    for shape in SHAPES[:1] if SMALL else SHAPES:
        ours: list[float] = []
        masked: list[float] = []
        for _ in range(1 + REPEATS):  # the first is a warm-up
            ours.append(seconds(attend, *shape))
            masked.append(seconds(masked_attention, *shape))
        ours_ms = 1000 * median(ours[1:])
        masked_ms = 1000 * median(masked[1:])
        yield *shape, ours_ms, masked_ms, masked_ms / ours_ms


def seconds(
    attention: Callable[..., Tensor], rows: int, heads: int, length: int, window: int, head_dim: int
) -> float:
    """Return the seconds of a forward and a backward pass."""
    query, key, value = (
        torch.randn(rows, length, heads, head_dim, requires_grad=True) for _ in range(3)
    )
    start = time.perf_counter()
    attended = attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), window)
    attended.transpose(1, 2).flatten(2).sum().backward()
    return time.perf_counter() - start


def masked_attention(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """Return torch's attention under a (T, T) mask."""
    position = torch.arange(query.size(2))
    age = position[:, None] - position
    return F.scaled_dot_product_attention(query, key, value, attn_mask=(age >= 0) & (age <= window))
