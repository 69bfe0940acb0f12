"""Read the output of nanochat's base_train: one run, its curve, and CORE by task."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from slm.exchange.importers.numbers import number, seconds, value_of
from slm.exchange.importers.types import Defect, Names, ParsedSource, Row, Source, Values

PATTERNS = {
    "model_dim": r"model_dim: (\d+)",
    "depth": r"num_layers: (\d+)",
    "sequence_length": r"Tokens / micro-batch / rank: \d+ x (\d+)",
    "batch_tokens": r"Total batch size ([\d,]+)",
    "ranks": r".*Distributed world size: (\d+)",
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
"""Facts that the log prints before its first step, by column."""
STEP = re.compile(r"step (\d+)/(\d+) \([\d.]+%\) \| (.+)")
EVAL = re.compile(r"Step (\d+) \| Validation bpb: ([\d.]+|nan|inf)")
CORE = re.compile(r"Step (\d+) \| CORE metric: (-?[\d.]+)")
TASK = re.compile(
    r"Evaluating: (\S+) \((\d+)-shot, type: (\w+)\)\.\.\. "
    r"accuracy: ([\d.]+) \| centered: (-?[\d.]+)"
)
TRAIN_FIELDS = {
    "loss": "loss",
    "lr": "lrm",
    "gradient_norm": "grad norm",
    "tokens_per_second": "tok/sec",
}
"""Fields of a train event, and their names in a step's line."""
CORE_TOLERANCE = 1.1e-4
"""Half a digit of CORE and half of its tasks, which are printed with four."""


@dataclass
class Log:
    """Contents of a log, gathered line by line."""

    values: Values = field(default_factory=dict)
    """Values by column."""
    units: dict[str, float] = field(default_factory=dict)
    """Value of the last printed digit, by column."""
    steps: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    """Step, and the cells of its line by name."""
    evals: dict[int, float] = field(default_factory=dict)
    """val_bpb by step."""
    cores: dict[int, float] = field(default_factory=dict)
    """CORE by step."""
    tasks: dict[str, Values] = field(default_factory=dict)
    """Accuracies of the last evaluation, by task."""
    unparsed_losses: int = 0
    """Losses that were not numbers: the run diverged."""

    def add_fact(self, column: str, text: str) -> None:
        """Set the value of a column, unless the text is no number, or -1 for "off"."""
        parsed = number(text)
        if parsed and parsed.value != -1:
            self.values[column] = parsed.value
            self.units[column] = parsed.unit

    def add_result(self, results: dict[int, float], step: int, text: str) -> None:
        """Add to `evals` or `cores`; count a text that is not a number."""
        value = value_of(text)
        if value is None:
            self.unparsed_losses += 1
        else:
            results[step] = float(value)


def is_base_train_log(text: str) -> bool:
    """Whether a text is such a log."""
    return bool(re.search(r"^(Step \d+ \| Validation bpb: |step \d+/\d+ \()", text, re.M))


def read_base_train_log(source: Source, mapping: Names) -> ParsedSource:
    """Read the run of one log. Raises ValueError for a mapping, since a log has no columns."""
    if mapping:
        raise ValueError("--map names columns, and a log has none")
    row, defects = run_of_log(parse_log(source.text), 1, source.stem)
    return ParsedSource([row], defects)


def parse_log(text: str) -> Log:
    """Gather the contents of a log."""
    log = Log()
    for raw_line in text.splitlines():
        line = re.sub(r"\x1b\[[0-9;]*m", "", raw_line).strip()
        if match := STEP.match(line):
            log.values.setdefault("steps", int(match[2]))
            cells = match[3].split(" | ")
            named = dict(cell.split(": ", 1) for cell in cells if ": " in cell)
            log.steps.append((int(match[1]), named))
        elif match := EVAL.match(line):
            log.add_result(log.evals, int(match[1]), match[2])
        elif match := CORE.match(line):
            log.add_result(log.cores, int(match[1]), match[2])
        elif match := TASK.match(line):
            log.tasks[match[1]] = {
                "shots": int(match[2]),
                "kind": match[3],
                "accuracy": float(match[4]),
                "centred": float(match[5]),
            }
        else:
            _parse_fact(log, line)
    return log


