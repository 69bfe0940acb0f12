"""One simulation on every core, with its progress on standard error."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


def spread(
    work: Callable[[Task], Result], tasks: Sequence[Task], label: str, at_once: int = 8
) -> list[Result]:
    """`work` of every task, in their order; `work` is a function of a module."""
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    found, began = [], time.monotonic()
    with multiprocessing.get_context("spawn").Pool() as pool:
        for done, result in enumerate(pool.imap(work, tasks, chunksize=at_once), 1):
            found.append(result)
            left = (time.monotonic() - began) / done * (len(tasks) - done)
            if done % (20 if at_once > 1 else 1) == 0 or done == len(tasks):
                print(
                    f"\r{label}: {done} of {len(tasks)}, {left / 60:.1f} min left ",
                    end="",
                    file=sys.stderr,
                )
    print(file=sys.stderr)
    return found
