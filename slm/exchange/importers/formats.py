"""Read tables of known programs: nanochat, Weights & Biases, autoresearch, CORE by task."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from typing import Any

from slm.exchange.importers.numbers import number
from slm.exchange.importers.readers import Table, choose_columns, parse_rows, plain, read_table
from slm.exchange.importers.types import Defect, ParsedSource, Row, Source

NANOCHAT = {
    "depth": "depth",
    "params_wte": "parameters_wte",
    "params_value_embeds": "parameters_value_embeds",
    "params_lm_head": "parameters_lm_head",
    "params_transformer": "parameters_matrices",
    "params_scalars": "parameters_scalars",
    "params_total": "parameters_total",
    "num_params": "parameters_total",
    "num_scaling_params": "parameters_scaling",
    "num_iterations": "steps",
    "tokens_trained": "tokens",
    "val_bpb": "val_bpb",
    "core_score": "core",
    "train_time": "wall_seconds",
}
"""Columns of scaling_laws.sh and miniseries.sh. Their train_time spans the whole job."""
WANDB = {
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
AUTORESEARCH = {
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
"""Columns of results.tsv and of the searches' .jsonl.

memory_gb is bytes / 2^30, peak_vram_mb bytes / 2^20.
"""
CORE_TASKS = 22
MAX_NESTING = 5


def is_nanochat(text: str) -> bool:
    """Whether a text is nanochat's results.csv, by its header."""
    header = {name.strip() for name in text.partition("\n")[0].split(",")}
    return {"depth", "num_iterations", "tokens_trained", "val_bpb"} <= header


def read_nanochat(source: Source, mapping: Mapping[str, str]) -> ParsedSource:
    """Read nanochat's results.csv.

    A budget is spent to the nearest step, so `flops` is computed and compared with the budget.
    """
    table = read_table(source.text)
    parsed = parse_rows(table, choose_columns(table.header, NANOCHAT, mapping))
    for row in parsed.rows:
        budget = number(row.original.get("flops_budget", ""))
        if budget:
            row.values["horizon"] = f"flops={budget.value:g}"
    return parsed


def is_wandb(text: str) -> bool:
    """Whether a text is an export of Weights & Biases: Name and State first, Runtime or Created."""
    header = next(csv.reader((text.splitlines() or [""])[:1]), [])
    return header[:2] == ["Name", "State"] and bool({"Runtime", "Created"} & set(header))


def read_wandb(source: Source, mapping: Mapping[str, str]) -> ParsedSource:
    """Read a table of runs exported from Weights & Biases."""
    table = read_table(source.text)
    parsed = parse_rows(table, choose_columns(table.header, WANDB, mapping))
    for row in parsed.rows:
        parsed.defects.extend(_wandb_defects(row))
    return parsed


def _wandb_defects(row: Row) -> list[Defect]:
    defects = []
    # Runtime covers only the last start of a resumed run.
    resumed = _setting(row, "resume_from_step")
    if resumed is not None:
        row.values.pop("wall_seconds", None)
        message = f"resumed at step {resumed:,.0f}: Runtime covers only the rest"
        defects.append(Defect("resumed", message, row.number, "Runtime"))
    limit = _setting(row, "core_metric_max_per_task")
    if limit is not None and row.get("core") is not None:
        message = f"CORE of at most {limit:,.0f} examples per task"
        defects.append(Defect("core-subset", message, row.number, "core_metric"))
    planned = _setting(row, "num_iterations")
    steps = row.get("steps")
    if planned is not None and steps is not None and steps < planned:
        row.values["status"] = "interrupted"
        message = f"step {steps:,} of {planned:,.0f}"
        defects.append(Defect("unfinished", message, row.number, "step"))
    return defects


def _setting(row: Row, column: str) -> float | None:
    """Return a setting, None where -1 or 0 switches it off."""
    parsed = number(str(row.original.get(column, "")))
    return parsed.value if parsed and parsed.value > 0 else None


def is_autoresearch(text: str) -> bool:
    """Whether a text is autoresearch's results.tsv, or the .jsonl of a search."""
    first_line = text.partition("\n")[0]
    names = {name.strip() for name in first_line.split("\t")}
    if {"commit", "status", "description"} <= names:
        return True
    return first_line.startswith("{") and '"results"' in first_line


