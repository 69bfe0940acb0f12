"""Peak memory of one training step and an evaluation, measured twice: what torch's allocator hands out, to the byte,
and what the process takes. `python -m tests.memory` sets both beside the estimate (about ten minutes on two cores).
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

from slm.hardware.memory import EVALUATION_TOKENS, peak_memory
from slm.model.gpt import GPT
from slm.recipe import Hyperparameters, nanochat
from slm.sweep.supervisor import ALLOCATOR
from slm.train.optimizer import Optimizer

GIVING = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
"""glibc returns at once what torch does: a process is then its tensors."""


def shape(depth: int, width: int, vocab: int, length: int, pattern: str) -> Hyperparameters:
    """A nanochat of any width, a multiple of 64."""
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
"""Models and rows a pass whose peaks lie above 500 MB, in the backward pass, the head or the evaluation."""


def step(given: Hyperparameters, rows: int) -> None:
    """Build model and optimiser, make a step of one pass, and evaluate once."""
    draw = torch.Generator().manual_seed(1)
    model = GPT(given)
    model.initialise(1)
    optimizer = Optimizer(model)
    optimizer.zero_grad()

    def pair(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.randint(given.vocab_size, (rows, given.sequence_length + 1), generator=draw)
        return ids[:, :-1], ids[:, 1:]

    (model.loss(*pair(rows)) / given.batch_tokens).backward()
    optimizer.step(1, measured=True)
    with torch.no_grad():
        model.losses(*pair(max(1, EVALUATION_TOKENS // given.sequence_length)))


@contextmanager
def allocations() -> Iterator[list[int]]:
    """Bytes held from torch's CPU allocator after each of its gifts and returns within the block, in order."""
    held: list[int] = []
    with profile(profile_memory=True) as found:
        yield held
    given = [own for own in found.kineto_results.events() if own.name() == "[memory]"]
    held.extend(accumulate(own.nbytes() for own in sorted(given, key=lambda own: own.start_ns())))


def tensor_peak(given: Hyperparameters, rows: int) -> int:
    """Bytes of tensors held at once, at most, by a step and an evaluation."""
    with allocations() as held:
        step(given, rows)
    return max(held)


def process_peak(given: Hyperparameters, rows: int) -> int:
    """Bytes of a process's memory over what it held before the model was built."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    step(given, rows)
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - pages * resource.getpagesize()
    )


def main() -> None:
    """The table, one process for each number; or one number, asked for by kind and place."""
    if len(sys.argv) == 3:
        measure = {"tensors": tensor_peak, "process": process_peak}[sys.argv[1]]
        print(measure(*SHAPES[int(sys.argv[2])]))
        return
    print(
        "depth width vocab context long rows  estimate   tensors    giving   keeping (MB; giving, keeping: process)"
    )
    for place, (given, rows) in enumerate(SHAPES):
        long = given.windows.count(given.sequence_length)
        sizes = [peak_memory(given, rows, "cpu"), _alone("tensors", place, {})]
        sizes += [_alone("process", place, malloc) for malloc in (GIVING, ALLOCATOR)]
        model = f"{given.depth:5} {given.width:5} {given.vocab_size:5} {given.sequence_length:7} {long:4} {rows:4}"
        print(model, *(f"{size / 1e6:9.0f}" for size in sizes), flush=True)


def _alone(kind: str, place: int, malloc: dict[str, str]) -> int:
    command = [sys.executable, "-m", "tests.memory", kind, str(place)]
    result = subprocess.run(
        command, env=os.environ | malloc, capture_output=True, text=True, check=True
    )
    return int(result.stdout)


if __name__ == "__main__":
    main()
