"""Trainer: whole optimiser steps, each row a process of its own, beside its matrix product ceiling and its peer.

NANOCHAT=FOLDER sets a nanochat checkout beside ours at the same shapes. README.md says what each column means.
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
"""The peer's smear gate reads so many channels: narrower models it cannot build."""
SMALL = 64
"""Models narrower than this the peer also trains uncompiled."""
TWICE = ("16 a layer, d2", "64 a layer, d4, 512 SSSL", "nanochat d12")
"""Shapes at which the peer starts a second time, on the compile cache of the first."""

Row = tuple[str, str, float, float, float, float, float, float | str | None, float, float]


@dataclass(frozen=True)
class Shape:
    """A model and what it trains on."""

    given: Hyperparameters
    """The model, and the tokens of a step."""
    threads: int
    """Threads of the process."""


def shapes() -> dict[str, Shape]:
    """What is measured here, by name."""
    if devices.gpu_count():
        return {f"nanochat d{depth}": Shape(nanochat(depth), 1) for depth in (12, 20)}
    found = {f"pocket d{depth}": Shape(pocket(depth), 1) for depth in (2, 4, 6)}
    narrow = replace(pocket, aspect_ratio=16, head_dim=16)
    for depth in (2, 3):
        found[f"16 a layer, d{depth}"] = Shape(replace(narrow(depth), batch_tokens=4096), 1)
    for depth, context, windows in ((2, 256, "L"), (4, 256, "L"), (4, 512, "L"), (4, 512, "SSSL")):
        wide = replace(
            nanochat, head_dim=64, vocab_size=4096, sequence_length=context, window_pattern=windows
        )
        name = f"64 a layer, d{depth}, {context} {windows if 'S' in windows else 'full'}"
        found[name] = Shape(replace(wide(depth), batch_tokens=8192), 2)
    return found


def rows() -> Iterator[Row]:
    """One row of HEADERS a shape and process."""
    checkout = os.environ.get("NANOCHAT")
    if checkout and not Path(checkout, "nanochat", "gpt.py").is_file():
        sys.exit(
            f"NANOCHAT={checkout}: no nanochat/gpt.py in it; name the folder of a nanochat checkout"
        )
    for name, shape in shapes().items():
        yield row(name, shape, "slm", ALLOCATOR)
        if checkout and shape.given.width >= PEER_CHANNELS:
            yield from peer_rows(name, shape)


def peer_rows(name: str, shape: Shape) -> Iterator[Row]:
    """Compiled on a cold cache, some on the warm one too, and the small models eager."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {"TORCHINDUCTOR_CACHE_DIR": cache}
        yield row(name, shape, "nanochat", environment)
        if name in TWICE:
            yield row(name, shape, "nanochat, warm cache", environment)
    if shape.given.width < SMALL:
        yield row(name, shape, "nanochat, eager", {"TORCHDYNAMO_DISABLE": "1"})


def row(name: str, shape: Shape, who: str, environment: dict[str, str]) -> Row:
    """Measured in a process that does nothing else."""
    print(f"{name}: {who}", file=sys.stderr, flush=True)
    result = subprocess.run(
        [sys.executable, "-m", "tests.bench.step", name, who.partition(",")[0]],
        env={**os.environ, "OMP_NUM_THREADS": str(shape.threads), **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = json.loads(result.stdout.splitlines()[-1])
    median, best = (shape.given.batch_tokens / found[key] for key in ("median", "best_tenth"))
    rate, top = median * shape.given.flops_per_token / 1e9, found["ceiling"] / 1e9
    mfu = _mfu(1e9 * rate) if devices.gpu_count() else None
    return (
        name,
        who,
        median,
        best,
        rate,
        top,
        100 * rate / top,
        mfu,
        found["peak"] / 1e6,
        1e3 * found["first_step"],
    )


def _mfu(flops: float) -> float | str:
    """Percent of the GPU's dense bfloat16 peak."""
    peak = devices.peak_flops(devices.name("cuda"))
    return 100 * flops / peak if peak else "unknown"
