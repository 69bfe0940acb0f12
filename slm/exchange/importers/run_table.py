"""Read any table of runs: known column names, units in headers, `--map` for the rest."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from slm.exchange.importers.numbers import number, value_of
from slm.exchange.importers.readers import (
    Table,
    by_spelling,
    is_markdown,
    parse_rows,
    plain,
    read_table,
)
from slm.exchange.importers.types import Names, ParsedSource, Row, Source, Values

COLUMNS = by_spelling(
    {
        "label": "label run name model_tag run_name",
        "recipe": "recipe family",
        "depth": "depth layers n_layer num_layers",
        "seed": "seed",
        "status": "status",
        "commit": "commit git_commit",
        "corpus": "dataset corpus data",
        "device_name": "gpu device device_name",
        "sequence_length": "sequence_length max_seq_len seq_len context",
        "parameters_total": "params_total params total_params num_params params_full n_params",
        "parameters_scaling": "scaling_params num_scaling_params params_scaling",
        "parameters_matrices": "params_transformer params_matrices",
        "parameters_value_embeds": "params_value_embeds",
        "parameters_lm_head": "params_lm_head",
        "parameters_wte": "params_wte",
        "flops_per_token": "flops_per_token",
        "batch_tokens": "total_batch_size batch_tokens batch_size_tokens",
        "steps": "steps step iterations num_iterations",
        "tokens": "tokens tokens_trained train_tokens total_tokens",
        "flops": "flops total_flops total_training_flops training_flops",
        "val_bpb": "val_bpb final_bpb validation_bpb bpb final_val_bpb",
        "val_loss": "val_loss val_loss_final validation_loss",
        "train_loss": "train_loss train_loss_final",
        "core": "core core_score core_metric",
        "train_seconds": "train_time total_training_time training_time time train_seconds",
        "train_seconds:3600": "hours train_hours",
        "wall_seconds": "wall_time wall_seconds runtime",
        "tokens_per_second": "tok_per_sec tokens_per_sec tokens_per_second",
        "peak_memory_bytes": "memory peak_memory peak_memory_bytes",
    }
)
"""Normalised headers (`readers.plain`), without unit, by which a column is recognised."""
CURVE_FIELDS = {
    "tokens": "tokens",
    "flops": "flops",
    "train_loss": "loss",
    "val_bpb": "val_bpb",
    "val_loss": "val_loss",
    "core": "core",
}
"""Columns of a curve, and the event field of each."""
CURVE_COLUMNS = {"step", "loss", "lr", "time", "dt", "epoch", *CURVE_FIELDS}
RESULTS = {"val_bpb", "val_loss", "core"}
IDENTIFIERS = {"depth", "run", "label", "name", "seed", "step", "steps", "model", "size"}
"""Headers that name a run. A table of optima has none."""
METHODS = ("convention", "definition", "method")
"""Headers that name the method by which optima were found."""


def is_run_table(text: str) -> bool:
    """Whether a text is a table at all, by its first line."""
    first_line = text.lstrip().partition("\n")[0]
    return is_markdown(text) or any(mark in first_line for mark in "\t,;")


def read_run_table(source: Source, mapping: Names, force: bool = False) -> ParsedSource:
    """Read the runs of a table; a table that is a curve is one run.

    Raises ValueError for a table without a result and, unless `force`, for one of optima or
    predictions.
    """
    table = read_table(source.text)
    parsed = parse_rows(table, COLUMNS, mapping)
    if not RESULTS & parsed.columns.keys():
        raise ValueError(_no_result(table))
    if not force and (reason := _not_runs(table)):
        raise ValueError(f"{reason}; --format table imports its rows as runs nevertheless")
    if _is_curve(table):
        return _as_one_run(parsed, source.stem)
    _label_rows(parsed, table)
    return parsed


def _no_result(table: Table) -> str:
    """Explain that no column is a result, and how to name one."""
    candidates = [
        name for name in table.header if {"bpb", "core", "loss"} & set(plain(name).split("_"))
    ]
    if len(candidates) == 1:
        target = "core" if "core" in plain(candidates[0]) else "val_bpb"
        return (
            f"no column is recognised as a result; --map {target}={candidates[0]!r} takes the "
            "one that looks like it"
        )
    if candidates:
        return (
            f"{len(candidates)} results per row ({', '.join(candidates)}), not one; "
            f"--map val_bpb={candidates[0]} takes one of them"
        )
    names = ", ".join(table.header)[:120]
    return (
        f"no results: no column holds val_bpb, val_loss or CORE ({names}); "
        "--map val_bpb=COLUMN names it"
    )


def _not_runs(table: Table) -> str | None:
    """Return why the rows look like optima or predictions instead of runs, else None."""
    names = table.names
    if {"target", "predicted", "extrapolated"} & names.keys():
        return f"predictions, not runs: a column {names.get('target', 'of predictions')}"
    if not {"flops", "tokens"} <= names.keys() or IDENTIFIERS & names.keys():
        return None
    # one budget may have an optimum by each of several methods
    keys = [names[name] for name in ("flops", *METHODS) if name in names]
    budgets = Counter(tuple(row[key] for key in keys) for _, row in table.lines)
    if max(budgets.values()) == 1 and all(_has_few_digits(flops) for flops, *_ in budgets):
        return "optima, not runs: one model per FLOPs budget, and none that was trained"
    return None


def _has_few_digits(text: str) -> bool:
    parsed = number(text)
    return parsed is not None and parsed.value / parsed.unit < 1000


def _is_curve(table: Table) -> bool:
    """Whether a table is one run by step: only steps and what changes with them, increasing."""
    names = table.names
    if "step" not in names or not names.keys() <= CURVE_COLUMNS or len(table.lines) < 3:
        return False
    steps = [value_of(row[names["step"]]) for _, row in table.lines]
    values = [step for step in steps if step is not None]
    return steps == values == sorted(set(values))


def _as_one_run(parsed: ParsedSource, label: str) -> ParsedSource:
    """Return the last row as a run, with all rows as its curve."""
    last = parsed.rows[-1]
    run = replace(
        last,
        values={**last.values, "label": label},
        original={**last.original, "rows": len(parsed.rows)},
        curve=[_event(row) for row in parsed.rows],
    )
    return replace(parsed, rows=[run])


def _event(row: Row) -> Values:
    fields = {
        event_field: row.values[column]
        for column, event_field in CURVE_FIELDS.items()
        if column in row.values
    }
    kind = "eval" if RESULTS & fields.keys() else "train"
    return {"event": kind, "time": None, "step": row.get("steps"), **fields}


def _label_rows(parsed: ParsedSource, table: Table) -> None:
    """Label rows without a name by the first column of words."""
    if {"label", "recipe"} & parsed.columns.keys():
        return
    for name in table.header:
        if name in parsed.columns.values():
            continue
        cells = [row.original[name] for row in parsed.rows]
        if all(cells) and all(value_of(cell) is None for cell in cells):
            for row, cell in zip(parsed.rows, cells):
                row.values["label"] = cell
            parsed.columns["label"] = name
            return
