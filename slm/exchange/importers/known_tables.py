"""Read tables of known programs: nanochat, Weights & Biases, autoresearch, CORE by task."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator

from slm.exchange.importers.base_train_log import core_defects
from slm.exchange.importers.numbers import value_of
from slm.exchange.importers.readers import Table, by_spelling, parse_rows, plain, read_table
from slm.exchange.importers.types import Defect, Names, ParsedSource, Row, Source, Values

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
AUTORESEARCH = by_spelling(
    {
        "commit": "commit",
        "label": "description",
        "status": "status results_status",
        "val_bpb": "val_bpb results_val_bpb",
        "val_loss": "val_loss",
        "steps": "steps",
        "depth": "params_depth",
        "batch_tokens": "params_total_batch_size",
        "parameters_total": "results_num_params",
        "train_seconds": "results_training_time",
        "wall_seconds": "results_wall_time",
        f"peak_memory_bytes:{2**30 / 1e9}": "memory",
        f"peak_memory_bytes:{2**20 / 1e6}": "results_peak_vram",
    }
)
"""Columns of results.tsv and of the searches' .jsonl.

memory_gb is bytes / 2^30, peak_vram_mb bytes / 2^20.
"""
CORE_TASKS = 22
CORE_TOLERANCE = 2e-6
"""CORE and its tasks are printed with six digits."""
SCORES = {"accuracy": "accuracy", "centred": "centered"}
"""Scores of a task, and their headers in CORE by task."""
MAX_NESTING = 5


def _header(text: str, delimiter: str) -> set[str]:
    first_line = text.partition("\n")[0]
    return {name.strip() for name in first_line.split(delimiter)}


def is_nanochat(text: str) -> bool:
    """Whether a text is nanochat's results.csv, by its header."""
    return {"depth", "num_iterations", "tokens_trained", "val_bpb"} <= _header(text, ",")


def read_nanochat(source: Source, mapping: Names) -> ParsedSource:
    """Read nanochat's results.csv.

    A budget is spent to the nearest step, so `flops` is computed and compared with the budget.
    """
    parsed = parse_rows(read_table(source.text), NANOCHAT, mapping)
    for row in parsed.rows:
        budget = value_of(row.original.get("flops_budget"))
        if budget:
            row.values["horizon"] = f"flops={budget:g}"
    return parsed


def is_wandb(text: str) -> bool:
    """Whether a text is an export of Weights & Biases: Name and State first, Runtime or Created."""
    header = next(csv.reader(text.splitlines()[:1]), [])
    return header[:2] == ["Name", "State"] and not {"Runtime", "Created"}.isdisjoint(header)


def read_wandb(source: Source, mapping: Names) -> ParsedSource:
    """Read a table of runs exported from Weights & Biases."""
    parsed = parse_rows(read_table(source.text), WANDB, mapping)
    for row in parsed.rows:
        parsed.defects.extend(_wandb_defects(row))
    return parsed


def _wandb_defects(row: Row) -> Iterator[Defect]:
    # Runtime covers only the last start of a resumed run.
    resumed = _setting(row, "resume_from_step")
    if resumed:
        row.values.pop("wall_seconds", None)
        message = f"resumed at step {resumed:,.0f}: Runtime covers only the rest"
        yield Defect("resumed", message, row.number, "Runtime")
    limit = _setting(row, "core_metric_max_per_task")
    if limit and "core" in row.values:
        message = f"CORE of at most {limit:,.0f} examples per task"
        yield Defect("core-subset", message, row.number, "core_metric")
    planned = _setting(row, "num_iterations")
    steps = row.values.get("steps", planned)
    if steps < planned:
        row.values["status"] = "interrupted"
        yield Defect("unfinished", f"step {steps:,} of {planned:,.0f}", row.number, "step")


def _setting(row: Row, column: str) -> float:
    """Return a setting, 0 where it is missing or -1, which switch it off."""
    return max(value_of(row.original.get(column)) or 0, 0)


