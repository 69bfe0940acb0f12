"""Trainer: one step of pocket models on one thread, beside the machine's float32 matrix product ceiling.

The ceiling is the best of three products of 1024 x 1024 matrices, measured before every row; a step is the median of
fifteen, forward, backward and optimiser, on random tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median

import torch

from slm.model import GPT
from slm.optim import Optimizer
from slm.recipe import pocket
from slm.train import gradient_buffers

HEADERS = ("depth", "width", "batch rows", "tokens/s", "GFLOP/s", "ceiling GFLOP/s", "share %")


def rows() -> Iterator[tuple[float, ...]]:
    """Depth, width, rows, tokens/s, GFLOP/s, ceiling and share."""
    torch.set_num_threads(1)
    for depth in (2, 4, 6):
        given = pocket(depth)
        top = ceiling()
        speed = given.batch_tokens / step_seconds(depth)
        rate = speed * given.flops_per_token / 1e9
        yield depth, given.width, given.batch_rows, speed, rate, top, 100 * rate / top


def step_seconds(depth: int) -> float:
    """Median seconds of one optimiser step."""
    given = pocket(depth)
    model = GPT(given)
    model.initialise(0)
    buffers, optimizer = gradient_buffers(model), Optimizer(model)
    ids = torch.randint(0, given.vocab_size, (given.batch_rows, given.sequence_length + 1))
    times = []
    for step in range(18):
        began = time.perf_counter()
        for buffer in buffers:
            buffer.zero_()
        loss = model.loss(ids[:, :-1], ids[:, 1:]).sum() / given.batch_tokens
        loss.backward()
        optimizer.step(step)
        times.append(time.perf_counter() - began)
    return median(times[3:])


def ceiling(size: int = 1024) -> float:
    """GFLOP/s of a float32 matrix product."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times) / 1e9
