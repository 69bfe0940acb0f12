"""Causal attention in which a token sees itself and the `window` tokens before it, by the best
available kernel.

On a CPU short windows are computed in bands: blocks of ATTENTION_BLOCK queries against the keys in
their reach, so that work and memory grow with the window and no (T, T) mask is ever made. The
softmax weights of the band, at most B·h·T·(window + ATTENTION_BLOCK) numbers, are saved for the
backward pass. On a GPU the kernel depends on the device and on the packages that are installed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slm.hardware.block_sizes import ATTENTION_BLOCK, attention_blocks, banded_pairs

FLEX_HEAD_DIM = 16
"""The smallest head that FlexAttention supports."""

_kernels: dict[tuple[str, torch.dtype], str] = {}


def attend(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """Return attention (B, h, T, q) of query, key and value of that shape, with scores divided by
    √q.

    It is plain causal attention where the window covers every token. Exact for every input, and on
    a CPU the same bits every time. Before `torch.compile`, call `kernel` once.
    """
    kind = kernel(query.device, query.dtype)
    length = query.size(2)
    is_full = window >= length - 1
    if kind == "flash3":
        return _flash(query, key, value, (-1, -1) if is_full else (window, 0))
    if is_full:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    if kind == "banded":
        attended, _ = torch.ops.slm.banded(query, key, value, window)
        return attended
    if kind == "flex" and query.size(3) >= FLEX_HEAD_DIM:
        return _flex(query, key, value, window)
    return masked(query, key, value, window)


def masked(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """Return attention (B, h, n, q) of queries (B, h, n, q), the last n of T tokens, by a mask."""
    position = torch.arange(key.size(2), device=query.device)
    mask = _is_visible(position[-query.size(2) :, None], position, window)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def kernel(device: torch.device, dtype: torch.dtype) -> str:
    """Return the attention kernel of a device and dtype, chosen once per process: "flash3", "flex",
    "banded", "sdpa".
    """
    key = device.type, dtype
    if key not in _kernels:
        _kernels[key] = _choose(device, dtype)
    return _kernels[key]


def _choose(device: torch.device, dtype: torch.dtype) -> str:
    """Choose FlashAttention 3 on sm_90 in 16 bits, FlexAttention wherever Triton compiles, else
    SDPA.
    """
    if device.type == "cpu":
        return "banded"
    if device.type != "cuda" or torch.version.hip or dtype == torch.float64:
        return "sdpa"
    major = torch.cuda.get_device_capability(device)[0]
    if major == 9 and dtype.itemsize == 2 and find_spec("flash_attn_interface"):
        return "flash3"
    return "flex" if major >= 8 and find_spec("triton") else "sdpa"


def _is_visible(query: Tensor, key: Tensor, window: int) -> Tensor:
    """Whether tokens at the positions `query` see those at the positions `key`."""
    return (query >= key) & (query - key <= window)


def _flash(query: Tensor, key: Tensor, value: Tensor, window: tuple[int, int]) -> Tensor:
    """Return attention by FlashAttention 3, which takes (B, T, h, q)."""
    from flash_attn_interface import flash_attn_func

    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    attended = flash_attn_func(query, key, value, causal=True, window_size=window)
    if isinstance(attended, tuple):
        attended = attended[0]
    return attended.transpose(1, 2)


def _flex(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """Return attention by FlexAttention over the blocks that the window meets.

    FlexAttention must be compiled, on its own or with its caller.
    """
    from torch.nn.attention.flex_attention import flex_attention

    length = query.size(2)
    if torch.compiler.is_compiling():
        mask = _flex_mask(length, window, query.device)
        return flex_attention(query, key, value, block_mask=mask)
    mask = _cached_flex_mask(length, window, query.device)
    return _compiled(flex_attention)(query, key, value, block_mask=mask)


def _flex_mask(length: int, window: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def is_visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return _is_visible(query, key, window)

    return create_block_mask(is_visible, None, None, length, length, device=str(device))


_cached_flex_mask = functools.cache(_flex_mask)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Any:
    return torch.compile(function, dynamic=False)


# The band is a custom operator, so that compiling does not unroll it. Its forward pass also returns
# the softmax weights, which its backward pass reads.

torch.library.define(
    "slm::banded", "(Tensor query, Tensor key, Tensor value, int window) -> (Tensor, Tensor)"
)
torch.library.define(
    "slm::banded_backward",
    "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor weights, int window)"
    " -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("slm::banded", "CPU")
def _banded(query: Tensor, key: Tensor, value: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Return attention, and the softmax weights of every block."""
    mask = _block_mask(query, window)
    weights = _empty_weights(query, window)
    attended = _empty_output(query)
    queries = _scaled(query)
    keys = key.flatten(0, 1)
    values = value.flatten(0, 1)
    out = torch.empty_like(queries)
    for block, reach, scores in _blocks(weights, queries, window):
        before = block.start - reach.start
        size = block.stop - block.start
        torch.bmm(queries[:, block], keys[:, reach].mT, out=scores)
        scores += mask[:size, window - before : window + size]
        torch.softmax(scores, dim=-1, out=scores)
        out[:, block] = torch.bmm(scores, values[:, reach])
    attended.copy_(out.view_as(query))
    return attended, weights


