"""The GPT of the family. Matrices of equal shape are stacked over layers: one parameter, one optimiser update."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm.model import layers
from slm.model.attention import attend
from slm.recipe import Hyperparameters

ROPE_BASE = 100_000
GATE_CHANNELS = 12
SMEAR_CHANNELS = 24
Attended = Callable[[int, Tensor, Tensor], Tensor]
"""Of a layer, queries and keys (B, T, 2h, q), and values (B, T, h, q): attention (B, T, d)."""


class GPT(nn.Module):
    """Pre-norm decoder with value embeddings, x0 and residual scalars, smear and backout (recipe.py, nanochat)."""

    def __init__(self, given: Hyperparameters) -> None:
        super().__init__()
        self.given = given
        self.dtype = torch.float32
        depth, width, vocab = given.depth, given.width, given.vocab_size
        tables = len(given.value_layers)
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
        self.value_gates = matrix(tables, given.heads, gate_channels)
        self.resid = matrix(depth)
        self.x0 = matrix(depth)
        self.smear_gate = matrix(min(SMEAR_CHANNELS, width))
        self.smear = matrix(1)
        self.backout = matrix(1)
        cos, sin = _rotation(given.sequence_length, given.head_dim)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Set every parameter from the seed, drawn on the CPU so that every device starts alike."""
        draw = torch.Generator().manual_seed(seed)
        std = self.given.width**-0.5

        def uniform(parameter: Tensor, bound: float, low: float | None = None) -> None:
            values = torch.empty(parameter.shape).uniform_(
                -bound if low is None else low, bound, generator=draw
            )
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
        """Compute in `dtype` from float32 parameters; in bfloat16, which has their range, embeddings are stored too."""
        self.dtype = dtype
        if dtype == torch.bfloat16:
            for parameter in (self.wte, self.value_embeds):
                parameter.data = parameter.data.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (B, T, V), float32, soft-capped, of token ids (B, T)."""
        return self.capped(self.features(ids))

    def capped(self, stream: Tensor) -> Tensor:
        """Logits (..., V), float32, soft-capped, of the stream (..., d)."""
        return layers.softcapped(stream, self.lm_head.to(self.dtype))

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Summed cross-entropy in nats of the targets (B, T)."""
        return layers.cross_entropy(self.features(ids), self.lm_head, targets)

    def losses(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats of every target (B, T), without gradients."""
        return layers.losses(self.features(ids), self.lm_head.to(self.dtype), targets)

    def features(self, ids: Tensor) -> Tensor:
        """The stream (B, T, d) that the head reads."""
        return self.stream(
            ids, self.smeared(self.embedded(ids)), slice(0, ids.size(1)), self._attended
        )

    def embedded(self, ids: Tensor) -> Tensor:
        """The normed embeddings (B, T, d) of token ids (B, T)."""
        return layers.norm(F.embedding(ids, self.wte).to(self.dtype))

    def smeared(self, embedded: Tensor) -> Tensor:
        """The stream x0 (B, T, d) that enters the first block."""
        return layers.smear(embedded, self.smear_gate.to(self.dtype), self.smear.to(self.dtype))

    def stream(
        self,
        ids: Tensor,
        x0: Tensor,
        places: slice | Tensor,
        attended: Attended,
        asked: Tensor | None = None,
    ) -> Tensor:
        """The stream (B, T, d) that the head reads, of tokens at T places of their rows; attention is given.

        Of the tokens `asked` (A,) alone, it is (B, A, d): then attention gives these alone in the last layer.
        """
        dtype, cos, sin = self.dtype, self.cos[places], self.sin[places]
        x = x0.view_as(x0)  # torch.compile takes no function of one tensor given twice
        tables = dict(
            zip(
                self.given.value_layers,
                zip(self.value_embeds, self.value_gates.to(dtype)),
                strict=True,
            )
        )
        attention_in, attention_out = (
            self.attention_in.to(dtype).unbind(),
            self.attention_out.to(dtype).unbind(),
        )
        mlp_up, mlp_down = self.mlp_up.to(dtype).unbind(), self.mlp_down.to(dtype).unbind()
        resid, x0_scale = self.resid.to(dtype).unbind(), self.x0.to(dtype).unbind()
        backout = x
        for layer in range(self.given.depth):
            x, normed, query_key, values = layers.attention_inputs(
                x, x0, resid[layer], x0_scale[layer], attention_in[layer].flatten(0, 1), cos, sin
            )
            if layer in tables:
                table, gate = tables[layer]
                values = layers.gated(
                    values, F.embedding(ids, table).to(dtype).view_as(values), normed, gate
                )
            mixed = attended(layer, query_key, values).flatten(0, 1)
            if asked is not None and layer == self.given.depth - 1:
                x, backout = x[:, asked], backout[:, asked]
            x = torch.addmm(x.flatten(0, 1), mixed, attention_out[layer].mT).view_as(x)
            x = layers.mlp(x, mlp_up[layer], mlp_down[layer])
            if layer == self.given.depth // 2:
                backout = x
        return layers.norm(x - self.backout.to(dtype) * backout)

    def _attended(self, layer: int, query_key: Tensor, values: Tensor) -> Tensor:
        """Causal attention (B, T, d) within the layer's window."""
        query, key = query_key.transpose(1, 2).chunk(2, dim=1)
        attended = attend(query, key, values.transpose(1, 2), self.given.windows[layer])
        return attended.transpose(1, 2).flatten(2)


def compute_dtype(device: torch.device) -> torch.dtype:
    """What the model computes in: bfloat16 on GPUs that have it, float16 on older ones, float32 elsewhere."""
    if device.type != "cuda":
        return torch.float32
    return (
        torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    )


def _rotation(length: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine (T, 1, q/2) of the rotary embedding."""
    frequencies = ROPE_BASE ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies).unsqueeze(1)
    return angles.cos(), angles.sin()
