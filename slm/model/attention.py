"""Causal attention in which a token sees itself and the `window` tokens before it, by the best kernel present.

On a CPU short windows go by bands: blocks of BLOCK queries against the keys in their reach, so that work and memory
follow the window and no (T, T) mask is ever made. The softmax weights of the band, B·h·T·(window + BLOCK) numbers at
most, are kept for the backward pass. What needs a GPU is chosen by what is importable there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64
"""Queries of one block of the band: smaller products are slower, larger blocks reach further past the window."""
FLEX_HEAD_DIM = 16
"""The smallest head that FlexAttention takes."""

_chosen: dict[tuple[str, torch.dtype], str] = {}


def attend(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """Attention (B, h, T, q) over three of that shape, scores divided by √q; plain causal where the window holds all.

    Exact for every input, and on a CPU the same bits every time. Before `torch.compile`, call `kernel` once.
    """
    kind, length = kernel(query.device, query.dtype), query.size(2)
    whole = window >= length - 1
    if kind == "flash3":
        return _flash(query, key, value, (-1, -1) if whole else (window, 0))
    if whole:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    if kind == "banded":
        attended, _ = torch.ops.slm.banded(query, key, value, window)
        return attended
    if kind == "flex" and query.size(3) >= FLEX_HEAD_DIM:
        return _flex(query, key, value, window)
    place = torch.arange(length, device=query.device)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=_sees(place[:, None], place, window)
    )


def kernel(device: torch.device, dtype: torch.dtype) -> str:
    """What computes attention there, settled once per process: "flash3", "flex", "banded" or "sdpa"."""
    if (device.type, dtype) not in _chosen:
        _chosen[device.type, dtype] = _choose(device, dtype)
    return _chosen[device.type, dtype]


def _choose(device: torch.device, dtype: torch.dtype) -> str:
    """FlashAttention 3 is for sm_90 and 16 bits; FlexAttention for what Triton compiles for."""
    if device.type == "cpu":
        return "banded"
    if device.type != "cuda" or torch.version.hip or dtype == torch.float64:
        return "sdpa"
    major, _ = torch.cuda.get_device_capability(device)
    if major == 9 and dtype.itemsize == 2 and find_spec("flash_attn_interface"):
        return "flash3"
    return "flex" if major >= 8 and find_spec("triton") else "sdpa"


def _sees(query: Tensor, key: Tensor, window: int) -> Tensor:
    """Whether tokens at the places `query` see those at `key`."""
    return (query >= key) & (query - key <= window)


def _flash(query: Tensor, key: Tensor, value: Tensor, window: tuple[int, int]) -> Tensor:
    """FlashAttention 3, which takes (B, T, h, q)."""
    from flash_attn_interface import flash_attn_func

    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    attended = flash_attn_func(query, key, value, causal=True, window_size=window)
    return (attended[0] if isinstance(attended, tuple) else attended).transpose(1, 2)


def _flex(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """FlexAttention over the blocks that the window meets; it must be compiled, here or with its caller."""
    from torch.nn.attention.flex_attention import flex_attention

    if torch.compiler.is_compiling():
        return flex_attention(
            query, key, value, block_mask=_flex_mask(query.size(2), window, query.device)
        )
    return _compiled_flex()(
        query, key, value, block_mask=_cached_flex_mask(query.size(2), window, query.device)
    )


def _flex_mask(length: int, window: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return _sees(query, key, window)

    return create_block_mask(sees, None, None, length, length, device=str(device))


_cached_flex_mask = functools.cache(_flex_mask)


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


# The band is an operator of its own, so that compiling does not unroll it. Its forward pass returns what its backward
# pass reads.

torch.library.define(
    "slm::banded", "(Tensor query, Tensor key, Tensor value, int window) -> (Tensor, Tensor)"
)
torch.library.define(
    "slm::banded_backward",
    "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor kept, int window) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("slm::banded", "CPU")
def _banded(query: Tensor, key: Tensor, value: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Attention, and the softmax weights of every block."""
    hidden, kept, attended = _hidden(query, window), _kept(query, window), _tokens_first(query)
    queries, keys, values = _scaled(query), key.flatten(0, 1), value.flatten(0, 1)
    out = torch.empty_like(queries)
    for block, reach, weights in _blocks(kept, queries, window):
        before, size = block.start - reach.start, block.stop - block.start
        torch.bmm(queries[:, block], keys[:, reach].mT, out=weights)
        weights += hidden[:size, window - before : window + size]
        torch.softmax(weights, dim=-1, out=weights)
        out[:, block] = torch.bmm(weights, values[:, reach])
    return attended.copy_(out.view_as(query)), kept


