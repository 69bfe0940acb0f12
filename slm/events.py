"""Events of an attempt, events.jsonl: a table of fields, an append-only writer, a reader that
ignores a torn last line.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

FIELDS: dict[str, tuple[str, ...]] = {
    "started": (
        "step",
        "resumed_from",
        "device",
        "ranks",
        "threads",
        "micro_batch",
        "attention",
        "compiled",
    ),
    "train": (
        "step",
        "tokens",
        "flops",
        "loss",
        "lr",
        "gradient_norm",
        "update_size",
        "tokens_per_second",
        "train_seconds",
        "memory_bytes",
    ),
    "eval": ("step", "tokens", "flops", "val_bpb", "val_loss", "rows", "seconds"),
    "core": (
        "step",
        "tokens",
        "flops",
        "metric",
        "mode",
        "core",
        "core_error",
        "bits_per_byte",
        "seconds",
    ),
    "checkpoint": ("step", "file", "bytes", "seconds"),
    "working": ("step", "what", "share"),
    "warning": ("step", "message"),
    "finished": ("step", "tokens", "flops", "val_bpb", "train_seconds", "wall_seconds"),
    "failed": ("reason", "message"),
}
"""Fields of each event, in addition to `event` and `time` (unix seconds).

tokens and flops are totals since step 0, loss is in nats a token, lr is the schedule's multiplier,
gradient_norm is that of the mean loss over all parameters, update_size is the matrices' change as a
share of their size, train_seconds is the time in steps since step 0 over all attempts, memory_bytes
is the peak of this attempt so far. `core` is the mean over the requested tasks (`mode`) of the
bundle `metric`, null where one could not be evaluated. `working` announces work that takes longer
than a step, one of WORKS, with the share done where it is known. After a `warning` training
continues; its message gives the problem and the way out."""

WORKS = ("compilation", "checkpoint", "evaluation", "core")
"""Kinds of work that take longer than a step; evaluations repeat their event now and then."""

REASONS = ("oom", "error", "timeout", "node", "data", "interrupted", "diverged", "cancelled")
"""Reasons for which an attempt ends before its run is finished. `diverged` is a result; an
`interrupted` run will be resumed."""

DURABLE = ("eval", "core", "checkpoint", "warning", "finished", "failed")
"""Events that are synced to disk before `write` returns."""


class Writer:
    """Appends events to a file that only this writer writes."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, event: str, **fields: Any) -> None:
        """Append one event as one line, whole or not at all.

        Raises OSError with the file's path when it cannot be written.
        """
        assert set(fields) == set(FIELDS[event]), (event, sorted(fields))
        line = json.dumps({"event": event, "time": time.time(), **fields}).encode() + b"\n"
        with self._path.open("ab", buffering=0) as file:
            end = file.tell()
            try:
                while line:
                    line = line[file.write(line) :]
                if event in DURABLE:
                    os.fsync(file.fileno())
            except OSError as error:
                file.truncate(end)
                raise OSError(error.errno, error.strerror, str(self._path)) from None


class Reader:
    """Reads the events of a growing file, each once; damaged lines are left out, and reported by
    the store's ingest.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def new(self) -> Iterator[dict[str, Any]]:
        """Yield the events whose lines were completed since the last call."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                with suppress(ValueError):
                    yield json.loads(line)