def _parse_fact(log: Log, line: str) -> None:
    """Record one fact of the run; the last line with it counts."""
    for column, pattern in PATTERNS.items():
        if match := re.match(pattern, line):
            log.add_fact(column, match[1])
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


def run_of_log(log: Log, row_number: int, label: str) -> tuple[Row, list[Defect]]:
    """Return the row of a log with its curve, and the defects of the log."""
    values = {"label": label, **log.values}
    values.pop("model_dim", None)
    defects = []
    # 1) finished if the last step was evaluated
    steps = values.get("steps")
    last_eval = max(log.evals, default=-1)
    if steps and last_eval >= steps:
        values["val_bpb"] = log.evals[last_eval]
        values["status"] = "finished"
        values.pop("core", None)
        if last_eval in log.cores:
            values["core"] = log.cores[last_eval]
    elif "val_bpb" not in values:
        values["status"] = "interrupted"
        logged = [step for step, _ in log.steps]
        last = max([*log.evals, *logged], default=0)
        progress = f"step {last:,} of {steps:,}" if steps else f"step {last:,}"
        message = f"ends at {progress}, without a last evaluation"
        defects.append(Defect("unfinished", message, row_number))
    # 2) diverged if any evaluation was not a number
    if log.unparsed_losses:
        values.update(status="diverged", reason="diverged")
        message = f"{log.unparsed_losses} evaluations are not numbers"
        defects.append(Defect("diverged", message, row_number))
    # 3) last training loss and CORE
    _, last_cells = log.steps[-1] if log.steps else (0, {})
    final_loss = value_of(last_cells.get("loss"))
    if final_loss is not None:
        values["train_loss"] = final_loss
    if log.tasks and "core" in values:
        defects += core_defects(values["core"], log.tasks, CORE_TOLERANCE, row_number)
    original = {**log.values, "evaluations": len(log.evals), "tasks": log.tasks}
    return Row(row_number, values, original, log.units, _curve(values, log)), defects


def core_defects(
    core: float, tasks: Mapping[str, Values], tolerance: float, row_number: int
) -> list[Defect]:
    """Compare CORE with the mean of its tasks."""
    scores = [task["centred"] for task in tasks.values()]
    mean = sum(scores) / len(scores)
    if abs(mean - core) <= tolerance:
        return []
    message = f"CORE {core}, but its tasks' mean is {mean:.6f}"
    return [Defect("core-disagree", message, row_number, "core")]


def _curve(values: Values, log: Log) -> list[Values]:
    """Return events ordered by step.

    A step's loss is the one before its update, smoothed by the log itself.
    """
    events = []
    for step, cells in log.steps:
        event = _event("train", step, values)
        for name, cell in TRAIN_FIELDS.items():
            value = value_of(cells.get(cell))
            if value is not None:
                event[name] = value
        elapsed = seconds(cells.get("total time", ""), 60.0)
        if elapsed:
            event["train_seconds"] = elapsed.value
        events.append(event)
    for step, bpb in log.evals.items():
        event = {**_event("eval", step, values), "val_bpb": bpb}
        if step in log.cores:
            event["core"] = log.cores[step]
        events.append(event)
    return sorted(events, key=lambda event: (event["step"], event["event"]))


def _event(kind: str, step: int, values: Values) -> Values:
    batch_tokens = values.get("batch_tokens")
    tokens = step * batch_tokens if batch_tokens else None
    flops_per_token = values.get("flops_per_token")
    flops = tokens * flops_per_token if tokens is not None and flops_per_token else None
    return {"event": kind, "time": None, "step": step, "tokens": tokens, "flops": flops}
