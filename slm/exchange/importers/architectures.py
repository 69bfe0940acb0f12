"""Families with exactly known counts, to recognise from a row's own numbers.

nanochat 2025     width 64·L; V = 65,536, later 32,768; matrices 12·d² per layer; no value
                  embeddings, no scalars; every layer attends to the whole context.
nanochat 2026-02  value embeddings on every other layer with gates of 32 channels per head, 2
                  scalars per layer; windows SSSL, short = T/2.
nanochat 2026-07  the recipe `nanochat` (slm/recipe.py).
FLOPs per token are 6·(matrices + head + smear channels) + Σ_layers 12·d·window in all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from slm.recipe import Parameters, nanochat


@dataclass(frozen=True)
class Architecture:
    """Family at a given depth, with its exact counts."""

    name: str
    width: int
    parameters: Parameters
    flops_per_token: int
    context: int
    """Context, in tokens, for which the FLOPs hold."""

    def counts(self) -> dict[str, int]:
        """Return the counts by the columns of an imported row."""
        groups = self.parameters
        return {
            "parameters_wte": groups.wte,
            "parameters_value_embeds": groups.value_embeds,
            "parameters_lm_head": groups.lm_head,
            "parameters_matrices": groups.transformer_matrices,
            "parameters_scalars": groups.scalars,
            "parameters_scaling": groups.scaling,
            "parameters_total": groups.total,
            "flops_per_token": self.flops_per_token,
        }


def known_architectures(depth: int, context: int | None) -> Iterator[Architecture]:
    """Yield the known families at a depth, at nanochat's context of 2,048 if a row names none."""
    tokens = context or nanochat.sequence_length
    for vocab in (32768, 65536):
        yield _nanochat_2025(depth, vocab, tokens)
    yield _nanochat_2026_02(depth, tokens)
    is_power_of_two = tokens & (tokens - 1) == 0
    if is_power_of_two:
        hp = replace(nanochat, sequence_length=tokens)(depth, steps=1)
        yield Architecture("nanochat 2026-07", hp.width, hp.parameters, hp.flops_per_token, tokens)


def _nanochat_2025(depth: int, vocab: int, context: int) -> Architecture:
    width = 64 * depth
    parameters = Parameters(vocab * width, 0, vocab * width, 12 * width**2 * depth, 0)
    flops = 6 * parameters.scaling + 12 * width * context * depth
    return Architecture(f"nanochat 2025 with {vocab:,} tokens", width, parameters, flops, context)


def _nanochat_2026_02(depth: int, context: int) -> Architecture:
    vocab = 32768
    width = -(-64 * depth // 128) * 128
    value_embeds = (depth + 1) // 2
    gates = value_embeds * (width // 128) * 32
    parameters = Parameters(
        vocab * width,
        value_embeds * vocab * width,
        vocab * width,
        12 * width**2 * depth + gates,
        2 * depth,
    )
    windows = sum(
        context if layer % 4 == 3 or layer == depth - 1 else context // 2 for layer in range(depth)
    )
    flops = 6 * parameters.scaling + 12 * width * windows
    return Architecture("nanochat 2026-02", width, parameters, flops, context)
