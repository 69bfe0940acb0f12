"""The standard output of nanochat's base_train: one run, its curve, and the accuracy of every CORE task."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from slm.exchange.importers.numbers import number, seconds
from slm.exchange.importers.types import Defect, Found, Row, Source

LINES = {
    "model_dim": r"model_dim: (\d+)",
    "depth": r"num_layers: (\d+)",
    "sequence_length": r"Tokens / micro-batch / rank: \d+ x (\d+)",
    "batch_tokens": r"Total batch size ([\d,]+)",
    "ranks": r"Distributed world size: (\d+)",
    "parameters_wte": r"wte\s*: ([\d,]+)",
    "parameters_value_embeds": r"value_embeds\s*: ([\d,]+)",
    "parameters_lm_head": r"lm_head\s*: ([\d,]+)",
    "parameters_matrices": r"transformer_matrices\s*: ([\d,]+)",
    "parameters_scalars": r"scalars\s*: ([\d,]+)",
    "parameters_total": r"(?:total\s*|Number of parameters): ([\d,]+)",
    "flops_per_token": r"Estimated FLOPs per token: ([\d.e+]+)",
    "steps": r"(?:Calculated|Using user-provided) number of iterations.*: ([\d,]+)",
    "tokens": r"Total number of training tokens: ([\d,]+)",
    "flops": r"Total training FLOPs estimate: ([\d.e+]+)",
}
"""What the log says of the run before its first step, by our names."""
STEP = re.compile(r"step (\d+)/(\d+) \([\d.]+%\) \| (.+)")
EVAL = re.compile(r"Step (\d+) \| Validation bpb: ([\d.]+|nan|inf)")
CORE = re.compile(r"Step (\d+) \| CORE metric: (-?[\d.]+)")
TASK = re.compile(
    r"Evaluating: (\S+) \((\d+)-shot, type: (\w+)\)\.\.\. accuracy: ([\d.]+) \| centered: (-?[\d.]+)"
)


@dataclass
class Log:
    """What a log says, gathered line by line."""

    values: dict[str, Any] = field(default_factory=dict)
    """By our names."""
    units: dict[str, float] = field(default_factory=dict)
    """Of the numbers' last digits."""
    steps: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    """Lines of steps: the step, and the cells by their names."""
    evals: dict[int, float] = field(default_factory=dict)
    """val_bpb by step."""
    cores: dict[int, float] = field(default_factory=dict)
    """CORE by step."""
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Accuracies of the last evaluation, by task."""
    unread: int = 0
    """Losses that were no numbers: a diverged run."""


def recognises(text: str) -> bool:
    """Whether this is such a log."""
    return bool(
        re.search(r"^Step \d+ \| Validation bpb: ", text, re.M)
        or re.search(r"^step \d+/\d+ \(", text, re.M)
    )


def read(source: Source, mapping: Mapping[str, str]) -> Found:
    """The run of one log. Raises ValueError for a mapping, since a log has no columns."""
    if mapping:
        raise ValueError("--map names columns, and a log has none")
    log = gathered(source.text)
    row, defects = run_of(log, 1, source.name.rpartition(".")[0] or source.name)
    return Found([row], defects)


def gathered(text: str) -> Log:
    """What a log's lines say."""
    log = Log()
    for raw in text.splitlines():
        line = re.sub(r"\x1b\[[0-9;]*m", "", raw).strip()
        if match := STEP.match(line):
            log.values.setdefault("steps", int(match[2]))
            log.steps.append(
                (
                    int(match[1]),
                    dict(cell.split(": ", 1) for cell in match[3].split(" | ") if ": " in cell),
                )
            )
        elif match := EVAL.match(line):
            _note(log, log.evals, match)
        elif match := CORE.match(line):
            log.cores[int(match[1])] = float(match[2])
        elif match := TASK.match(line):
            names = ("shots", "kind", "accuracy", "centred")
            log.tasks[match[1]] = dict(
                zip(names, (int(match[2]), match[3], float(match[4]), float(match[5])))
            )
        else:
            _fact(log, line)
    return log


def _note(log: Log, evals: dict[int, float], match: re.Match[str]) -> None:
    found = number(match[2])
    if found:
        evals[int(match[1])] = float(found.value)
    else:
        log.unread += 1