def read_autoresearch(source: Source, mapping: Mapping[str, str]) -> ParsedSource:
    """Read autoresearch's results. Runs have equal minutes; tokens and FLOPs are not recorded."""
    is_jsonl = source.text.startswith("{")
    table = _flatten_jsonl(source.text) if is_jsonl else read_table(source.text)
    parsed = parse_rows(table, choose_columns(table.header, AUTORESEARCH, mapping))
    for row in parsed.rows:
        commit = row.get("commit")
        if commit and not (len(commit) >= 7 and set(commit) <= set("0123456789abcdef")):
            row.values.setdefault("label", row.values.pop("commit"))
    return parsed


def _flatten_jsonl(text: str) -> Table:
    """Return lines of JSON as a table; {"params": {"depth": 4}} is column params.depth.

    Raises ValueError naming the line.
    """
    lines = []
    for position, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
        except ValueError:
            raise ValueError(f"line {position} is not JSON") from None
        if not isinstance(document, dict):
            raise ValueError(f"line {position} is not a JSON object")
        lines.append((position, dict(_leaves(document))))
    header = tuple(dict.fromkeys(name for _, cells in lines for name in cells))
    rows = [(line, {name: cells.get(name, "") for name in header}) for line, cells in lines]
    return Table(header, tuple(rows))


def _leaves(document: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    leaves = []
    for key, value in document.items():
        if isinstance(value, dict) and prefix.count(".") < MAX_NESTING:
            leaves += _leaves(value, f"{prefix}{key}.")
        else:
            leaves.append((f"{prefix}{key}", "" if value is None else str(value)))
    return leaves


def is_core_by_task(text: str) -> bool:
    """Whether a text is CORE by task, by its header."""
    header = {plain(name) for name in text.partition("\n")[0].split(",")}
    return {"task", "accuracy"} <= header and bool(header & {"centered", "centred"})


def read_core_by_task(source: Source, mapping: Mapping[str, str]) -> ParsedSource:
    """Read CORE of one model by task, as nanochat's base_eval writes it: one row with its tasks.

    Raises ValueError for a mapping, and where no line has the CORE.
    """
    if mapping:
        raise ValueError("--map names columns of runs; this file is one run by task")
    table = read_table(source.text)
    names = {plain(name): name for name in table.header}
    centred = names.get("centered") or names.get("centred") or ""
    if centred not in table.header or not {"task", "accuracy"} <= set(names):
        raise ValueError("CORE by task needs the columns task, accuracy and centered")
    cells = {row[names["task"]].strip(): row for _, row in table.lines}
    total = cells.pop("CORE", None)
    core = number(total[centred]) if total else None
    if total is None or core is None:
        raise ValueError("CORE by task has no line CORE: the file is truncated")
    tasks = {
        task: {"accuracy": _float(row[names["accuracy"]]), "centred": _float(row[centred])}
        for task, row in cells.items()
    }
    original: dict[str, Any] = {
        name: total[names[name]] for name in ("checkpoint", "step") if name in names
    }
    values: dict[str, Any] = {"label": source.name.rpartition(".")[0], "core": core.value}
    step = number(original.get("step", ""))
    if step:
        values["steps"] = step.value
    row = Row(1, values, {**original, "tasks": tasks})
    return ParsedSource([row], _core_defects(core.value, tasks))


def _float(text: str) -> float | None:
    parsed = number(text)
    return float(parsed.value) if parsed else None


def _core_defects(core: float, tasks: Mapping[str, Mapping[str, float | None]]) -> list[Defect]:
    scores = [task["centred"] for task in tasks.values() if task["centred"] is not None]
    if len(scores) != CORE_TASKS:
        return [Defect("core-subset", f"CORE of {len(scores)} tasks instead of {CORE_TASKS}", 1)]
    mean = sum(scores) / len(scores)
    if abs(mean - core) > 2e-6:
        return [
            Defect("core-disagree", f"CORE {core}, but its tasks' mean is {mean:.6f}", 1, "CORE")
        ]
    return []
