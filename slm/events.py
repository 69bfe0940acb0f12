"""An attempt's events.jsonl: one table of fields, an append-only writer, a reader that ignores a torn last line."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

FIELDS: dict[str, tuple[str, ...]] = {
    "started": ("step", "resumed_from", "device", "ranks", "threads", "micro_batch"),
    "train": ("step", "tokens", "flops", "loss", "lr", "tokens_per_second", "train_seconds"),
    "eval": ("step", "tokens", "flops", "val_bpb", "val_loss", "rows", "seconds"),
    "checkpoint": ("step", "file", "bytes", "seconds"),
    "finished": ("step", "tokens", "flops", "val_bpb", "train_seconds", "wall_seconds"),
    "failed": ("reason", "message"),
}
"""Fields of each event, beside `event` and `time` (unix seconds): tokens and flops are totals since step 0, loss in
nats a token, lr the schedule's multiplier, train_seconds the time in steps since step 0 over all attempts."""

REASONS = ("oom", "error", "timeout", "node", "data", "interrupted", "diverged", "cancelled")
"""Why an attempt ended without finishing. `diverged` is a result; `interrupted` will go on."""

DURABLE = ("eval", "checkpoint", "finished", "failed")


class Writer:
    """Appends events to a file that only this writer writes."""

    def __init__(self, path: Path) -> None:
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, event: str, **fields: Any) -> None:
        """Append one event as one line; what a reader must not lose is on disk when this returns."""
        assert set(fields) == set(FIELDS[event]), (event, sorted(fields))
        self._file.write(json.dumps({"event": event, "time": time.time(), **fields}) + "\n")
        self._file.flush()
        if event in DURABLE:
            os.fsync(self._file.fileno())


class Reader:
    """Yields the events of a growing file, each once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def new(self) -> Iterator[dict[str, Any]]:
        """Events whose lines have been completed since the last call."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                yield json.loads(line)


def write_json(path: Path, document: Any) -> None:
    """Write a document whole or not at all: temporary name, fsync, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """The document in a file. Raises ValueError naming the file when it holds none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
