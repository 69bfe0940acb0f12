"""Depth and horizon -> Hyperparameters: the only configuration, and its formula sheet.

Symbols: L depth, d width, h heads, q head dimension, T sequence length, V vocabulary, N scaling
parameters, D training tokens, B batch in tokens, C training FLOPs. `ref` is the same recipe at its
reference depth and batch.

Shape           d = ceil(aspect_ratio·L / q)·q,  h = d/q,  V padded up to a multiple of 64.
Windows         pattern SSSL tiled over the layers, the last one long. Long = T, short = T/4 rounded
                up to a multiple of 128 and at most T. A window of w sees the token itself and the w
                tokens before it.
Parameters      wte = V·d; value_embeds = V·d on every other layer, the last one included; lm_head =
                V·d; transformer_matrices = 12·d² a layer (4 attention, 8 MLP), and a gate h ×
                min(12, d) a value embedding; scalars = 2 a layer, min(24, d) smear channels, smear,
                backout. Scaling parameters N = transformer_matrices + lm_head: the convention with
                the cleanest exponents.
FLOPs a token   6·(transformer_matrices + lm_head + smear channels) + Σ_layers 12·h·q·window,
                forward and backward.
Horizon         D = tokens_per_parameter·N; or C / (FLOPs a token); or ratio·N; or steps·B. Settled
                before all below.
Batch           B = 2^round(log2(B_ref·(D/D_ref)^0.383)) (Power Lines, arXiv 2505.13738), at least
                one row. For a horizon in steps, D = steps·B makes this an equation in B; its
                solution is log2 B = round(log2(B_ref·(steps/D_ref)^0.383) / (1 - 0.383)).
Steps           D // B; at a FLOPs budget round(D / B).
Learning rates  every one but smear and backout times √(B/B_ref); embeddings and head also times
                √(d_ref/d). Warm-up, constant, then linear down over the last 65 % to 5 %.
Weight decay    of the matrices: 0.28·√(B/B_ref)·(D_ref/D) (T_epoch, arXiv 2405.13698), cosine to
                zero, cautious.
Muon            momentum 0.85 -> 0.97 over its warm-up, then -> 0.90 over the warm-down; its update
                is in optimizer.py.

`nanochat` is karpathy/nanochat of July 2026 (commit 92d63d4). `pocket` keeps every law and re-bases
the constants for two CPU cores; its docstring below gives the measurements.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

BATCH_EXPONENT = 0.383
LARGEST_HORIZON = 1e40
"""FLOPs, tokens a parameter or steps beyond which a horizon must be a typing error."""


@dataclass(frozen=True)
class AdamW:
    """Settings of one AdamW parameter group."""

    lr: float
    """Learning rate at the reference batch and width (in a Recipe), or the one to use (in
    Hyperparameters)."""
    beta1: float
    beta2: float
    decay: float
    """Decoupled weight decay."""


@dataclass(frozen=True)
class Parameters:
    """Exact parameter counts by group."""

    wte: int
    value_embeds: int
    lm_head: int
    transformer_matrices: int
    """Parameters inside the blocks, value gates included."""
    scalars: int
    """Residual, x0, smear and backout scalars and the smear gate."""

    @property
    def total(self) -> int:
        """The sum of all groups."""
        return sum(vars(self).values())

    @property
    def scaling(self) -> int:
        """N of the scaling laws: transformer matrices and head."""
        return self.transformer_matrices + self.lm_head


@dataclass(frozen=True)
class Hyperparameters:
    """Hyperparameters of one model and its training, resolved to numbers."""

    depth: int
    """Layers."""
    width: int
    """Model dimension."""
    heads: int
    """Attention heads, the same number for queries, keys and values."""
    head_dim: int
    """Channels of a head."""
    sequence_length: int
    """Tokens of context."""
    vocab_size: int
    """Tokens in the vocabulary, padded to a multiple of 64."""
    windows: tuple[int, ...]
    """Attention window of each layer, in tokens before the current one."""
    parameters: Parameters
    flops_per_token: int
    """FLOPs a training token, forward and backward."""
    tokens_asked: float
    """Tokens of the horizon, before rounding to whole steps."""
    batch_tokens: int
    """Tokens a step."""
    steps: int
    """Optimiser steps."""
    warmup_steps: int
    """Steps of linear learning-rate warm-up."""
    warmdown_steps: int
    """Steps of linear warm-down at the end."""
    final_lr: float
    """Learning rate at the end, as a share of the peak."""
    matrix_lr: float
    """Muon learning rate."""
    matrix_decay: float
    """Muon weight decay at the start (cosine to zero)."""
    momentum: tuple[float, float, float]
    """Muon momentum at the start, after its warm-up, at the end."""
    momentum_warmup_steps: int
    matrix_beta2: float
    """Decay of Muon's factored second moment."""
    lm_head: AdamW
    wte: AdamW
    value_embeds: AdamW
    resid: AdamW
    x0: AdamW
    smear: AdamW
    """Group of the smear and backout parameters."""
    validation_tokens: int
    """Tokens that val_bpb reads."""
    split_documents: bool
    """Whether documents longer than a row are split into rows (else cropped)."""

    @property
    def value_layers(self) -> tuple[int, ...]:
        """Layers with a value embedding: every other one, the last included."""
        return tuple(range((self.depth - 1) % 2, self.depth, 2))

    @property
    def tokens(self) -> int:
        """Training tokens: steps·batch_tokens."""
        return self.steps * self.batch_tokens

    @property
    def flops(self) -> int:
        """Training FLOPs: flops_per_token·tokens."""
        return self.flops_per_token * self.tokens

    @property
    def batch_rows(self) -> int:
        """Rows of sequence_length tokens a step."""
        return self.batch_tokens // self.sequence_length

    @property
    def train_rows(self) -> int:
        """Rows that training reads."""
        return self.steps * self.batch_rows

    @property
    def validation_rows(self) -> int:
        """Rows that val_bpb reads."""
        return self.validation_tokens // self.sequence_length


