"""nanochat's experiment harness: a folder of runs, whose logs hold records `<tag> key=value …` among their prose.

`experiments/<name>/meta.json` names commit and dataset; each run is a folder below it with a base_train.log. The
`summary` is the result, `params`, `config` and `argv` say what was run, `eval` and `core` are the curve.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from slm.exchange.importers import base_train_log
from slm.exchange.importers.numbers import number
from slm.exchange.importers.types import Defect, Found, Row, Source

TAGS = ("argv", "config", "params", "eval", "core", "step", "summary")
RECORD = re.compile(rf"({'|'.join(TAGS)})( [\w./-]+=.*)")
NAMES = {
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
"""Keys of params, config, argv and summary under our names."""
TRAIN = {
    "loss": "loss",
    "lrm": "lr",
    "tok_per_sec": "tokens_per_second",
    "train_time_sec": "train_seconds",
}


def recognises(text: str) -> bool:
    """Whether this is a log with records, or a folder's meta.json."""
    return any(_record(line) for line in text.splitlines() if line.startswith(TAGS)) or _is_meta(
        text
    )


def _is_meta(text: str) -> bool:
    return text.lstrip().startswith("{") and '"git_commit"' in text and '"dataset"' in text


def read(source: Source, mapping: Mapping[str, str]) -> Found:
    """The runs of a folder, or of one log. Raises ValueError for a mapping, and for a folder without a log."""
    if mapping:
        raise ValueError("--map names columns, and a log has none")
    metas = [text for name, text in source.texts.items() if PurePosixPath(name).name == "meta.json"]
    meta = json.loads(metas[0], parse_constant=str) if metas else {}
    if not isinstance(meta, dict):
        raise ValueError("meta.json is no object")
    logs = {name: text for name, text in source.texts.items() if name.endswith(".log")}
    if not logs:
        raise ValueError("no base_train.log in the folders below it")
    found = Found([], name=str(meta.get("name") or "") or None)
    for position, name in enumerate(sorted(logs, key=_natural), 1):
        row, defects = _run(logs[name], position, PurePosixPath(name).parent.name or source.name)
        _identity(row, meta)
        found.rows.append(row)
        found.defects.extend([*defects, *_dirty(meta, position)])
    return found


def _natural(name: str) -> list[tuple[int, str]]:
    """d8 before d12."""
    return [(int(digits or 0), text) for text, digits in re.findall(r"(\D*)(\d*)", name)]


def _record(line: str) -> tuple[str, dict[str, str]] | None:
    """Tag and fields of a record; None for prose."""
    match = RECORD.fullmatch(line.strip())
    if not match:
        return None
    try:
        words = shlex.split(match[2])
    except ValueError:
        return None
    pairs = [word.partition("=") for word in words]
    return (
        (match[1], {key: value for key, _, value in pairs})
        if all(equals for _, equals, _ in pairs)
        else None
    )


def _run(text: str, position: int, label: str) -> tuple[Row, list[Defect]]:
    """A log's run: what its prose says, then what its records say."""
    log = base_train_log.gathered(text)
    records: dict[str, dict[str, str]] = {}
    for line in text.splitlines():
        if record := _record(line):
            tag, fields = record
            if tag in ("eval", "core", "step"):
                _point(log, tag, fields)
            else:
                records.setdefault(tag, {}).update(fields)
                _facts(log, tag, fields)
    row, defects = base_train_log.run_of(log, position, log.values.get("label", label))
    row.original.update(records)
    return row, defects


def _point(log: base_train_log.Log, tag: str, fields: Mapping[str, str]) -> None:
    """A record of the curve."""
    step = number(fields.get("step", ""))
    value = number(fields.get({"eval": "val_bpb", "core": "core"}.get(tag, "loss"), ""))
    if step is None:
        return
    if tag == "step":
        cells = {
            theirs: fields[key]
            for key, theirs in (("loss", "loss"), ("lrm", "lrm"), ("tok_per_sec", "tok/sec"))
            if key in fields
        }
        log.steps.append((int(step.value), cells))
    elif value is None:
        log.unread += 1
    else:
        (log.evals if tag == "eval" else log.cores)[int(step.value)] = float(value.value)


def _facts(log: base_train_log.Log, tag: str, fields: Mapping[str, str]) -> None:
    """A record of the run; what is asked for with -1 is asked of nobody, and an argv asks before the run decides."""
    for key, text in fields.items():
        ours = NAMES.get(key.lstrip("-").replace("-", "_"))
        found = number(text)
        if ours in ("label", "device_name"):
            log.values[ours] = text
        elif ours and found and found.value != -1 and not (tag == "argv" and ours in log.values):
            log.values[ours], log.units[ours] = found.value, found.unit
    budget = number(fields.get("target_flops", ""))
    if budget and budget.value > 0:
        log.values["horizon"] = f"flops={budget.value:g}"
    if "peak_vram_mib" in fields and (found := number(fields["peak_vram_mib"])):
        log.values["peak_memory_bytes"] = round(found.value * 2**20)


def _identity(row: Row, meta: Mapping[str, Any]) -> None:
    """Commit and dataset of the experiment."""
    for ours, theirs in (("commit", "git_commit"), ("corpus", "dataset")):
        if isinstance(meta.get(theirs), str) and meta[theirs]:
            row.values[ours] = meta[theirs]
    row.original["meta"] = dict(meta)


def _dirty(meta: Mapping[str, Any], position: int) -> list[Defect]:
    return (
        [Defect("dirty-code", "meta.json says git_dirty", position)]
        if meta.get("git_dirty")
        else []
    )
