"""Recognise an error for exhausted memory, and tell the user what follows it."""

from __future__ import annotations

import re

from slm.hardware.slot import MicroBatch

OUT_OF_MEMORY = re.compile(
    r"OutOfMemoryError|out of memory|(can't|[Cc]annot) allocate memory|MemoryError|bad_alloc"
    r"|_ALLOC_FAILED"
)
"""Errors of torch, Python, C++, the C library and cuBLAS for exhausted memory."""


def after_out_of_memory(smaller: MicroBatch | None) -> str:
    """Return what the user is told after a run ran out of memory: the next micro-batch, if any."""
    if smaller is None:
        return "one row is the smallest micro-batch: use more memory per run, or a smaller depth"
    return (
        f"retrying with micro-batches of {smaller.training} rows and, in evaluation, "
        f"{smaller.evaluation_tokens} tokens"
    )