def _fact(log: Log, line: str) -> None:
    """One fact of the run; the last line that tells it counts."""
    for name, pattern in LINES.items():
        match = re.search(pattern, line) if name == "ranks" else re.match(pattern, line)
        found = number(match[1]) if match else None
        if found:
            log.values[name], log.units[name] = found.value, found.unit
    if match := re.match(r"Tokens : Scaling params ratio: ([\d.]+)", line):
        log.values.setdefault("horizon", f"ratio={float(match[1]):g}")
    if match := re.match(r"Using user-provided number of iterations: ([\d,]+)", line):
        log.values["horizon"] = f"steps={match[1].replace(',', '')}"
    if match := re.match(r"GPU: (.+?) \|", line):
        log.values["device_name"] = match[1]
    if match := re.match(r"Peak memory usage: ([\d.]+)MiB", line):
        log.values["peak_memory_bytes"] = round(float(match[1]) * 2**20)
    if match := re.match(r"Total training time: ([\d.]+)m", line):
        log.values["train_seconds"] = round(float(match[1]) * 60, 3)


def run_of(log: Log, number_: int, label: str) -> tuple[Row, list[Defect]]:
    """The row of a log, with its curve, and what is wrong with it as a log."""
    values = {
        "label": label,
        **{name: value for name, value in log.values.items() if name != "model_dim"},
    }
    last = max([*log.evals, *(step for step, _ in log.steps)], default=0)
    steps = values.get("steps")
    defects = []
    if log.evals and steps and max(log.evals) >= steps:
        values["val_bpb"] = log.evals[max(log.evals)]
        values["core"] = log.cores.get(max(log.evals))
        values["status"] = "finished"
    elif "val_bpb" not in values:
        values["status"] = "interrupted"
        shown = f"step {last:,} of {steps:,}" if steps else f"step {last:,}"
        defects.append(Defect("unfinished", f"ends at {shown}, without a last evaluation", number_))
    if log.unread:
        values.update(status="diverged", reason="diverged")
        defects.append(Defect("diverged", f"{log.unread} evaluations gave no number", number_))
    if log.steps:
        final = number(log.steps[-1][1].get("loss", ""))
        values["train_loss"] = final.value if final else None
    defects += _check_core(values, log, number_)
    original = {**log.values, "evaluations": len(log.evals), "tasks": log.tasks}
    values = {name: value for name, value in values.items() if value is not None}
    return Row(number_, values, original, log.units, _curve(values, log)), defects


def _check_core(values: dict[str, Any], log: Log, number_: int) -> list[Defect]:
    """CORE against the mean of the tasks: printed to four digits, both."""
    core = values.get("core")
    if core is None or not log.tasks:
        return []
    mean = sum(task["centred"] for task in log.tasks.values()) / len(log.tasks)
    wrong = abs(mean - core) > 1.1e-4
    return (
        [
            Defect(
                "core-disagree", f"CORE {core}, but its tasks' mean is {mean:.4f}", number_, "core"
            )
        ]
        if wrong
        else []
    )


def _curve(values: dict[str, Any], log: Log) -> tuple[dict[str, Any], ...]:
    """Events in the order of steps. A step's loss is that before its update, smoothed by the log itself."""
    batch, cost = values.get("batch_tokens"), values.get("flops_per_token")
    events: list[dict[str, Any]] = []

    def place(event: str, step: int) -> dict[str, Any]:
        tokens = step * batch if batch else None
        flops = tokens * cost if tokens is not None and cost else None
        return {"event": event, "time": None, "step": step, "tokens": tokens, "flops": flops}

    for step, cells in log.steps:
        read = {name: number(cells.get(theirs, "")) for name, theirs in TRAIN.items()}
        spent = seconds(cells["total time"], 60.0) if "total time" in cells else None
        told = {
            name: found.value for name, found in (*read.items(), ("train_seconds", spent)) if found
        }
        events.append({**place("train", step), **told})
    for step, bpb in log.evals.items():
        events.append(
            {**place("eval", step), "val_bpb": bpb}
            | ({"core": log.cores[step]} if step in log.cores else {})
        )
    return tuple(sorted(events, key=lambda event: (event["step"], event["event"])))


TRAIN = {"loss": "loss", "lr": "lrm", "gradient_norm": "grad norm", "tokens_per_second": "tok/sec"}
"""Fields of a train event, each with its name in a line of a step."""
