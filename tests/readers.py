"""Readers in a loop: processes that run the queries of notebooks and `slm query`.

`python -m tests.readers HOME COUNT` runs until standard input ends, and prints one tally per reader
as a line of JSON.
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

import duckdb  # noqa: F401  # loaded once, before the readers are forked
import pandas  # noqa: F401

import store


@dataclass
class Tally:
    """Reads and failures of one reader."""

    early: int = 0
    """Reads before the first snapshot."""
    reads: int = 0
    """Reads that gave rows."""
    failures: list[str] = field(default_factory=list)
    """Reads that failed after the first snapshot, or saw fewer numbers than before."""
    metrics: int = 0
    """Numbers counted by the last read."""
    slowest: float = 0.0
    """Seconds of the slowest read."""


def look(home: Path, tally: Tally) -> None:
    """Read all results, the curve of one run, and a count of all metrics."""
    began = time.monotonic()
    try:
        results = store.results(home=home)
        for run in results["run_id"].sample(min(1, len(results))):
            store.curves(home=home, run=run)
        metrics = int(store.sql("SELECT count(*) AS n FROM metrics", home=home)["n"][0])
    except store.StoreError as error:
        if tally.reads or "no results yet" not in str(error):
            tally.failures.append(str(error))
        tally.early += 1
        time.sleep(0.05)
        return
    if metrics < tally.metrics:
        tally.failures.append(f"{metrics} numbers after {tally.metrics}")
    tally.metrics = metrics
    tally.slowest = max(tally.slowest, time.monotonic() - began)
    tally.reads += 1


def read(home: Path, ended: Callable[[], bool]) -> None:
    """Read until the end is signalled, and once more after it; print the tally."""
    tally = Tally()
    while not ended():
        look(home, tally)
    look(home, tally)
    os.write(1, f"{json.dumps(asdict(tally))}\n".encode())


def main() -> None:
    """Start the readers and wait for them."""
    home = Path(sys.argv[1])
    count = int(sys.argv[2])
    stdin = os.dup(0)
    context = multiprocessing.get_context("fork")
    ended = lambda: bool(select.select([stdin], [], [], 0)[0])  # noqa: E731
    readers = [context.Process(target=read, args=(home, ended)) for _ in range(count)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()


if __name__ == "__main__":
    main()
