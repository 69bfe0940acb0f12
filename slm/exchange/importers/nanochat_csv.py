"""results.csv of nanochat's scaling_laws.sh and miniseries.sh: columns read out of logs by the script, often empty."""

from __future__ import annotations

from collections.abc import Mapping

from slm.exchange.importers.numbers import number
from slm.exchange.importers.readers import chosen, sheet, typed
from slm.exchange.importers.types import Found, Source

COLUMNS = {
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
"""Its time is the whole job's, start and evaluations included."""


def recognises(text: str) -> bool:
    """Whether this is such a file, by its header."""
    header = text.partition("\n")[0].split(",")
    return {"depth", "num_iterations", "tokens_trained", "val_bpb"} <= {
        name.strip() for name in header
    }


def read(source: Source, mapping: Mapping[str, str]) -> Found:
    """The rows. A budget's FLOPs are spent to the nearest step, so `flops` is computed and the budget compared."""
    table = sheet(source.text)
    found = typed(table, chosen(table.header, COLUMNS, mapping))
    for row in found.rows:
        budget = number(row.original.get("flops_budget", ""))
        if budget:
            row.values["horizon"] = f"flops={budget.value:g}"
    return found
