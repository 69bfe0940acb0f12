"""`slm size`: the table of a family."""

from __future__ import annotations

from dataclasses import asdict

from slm.cli.options import Depths, Json, RecipeName, depths_of, print_json, print_table, recipe_of
from slm.hardware.memory import peak_memory
from slm.recipe import Hyperparameters
from slm.text import count


def size(
    depths: Depths = "4,8,12,16,20,24", recipe: RecipeName = None, as_json: Json = False
) -> None:
    """Show a family: width, heads, parameters, FLOPs, horizon, batch, and peak memory with one row a pass, by depth."""
    from slm.hardware import devices

    family, device = recipe_of(recipe), "cuda" if devices.gpu_count() else "cpu"
    members = [family(depth) for depth in depths_of(depths)]
    if as_json:
        print_json(
            {
                "recipe": family.name,
                "device": device,
                "models": [_document(given, device) for given in members],
            }
        )
        return
    print(f"recipe {family.name}: {family.tokens_per_parameter:g} tokens per scaling parameter")
    headers = [
        "depth",
        "width",
        "heads",
        "parameters",
        "scaling N",
        "FLOPs/token",
        "tokens",
        "batch",
        "steps",
        "FLOPs",
    ]
    print_table([_row(given, device) for given in members], [*headers, f"GB ({device})"])


def _document(given: Hyperparameters, device: str) -> dict[str, object]:
    counts = given.parameters
    derived = {"parameters_total": counts.total, "parameters_scaling": counts.scaling}
    peak = {"peak_memory_bytes": peak_memory(given, 1, device)}
    return asdict(given) | derived | {"tokens": given.tokens, "flops": given.flops} | peak


def _row(given: Hyperparameters, device: str) -> list[str]:
    counts = given.parameters
    return [
        str(given.depth),
        str(given.width),
        str(given.heads),
        f"{counts.total:,}",
        f"{counts.scaling:,}",
        f"{given.flops_per_token:.4e}",
        count(given.tokens),
        f"{given.batch_tokens:,}",
        f"{given.steps:,}",
        f"{given.flops:.3g}",
        f"{peak_memory(given, 1, device) / 1e9:.3g}",
    ]
