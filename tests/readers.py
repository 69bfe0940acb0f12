"""Readers in a loop, each a process that asks what notebooks and `slm query` ask, until standard input ends.

`python -m tests.readers HOME COUNT` prints what each of them met, a line of JSON a reader.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import select
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import duckdb  # noqa: F401  # here, so that it is loaded once for all readers
import pandas  # noqa: F401

import store


@dataclass
class Tally:
    """What a reader met."""

    early: int = 0
    """Reads before the first snapshot."""
    reads: int = 0
    """Reads that gave rows."""
    failures: list[str] = field(default_factory=list)
    """Reads that failed after the first snapshot, and numbers that became fewer."""
    metrics: int = 0
    """Numbers that the last read counted."""
    slowest: float = 0.0
    """Seconds that the slowest read took."""


def look(home: Path, tally: Tally) -> None:
    """All results, the curve of one run, and a query of one's own."""
    began = time.monotonic()
    try:
        results = store.results(home=home)
        for run in results["run_id"].sample(min(1, len(results))):
            store.curves(home=home, run=run)
        found = int(store.sql("SELECT count(*) AS n FROM metrics", home=home)["n"][0])
    except store.StoreError as error:
        if tally.reads or "no results yet" not in str(error):
            tally.failures.append(str(error))
        tally.early += 1
        time.sleep(0.05)
        return
    if found < tally.metrics:
        tally.failures.append(f"{found} numbers after {tally.metrics}")
    tally.metrics = found
    tally.slowest = max(tally.slowest, time.monotonic() - began)
    tally.reads += 1


def read(home: Path, ended: Callable[[], bool]) -> None:
    """Look again and again, and once more when the end is told; print the tally."""
    tally = Tally()
    while not ended():
        look(home, tally)
    look(home, tally)
    os.write(1, f"{json.dumps(asdict(tally))}\n".encode())


def main() -> None:
    """By hand, or from tests."""
    home, count, stdin = Path(sys.argv[1]), int(sys.argv[2]), os.dup(0)
    context = multiprocessing.get_context("fork")
    ended = lambda: bool(select.select([stdin], [], [], 0)[0])  # noqa: E731
    readers = [context.Process(target=read, args=(home, ended)) for _ in range(count)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()


if __name__ == "__main__":
    main()
