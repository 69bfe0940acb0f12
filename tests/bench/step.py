"""Time and memory of training steps: `python -m tests.bench.step SHAPE slm|nanochat`."""

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
from slm.sweep.micro_batch import CPU_TOKENS
from slm.train.optimizer import Optimizer
from tests.bench.trainer import SMALL, shapes

MIN_SECONDS = 0.0 if SMALL else 3.0
"""Minimum time over which steps are measured."""
MIN_STEPS = 2 if SMALL else 5
GPU_ROWS = 32
"""Rows of a micro-batch on a GPU, halved until they fit."""

Batch = list[tuple[Tensor, Tensor]]
Step = Callable[[int, Batch], None]
"""A training step of a number, on micro-batches of ids and targets."""


def slm_step(hp: Hyperparameters, device: torch.device) -> Step:
    """Return the trainer's step."""
    model = GPT(hp)
    model.initialise(0)
    model.to(device)
    if device.type == "cuda":
        model.set_compute_dtype(torch.bfloat16)
    optimizer = Optimizer(model)

    def step(number: int, batch: Batch) -> None:
        optimizer.zero_grad()
        for ids, targets in batch:
            (model.loss(ids, targets) / hp.batch_tokens).backward()
        optimizer.step(number)

    return step


def nanochat_step(hp: Hyperparameters, device: torch.device) -> Step:
    """Return nanochat's step, as its base_train makes it."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    eager = _nanochat_model(hp, device)
    model = torch.compile(eager, dynamic=False)
    optimizer = eager.setup_optimizer()

    def step(number: int, batch: Batch) -> None:
        for ids, targets in batch:
            (model(ids, targets) / len(batch)).backward()
        optimizer.step()
        eager.zero_grad(set_to_none=True)
        if number == 0:
            gc.collect()
            gc.freeze()
            gc.disable()

    return step


def _nanochat_model(hp: Hyperparameters, device: torch.device) -> Any:
    """Return nanochat's model of the same shape: as many parameters, the same windows."""
    gpt = importlib.import_module("nanochat.gpt")
    is_full = [window == hp.sequence_length for window in hp.windows]
    config = gpt.GPTConfig(
        sequence_len=hp.sequence_length,
        vocab_size=hp.vocab_size,
        n_layer=hp.depth,
        n_head=hp.heads,
        n_kv_head=hp.heads,
        n_embd=hp.width,
        window_pattern="".join("L" if full else "S" for full in is_full),
    )
    with torch.device("meta"):
        model = gpt.GPT(config)
    model.to_empty(device=device)
    model.init_weights()
    assert sum(parameter.numel() for parameter in model.parameters()) == hp.parameters.total
    assert [window for window, _ in model.window_sizes] == list(hp.windows)
    return model


def measure(
    hp: Hyperparameters,
    device: torch.device,
    make: Callable[[Hyperparameters, torch.device], Step],
    rows: int,
) -> dict[str, float]:
    """Measure steps of micro-batches of some rows.

    Return seconds of the first step, of the median one and of the best tenth, the FLOPs a second of
    a matrix product, and the peak bytes.
    """
    if torch.cuda.is_initialized():  # by an attempt whose micro-batch did not fit
        torch.cuda.reset_peak_memory_stats()
    before = peak_memory(device)
    start = time.perf_counter()
    step = make(hp, device)
    ids = torch.randint(0, hp.vocab_size, (hp.batch_rows, hp.sequence_length + 1)).to(device)
    batch = [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in ids.split(rows)]
    seconds: list[float] = []
    matmul_rate = 0.0
    while len(seconds) <= MIN_STEPS or sum(seconds[1:]) < MIN_SECONDS:
        step(len(seconds) % hp.steps, batch)
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
        if len(seconds) == 1:
            matmul_rate = ceiling(device)
        start = time.perf_counter()
    first, *rest = seconds
    return {
        "first_step": first,
        "median": median(rest),
        "best_tenth": quantiles(rest, n=10, method="inclusive")[0],
        "ceiling": matmul_rate,
        "peak": peak_memory(device) - before,
    }


def ceiling(device: torch.device) -> float:
    """Return the FLOPs a second of the best of ten matrix products.

    They are float32 on a CPU, bfloat16 on a GPU.
    """
    size = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = torch.randn(size, size, device=device, dtype=dtype)
    y = torch.randn(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        x @ y
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def peak_memory(device: torch.device) -> int:
    """Return the peak bytes so far: of the allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Measure and print JSON; a micro-batch that does not fit a GPU is halved."""
    name, trainer = sys.argv[1:]
    shape = shapes()[name]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if trainer == "nanochat":
        sys.path.append(os.environ["NANOCHAT"])
        importlib.import_module("nanochat.gpt")
    torch.set_num_threads(shape.threads)
    make = slm_step if trainer == "slm" else nanochat_step
    rows = GPU_ROWS if device.type == "cuda" else CPU_TOKENS // shape.hp.sequence_length
    while True:
        try:
            result = measure(shape.hp, device, make, rows)
            break
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            rows //= 2
    print(json.dumps(result))


if __name__ == "__main__":
    main()
