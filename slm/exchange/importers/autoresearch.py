"""autoresearch: results.tsv (commit, val_bpb, memory_gb, status, description), and the .jsonl of its searches."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from slm.exchange.importers.readers import Sheet, chosen, sheet, typed
from slm.exchange.importers.types import Found, Source

COLUMNS = {
    "commit": "commit",
    "val_bpb": "val_bpb",
    "val_loss": "val_loss",
    "memory": f"peak_memory_bytes:{2**30 / 1e9}",
    "status": "status",
    "description": "label",
    "steps": "steps",
    "params_depth": "depth",
    "params_total_batch_size": "batch_tokens",
    "results_val_bpb": "val_bpb",
    "results_peak_vram": f"peak_memory_bytes:{2**20 / 1e6}",
    "results_training_time": "train_seconds",
    "results_wall_time": "wall_seconds",
    "results_num_params": "parameters_total",
    "results_status": "status",
}
"""Its memory_gb are bytes over 2^30, and its peak_vram_mb over 2^20."""


def recognises(text: str) -> bool:
    """Whether this is one of its tables, by the header, or one of its searches, by the first line."""
    first = text.partition("\n")[0]
    names = {name.strip() for name in first.split("\t")}
    return {"commit", "status", "description"} <= names or (
        first.startswith("{") and '"results"' in first
    )


def read(source: Source, mapping: Mapping[str, str]) -> Found:
    """The rows. Every run had the same minutes, whatever it did with them; tokens and FLOPs are not told."""
    table = _flat(source.text) if source.text.startswith("{") else sheet(source.text)
    found = typed(table, chosen(table.header, COLUMNS, mapping))
    for row in found.rows:
        commit = row.get("commit")
        if commit and not (len(commit) >= 7 and set(commit) <= set("0123456789abcdef")):
            row.values.setdefault("label", row.values.pop("commit"))
    return found


def _flat(text: str) -> Sheet:
    """Lines of JSON as a table, {"params": {"depth": 4}} as a column params.depth. Raises ValueError naming a line."""
    lines = []
    for position, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                document = json.loads(line)
            except ValueError:
                raise ValueError(f"line {position} is not JSON") from None
            if not isinstance(document, dict):
                raise ValueError(f"line {position} is no object")
            lines.append((position, dict(_leaves(document))))
    header = tuple(dict.fromkeys(name for _, cells in lines for name in cells))
    return Sheet(
        header,
        tuple((line, {name: cells.get(name, "") for name in header}) for line, cells in lines),
    )


def _leaves(document: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found = []
    for key, value in document.items():
        if isinstance(value, dict) and prefix.count(".") < 5:
            found += _leaves(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", "" if value is None else str(value)))
    return found
