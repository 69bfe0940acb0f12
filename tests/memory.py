"""Peak memory of one training step and an evaluation: of torch's allocator, to the byte, and of the
process.

`python -m tests.memory` prints both next to the estimate (about ten minutes on two cores).
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import torch
from torch.autograd.profiler import profile

from slm.hardware.block_sizes import EVALUATION_TOKENS
from slm.hardware.memory import peak_memory
from slm.model.gpt import GPT
from slm.recipe import Hyperparameters, nanochat
from slm.sweep.supervisor import ALLOCATOR
from slm.train.optimizer import Optimizer

RETURNING = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
"""Environment in which glibc returns freed memory at once: a process is then its tensors."""


def shape(depth: int, width: int, vocab: int, length: int, pattern: str) -> Hyperparameters:
    """Return a nanochat of any width, a multiple of 64."""
    family = replace(
        nanochat,
        aspect_ratio=1,
        head_dim=64,
        vocab_size=vocab,
        sequence_length=length,
        window_pattern=pattern,
    )
    return replace(family, aspect_ratio=-(-width // depth))(depth, steps=10)


SHAPES = [
    (shape(4, 256, 4096, 512, "SSSL"), 16),
    (shape(4, 256, 4096, 1024, "L"), 16),
    (shape(4, 256, 32768, 2048, "SSSL"), 1),
    (nanochat(4, steps=10), 1),
    (nanochat(4, steps=10), 4),
    (shape(6, 384, 4096, 512, "SSSL"), 4),
    (shape(6, 384, 4096, 512, "SSSL"), 16),
    (shape(6, 384, 4096, 1024, "SSSL"), 4),
    (shape(6, 384, 4096, 1024, "L"), 4),
    (shape(6, 384, 16384, 512, "L"), 1),
    (shape(8, 512, 4096, 512, "SSSL"), 1),
    (shape(8, 512, 4096, 1024, "SSSL"), 1),
    (shape(8, 512, 4096, 1024, "L"), 4),
    (shape(2, 1024, 4096, 256, "L"), 1),
    (shape(12, 256, 8192, 256, "SL"), 8),
]
"""Models and rows a pass with peaks above 500 MB, in the backward pass, the head or the
evaluation."""


def step(hp: Hyperparameters, rows: int) -> None:
    """Build model and optimiser, take a step of one pass, and evaluate once."""
    draw = torch.Generator().manual_seed(1)
    model = GPT(hp)
    model.initialise(1)
    optimizer = Optimizer(model)
    optimizer.zero_grad()

    def pair(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.randint(hp.vocab_size, (rows, hp.sequence_length + 1), generator=draw)
        return ids[:, :-1], ids[:, 1:]

    (model.loss(*pair(rows)) / hp.batch_tokens).backward()
    optimizer.step(1, measured=True)
    with torch.no_grad():
        model.losses(*pair(max(1, EVALUATION_TOKENS // hp.sequence_length)))


@contextmanager
def allocations() -> Iterator[list[int]]:
    """Yield a list that holds, after the block, the bytes allocated by torch after each allocation,
    in order.
    """
    totals: list[int] = []
    with profile(profile_memory=True) as profiler:
        yield totals
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    totals.extend(accumulate(event.nbytes() for event in events))


def tensor_peak(hp: Hyperparameters, rows: int) -> int:
    """Return the peak bytes of tensors in a step and an evaluation."""
    with allocations() as totals:
        step(hp, rows)
    return max(totals)


def process_peak(hp: Hyperparameters, rows: int) -> int:
    """Return the peak bytes of the process, above those it held before the model was built."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    step(hp, rows)
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - pages * resource.getpagesize()
    )


def main() -> None:
    """Print the table, one process for each number; or one number, by kind and index."""
    if len(sys.argv) == 3:
        measure = {"tensors": tensor_peak, "process": process_peak}[sys.argv[1]]
        print(measure(*SHAPES[int(sys.argv[2])]))
        return
    print(
        "depth width vocab context long rows  estimate   tensors returning retaining (MB; the last "
        "two: process)"
    )
    for index, (hp, rows) in enumerate(SHAPES):
        long = hp.windows.count(hp.sequence_length)
        sizes = [peak_memory(hp, rows, "cpu"), _measure("tensors", index, {})]
        sizes += [_measure("process", index, malloc) for malloc in (RETURNING, ALLOCATOR)]
        model = f"{hp.depth:5} {hp.width:5} {hp.vocab_size:5} {hp.sequence_length:7}"
        print(model, f"{long:4} {rows:4}", *(f"{size / 1e6:9.0f}" for size in sizes), flush=True)


def _measure(kind: str, index: int, malloc: dict[str, str]) -> int:
    """Measure in a process of its own."""
    command = [sys.executable, "-m", "tests.memory", kind, str(index)]
    result = subprocess.run(
        command, env=os.environ | malloc, capture_output=True, text=True, check=True
    )
    return int(result.stdout)


if __name__ == "__main__":
    main()