@dataclass(frozen=True)
class Recipe:
    """Constants of a family of models. Called with a depth and at most one horizon, it returns
    Hyperparameters.

    >>> nanochat(12).tokens_asked == 12 * nanochat(12).parameters.scaling
    True
    """

    name: str
    """Name of the family, for people."""
    aspect_ratio: int = 64
    """Width a layer, before rounding up to whole heads."""
    head_dim: int = 128
    """Channels a head."""
    sequence_length: int = 2048
    """Tokens of context; a power of two."""
    vocab_size: int = 32768
    """Tokens in the vocabulary."""
    window_pattern: str = "SSSL"
    """Short and long windows, tiled over the layers."""
    tokens_per_parameter: float = 12.0
    """Compute-optimal tokens per scaling parameter."""
    reference_depth: int = 12
    """Depth at which batch, rates and decay below hold."""
    reference_batch: int = 2**19
    """Tokens a step at the reference depth."""
    warmup_steps: int = 40
    """Steps of learning-rate warm-up."""
    momentum_warmup_steps: int = 400
    """Steps of momentum warm-up."""
    warmdown_share: float = 0.65
    """Share of the steps over which the learning rate falls."""
    final_lr: float = 0.05
    """Learning rate at the end, as a share of the peak."""
    matrix_lr: float = 0.02
    """Muon learning rate."""
    matrix_decay: float = 0.28
    """Muon weight decay."""
    matrix_beta2: float = 0.9
    """Decay of Muon's factored second moment."""
    momentum: tuple[float, float, float] = (0.85, 0.97, 0.90)
    """Muon momentum at the start, after its warm-up, at the end."""
    lm_head: AdamW = AdamW(0.008, 0.8, 0.96, 0.01)
    wte: AdamW = AdamW(0.3, 0.8, 0.995, 0.001)
    value_embeds: AdamW = AdamW(0.15, 0.8, 0.995, 0.01)
    resid: AdamW = AdamW(0.005, 0.8, 0.95, 0.05)
    x0: AdamW = AdamW(0.5, 0.96, 0.95, 0.0)
    smear: AdamW = AdamW(0.2, 0.8, 0.95, 0.0)
    """Group of the smear and backout parameters; its rate is never scaled."""
    validation_tokens: int = 80 * 2**19
    """Tokens that val_bpb reads."""
    split_documents: bool = False
    """Whether documents longer than a row are split into rows (else cropped, the rest dropped)."""

    def __call__(
        self,
        depth: int,
        *,
        flops: float | None = None,
        ratio: float | None = None,
        steps: int | None = None,
    ) -> Hyperparameters:
        """Return the hyperparameters of one model: compute-optimal, or at a FLOPs budget, a
        tokens-per-parameter ratio, or for a number of steps (a smoke run).

        Raises ValueError for a depth below 1, more than one horizon, or a horizon that holds no
        step.
        """
        width, parameters, windows, flops_per_token = self._shape(depth)
        tokens, batch, steps = self._horizon(depth, flops, ratio, steps)
        scale = math.sqrt(batch / self.reference_batch)
        table = scale * math.sqrt(self._width(self.reference_depth) / width)
        return Hyperparameters(
            depth=depth,
            width=width,
            heads=width // self.head_dim,
            head_dim=self.head_dim,
            sequence_length=self.sequence_length,
            vocab_size=_round_up(self.vocab_size, 64),
            windows=windows,
            parameters=parameters,
            flops_per_token=flops_per_token,
            tokens_asked=tokens,
            batch_tokens=batch,
            steps=steps,
            warmup_steps=self.warmup_steps,
            warmdown_steps=round(self.warmdown_share * steps),
            final_lr=self.final_lr,
            matrix_lr=self.matrix_lr * scale,
            matrix_decay=self.matrix_decay * scale * self._reference_tokens() / tokens,
            momentum=self.momentum,
            momentum_warmup_steps=self.momentum_warmup_steps,
            matrix_beta2=self.matrix_beta2,
            lm_head=_scaled(self.lm_head, table),
            wte=_scaled(self.wte, table),
            value_embeds=_scaled(self.value_embeds, table),
            resid=_scaled(self.resid, scale),
            x0=_scaled(self.x0, scale),
            smear=self.smear,
            validation_tokens=self.validation_tokens,
            split_documents=self.split_documents,
        )

    def _horizon(
        self, depth: int, flops: float | None, ratio: float | None, steps: int | None
    ) -> tuple[float, int, int]:
        """Return requested tokens, tokens a step, and steps. Raises ValueError as a call does."""
        requested = {"flops": flops, "ratio": ratio, "steps": steps}
        horizons = {name: value for name, value in requested.items() if value is not None}
        check_one_horizon(horizons)
        for name, value in horizons.items():
            if not 0 < value <= LARGEST_HORIZON:
                limit = f"a horizon must be positive and below {LARGEST_HORIZON:g}"
                raise ValueError(f"{name} {str(value)[:20]}: {limit}")
        if steps is not None:
            batch = self._batch(self._log2_batch(steps) / (1 - BATCH_EXPONENT))
            return steps * batch, batch, steps
        _, parameters, _, flops_per_token = self._shape(depth)
        ratio = ratio or self.tokens_per_parameter
        tokens = flops / flops_per_token if flops else parameters.scaling * ratio
        batch = self._batch(self._log2_batch(max(tokens, 1.0)))
        steps = round(tokens / batch) if flops else int(tokens // batch)
        if steps < 1:
            horizon = f"flops {flops:g}" if flops else f"ratio {ratio:g}"
            raise ValueError(
                f"{horizon} at depth {depth}: {tokens:.0f} tokens are less than one step of {batch}"
            )
        return tokens, batch, steps

    def _width(self, depth: int) -> int:
        return _round_up(self.aspect_ratio * depth, self.head_dim)

    def _shape(self, depth: int) -> tuple[int, Parameters, tuple[int, ...], int]:
        """Return the width, parameters, windows and FLOPs a token of a depth."""
        if depth < 1:
            raise ValueError(f"depth {depth}: a model has at least one layer")
        width = self._width(depth)
        vocab = _round_up(self.vocab_size, 64)
        tables = (depth + 1) // 2
        gates = tables * (width // self.head_dim) * min(12, width)
        smear_channels = min(24, width)
        parameters = Parameters(
            wte=vocab * width,
            value_embeds=tables * vocab * width,
            lm_head=vocab * width,
            transformer_matrices=12 * width**2 * depth + gates,
            scalars=2 * depth + smear_channels + 2,
        )
        windows = self._windows(depth)
        attention = sum(12 * width * window for window in windows)
        flops_per_token = 6 * (parameters.scaling + smear_channels) + attention
        return width, parameters, windows, flops_per_token

    def _windows(self, depth: int) -> tuple[int, ...]:
        length = self.sequence_length
        short = min(_round_up(-(-length // 4), 128), length)
        sizes = {"S": short, "L": length}
        pattern = self.window_pattern
        tiled = [sizes[pattern[layer % len(pattern)]] for layer in range(depth - 1)]
        return (*tiled, length)

    def _reference_tokens(self) -> float:
        return self.tokens_per_parameter * self._shape(self.reference_depth)[1].scaling

    def _log2_batch(self, horizon: float) -> float:
        ratio = horizon / self._reference_tokens()
        return math.log2(self.reference_batch) + BATCH_EXPONENT * math.log2(ratio)

    def _batch(self, log2: float) -> int:
        """Return the nearest power of two of tokens that holds at least one row."""
        length = self.sequence_length
        batch = max(int(2 ** max(round(log2), 0)), length)
        if batch % length:
            raise ValueError(f"sequence_length {length}: must be a power of two")
        return batch


def check_one_horizon(names: Collection[str]) -> None:
    """Raise ValueError if more than one horizon is named."""
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)} given together: choose one horizon")


def _scaled(group: AdamW, factor: float) -> AdamW:
    return replace(group, lr=group.lr * factor)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


nanochat = Recipe("nanochat")

pocket = Recipe(
    "pocket",
    aspect_ratio=8,
    head_dim=8,
    sequence_length=128,
    vocab_size=512,
    tokens_per_parameter=16.0,
    reference_depth=4,
    reference_batch=1024,
    momentum_warmup_steps=100,
    x0=replace(nanochat.x0, lr=0.05),
    smear=replace(nanochat.smear, lr=0.02),
    validation_tokens=2**17,
    split_documents=True,
)
"""nanochat's laws for two CPU cores; differences, with the measurement behind each (figures in
experiments/LOG.md):

Width           8 a layer, heads of 8, vocabulary 512, context 128: depths 2 to 6 train in minutes
                (`make demo`).
Horizon         16 tokens a scaling parameter. The isoFLOP minima lie near 24
                (experiments/isoflop.py) in a flat valley: at 16 the loss is higher by about what
                seeds differ, and the ladder takes two thirds of the time.
Batch           1,024 tokens at depth 4, where the rates are the reference's own, unscaled
                (experiments/pocket_rates.py: half the batch or twice the rates gain about what
                seeds differ, every other change loses more).
x0, smear       rates of 0.05 and 0.02, a tenth of the reference's, which at this few steps lose
                (same experiment).
Momentum        warm-up over 100 steps, since a run has a few hundred; the learning rate's 40 steps
                are the reference's.
Documents       longer than a row are split and shuffled, not cropped: 11 MB cannot spare what
                cropping drops at 128."""

RECIPES = {recipe.name: recipe for recipe in (nanochat, pocket)}
