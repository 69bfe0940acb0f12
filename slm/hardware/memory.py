"""Peak memory of one rank in closed form, before the model is built, and the micro-batch that fits.

Symbols as in recipe.py, and: r rows a pass, n = r·T its tokens, R ranks, t layers with a value
embedding, W = d² a square matrix, E = V·d a table. c bytes hold a number of the computation: 4 on a
CPU, 2 on CUDA. A stream X = n·d·c is one tensor (B, T, d).

Resident        parameters, gradients and Muon's momentum, 4 bytes each; AdamW's two moments like
                their parameters: 4 bytes, or 2 where CUDA stores the embeddings (wte, value_embeds)
                in bfloat16. Over R ranks a large buffer is padded to R equal parts, of whole
                matrices, and a rank holds the optimiser state of its own part.
Layer           its input, norm, rotated queries and keys, and attention's output: 5 X; the MLP's
                norm and activations: 5 X; values: 1 X, and their embedding 1 X. Factors of norms
                and gates: n·(2 + 2h) and n·h numbers. Attention: the softmax weights of the band,
                or the h·n sums of exponentials. All of it is saved for the backward pass. Below all
                layers lie x0 and the token's norm, 2 X; the first layer's input is x0. CUDA adds
                the matrices in bfloat16, 12·W·L·c.
Backward        passing a layer takes 8 X + 4·W·c more (the gradient of its MLP), and leaves the
                gradients of its matrices, 12·W·c, and of its table, E·c, which live until all
                layers are through. The worst layer counts: the last where activations outweigh
                weights, else the first.
Backward's end  all those gradients next to one stack of 4·W·L float32 numbers, or the tables'
                twice; and 4 X.
Head            all that layers save, 2 X and the head's gradient, below the logits of a chunk or 1
                X.
Update          Muon on the stack of the MLP, S = 8·W·L/R numbers: its update, two copies and two
                Gram matrices of S/4, 14·S bytes; on CUDA, where copies are bfloat16, 12·S. Ranks on
                CPUs add gloo's copies, which live until the step ends: all gradients, and below
                them S's or all parameters.
Evaluation      2^13 tokens (or one row) without gradients: 20 X, or in a band 14 X and its weights.
Peak            the resident memory, and the largest of the other phases.

Measured on CPUs alone (`python -m tests.memory`): the CUDA branch is the same account in bfloat16
without what `torch.compile` saves, and that of MPS the CPU's with h·T²·r weights saved a layer.
Neither has been measured on a device yet.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import cache

from slm.hardware.block_sizes import EVALUATION_TOKENS, SHARED_ELEMENTS, banded_pairs, logit_tokens
from slm.recipe import Hyperparameters

ELEMENT_BYTES = {"cpu": 4, "cuda": 2, "mps": 4}
"""Bytes of one number of the computation, by device."""
USABLE_SHARE = {"cpu": 0.6, "cuda": 0.8, "mps": 0.8}
"""Share of the memory that an estimate may fill. The estimate errs by 15 % at most; glibc,
configured to retain freed memory, took up to 1.65 times the tensors: blocks that torch frees have
no room for equal ones with their alignment."""
PROCESS = 2**29
"""Bytes of a rank that has no tensors yet: torch, its libraries, on a GPU the context."""

_cached_pairs = cache(banded_pairs)


def peak_memory(hp: Hyperparameters, rows: int, device: str, ranks: int = 1) -> int:
    """Return the peak bytes of tensors on one rank, in training with `rows` a pass.

    `device` is "cpu", "cuda" or "mps". On a CPU within 15 % of the allocator's peak above 500 MB;
    the process itself (PROCESS) comes on top.
    """
    return RankMemory(hp, rows, device, ranks).peak()


def largest_micro_batch(hp: Hyperparameters, memory: int, device: str, ranks: int = 1) -> int:
    """Return the most rows a pass that fit into `memory` bytes of one rank.

    It is all the rank's rows of a step, or a power of two, so that passes are even wherever the
    ranks are a power of two. One row may fill the memory; more stay within USABLE_SHARE.

    Raises ValueError where not even one row fits.
    """

    def peak(rows: int) -> int:
        return PROCESS + peak_memory(hp, rows, device, ranks)

    one_row = peak(1)
    if one_row > memory:
        raise ValueError(
            f"depth {hp.depth}: one row of {hp.sequence_length} tokens needs {one_row / 1e9:.3g} "
            f"GB a rank, and there are {memory / 1e9:.3g}: take fewer ranks on a machine, more "
            "machines, or a smaller depth"
        )
    share = -(-hp.batch_rows // ranks)
    powers = [2**power for power in range((share - 1).bit_length())]
    choices = [*powers, share]
    usable = PROCESS + USABLE_SHARE[device] * (memory - PROCESS)
    fitting = bisect_right(choices, usable, key=peak)
    return choices[max(1, fitting) - 1]


class RankMemory:
    """The terms of the account above, in bytes, for one rank and `rows` a pass."""

    def __init__(self, hp: Hyperparameters, rows: int, device: str, ranks: int = 1) -> None:
        self.hp = hp
        self.rows = rows
        self.device = device
        self.ranks = ranks
        self.on_cuda = device == "cuda"
        self.element = ELEMENT_BYTES[device]
        """Bytes of one number of the computation."""
        self.square = hp.width**2
        """Numbers of one square matrix, W."""
        self.matrices = 12 * self.square * hp.depth
        """Numbers of the matrices of all layers."""
        self.tokens = rows * hp.sequence_length
        """Tokens of a pass, n."""
        self.stream = self.tokens * hp.width * self.element
        """A tensor (B, T, d)."""
        self.cast_matrices = 2 * self.matrices if self.on_cuda else 0
        """The matrices in bfloat16, on CUDA."""
        self.below_layers = 2 * self.stream + self.cast_matrices
        """x0, the token's norm, and the cast matrices, which live below all layers."""
        self.gradients = (self.matrices + hp.parameters.value_embeds) * self.element
        """Gradients of matrices and value embeddings, which live until all layers are through."""

    def peak(self) -> int:
        """Return the resident memory and the largest of the phases."""
        return self.resident() + max(
            self.backward(),
            self.backward_end(),
            self.head(),
            self.update(),
            self.evaluation(),
        )

    def resident(self) -> int:
        """Parameters, gradients and the state of both optimisers."""
        counts = self.hp.parameters
        scalars_and_gates = counts.transformer_matrices - self.matrices + counts.scalars
        return (
            self._buffer(self.matrices // 3, self.square, moments=1)
            + self._buffer(2 * self.matrices // 3, 4 * self.square, moments=1)
            + self._buffer(scalars_and_gates)
            + self._buffer(counts.lm_head)
            + self._buffer(counts.wte + counts.value_embeds, size=self.element)
        )

    def _buffer(self, numbers: int, unit: int = 1, size: int = 4, moments: int = 2) -> int:
        """A buffer and its gradients, and `moments` of the size of this rank's part of it."""
        ranks = self.ranks
        if numbers < SHARED_ELEMENTS:
            ranks = unit = 1
        part = -(-numbers // (ranks * unit)) * unit
        return part * size * (2 * ranks + moments)

    def layer(self, layer: int) -> int:
        """Tensors that a layer saves for the backward pass."""
        hp = self.hp
        has_table = layer in hp.value_layers
        streams = 11 + has_table - (layer == 0)
        factors = 2 + 2 * hp.heads + has_table * hp.heads
        attention = self.attention_weights(hp.windows[layer])
        return streams * self.stream + 4 * self.tokens * factors + attention

    def attention_weights(self, window: int) -> int:
        """Softmax weights where they exist, else one sum of exponentials a query."""
        length = self.hp.sequence_length
        heads = self.rows * self.hp.heads
        if self.device == "mps":
            return heads * length**2 * self.element
        if self.device == "cpu" and window < length - 1:
            return 4 * heads * _cached_pairs(length, window)
        return 4 * heads * length

    def backward(self) -> int:
        """The worst layer: activations up to it, its passage, and gradients of later layers."""
        hp = self.hp
        matrices = 12 * self.square * self.element
        table = hp.vocab_size * hp.width * self.element
        activations = 0
        gradients = self.gradients
        worst = 0
        for layer in range(hp.depth):
            activations += self.layer(layer)
            gradients -= matrices
            if layer in hp.value_layers:
                gradients -= table
            worst = max(worst, activations + gradients)
        passage = 8 * self.stream + 4 * self.square * self.element
        return self.below_layers + worst + passage

    def backward_end(self) -> int:
        """Every gradient next to one float32 stack, or the tables' gradients twice."""
        stack = 16 * self.square * self.hp.depth
        tables = self.hp.parameters.value_embeds * self.element
        return max(self.gradients + stack, 2 * tables) + 4 * self.stream

    def head(self) -> int:
        """The logits of a chunk above everything that the layers save."""
        hp = self.hp
        logit_bytes = 20 if self.on_cuda else 16
        cast = 2 * hp.parameters.lm_head if self.on_cuda else 0
        chunk = logit_tokens(self.device, hp.vocab_size)
        logits = logit_bytes * min(chunk, self.tokens) * hp.vocab_size
        if self.tokens <= chunk:
            logits //= 2
        activations = sum(map(self.layer, range(hp.depth)))
        gradient = 4 * hp.parameters.lm_head
        top = max(cast + logits, self.stream)
        return self.below_layers + activations + 2 * self.stream + gradient + top

    def update(self) -> int:
        """Muon's temporaries, and gloo's copies where ranks are on CPUs."""
        matrices = -(-2 * self.hp.depth // self.ranks)
        stack = 4 * self.square * matrices * (12 if self.on_cuda else 14)
        if self.device != "cpu" or self.ranks == 1:
            return stack
        copies = 4 * self.hp.parameters.total
        return copies + max(copies, stack)

    def evaluation(self) -> int:
        """A forward pass of an evaluation, with rows of its own."""
        rows = max(1, EVALUATION_TOKENS // self.hp.sequence_length)
        batch = RankMemory(self.hp, rows, self.device)
        weights = max(map(batch.attention_weights, self.hp.windows))
        return self.cast_matrices + max(20 * batch.stream, 14 * batch.stream + weights)