@torch.library.impl("slm::banded_backward", "CPU")
def _banded_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, kept: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of weights P and scores S: dV = P'G, dS = P∘(GV' − rowsum(P∘GV')), dQ = dS K/√q, dK = dS'Q/√q."""
    queries, keys, values, grads = (
        _scaled(query),
        key.flatten(0, 1),
        value.flatten(0, 1),
        grad.flatten(0, 1),
    )
    for_queries, for_keys, for_values = (
        torch.empty_like(queries),
        torch.zeros_like(queries),
        torch.zeros_like(queries),
    )
    for block, reach, weights in _blocks(kept, queries, window):
        for_values[:, reach] += torch.bmm(weights.mT, grads[:, block])
        slopes = torch.bmm(grads[:, block], values[:, reach].mT)
        slopes = torch._softmax_backward_data(slopes, weights, -1, weights.dtype)
        for_queries[:, block] = torch.bmm(slopes, keys[:, reach])
        for_keys[:, reach] += torch.bmm(slopes.mT, queries[:, block])
    for_queries *= query.size(3) ** -0.5
    return for_queries.view_as(query), for_keys.view_as(query), for_values.view_as(query)


def _spans(length: int, window: int) -> Iterator[tuple[int, int, int]]:
    """Of every block: its first query, the one after its last, and the first key in its reach."""
    for start in range(0, length, BLOCK):
        yield start, min(start + BLOCK, length), max(0, start - window)


def _kept(query: Tensor, window: int) -> Tensor:
    """Room for the weights of every block."""
    rows, heads, length, _ = query.shape
    pairs = sum((stop - start) * (stop - first) for start, stop, first in _spans(length, window))
    return query.new_empty(rows * heads * pairs)


def _blocks(kept: Tensor, queries: Tensor, window: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Of every block: its queries, the keys in its reach, and its weights (B·h, queries, keys), a view of `kept`."""
    heads, length, _ = queries.shape
    place = 0
    for start, stop, first in _spans(length, window):
        shape = (heads, stop - start, stop - first)
        weights = kept[place:].as_strided(shape, (shape[1] * shape[2], shape[2], 1))
        place += weights.numel()
        yield slice(start, stop), slice(first, stop), weights


def _hidden(query: Tensor, window: int) -> Tensor:
    """What is added to the scores of a whole block: −∞ where a query does not see a key. Its keys start `window`
    places before its queries."""
    row, column = torch.arange(BLOCK)[:, None] + window, torch.arange(window + BLOCK)
    unseen = query.new_full((BLOCK, window + BLOCK), -torch.inf)
    return unseen.masked_fill_(_sees(row, column, window), 0)


def _scaled(query: Tensor) -> Tensor:
    """Queries over √q, (B·h, T, q)."""
    scaled = query.new_empty(query.shape)
    return torch.mul(query, query.size(3) ** -0.5, out=scaled).flatten(0, 1)


def _tokens_first(query: Tensor) -> Tensor:
    """Room for (B, h, T, q), laid out as (B, T, h, q), which the layer reads next."""
    rows, heads, length, head_dim = query.shape
    return query.new_empty(rows, length, heads, head_dim).transpose(1, 2)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """The weights are for the backward pass alone."""
    *tensors, ctx.window = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _from_banded(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    return *torch.ops.slm.banded_backward(grad, *ctx.saved_tensors, ctx.window), None


def _empty_banded(query: Tensor, key: Tensor, value: Tensor, window: int) -> tuple[Tensor, Tensor]:
    return _tokens_first(query), _kept(query, window)


def _empty_gradients(grad: Tensor, query: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape), query.new_empty(query.shape)


torch.library.register_fake("slm::banded", _empty_banded)
torch.library.register_fake("slm::banded_backward", _empty_gradients)
torch.library.register_autograd("slm::banded", _from_banded, setup_context=_keep)
