"""CORE of one model by task, as nanochat's base_eval writes it: one row, its tasks kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slm.exchange.importers.numbers import number
from slm.exchange.importers.readers import plain, sheet
from slm.exchange.importers.types import Defect, Found, Row, Source

TASKS = 22


def recognises(text: str) -> bool:
    """Whether this is such a file, by its header and its last line."""
    header = {plain(name) for name in text.partition("\n")[0].split(",")}
    return {"task", "accuracy"} <= header and bool(header & {"centered", "centred"})


def read(source: Source, mapping: Mapping[str, str]) -> Found:
    """The row. Raises ValueError for a mapping, and where no line holds the CORE."""
    if mapping:
        raise ValueError("--map names columns of runs, and this is one run by tasks")
    table = sheet(source.text)
    names = {plain(name): name for name in table.header}
    centred = names.get("centered") or names.get("centred") or ""
    if centred not in table.header or not {"task", "accuracy"} <= set(names):
        raise ValueError("CORE by task needs the columns task, accuracy and centered")
    cells = {row[names["task"]].strip(): row for _, row in table.lines}
    total = cells.pop("CORE", None)
    core = number(total[centred]) if total else None
    if core is None:
        raise ValueError("CORE by task without a line CORE: the file was cut short")
    tasks = {
        task: {"accuracy": _value(row[names["accuracy"]]), "centred": _value(row[centred])}
        for task, row in cells.items()
    }
    original: dict[str, Any] = {
        name: total[names[name]] for name in ("checkpoint", "step") if total and name in names
    }
    step = number(original.get("step", ""))
    values = {
        "label": source.name.rpartition(".")[0],
        "core": core.value,
        "steps": step.value if step else None,
    }
    row = Row(
        1,
        {name: value for name, value in values.items() if value is not None},
        {**original, "tasks": tasks},
    )
    return Found([row], _wrong(core.value, tasks))


def _value(text: str) -> float | None:
    found = number(text)
    return float(found.value) if found else None


def _wrong(core: float, tasks: Mapping[str, Mapping[str, float | None]]) -> list[Defect]:
    scores = [task["centred"] for task in tasks.values() if task["centred"] is not None]
    mean = sum(scores) / len(scores) if scores else 0.0
    if len(scores) != TASKS:
        return [Defect("core-subset", f"CORE of {len(scores)} tasks instead of {TASKS}", 1)]
    if abs(mean - core) > 2e-6:
        return [
            Defect("core-disagree", f"CORE {core}, but its tasks' mean is {mean:.6f}", 1, "CORE")
        ]
    return []
