"""Block sizes of the trainer's computation, shared by the torch modules and by the memory estimate.

They decide in which order floating-point numbers are added, and so the bits of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator

ATTENTION_BLOCK = 64
"""Queries of one block of banded attention: smaller matrix products are slower, larger blocks read
more keys beyond the window."""
SHARED_ELEMENTS = 2**17
"""Elements from which ranks share the update of a buffer: below, the exchange costs more time than
it saves."""
EVALUATION_TOKENS = 2**13
"""Maximum tokens of one forward pass of an evaluation (at least one row)."""
LOGITS = {"cpu": 2**19, "cuda": 2**28, "mps": 2**28}
"""Logits held at once: what stays in a core's cache, or a share of a GPU's memory."""
MIN_LOGIT_TOKENS = 128
"""Minimum tokens whose logits are computed at once: matrix products of fewer rows are slow."""


def attention_blocks(length: int, window: int) -> Iterator[tuple[int, int, int]]:
    """Yield each block's first query, the query after its last, and the first key in its reach."""
    for start in range(0, length, ATTENTION_BLOCK):
        stop = min(start + ATTENTION_BLOCK, length)
        yield start, stop, max(0, start - window)


def banded_pairs(length: int, window: int) -> int:
    """Return the query-key pairs that the blocks of banded attention compute."""
    blocks = attention_blocks(length, window)
    return sum((stop - start) * (stop - first_key) for start, stop, first_key in blocks)


def logit_tokens(device: str, vocab_size: int) -> int:
    """Return the number of tokens whose logits are computed at once on "cpu", "cuda" or "mps"."""
    return max(MIN_LOGIT_TOKENS, LOGITS.get(device, LOGITS["cuda"]) // vocab_size)
