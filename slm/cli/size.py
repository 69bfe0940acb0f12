"""`slm size`: the table of a family."""

from __future__ import annotations

from dataclasses import asdict

from slm.cli.options import Depths, Json, RecipeName, depths_of, print_json, print_table, quantity, recipe_of
from slm.recipe import Hyperparameters


def size(depths: Depths = "4,8,12,16,20,24", recipe: RecipeName = None, as_json: Json = False) -> None:
    """Show a family: width, heads, parameters, FLOPs, horizon and batch at each depth."""
    family = recipe_of(recipe)
    members = [family(depth) for depth in depths_of(depths)]
    if as_json:
        print_json({"recipe": family.name, "models": [_document(given) for given in members]})
        return
    print(f"recipe {family.name}: {family.tokens_per_parameter:g} tokens per scaling parameter")
    headers = ["depth", "width", "heads", "parameters", "scaling N", "FLOPs/token", "tokens", "batch", "steps", "FLOPs"]
    print_table([_row(given) for given in members], headers)


def _document(given: Hyperparameters) -> dict[str, object]:
    counts = given.parameters
    derived = {"parameters_total": counts.total, "parameters_scaling": counts.scaling}
    return asdict(given) | derived | {"tokens": given.tokens, "flops": given.flops}


def _row(given: Hyperparameters) -> list[str]:
    counts = given.parameters
    return [
        str(given.depth),
        str(given.width),
        str(given.heads),
        f"{counts.total:,}",
        f"{counts.scaling:,}",
        f"{given.flops_per_token:.4e}",
        quantity(given.tokens),
        f"{given.batch_tokens:,}",
        f"{given.steps:,}",
        f"{given.flops:.3g}",
    ]