@torch.library.impl("slm::banded_backward", "CPU")
def _banded_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, weights: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value.

    With weights P, scores S and the output's gradient G: dV = P'G, dS = P∘(GV' − rowsum(P∘GV')), dQ
    = dS K/√q, dK = dS'Q/√q.
    """
    queries = _scaled(query)
    keys = key.flatten(0, 1)
    values = value.flatten(0, 1)
    grads = grad.flatten(0, 1)
    query_grad = torch.empty_like(queries)
    key_grad = torch.zeros_like(queries)
    value_grad = torch.zeros_like(queries)
    for block, reach, softmax in _blocks(weights, queries, window):
        value_grad[:, reach] += torch.bmm(softmax.mT, grads[:, block])
        score_grad = torch.bmm(grads[:, block], values[:, reach].mT)
        score_grad = torch._softmax_backward_data(score_grad, softmax, -1, softmax.dtype)
        query_grad[:, block] = torch.bmm(score_grad, keys[:, reach])
        key_grad[:, reach] += torch.bmm(score_grad.mT, queries[:, block])
    query_grad *= query.size(3) ** -0.5
    return (query_grad.view_as(query), key_grad.view_as(query), value_grad.view_as(query))


def _blocks(weights: Tensor, queries: Tensor, window: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield each block's queries, the keys in its reach, and its part of `weights`, a view (B·h,
    queries, keys).
    """
    heads, length, _ = queries.shape
    offset = 0
    for start, stop, first_key in attention_blocks(length, window):
        size = stop - start
        reach = stop - first_key
        part = weights[offset:].as_strided((heads, size, reach), (size * reach, reach, 1))
        offset += part.numel()
        yield slice(start, stop), slice(first_key, stop), part


def _block_mask(query: Tensor, window: int) -> Tensor:
    """Return the mask to add to the scores of a full block: −∞ where a query does not see a key.

    The block's keys start `window` positions before its queries.
    """
    row = torch.arange(ATTENTION_BLOCK)[:, None] + window
    column = torch.arange(window + ATTENTION_BLOCK)
    is_visible = _is_visible(row, column, window)
    mask = query.new_full(is_visible.shape, -torch.inf)
    return mask.masked_fill_(is_visible, 0)


def _scaled(query: Tensor) -> Tensor:
    """Return the queries over √q, (B·h, T, q)."""
    scaled = query.new_empty(query.shape)
    torch.mul(query, query.size(3) ** -0.5, out=scaled)
    return scaled.flatten(0, 1)


def _empty_weights(query: Tensor, window: int) -> Tensor:
    """Allocate the softmax weights of every block."""
    rows, heads, length, _ = query.shape
    return query.new_empty(rows * heads * banded_pairs(length, window))


def _empty_output(query: Tensor) -> Tensor:
    """Allocate (B, h, T, q), laid out as (B, T, h, q), which the layer reads next."""
    return query.new_empty(query.transpose(1, 2).shape).transpose(1, 2)


def _fake_banded(query: Tensor, key: Tensor, value: Tensor, window: int) -> tuple[Tensor, Tensor]:
    return _empty_output(query), _empty_weights(query, window)


def _fake_banded_backward(grad: Tensor, query: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(query.new_empty(query.shape) for _ in range(3))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    # the weights have no gradient: they are an output for the backward pass alone
    *tensors, ctx.window = inputs
    _, weights = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(weights)
    ctx.save_for_backward(*tensors, weights)


def _backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.slm.banded_backward(grad, *ctx.saved_tensors, ctx.window)
    return *gradients, None


torch.library.register_fake("slm::banded", _fake_banded)
torch.library.register_fake("slm::banded_backward", _fake_banded_backward)
torch.library.register_autograd("slm::banded", _backward, setup_context=_save_for_backward)
