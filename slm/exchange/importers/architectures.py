"""The families whose exact counts are known, to say from a row's own numbers which of them it is.

nanochat 2025     width 64·L; V = 65,536, later 32,768; matrices 12·d² a layer; no value embeddings, no scalars;
                  every layer attends to the whole context.
nanochat 2026-02  value embeddings on every other layer with gates of 32 channels a head, 2 scalars a layer; windows
                  SSSL, short = T/2.
nanochat 2026-07  the recipe `nanochat` (slm/recipe.py).
FLOPs a token are 6·(matrices + head + smear channels) + Σ_layers 12·d·window in all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from slm.recipe import Parameters, nanochat


@dataclass(frozen=True)
class Architecture:
    """One family at one depth."""

    name: str
    """What people call it."""
    width: int
    """Model dimension."""
    parameters: Parameters
    """Exact counts."""
    flops_per_token: int
    """FLOPs a training token."""
    context: int
    """Tokens of context that the FLOPs hold for."""

    def counts(self) -> dict[str, int]:
        """Counts under the names of an imported row."""
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


def known(depth: int, context: int | None) -> Iterator[Architecture]:
    """The known families at a depth; at nanochat's own context of 2,048 where a row names none."""
    tokens = context or nanochat.sequence_length
    for vocab in (32768, 65536):
        yield _before(depth, vocab, tokens)
    yield _february(depth, tokens)
    if tokens & (tokens - 1):
        return
    given = replace(nanochat, sequence_length=tokens)(depth, steps=1)
    yield Architecture(
        "nanochat 2026-07", given.width, given.parameters, given.flops_per_token, tokens
    )


def _before(depth: int, vocab: int, context: int) -> Architecture:
    width = 64 * depth
    counts = Parameters(vocab * width, 0, vocab * width, 12 * width**2 * depth, 0)
    flops = 6 * counts.scaling + 12 * width * context * depth
    return Architecture(f"nanochat 2025 with {vocab:,} tokens", width, counts, flops, context)


def _february(depth: int, context: int) -> Architecture:
    width = -(-64 * depth // 128) * 128
    tables, vocab = (depth + 1) // 2, 32768
    gates = tables * (width // 128) * 32
    counts = Parameters(
        vocab * width,
        tables * vocab * width,
        vocab * width,
        12 * width**2 * depth + gates,
        2 * depth,
    )
    windows = sum(
        context if layer % 4 == 3 or layer == depth - 1 else context // 2 for layer in range(depth)
    )
    return Architecture(
        "nanochat 2026-02", width, counts, 6 * counts.scaling + 12 * width * windows, context
    )
