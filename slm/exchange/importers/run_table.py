"""Any table of runs, CSV or Markdown: known names of columns, units in headers, `--map` for the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from slm.exchange.importers.numbers import number
from slm.exchange.importers.readers import Sheet, chosen, is_markdown, plain, sheet, typed
from slm.exchange.importers.types import Found, Row, Source

COLUMNS = {
    **dict.fromkeys(("label", "run", "name", "model_tag", "run_name"), "label"),
    **dict.fromkeys(("recipe", "family"), "recipe"),
    **dict.fromkeys(("depth", "layers", "n_layer", "num_layers"), "depth"),
    "seed": "seed",
    "status": "status",
    **dict.fromkeys(("commit", "git_commit"), "commit"),
    **dict.fromkeys(("dataset", "corpus", "data"), "corpus"),
    **dict.fromkeys(("gpu", "device", "device_name"), "device_name"),
    **dict.fromkeys(("sequence_length", "max_seq_len", "seq_len", "context"), "sequence_length"),
    **dict.fromkeys(
        ("params_total", "params", "total_params", "num_params", "params_full", "n_params"),
        "parameters_total",
    ),
    **dict.fromkeys(
        ("scaling_params", "num_scaling_params", "params_scaling"), "parameters_scaling"
    ),
    **dict.fromkeys(("params_transformer", "params_matrices"), "parameters_matrices"),
    "params_value_embeds": "parameters_value_embeds",
    "params_lm_head": "parameters_lm_head",
    "params_wte": "parameters_wte",
    "flops_per_token": "flops_per_token",
    **dict.fromkeys(("total_batch_size", "batch_tokens", "batch_size_tokens"), "batch_tokens"),
    **dict.fromkeys(("steps", "step", "iterations", "num_iterations"), "steps"),
    **dict.fromkeys(("tokens", "tokens_trained", "train_tokens", "total_tokens"), "tokens"),
    **dict.fromkeys(("flops", "total_flops", "total_training_flops", "training_flops"), "flops"),
    **dict.fromkeys(("val_bpb", "final_bpb", "validation_bpb", "bpb", "final_val_bpb"), "val_bpb"),
    **dict.fromkeys(("val_loss", "val_loss_final", "validation_loss"), "val_loss"),
    **dict.fromkeys(("train_loss", "train_loss_final"), "train_loss"),
    **dict.fromkeys(("core", "core_score", "core_metric"), "core"),
    **dict.fromkeys(
        ("train_time", "total_training_time", "training_time", "time", "train_seconds"),
        "train_seconds",
    ),
    **dict.fromkeys(("hours", "train_hours"), "train_seconds:3600"),
    **dict.fromkeys(("wall_time", "wall_seconds", "runtime"), "wall_seconds"),
    **dict.fromkeys(("tok_per_sec", "tokens_per_sec", "tokens_per_second"), "tokens_per_second"),
    **dict.fromkeys(("memory", "peak_memory", "peak_memory_bytes"), "peak_memory_bytes"),
}
"""Headers by which a column is known, plain (sheet.plain) and without their unit."""
OF_A_CURVE = {
    "step",
    "tokens",
    "flops",
    "loss",
    "train_loss",
    "val_loss",
    "val_bpb",
    "core",
    "lr",
    "time",
    "dt",
    "epoch",
}
RESULTS = ("val_bpb", "val_loss", "core")


def recognises(text: str) -> bool:
    """Whether this is a table at all, by its first line."""
    return is_markdown(text) or bool(set(text.lstrip().partition("\n")[0]) & set("\t,;"))


def read(source: Source, mapping: Mapping[str, str], insisting: bool = False) -> Found:
    """The runs of a table; one run where the table is a curve.

    Raises ValueError for a table without a result, and, unless one insists, for one of optima, predictions or pairs.
    """
    table = sheet(source.text)
    columns = chosen(table.header, COLUMNS, mapping)
    if not {column.name for column in columns} & set(RESULTS):
        raise ValueError(_no_result(table))
    if not insisting and (why := _not_runs(table)):
        raise ValueError(f"{why}; --format table imports its rows as runs all the same")
    found = typed(table, columns)
    if _is_curve(table):
        return _one_run(found, source.name)
    _named(found, table)
    return found


def _no_result(table: Sheet) -> str:
    like = [
        name
        for name in table.header
        if any(word in plain(name).split("_") for word in ("bpb", "core", "loss"))
    ]
    if len(like) == 1:
        ours = "core" if "core" in plain(like[0]) else "val_bpb"
        return f"no column is known as a result; --map {ours}={like[0]!r} takes the one that looks like it"
    if like:
        return f"{len(like)} results a row ({', '.join(like)}), not one; --map val_bpb={like[0]} takes one of them"
    names = ", ".join(table.header)[:120]
    return f"no results: no column holds val_bpb, val_loss or CORE ({names}); --map val_bpb=COLUMN names it"


def _not_runs(table: Sheet) -> str | None:
    """Why the rows of a table look like something else than runs."""
    names = {plain(name): name for name in table.header}
    if {"target", "predicted", "extrapolated"} & set(names):
        return f"predictions, not runs: a column {names.get('target') or 'of predictions'}"
    identity = {"depth", "run", "label", "name", "seed", "step", "steps", "model", "size"} & set(
        names
    )
    if "flops" in names and "tokens" in names and not identity:
        others = [
            name
            for plain_, name in names.items()
            if plain_ in ("convention", "definition", "method", "model")
        ]
        budgets = Counter(
            (row[names["flops"]], *(row[other] for other in others)) for _, row in table.lines
        )
        if max(budgets.values()) == 1 and all(_few_digits(flops) for flops, *_ in budgets):
            return "optima, not runs: one model for each budget of FLOPs, and none that was trained"
    return None


def _few_digits(text: str) -> bool:
    found = number(text)
    return found is not None and found.value / found.unit < 1000


def _is_curve(table: Sheet) -> bool:
    """Whether a table is one run by steps: nothing but step and what changes with it, steps growing."""
    names = {plain(name): name for name in table.header}
    if "step" not in names or not set(names) <= OF_A_CURVE or len(table.lines) < 3:
        return False
    steps = [number(row[names["step"]]) for _, row in table.lines]
    known = [step.value for step in steps if step]
    return len(known) == len(steps) and all(one < other for one, other in pairwise(known))


def _one_run(found: Found, name: str) -> Found:
    """The last row, with all of them as its curve."""
    last = found.rows[-1]
    curve = tuple(_event(row) for row in found.rows)
    values = {**last.values, "label": name.rpartition(".")[0] or name}
    run = Row(last.number, values, {**last.original, "rows": len(found.rows)}, last.units, curve)
    return Found([run], found.defects, found.columns)


def _event(row: Row) -> dict[str, Any]:
    """A row of a curve."""
    names = {
        "tokens": "tokens",
        "flops": "flops",
        "train_loss": "loss",
        "val_bpb": "val_bpb",
        "val_loss": "val_loss",
    }
    told = {
        theirs: row.values[ours]
        for ours, theirs in {**names, "core": "core"}.items()
        if ours in row.values
    }
    kind = "eval" if {"val_bpb", "val_loss", "core"} & set(told) else "train"
    return {"event": kind, "time": None, "step": row.get("steps"), **told}


def _named(found: Found, table: Sheet) -> None:
    """Rows without a name take the first column of words."""
    if "label" in found.columns or "recipe" in found.columns:
        return
    words = [
        name
        for name in table.header
        if name not in found.columns.values() and _is_words(found.rows, name)
    ]
    for row in found.rows if words else ():
        if row.original[words[0]].strip():
            row.values["label"] = row.original[words[0]].strip()
    if words:
        found.columns["label"] = words[0]


def _is_words(rows: list[Row], name: str) -> bool:
    cells = [str(row.original[name]).strip() for row in rows]
    return all(cells) and not any(number(cell) for cell in cells)
