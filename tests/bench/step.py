"""`python -m tests.bench.step SHAPE slm|nanochat`: one row of the trainer's table, measured in this process alone."""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from slm.model.gpt import GPT
from slm.recipe import Hyperparameters
from slm.run import CPU_TOKENS
from slm.train.optimizer import Optimizer
from tests.bench.trainer import shapes

SECONDS, STEPS = 3.0, 5
"""Steps are timed for so long, and at least so many."""
GPU_ROWS = 32
"""Rows of a micro-batch on a GPU, halved until they fit."""

Step = Callable[[int, list[tuple[Tensor, Tensor]]], None]


def ours(given: Hyperparameters, device: torch.device) -> Step:
    """The trainer's step: a function of its number and its micro-batches of ids and targets."""
    model = GPT(given)
    model.initialise(0)
    model.to(device)
    if device.type == "cuda":
        model.set_compute_dtype(torch.bfloat16)
    optimizer = Optimizer(model)

    def step(number: int, batch: list[tuple[Tensor, Tensor]]) -> None:
        optimizer.zero_grad()
        for ids, targets in batch:
            (model.loss(ids, targets) / given.batch_tokens).backward()
        optimizer.step(number)

    return step


def peers(given: Hyperparameters, device: torch.device) -> Step:
    """nanochat's step, as its base_train makes it."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    plain = _peer_model(given, device)
    model, optimizer = torch.compile(plain, dynamic=False), plain.setup_optimizer()

    def step(number: int, batch: list[tuple[Tensor, Tensor]]) -> None:
        for ids, targets in batch:
            (model(ids, targets) / len(batch)).backward()
        optimizer.step()
        plain.zero_grad(set_to_none=True)
        if number == 0:
            gc.collect()
            gc.freeze()
            gc.disable()

    return step


def _peer_model(given: Hyperparameters, device: torch.device) -> Any:
    """nanochat's model of the same shape: as many parameters, the same windows."""
    peer = importlib.import_module("nanochat.gpt")
    config = peer.GPTConfig(
        sequence_len=given.sequence_length,
        vocab_size=given.vocab_size,
        n_layer=given.depth,
        n_head=given.heads,
        n_kv_head=given.heads,
        n_embd=given.width,
        window_pattern="".join(
            "L" if window == given.sequence_length else "S" for window in given.windows
        ),
    )
    with torch.device("meta"):
        model = peer.GPT(config)
    model.to_empty(device=device)
    model.init_weights()
    assert sum(parameter.numel() for parameter in model.parameters()) == given.parameters.total
    assert [window for window, _ in model.window_sizes] == list(given.windows)
    return model


def measured(
    given: Hyperparameters,
    device: torch.device,
    make: Callable[[Hyperparameters, torch.device], Step],
    rows: int,
) -> dict[str, float]:
    """Seconds of the first step, the median one and the best tenth; FLOPs a second of a matrix product; bytes."""
    if torch.cuda.is_initialized():  # by an attempt whose micro-batch did not fit
        torch.cuda.reset_peak_memory_stats()
    before, began = peak_memory(device), time.perf_counter()
    step = make(given, device)
    ids = torch.randint(0, given.vocab_size, (given.batch_rows, given.sequence_length + 1)).to(
        device
    )
    batch = [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in ids.split(rows)]
    seconds: list[float] = []
    while len(seconds) <= STEPS or sum(seconds[1:]) < SECONDS:
        step(len(seconds) % given.steps, batch)
        _synchronize(device)
        seconds.append(time.perf_counter() - began)
        if len(seconds) == 1:
            top = ceiling(device)
        began = time.perf_counter()
    first, *others = seconds
    return {
        "first_step": first,
        "median": median(others),
        "best_tenth": quantiles(others, n=10, method="inclusive")[0],
        "ceiling": top,
        "peak": peak_memory(device) - before,
    }


def ceiling(device: torch.device) -> float:
    """FLOPs a second of the best of ten matrix products: float32 on a CPU, bfloat16 on a GPU."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        left @ right
        _synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)


def peak_memory(device: torch.device) -> int:
    """Bytes held at most until now: by the allocator on a GPU, by the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Measure and print; a micro-batch that does not fit a GPU is halved."""
    name, who = sys.argv[1:]
    shape = shapes()[name]
    given, device = shape.given, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if who == "nanochat":
        sys.path.append(os.environ["NANOCHAT"])
        importlib.import_module("nanochat.gpt")
    torch.set_num_threads(shape.threads)
    rows = GPU_ROWS if device.type == "cuda" else CPU_TOKENS // given.sequence_length
    while True:
        try:
            found = measured(given, device, ours if who == "slm" else peers, rows)
            break
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            rows //= 2
    print(json.dumps(found))


if __name__ == "__main__":
    main()
