"""Parallel map over simulations, with progress on standard error."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


def parallel_map(
    work: Callable[[Task], Result], tasks: Sequence[Task], label: str, chunk: int = 8
) -> list[Result]:
    """Return `work` of every task, in their order, from one process per core.

    `work` must be a function of a module, and workers get `chunk` tasks at a time.
    """
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    results = []
    start = time.monotonic()
    with multiprocessing.get_context("spawn").Pool() as pool:
        for done, result in enumerate(pool.imap(work, tasks, chunksize=chunk), 1):
            results.append(result)
            seconds_left = (time.monotonic() - start) / done * (len(tasks) - done)
            if done % (20 if chunk > 1 else 1) == 0 or done == len(tasks):
                progress = f"{label}: {done} of {len(tasks)}, {seconds_left / 60:.1f} min left"
                print(f"\r{progress} ", end="", file=sys.stderr)
    print(file=sys.stderr)
    return results
