"""`slm size`: the table of a family."""

from __future__ import annotations

from dataclasses import asdict

from slm.cli.options import Depths, Json, RecipeName, depths_of, print_json, print_table, recipe_of
from slm.hardware.memory import peak_memory
from slm.recipe import Hyperparameters
from slm.text import count

HEADERS = (
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
)


def size(
    depths: Depths = "4,8,12,16,20,24", recipe: RecipeName = None, as_json: Json = False
) -> None:
    """Show a family by depth: shape, parameters, FLOPs, horizon, batch, memory of one row."""
    from slm.hardware import devices

    family = recipe_of(recipe)
    device = "cuda" if devices.gpu_count() else "cpu"
    models = [family(depth) for depth in depths_of(depths)]
    if as_json:
        documents = [_document(hp, device) for hp in models]
        print_json({"recipe": family.name, "device": device, "models": documents})
        return
    print(f"recipe {family.name}: {family.tokens_per_parameter:g} tokens per scaling parameter")
    print_table([_row(hp, device) for hp in models], [*HEADERS, f"GB ({device})"])


def _document(hp: Hyperparameters, device: str) -> dict[str, object]:
    return {
        **asdict(hp),
        "parameters_total": hp.parameters.total,
        "parameters_scaling": hp.parameters.scaling,
        "tokens": hp.tokens,
        "flops": hp.flops,
        "peak_memory_bytes": peak_memory(hp, 1, device),
    }


def _row(hp: Hyperparameters, device: str) -> list[str]:
    return [
        str(hp.depth),
        str(hp.width),
        str(hp.heads),
        f"{hp.parameters.total:,}",
        f"{hp.parameters.scaling:,}",
        f"{hp.flops_per_token:.4e}",
        count(hp.tokens),
        f"{hp.batch_tokens:,}",
        f"{hp.steps:,}",
        f"{hp.flops:.3g}",
        f"{peak_memory(hp, 1, device) / 1e9:.3g}",
    ]
