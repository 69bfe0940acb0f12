"""Read nanochat's experiment harness: a folder of runs whose logs hold `<tag> key=value …` records.

`experiments/<name>/meta.json` names commit and dataset; each run is a folder below it with a
base_train.log. `summary` records are the result; `params`, `config` and `argv` say what was run;
`eval`, `core` and `step` are the curve.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import PurePosixPath

from slm.exchange.importers.base_train_log import Log, parse_log, run_of_log
from slm.exchange.importers.numbers import value_of
from slm.exchange.importers.readers import by_spelling
from slm.exchange.importers.types import Defect, Names, ParsedSource, Row, Source

TAGS = ("argv", "config", "params", "eval", "core", "step", "summary")
RECORD = re.compile(rf"({'|'.join(TAGS)})( [\w./-]+=.*)")
COLUMNS = by_spelling(
    {
        "label": "model_tag",
        "device_name": "gpu",
        "depth": "depth n_layer",
        "seed": "seed",
        "sequence_length": "max_seq_len sequence_len",
        "ranks": "world_size",
        "parameters_wte": "wte",
        "parameters_value_embeds": "value_embeds",
        "parameters_lm_head": "lm_head",
        "parameters_matrices": "transformer_matrices",
        "parameters_scalars": "scalars",
        "parameters_total": "total num_params",
        "parameters_scaling": "num_scaling_params",
        "flops_per_token": "flops_per_token num_flops_per_token",
        "batch_tokens": "total_batch_size",
        "steps": "num_iterations",
        "tokens": "tokens_trained total_tokens",
        "train_seconds": "train_time_sec",
        "val_bpb": "val_bpb",
        "core": "core",
    }
)
"""Columns of the keys of params, config, argv and summary records."""
STEP_CELLS = {"loss": "loss", "lrm": "lrm", "tok_per_sec": "tok/sec"}
"""Keys of step records, and the same cells of a step's line in the log."""


def is_harness(text: str) -> bool:
    """Whether a text is a log with records, or a folder's meta.json."""
    tagged = [line for line in text.splitlines() if line.startswith(TAGS)]
    if any(_parse_record(line) for line in tagged):
        return True
    return text.lstrip().startswith("{") and '"git_commit"' in text and '"dataset"' in text


def read_harness(source: Source, mapping: Names) -> ParsedSource:
    """Read the runs of a folder, or of one log.

    Raises ValueError for a mapping, and for a folder without a log.
    """
    if mapping:
        raise ValueError("--map names columns, and a log has none")
    meta = json.loads(source.texts.get("meta.json", "{}"), parse_constant=str)
    if not isinstance(meta, dict):
        raise ValueError("meta.json is not a JSON object")
    logs = [name for name in source.texts if name.endswith(".log")]
    if not logs:
        raise ValueError("no base_train.log in the folders below it")
    parsed = ParsedSource([], name=str(meta.get("name") or ""))
    for position, name in enumerate(sorted(logs, key=_natural_order), 1):
        label = PurePosixPath(name).parent.name or source.name
        row, defects = _read_run(source.texts[name], position, label)
        for column, key in (("commit", "git_commit"), ("corpus", "dataset")):
            if isinstance(meta.get(key), str) and meta[key]:
                row.values[column] = meta[key]
        row.original["meta"] = meta
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
        fields = dict(token.split("=", 1) for token in tokens)
    except ValueError:  # an open quote, or a word without "="
        return None
    return match[1], fields


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


def _add_curve_point(log: Log, tag: str, fields: Names) -> None:
    value = value_of(fields.get("step"))
    if value is None:
        return
    step = int(value)
    if tag == "step":
        cells = {STEP_CELLS[key]: text for key, text in fields.items() if key in STEP_CELLS}
        log.steps.append((step, cells))
    elif tag == "eval":
        log.add_result(log.evals, step, fields.get("val_bpb", ""))
    else:
        log.add_result(log.cores, step, fields.get("core", ""))


def _add_facts(log: Log, tag: str, fields: Names) -> None:
    """Record what a run is; -1 means unset, and an argv does not override what the run printed."""
    for key, text in fields.items():
        column = COLUMNS.get(key.lstrip("-").replace("-", "_"))
        if column in ("label", "device_name"):
            log.values[column] = text
        elif column and not (tag == "argv" and column in log.values):
            log.add_fact(column, text)
    budget = value_of(fields.get("target_flops"))
    if budget and budget > 0:
        log.values["horizon"] = f"flops={budget:g}"
    memory = value_of(fields.get("peak_vram_mib"))
    if memory is not None:
        log.values["peak_memory_bytes"] = round(memory * 2**20)
