"""The GPT of the recipes. Matrices of equal shape are stacked over layers: one parameter, one
optimiser update.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm.model import layers, logits
from slm.model.attention import attend
from slm.recipe import Hyperparameters

ROPE_BASE = 100_000
GATE_CHANNELS = 12
SMEAR_CHANNELS = 24
Attended = Callable[[int, Tensor, Tensor], Tensor]
"""Function of a layer, queries and keys (B, T, 2h, q), and values (B, T, h, q) that returns
attention (B, T, d)."""


class GPT(nn.Module):
    """Pre-norm decoder with value embeddings, x0 and residual scalars, smear and backout
    (recipe.py, nanochat).
    """

    def __init__(self, hp: Hyperparameters) -> None:
        super().__init__()
        self.hp = hp
        self.dtype = torch.float32
        depth = hp.depth
        width = hp.width
        vocab = hp.vocab_size
        tables = len(hp.value_layers)
        gate_channels = min(GATE_CHANNELS, width)

        def matrix(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape))

        self.wte = matrix(vocab, width)
        self.value_embeds = matrix(tables, vocab, width)
        self.lm_head = matrix(vocab, width)
        self.attention_in = matrix(depth, 3, width, width)
        self.attention_out = matrix(depth, width, width)
        self.mlp_up = matrix(depth, 4 * width, width)
        self.mlp_down = matrix(depth, 4 * width, width)
        self.value_gates = matrix(tables, hp.heads, gate_channels)
        self.resid = matrix(depth)
        self.x0 = matrix(depth)
        self.smear_gate = matrix(min(SMEAR_CHANNELS, width))
        self.smear = matrix(1)
        self.backout = matrix(1)
        cos, sin = _rotation(hp.sequence_length, hp.head_dim)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw every parameter from the seed, on the CPU, so that every device starts with the same
        values.
        """
        draw = torch.Generator().manual_seed(seed)
        std = self.hp.width**-0.5

        bound = 3**0.5 * std

        def uniform(parameter: Tensor, low: float, high: float) -> None:
            parameter.copy_(torch.empty(parameter.shape).uniform_(low, high, generator=draw))

        def normal(parameter: Tensor, deviation: float) -> None:
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, deviation, generator=draw))

        normal(self.wte, 0.8)
        normal(self.lm_head, 0.001)
        uniform(self.attention_in, -bound, bound)
        up_bound = 0.4 * 3**0.5 * std
        uniform(self.mlp_up, -up_bound, up_bound)
        uniform(self.value_embeds, -bound, bound)
        uniform(self.value_gates, 0.0, 0.02)
        uniform(self.smear_gate, 0.0, 0.02)
        self.attention_out.zero_()
        self.mlp_down.zero_()
        self.smear.zero_()
        self.backout.fill_(0.2)
        self.resid.copy_(torch.linspace(1.15, 1.05, self.hp.depth))
        self.x0.copy_(torch.linspace(0.20, 0.05, self.hp.depth))

    def set_compute_dtype(self, dtype: torch.dtype) -> None:
        """Compute in `dtype` from float32 parameters; bfloat16, which has their range, also stores
        the embeddings.
        """
        self.dtype = dtype
        if dtype == torch.bfloat16:
            for parameter in (self.wte, self.value_embeds):
                parameter.data = parameter.data.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the soft-capped logits (B, T, V), float32, of token ids (B, T)."""
        return self.capped(self.features(ids))

    def capped(self, stream: Tensor) -> Tensor:
        """Return the soft-capped logits (..., V), float32, of the stream (..., d)."""
        return logits.softcapped(stream, self.lm_head.to(self.dtype))

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Return the summed cross-entropy, in nats, of the targets (B, T)."""
        return logits.cross_entropy(self.features(ids), self.lm_head, targets)

    def losses(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy of every target (B, T), in nats, without gradients."""
        return logits.losses(self.features(ids), self.lm_head.to(self.dtype), targets)

    def features(self, ids: Tensor) -> Tensor:
        """Return the stream (B, T, d) that the head reads."""
        x0 = self.smeared(self.embedded(ids))
        return self.stream(ids, x0, slice(0, ids.size(1)), self._attended)

    def embedded(self, ids: Tensor) -> Tensor:
        """Return the normed embeddings (B, T, d) of token ids (B, T)."""
        return layers.norm(F.embedding(ids, self.wte).to(self.dtype))

    def smeared(self, embedded: Tensor) -> Tensor:
        """Return the stream x0 (B, T, d) that enters the first block."""
        return layers.smear(embedded, self.smear_gate.to(self.dtype), self.smear.to(self.dtype))

    def stream(
        self,
        ids: Tensor,
        x0: Tensor,
        positions: slice | Tensor,
        attended: Attended,
        selected: Tensor | None = None,
    ) -> Tensor:
        """Return the stream (B, T, d) that the head reads, for tokens at T positions of their rows.

        `attended` computes attention. With `selected` (A,), the result is (B, A, d), for these
        tokens alone; then `attended` returns these alone in the last layer.
        """
        dtype = self.dtype
        cos = self.cos[positions]
        sin = self.sin[positions]
        x = x0.view_as(x0)  # torch.compile rejects a function that gets one tensor twice
        value_embeds = dict(zip(self.hp.value_layers, self.value_embeds, strict=True))
        value_gates = dict(zip(self.hp.value_layers, self.value_gates.to(dtype), strict=True))
        attention_in = self.attention_in.to(dtype).flatten(1, 2).unbind()
        attention_out = self.attention_out.to(dtype).unbind()
        mlp_up = self.mlp_up.to(dtype).unbind()
        mlp_down = self.mlp_down.to(dtype).unbind()
        resid = self.resid.to(dtype).unbind()
        x0_scale = self.x0.to(dtype).unbind()
        backout = x
        for layer in range(self.hp.depth):
            x, normed, query_key, values = layers.attention_inputs(
                x, x0, resid[layer], x0_scale[layer], attention_in[layer], cos, sin
            )
            if layer in value_embeds:
                embedded = F.embedding(ids, value_embeds[layer]).to(dtype).view_as(values)
                values = layers.gated(values, embedded, normed, value_gates[layer])
            mixed = attended(layer, query_key, values).flatten(0, 1)
            if selected is not None and layer == self.hp.depth - 1:
                x = x[:, selected]
                backout = backout[:, selected]
            x = torch.addmm(x.flatten(0, 1), mixed, attention_out[layer].mT).view_as(x)
            x = layers.mlp(x, mlp_up[layer], mlp_down[layer])
            if layer == self.hp.depth // 2:
                backout = x
        return layers.norm(x - self.backout.to(dtype) * backout)

    def _attended(self, layer: int, query_key: Tensor, values: Tensor) -> Tensor:
        """Return causal attention (B, T, d) within the layer's window."""
        query, key = query_key.transpose(1, 2).chunk(2, dim=1)
        attended = attend(query, key, values.transpose(1, 2), self.hp.windows[layer])
        return attended.transpose(1, 2).flatten(2)


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of the computation: bfloat16 on GPUs that have it, float16 on older ones,
    float32 elsewhere.
    """
    if device.type != "cuda":
        return torch.float32
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bfloat16 else torch.float16


def _rotation(length: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Return the cosine and sine (T, 1, q/2) of the rotary embedding."""
    channels = torch.arange(0, head_dim, 2, dtype=torch.float32)
    frequencies = ROPE_BASE ** -(channels / head_dim)
    positions = torch.arange(length, dtype=torch.float32)
    angles = torch.outer(positions, frequencies).unsqueeze(1)
    return angles.cos(), angles.sin()
