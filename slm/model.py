"""The GPT of the family. Matrices of equal shape are stacked over layers: one parameter, one optimiser update."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm.recipe import Hyperparameters

ROPE_BASE = 100_000
QK_SCALE = 1.2
SOFTCAP = 15.0
GATE_CHANNELS = 12
SMEAR_CHANNELS = 24


class GPT(nn.Module):
    """Pre-norm decoder with value embeddings, x0 and residual scalars, smear and backout (recipe.py, nanochat)."""

    def __init__(self, given: Hyperparameters) -> None:
        super().__init__()
        self.given = given
        layers, width, vocab = given.depth, given.width, given.vocab_size
        tables = len(self._value_layers())
        gate_channels = min(GATE_CHANNELS, width)

        def matrix(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape))

        self.wte = matrix(vocab, width)
        self.value_embeds = matrix(tables, vocab, width)
        self.lm_head = matrix(vocab, width)
        self.attention_in = matrix(layers, 3, width, width)
        self.attention_out = matrix(layers, width, width)
        self.mlp_up = matrix(layers, 4 * width, width)
        self.mlp_down = matrix(layers, width, 4 * width)
        self.value_gates = matrix(tables, given.heads, gate_channels)
        self.resid = matrix(layers)
        self.x0 = matrix(layers)
        self.smear_gate = matrix(min(SMEAR_CHANNELS, width))
        self.smear = matrix(1)
        self.backout = matrix(1)
        cos, sin = _rotation(given.sequence_length, given.head_dim)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _value_layers(self) -> list[int]:
        """Layers with a value embedding: every other one, the last included."""
        return [layer for layer in range(self.given.depth) if layer % 2 == (self.given.depth - 1) % 2]

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Set every parameter from the seed, drawn on the CPU so that every device starts alike."""
        draw = torch.Generator().manual_seed(seed)
        std = self.given.width**-0.5

        def uniform(parameter: Tensor, bound: float, low: float | None = None) -> None:
            values = torch.empty(parameter.shape).uniform_(-bound if low is None else low, bound, generator=draw)
            parameter.copy_(values)

        def normal(parameter: Tensor, deviation: float) -> None:
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, deviation, generator=draw))

        normal(self.wte, 0.8)
        normal(self.lm_head, 0.001)
        uniform(self.attention_in, 3**0.5 * std)
        uniform(self.mlp_up, 0.4 * 3**0.5 * std)
        uniform(self.value_embeds, 3**0.5 * std)
        uniform(self.value_gates, 0.02, low=0.0)
        uniform(self.smear_gate, 0.02, low=0.0)
        self.attention_out.zero_()
        self.mlp_down.zero_()
        self.smear.zero_()
        self.backout.fill_(0.2)
        self.resid.copy_(torch.linspace(1.15, 1.05, self.given.depth))
        self.x0.copy_(torch.linspace(0.20, 0.05, self.given.depth))

    def set_compute_dtype(self, dtype: torch.dtype) -> None:
        """Matrix products and stored embeddings in `dtype`; every other parameter stays float32."""
        for parameter in (self.wte, self.value_embeds):
            parameter.data = parameter.data.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (B, T, V), float32, soft-capped, of token ids (B, T)."""
        logits = F.linear(self.features(ids), self.lm_head.to(self.wte.dtype)).float()
        return SOFTCAP * torch.tanh(logits / SOFTCAP)

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats of every target (B, T)."""
        logits = self(ids)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)

    def features(self, ids: Tensor) -> Tensor:
        """The stream (B, T, d) that the head reads."""
        dtype = self.wte.dtype
        x = x0 = self._smeared(_norm(F.embedding(ids, self.wte)))
        value_layers = {layer: table for table, layer in enumerate(self._value_layers())}
        tables, gates = self.value_embeds.unbind(), self.value_gates.to(dtype).unbind()
        attention_in, attention_out = self.attention_in.to(dtype).unbind(), self.attention_out.to(dtype).unbind()
        mlp_up, mlp_down = self.mlp_up.to(dtype).unbind(), self.mlp_down.to(dtype).unbind()
        resid, x0_scale = self.resid.to(dtype).unbind(), self.x0.to(dtype).unbind()
        backout = x
        for layer, window in enumerate(self.given.windows):
            x = resid[layer] * x + x0_scale[layer] * x0
            normed = _norm(x)
            value = None
            if layer in value_layers:
                table = value_layers[layer]
                value = self._gated_values(ids, normed, tables[table], gates[table])
            x = x + F.linear(self._attend(normed, attention_in[layer], value, window), attention_out[layer])
            x = x + F.linear(F.relu(F.linear(_norm(x), mlp_up[layer])).square(), mlp_down[layer])
            if layer == self.given.depth // 2:
                backout = x
        return _norm(x - self.backout.to(dtype) * backout)

    def _smeared(self, x: Tensor) -> Tensor:
        """x_t + s·sigmoid(w·x_t[:24])·x_(t-1)."""
        dtype, channels = x.dtype, len(self.smear_gate)
        gate = self.smear.to(dtype) * torch.sigmoid(x[:, 1:, :channels] @ self.smear_gate.to(dtype)).unsqueeze(-1)
        return torch.cat([x[:, :1], x[:, 1:] + gate * x[:, :-1]], dim=1)

    def _gated_values(self, ids: Tensor, normed: Tensor, table: Tensor, gate: Tensor) -> Tensor:
        """3·sigmoid(W x[:12])·value embedding, (B, T, heads, q)."""
        heads = self.given.heads
        strength = 3 * torch.sigmoid(F.linear(normed[..., : gate.size(1)], gate))
        return strength.unsqueeze(-1) * F.embedding(ids, table).unflatten(-1, (heads, -1))

    def _attend(self, normed: Tensor, projection: Tensor, value: Tensor | None, window: int) -> Tensor:
        """Causal attention within the window, (B, T, d)."""
        heads, length = self.given.heads, normed.size(1)
        query_key, values = (
            F.linear(normed, projection.flatten(0, 1)).unflatten(-1, (3 * heads, -1)).split([2 * heads, heads], dim=2)
        )
        if value is not None:
            values = values + value
        rotated = _rotated(query_key, self.cos[:length], self.sin[:length])
        query, key = (QK_SCALE * _norm(rotated)).transpose(1, 2).chunk(2, dim=1)
        mask = None if window >= length else _band(length, window, normed.device)
        attended = F.scaled_dot_product_attention(
            query, key, values.transpose(1, 2), attn_mask=mask, is_causal=mask is None
        )
        return attended.transpose(1, 2).flatten(2)


def _norm(x: Tensor) -> Tensor:
    """RMSNorm without parameters."""
    return F.rms_norm(x, (x.size(-1),))


def _rotation(length: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine (T, 1, q/2) of the rotary embedding."""
    frequencies = ROPE_BASE ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies).unsqueeze(1)
    return angles.cos(), angles.sin()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first half of each head rotated against the second."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """(T, T) mask: each token sees itself and the `window` tokens before it."""
    place = torch.arange(length, device=device)
    distance = place[:, None] - place[None, :]
    return (distance >= 0) & (distance <= window)
