"""A table of runs exported from Weights & Biases: settings and last values, 70 columns and more."""

from __future__ import annotations

import csv
from collections.abc import Mapping

from slm.exchange.importers.numbers import number
from slm.exchange.importers.readers import chosen, sheet, typed
from slm.exchange.importers.types import Defect, Found, Row, Source

COLUMNS = {
    "name": "label",
    "state": "status",
    "depth": "depth",
    "seed": "seed",
    "max_seq_len": "sequence_length",
    "total_batch_size": "batch_tokens",
    "step": "steps",
    "total_training_flops": "flops",
    "total_training_time": "train_seconds",
    "runtime": "wall_seconds",
    "train_loss": "train_loss",
    "train_tok_per_sec": "tokens_per_second",
    "val_bpb": "val_bpb",
    "val_loss": "val_loss",
    "core_metric": "core",
}


def recognises(text: str) -> bool:
    """Whether this is such an export: it begins with Name and State, and knows Runtime or Created."""
    header = next(csv.reader((text.splitlines() or [""])[:1]), [])
    return header[:2] == ["Name", "State"] and bool({"Runtime", "Created"} & set(header))


def read(source: Source, mapping: Mapping[str, str]) -> Found:
    """The rows; its clock covers a run's last start alone, and its CORE may be of few examples a task."""
    table = sheet(source.text)
    found = typed(table, chosen(table.header, COLUMNS, mapping))
    for row in found.rows:
        found.defects.extend([*_resumed(row), *_subset(row), *_unfinished(row)])
    return found


def _told(row: Row, column: str) -> float | None:
    """A setting that is not switched off by -1 or 0."""
    found = number(str(row.original.get(column, "")))
    return found.value if found and found.value > 0 else None


def _resumed(row: Row) -> list[Defect]:
    start = _told(row, "resume_from_step")
    if start is None:
        return []
    row.values.pop("wall_seconds", None)
    return [
        Defect(
            "resumed",
            f"resumed at step {start:,.0f}: Runtime is of the rest",
            row.number,
            "Runtime",
        )
    ]


def _subset(row: Row) -> list[Defect]:
    most = _told(row, "core_metric_max_per_task")
    if most is None or row.get("core") is None:
        return []
    return [
        Defect(
            "core-subset", f"CORE of at most {most:,.0f} examples a task", row.number, "core_metric"
        )
    ]


def _unfinished(row: Row) -> list[Defect]:
    asked, done = _told(row, "num_iterations"), row.get("steps")
    if asked is None or done is None or done >= asked:
        return []
    row.values["status"] = "interrupted"
    return [Defect("unfinished", f"step {done:,} of {asked:,.0f}", row.number, "step")]