def is_autoresearch(text: str) -> bool:
    """Whether a text is autoresearch's results.tsv, or the .jsonl of a search."""
    is_search = text.startswith("{") and '"results"' in text.partition("\n")[0]
    return is_search or {"commit", "status", "description"} <= _header(text, "\t")


def read_autoresearch(source: Source, mapping: Names) -> ParsedSource:
    """Read autoresearch's results. Runs have equal minutes; tokens and FLOPs are not recorded."""
    is_jsonl = source.text.startswith("{")
    table = _flatten_jsonl(source.text) if is_jsonl else read_table(source.text)
    parsed = parse_rows(table, AUTORESEARCH, mapping)
    for row in parsed.rows:
        commit = row.get("commit")
        if commit and not re.fullmatch("[0-9a-f]{7,}", commit):
            row.values.setdefault("label", row.values.pop("commit"))
    return parsed


def _flatten_jsonl(text: str) -> Table:
    """Return lines of JSON as a table; {"params": {"depth": 4}} is column params.depth.

    Raises ValueError naming the line.
    """
    lines = []
    for position, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                lines.append((position, dict(_leaves(json.loads(line)))))
            except ValueError:
                raise ValueError(f"line {position} is not JSON") from None
            except AttributeError:
                raise ValueError(f"line {position} is not a JSON object") from None
    header: dict[str, str] = {}
    for _, cells in lines:
        header |= dict.fromkeys(cells, "")
    rows = [(line, header | cells) for line, cells in lines]
    return Table(list(header), rows)


def _leaves(document: Values, prefix: str = "") -> list[tuple[str, str]]:
    leaves = []
    for key, value in document.items():
        if isinstance(value, dict) and prefix.count(".") < MAX_NESTING:
            leaves += _leaves(value, f"{prefix}{key}.")
        else:
            leaves.append((f"{prefix}{key}", "" if value is None else str(value)))
    return leaves


def is_core_by_task(text: str) -> bool:
    """Whether a text is CORE by task, by its header."""
    header = {plain(name) for name in _header(text, ",")}
    return {"task", "accuracy"} <= header and bool(header & {"centered", "centred"})


def read_core_by_task(source: Source, mapping: Names) -> ParsedSource:
    """Read CORE of one model by task, as nanochat's base_eval writes it: one row with its tasks.

    Raises ValueError for a mapping, and where no line has the CORE.
    """
    if mapping:
        raise ValueError("--map names columns of runs; this file is one run by task")
    table = read_table(source.text)
    names = {plain(name).replace("centred", "centered"): name for name in table.header}
    if not {"task", "accuracy", "centered"} <= names.keys():
        raise ValueError("CORE by task needs the columns task, accuracy and centered")
    cells = {row[names["task"]]: row for _, row in table.lines}
    total = cells.pop("CORE", {})
    core = value_of(total.get(names["centered"]))
    if core is None:
        raise ValueError("CORE by task has no line CORE: the file is truncated")
    tasks = {
        task: {name: _float(row[names[header]]) for name, header in SCORES.items()}
        for task, row in cells.items()
    }
    values: Values = {"label": source.stem, "core": core}
    original: Values = {
        name: total[names[name]] for name in ("checkpoint", "step") if name in names
    }
    steps = value_of(original.get("step"))
    if steps is not None:
        values["steps"] = steps
    row = Row(1, values, {**original, "tasks": tasks})
    scored = {task: scores for task, scores in tasks.items() if scores["centred"] is not None}
    if len(scored) == CORE_TASKS:
        return ParsedSource([row], core_defects(core, scored, CORE_TOLERANCE, 1))
    message = f"CORE of {len(scored)} tasks instead of {CORE_TASKS}"
    return ParsedSource([row], [Defect("core-subset", message, 1)])


def _float(text: str) -> float | None:
    value = value_of(text)
    return None if value is None else float(value)
