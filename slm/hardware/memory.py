"""What a model takes of one rank's memory, before it is built: the closed forms, and the micro-batch that fits.

Symbols as in recipe.py, and: r rows a pass, n = r·T its tokens, R ranks, t layers with a value embedding, W = d² a
square matrix, E = V·d a table. c bytes hold a number of the computation: 4 on a CPU, 2 on CUDA. A stream X = n·d·c
is one tensor (B, T, d).

Held always     parameters, gradients and Muon's momentum, 4 bytes each; AdamW's two moments like their parameters:
                4 bytes, or 2 where CUDA stores the embeddings (wte, value_embeds) in bfloat16. Over R ranks a large
                buffer is padded to R equal parts, of whole matrices, and a rank holds the state of its own part.
A layer keeps   its input, norm, rotated queries and keys, attention's output: 5 X; the MLP's norm and active: 5 X;
                values: 1 X, and their embedding 1 X. Factors of norms and gates: n·(2 + 2h) and n·h numbers.
                Attention: the weights of the band, or the h·n sums of exponentials.
                x0 and the token's norm, 2 X, lie under all layers; the first one's input is x0. CUDA adds the
                matrices in bfloat16, 12·W·L·c.
Backward        a layer's passage takes 8 X + 4·W·c more (the gradient of its MLP), and leaves its matrices' gradients,
                12·W·c, and its table's, E·c, which are held until all layers are through.
                The worst layer counts: the last where activations outweigh weights, else the first.
End of it       all those gradients beside one stack of 4·W·L float32 numbers, or the tables' twice; and 4 X.
Head            what all layers keep, 2 X and the head's gradient, under the logits of a chunk or 1 X.
Update          Muon on the stack of the MLP, S = 8·W·L/R numbers: its update, two copies and two Gram matrices of
                S/4, 14·S bytes; on CUDA, where copies are bfloat16, 12·S. Ranks on CPUs add gloo's copies,
                which live until the step ends: all gradients, and under them S's or all parameters.
Evaluation      2^13 tokens (or one row) without gradients: 20 X, or in a band 14 X and its weights.
Peak            what is always held, and the largest of the others.

Measured on CPUs alone (`python -m tests.memory`): the CUDA branch is the same account in bfloat16 without what
`torch.compile` saves, and that of MPS the CPU's with h·T²·r weights kept a layer. Neither has met a device yet.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import cache

from slm.recipe import Hyperparameters

EVALUATION_TOKENS = 2**13
"""Tokens of one pass of an evaluation, at most (at least one row)."""
SHARED = 2**17
"""Elements from which ranks share the update of a buffer."""
BLOCK = 64
"""Queries of one block of the band."""
LOGITS = {"cpu": 2**19, "cuda": 2**28, "mps": 2**28}
"""Logits held at once, of at least FEWEST tokens."""
FEWEST = 128
"""Tokens whose logits are made at once, at least."""
COMPUTED = {"cpu": 4, "cuda": 2, "mps": 4}
"""Bytes of a number of the computation, by device."""
FILLED = {"cpu": 0.6, "cuda": 0.8, "mps": 0.8}
"""Share of a memory that an estimate may fill. The estimate errs by 15 % at most; glibc, told to keep what it is given,
took up to 1.65 times the tensors, as blocks that torch returns have no room for equal ones with their alignment."""
PROCESS = 2**29
"""Bytes of a rank that has no tensors yet: torch, its libraries, on a GPU the context."""


def peak_memory(given: Hyperparameters, rows: int, device: str, ranks: int = 1) -> int:
    """Bytes of tensors on one rank at their peak, in training with `rows` a pass on "cpu", "cuda" or "mps".

    On a CPU within 15 % of the allocator's peak above 500 MB; the process itself comes on top.
    """
    return _held(given, device, ranks) + max(
        _backward(given, rows, device),
        _end_of_backward(given, rows, device),
        _head(given, rows, device),
        _update(given, device, ranks),
        _evaluation(given, device),
    )


def largest_micro_batch(given: Hyperparameters, memory: int, device: str, ranks: int = 1) -> int:
    """The most rows a pass that `memory` bytes of one rank hold: all its rows of a step, or a power of two of them,
    so that passes are even wherever the ranks are a power of two. One row may fill it; more keep to FILLED.

    Raises ValueError where not even one row fits.
    """

    def needs(rows: int) -> int:
        return peak_memory(given, rows, device, ranks)

    share = -(-given.batch_rows // ranks)
    choices = [*(2**power for power in range((share - 1).bit_length())), share]
    if (need := PROCESS + needs(1)) > memory:
        raise ValueError(
            f"depth {given.depth}: one row of {given.sequence_length} tokens needs {need / 1e9:.3g} GB a rank, and "
            f"there are {memory / 1e9:.3g}: take fewer ranks on a machine, more machines, or a smaller depth"
        )
    return choices[
        max(1, bisect_right(choices, FILLED[device] * (memory - PROCESS), key=needs)) - 1
    ]


def _held(given: Hyperparameters, device: str, ranks: int) -> int:
    """Parameters, gradients and the optimisers' state."""
    square, counts = given.width**2, given.parameters
    matrices = 12 * square * given.depth
    embeddings = counts.wte + counts.value_embeds
    stored = COMPUTED[device]
    return (
        _buffer(matrices // 3, square, 4, 1, ranks)
        + _buffer(2 * matrices // 3, 4 * square, 4, 1, ranks)
        + _buffer(counts.transformer_matrices - matrices + counts.scalars, 1, 4, 2, ranks)
        + _buffer(counts.lm_head, 1, 4, 2, ranks)
        + _buffer(embeddings, 1, stored, 2, ranks)
    )


def _buffer(numbers: int, unit: int, size: int, moments: int, ranks: int) -> int:
    """A buffer, its gradients, and `moments` of the same size of the part that is this rank's."""
    if numbers < SHARED:
        return numbers * size * (2 + moments)
    part = -(-numbers // (ranks * unit)) * unit
    return part * size * (2 * ranks + moments)


def _stream(given: Hyperparameters, rows: int, device: str) -> int:
    return rows * given.sequence_length * given.width * COMPUTED[device]


def _kept(given: Hyperparameters, rows: int, device: str, layer: int) -> int:
    """What a layer keeps for the backward pass."""
    tokens, heads, embeds = rows * given.sequence_length, given.heads, layer in given.value_layers
    streams = 11 + embeds - (layer == 0)
    factors = 4 * tokens * (2 + 2 * heads + embeds * heads)
    return (
        streams * _stream(given, rows, device)
        + factors
        + _weights(given, rows, device, given.windows[layer])
    )


def _weights(given: Hyperparameters, rows: int, device: str, window: int) -> int:
    """What attention keeps beside its inputs and output: softmax weights where they exist, else a sum a query."""
    length, heads = given.sequence_length, rows * given.heads
    if device == "mps":
        return heads * length**2 * COMPUTED[device]
    if device == "cpu" and window < length - 1:
        return 4 * heads * _pairs(length, window)
    return 4 * heads * length


@cache
def _pairs(length: int, window: int) -> int:
    """Queries and keys that the blocks of a band bring together."""
    spans = [(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]
    return sum((stop - start) * (stop - max(0, start - window)) for start, stop in spans)


def _under(given: Hyperparameters, rows: int, device: str) -> int:
    """What lies under all layers: x0, the token's norm, and matrices that were cast."""
    cast = 12 * given.width**2 * given.depth * 2 if device == "cuda" else 0
    return 2 * _stream(given, rows, device) + cast


def _backward(given: Hyperparameters, rows: int, device: str) -> int:
    """The worst layer: what it and those before it keep, its passage, and the gradients that those after it left."""
    stream, square = _stream(given, rows, device), given.width**2 * COMPUTED[device]
    kept, passed, worst = 0, _gradients(given, device), 0
    for layer in range(given.depth):
        kept += _kept(given, rows, device, layer)
        passed -= (
            12 * square
            + (layer in given.value_layers) * given.vocab_size * given.width * COMPUTED[device]
        )
        worst = max(worst, kept + passed)
    return _under(given, rows, device) + worst + 8 * stream + 4 * square


def _gradients(given: Hyperparameters, device: str) -> int:
    """Gradients of matrices and value embeddings that wait for each other."""
    return (12 * given.width**2 * given.depth + given.parameters.value_embeds) * COMPUTED[device]


def _end_of_backward(given: Hyperparameters, rows: int, device: str) -> int:
    stack, tables = (
        4 * given.width**2 * given.depth * 4,
        given.parameters.value_embeds * COMPUTED[device],
    )
    return max(_gradients(given, device) + stack, 2 * tables) + 4 * _stream(given, rows, device)


def _head(given: Hyperparameters, rows: int, device: str) -> int:
    tokens, vocab, stream = (
        rows * given.sequence_length,
        given.vocab_size,
        _stream(given, rows, device),
    )
    kept = sum(_kept(given, rows, device, layer) for layer in range(given.depth))
    chunk = max(FEWEST, LOGITS[device] // vocab)
    logits = (
        (20 if device == "cuda" else 16)
        * min(chunk, tokens)
        * vocab
        // (1 if tokens > chunk else 2)
    )
    cast = 2 * given.parameters.lm_head if device == "cuda" else 0
    gradient = 4 * given.parameters.lm_head
    return _under(given, rows, device) + kept + 2 * stream + gradient + max(cast + logits, stream)


def _update(given: Hyperparameters, device: str, ranks: int) -> int:
    matrices = -(-2 * given.depth // ranks)
    stack = 4 * given.width**2 * matrices * (12 if device == "cuda" else 14)
    copied = 4 * given.parameters.total if device == "cpu" and ranks > 1 else 0
    return copied + max(copied, stack)


def _evaluation(given: Hyperparameters, device: str) -> int:
    rows = max(1, EVALUATION_TOKENS // given.sequence_length)
    stream = _stream(given, rows, device)
    cast = 12 * given.width**2 * given.depth * 2 if device == "cuda" else 0
    weights = max(_weights(given, rows, device, window) for window in given.windows)
    return cast + max(20 * stream, 14 * stream + weights)
