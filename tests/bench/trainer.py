"""Trainer: optimiser steps, each row in its own process, next to a matrix product and its peer.

NANOCHAT=FOLDER adds nanochat from a checkout at the same shapes; SLM_BENCH_SMALL=1 measures the
smallest shape for a few steps. README.md says what each column means.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from slm.hardware import devices
from slm.recipe import Hyperparameters, nanochat, pocket
from slm.sweep.supervisor import ALLOCATOR

SMALL = bool(os.environ.get("SLM_BENCH_SMALL"))
HEADERS = (
    "shape",
    "who",
    "tokens/s",
    "best tenth",
    "GFLOP/s",
    "ceiling GFLOP/s",
    "share %",
    "MFU %",
    "peak MB",
    "first step, ms",
)
PEER_CHANNELS = 24
"""Channels that the peer's smear gate reads: it cannot build narrower models."""
EAGER_WIDTH = 64
"""Width below which the peer also trains without compilation."""
WARM_SHAPES = ("16 a layer, d2", "64 a layer, d4, 512 SSSL", "nanochat d12")
"""Shapes at which the peer starts a second time, on the compile cache of the first."""

Row = tuple[str, str, float, float, float, float, float, float | str | None, float, float]


@dataclass(frozen=True)
class Shape:
    """A model, the tokens of a step, and the threads of the process."""

    hp: Hyperparameters
    threads: int


def shapes() -> dict[str, Shape]:
    """Return the shapes that are measured on this machine, by name."""
    if SMALL:
        return {"pocket d2": Shape(pocket(2), 1)}
    if devices.gpu_count():
        return {f"nanochat d{depth}": Shape(nanochat(depth), 1) for depth in (12, 20)}
    shapes = {f"pocket d{depth}": Shape(pocket(depth), 1) for depth in (2, 4, 6)}
    narrow = replace(pocket, aspect_ratio=16, head_dim=16)
    for depth in (2, 3):
        shapes[f"16 a layer, d{depth}"] = Shape(replace(narrow(depth), batch_tokens=4096), 1)
    for depth, context, windows in ((2, 256, "L"), (4, 256, "L"), (4, 512, "L"), (4, 512, "SSSL")):
        wide = replace(
            nanochat, head_dim=64, vocab_size=4096, sequence_length=context, window_pattern=windows
        )
        name = f"64 a layer, d{depth}, {context} {windows if 'S' in windows else 'full'}"
        shapes[name] = Shape(replace(wide(depth), batch_tokens=8192), 2)
    return shapes


def rows() -> Iterator[Row]:
    """Yield a row of HEADERS for each shape and process."""
    checkout = os.environ.get("NANOCHAT")
    if checkout and not Path(checkout, "nanochat", "gpt.py").is_file():
        sys.exit(
            f"NANOCHAT={checkout}: no nanochat/gpt.py in it; name the folder of a nanochat checkout"
        )
    for name, shape in shapes().items():
        yield measure(name, shape, "slm", ALLOCATOR)
        if checkout and shape.hp.width >= PEER_CHANNELS:
            yield from peer_rows(name, shape)


def peer_rows(name: str, shape: Shape) -> Iterator[Row]:
    """Yield nanochat compiled on a cold cache, some on the warm one too, and small models eager."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {"TORCHINDUCTOR_CACHE_DIR": cache}
        yield measure(name, shape, "nanochat", environment)
        if name in WARM_SHAPES:
            yield measure(name, shape, "nanochat, warm cache", environment)
    if shape.hp.width < EAGER_WIDTH:
        yield measure(name, shape, "nanochat, eager", {"TORCHDYNAMO_DISABLE": "1"})


def measure(name: str, shape: Shape, trainer: str, environment: dict[str, str]) -> Row:
    """Measure a row in a process that does nothing else."""
    print(f"{name}: {trainer}", file=sys.stderr, flush=True)
    process = subprocess.run(
        [sys.executable, "-m", "tests.bench.step", name, trainer.partition(",")[0]],
        env={**os.environ, "OMP_NUM_THREADS": str(shape.threads), **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result = json.loads(process.stdout.splitlines()[-1])
    tokens_per_second = shape.hp.batch_tokens / result["median"]
    flops_per_second = tokens_per_second * shape.hp.flops_per_token
    return (
        name,
        trainer,
        tokens_per_second,
        shape.hp.batch_tokens / result["best_tenth"],
        flops_per_second / 1e9,
        result["ceiling"] / 1e9,
        100 * flops_per_second / result["ceiling"],
        _mfu_percent(flops_per_second),
        result["peak"] / 1e6,
        1e3 * result["first_step"],
    )


def _mfu_percent(flops_per_second: float) -> float | str | None:
    """Return MFU in percent, "unknown" without a peak for the GPU, None on a CPU."""
    if not devices.gpu_count():
        return None
    mfu = devices.mfu(flops_per_second, devices.name("cuda"), 1)
    return "unknown" if mfu is None else 100 * mfu
