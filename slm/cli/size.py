"""`slm size`: the table of a family."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from typer import Option

from slm.cli.options import Json, RecipeName, depths_of, print_json, recipe_of, table
from slm.hardware import devices
from slm.hardware.memory import peak_memory
from slm.recipe import Hyperparameters
from slm.text import count


def size(
    depths: Annotated[
        str, Option(help="Depths: 10-20, or 4,8,12.", metavar="DEPTHS")
    ] = "4,8,12,16,20,24",
    recipe: RecipeName = None,
    as_json: Json = False,
) -> None:
    """Show a family by depth: shape, parameters, FLOPs, horizon, batch, memory of one row."""
    family = recipe_of(recipe)
    device = "cuda" if devices.gpu_count() else "cpu"
    models = [family(depth) for depth in depths_of(depths)]
    if as_json:
        documents = [_document(hp, device) for hp in models]
        print_json({"recipe": family.name, "device": device, "models": documents})
        return
    print(f"recipe {family.name}: {family.tokens_per_parameter:g} tokens per scaling parameter")
    print(table([_row(hp, device) for hp in models]))


def _document(hp: Hyperparameters, device: str) -> dict[str, object]:
    return {
        **asdict(hp),
        "parameters_total": hp.parameters.total,
        "parameters_scaling": hp.parameters.scaling,
        "tokens": hp.tokens,
        "flops": hp.flops,
        "peak_memory_bytes": peak_memory(hp, 1, device),
    }


def _row(hp: Hyperparameters, device: str) -> dict[str, str]:
    return {
        "depth": str(hp.depth),
        "width": str(hp.width),
        "heads": str(hp.heads),
        "parameters": f"{hp.parameters.total:,}",
        "scaling N": f"{hp.parameters.scaling:,}",
        "FLOPs/token": f"{hp.flops_per_token:.4e}",
        "tokens": count(hp.tokens),
        "batch": f"{hp.batch_tokens:,}",
        "steps": f"{hp.steps:,}",
        "FLOPs": f"{hp.flops:.3g}",
        f"GB ({device})": f"{peak_memory(hp, 1, device) / 1e9:.3g}",
    }
