"""Read nanochat's experiment harness: a folder of runs whose logs hold `<tag> key=value …` records.

`experiments/<name>/meta.json` names commit and dataset; each run is a folder below it with a
base_train.log. `summary` records are the result; `params`, `config` and `argv` say what was run;
`eval`, `core` and `step` are the curve.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from slm.exchange.importers.base_train_log import Log, parse_log, run_of_log
from slm.exchange.importers.numbers import number
from slm.exchange.importers.types import Defect, ParsedSource, Row, Source

TAGS = ("argv", "config", "params", "eval", "core", "step", "summary")
RECORD = re.compile(rf"({'|'.join(TAGS)})( [\w./-]+=.*)")
COLUMNS = {
    "model_tag": "label",
    "depth": "depth",
    "n_layer": "depth",
    "wte": "parameters_wte",
    "value_embeds": "parameters_value_embeds",
    "lm_head": "parameters_lm_head",
    "transformer_matrices": "parameters_matrices",
    "scalars": "parameters_scalars",
    "total": "parameters_total",
    "num_params": "parameters_total",
    "num_scaling_params": "parameters_scaling",
    "flops_per_token": "flops_per_token",
    "num_flops_per_token": "flops_per_token",
    "num_iterations": "steps",
    "total_batch_size": "batch_tokens",
    "tokens_trained": "tokens",
    "total_tokens": "tokens",
    "train_time_sec": "train_seconds",
    "val_bpb": "val_bpb",
    "core": "core",
    "max_seq_len": "sequence_length",
    "sequence_len": "sequence_length",
    "world_size": "ranks",
    "gpu": "device_name",
    "seed": "seed",
}
"""Keys of params, config, argv and summary records, by column."""
STEP_CELLS = {"loss": "loss", "lrm": "lrm", "tok_per_sec": "tok/sec"}
"""Keys of step records, and the same cells of a step's line in the log."""


def is_harness(text: str) -> bool:
    """Whether a text is a log with records, or a folder's meta.json."""
    if any(_parse_record(line) for line in text.splitlines() if line.startswith(TAGS)):
        return True
    return text.lstrip().startswith("{") and '"git_commit"' in text and '"dataset"' in text


def read_harness(source: Source, mapping: Mapping[str, str]) -> ParsedSource:
    """Read the runs of a folder, or of one log.

    Raises ValueError for a mapping, and for a folder without a log.
    """
    if mapping:
        raise ValueError("--map names columns, and a log has none")
    metas = [text for name, text in source.texts.items() if PurePosixPath(name).name == "meta.json"]
    meta = json.loads(metas[0], parse_constant=str) if metas else {}
    if not isinstance(meta, dict):
        raise ValueError("meta.json is not a JSON object")
    logs = {name: text for name, text in source.texts.items() if name.endswith(".log")}
    if not logs:
        raise ValueError("no base_train.log in the folders below it")
    parsed = ParsedSource([], name=str(meta.get("name") or "") or None)
    for position, name in enumerate(sorted(logs, key=_natural_order), 1):
        label = PurePosixPath(name).parent.name or source.name
        row, defects = _read_run(logs[name], position, label)
        _add_identity(row, meta)
        parsed.rows.append(row)
        parsed.defects.extend(defects)
        if meta.get("git_dirty"):
            parsed.defects.append(Defect("dirty-code", "meta.json says git_dirty", position))
    return parsed


def _natural_order(name: str) -> list[tuple[int, str]]:
    """Sort key that puts d8 before d12."""
    return [(int(digits or 0), text) for text, digits in re.findall(r"(\D*)(\d*)", name)]


def _parse_record(line: str) -> tuple[str, dict[str, str]] | None:
    """Return tag and fields of a record, None for prose."""
    match = RECORD.fullmatch(line.strip())
    if not match:
        return None
    try:
        tokens = shlex.split(match[2])
    except ValueError:
        return None
    pairs = [token.partition("=") for token in tokens]
    if not all(equals for _, equals, _ in pairs):
        return None
    return match[1], {key: value for key, _, value in pairs}


def _read_run(text: str, position: int, label: str) -> tuple[Row, list[Defect]]:
    """Read a run from its log: first the prose, then the records."""
    log = parse_log(text)
    records: dict[str, dict[str, str]] = {}
    for line in text.splitlines():
        record = _parse_record(line)
        if record is None:
            continue
        tag, fields = record
        if tag in ("eval", "core", "step"):
            _add_curve_point(log, tag, fields)
        else:
            records.setdefault(tag, {}).update(fields)
            _add_facts(log, tag, fields)
    row, defects = run_of_log(log, position, log.values.get("label", label))
    row.original.update(records)
    return row, defects


def _add_curve_point(log: Log, tag: str, fields: Mapping[str, str]) -> None:
    step = number(fields.get("step", ""))
    if step is None:
        return
    if tag == "step":
        cells = {cell: fields[key] for key, cell in STEP_CELLS.items() if key in fields}
        log.steps.append((int(step.value), cells))
        return
    value = number(fields.get("val_bpb" if tag == "eval" else "core", ""))
    if value is None:
        log.unparsed_losses += 1
        return
    series = log.evals if tag == "eval" else log.cores
    series[int(step.value)] = float(value.value)


def _add_facts(log: Log, tag: str, fields: Mapping[str, str]) -> None:
    """Record what a run is; -1 means unset, and an argv does not override what the run printed."""
    for key, text in fields.items():
        column = COLUMNS.get(key.lstrip("-").replace("-", "_"))
        if column in ("label", "device_name"):
            log.values[column] = text
            continue
        parsed = number(text)
        is_overridden = tag == "argv" and column in log.values
        if column and parsed and parsed.value != -1 and not is_overridden:
            log.values[column] = parsed.value
            log.units[column] = parsed.unit
    budget = number(fields.get("target_flops", ""))
    if budget and budget.value > 0:
        log.values["horizon"] = f"flops={budget.value:g}"
    memory = number(fields.get("peak_vram_mib", ""))
    if memory:
        log.values["peak_memory_bytes"] = round(memory.value * 2**20)


def _add_identity(row: Row, meta: Mapping[str, Any]) -> None:
    """Add commit and dataset of the experiment."""
    for column, key in (("commit", "git_commit"), ("corpus", "dataset")):
        if isinstance(meta.get(key), str) and meta[key]:
            row.values[column] = meta[key]
    row.original["meta"] = dict(meta)
