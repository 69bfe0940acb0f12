"""The layers of the GPT with hand-written gradients: few passes over memory, and little saved for
the backward pass.

Each is an ordinary differentiable function of its tensors, so that a changed model may mix them
with plain operations. Shapes: B rows, T tokens, d width, h heads of q channels, V vocabulary, N =
B·T.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from slm.hardware.block_sizes import logit_tokens

QK_SCALE = 1.2
SOFTCAP = 15.0


def norm(x: Tensor) -> Tensor:
    """Return the RMSNorm of x over the last dimension, without parameters."""
    return _Norm.apply(x)


def smear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Return x_t + scale·sigmoid(weight·x_t[:c])·x_(t-1) for x (B, T, d), weight (c,) and scale
    (1,).
    """
    return _Smear.apply(x, weight, scale)


def attention_inputs(
    x: Tensor, x0: Tensor, resid: Tensor, x0_scale: Tensor, weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the stream resid·x + x0_scale·x0 (B, T, d), its norm, queries and keys, and values.

    Queries and keys (B, T, 2h, q) are rotated by cos and sin (T, 1, q/2), normed, and multiplied by
    QK_SCALE; values are (B, T, h, q). `weight` is (3d, d).
    """
    return _AttentionInputs.apply(x, x0, resid, x0_scale, weight, cos, sin)


def gated(values: Tensor, embedded: Tensor, normed: Tensor, gate: Tensor) -> Tensor:
    """Return values + 3·sigmoid(gate·normed[:c])·embedded (B, T, h, q), for normed (B, T, d) and
    gate (h, c).
    """
    return _Gated.apply(values, embedded, normed, gate)


def mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Return x + relu(norm(x)·upᵀ)²·down for x (B, T, d), up and down (4d, d)."""
    return _MLP.apply(x, up, down)


def cross_entropy(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Return the summed nats of targets (B, T) under the soft-capped logits of x (B, T, d) and head
    (V, d).

    The logits are computed a few tokens at a time and never held all at once; the same pass
    computes their gradients.
    """
    return _CrossEntropy.apply(x, head, targets)


def losses(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Return the nats of each target (B, T), in float32 or better; without gradients."""
    chunks = [_nats(chunk, head, target)[0] for chunk, target in _chunks(x, head, targets)]
    return torch.cat(chunks).view(targets.shape)


def softcapped(x: Tensor, head: Tensor) -> Tensor:
    """Return the soft-capped logits (..., V) of x (..., d), in float32 or better."""
    return SOFTCAP * _capped(x, head)


def _capped(x: Tensor, head: Tensor) -> Tensor:
    """Return the soft-capped logits over SOFTCAP."""
    logits = (x / SOFTCAP) @ head.mT
    return logits.to(wide(logits)).tanh_()


def wide(x: Tensor) -> torch.dtype:
    """Return float32, or x's dtype where that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


def _normed(x: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return y = factor·x, with scale as its root mean square, and the factor (..., 1)."""
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide(x)).square_()
    factor = square.div_(x.size(-1)).add_(torch.finfo(square.dtype).eps).rsqrt_()
    if scale != 1:
        factor = factor.mul_(scale)
    return (x * factor).to(x.dtype), factor


def _norm_gradient(grad: Tensor, y: Tensor, factor: Tensor, scale: float = 1.0) -> Tensor:
    """Return the gradient of a norm's input from the gradient of its output y = factor·input."""
    share = (grad * y).sum(-1, keepdim=True, dtype=factor.dtype).div_(y.size(-1) * scale**2)
    return torch.addcmul(grad, y, share.to(y.dtype), value=-1).mul_(factor.to(y.dtype))


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Return the sum of the products of all elements."""
    return torch.dot(x.reshape(-1), y.reshape(-1))


class _Norm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y, factor = _normed(x)
        ctx.save_for_backward(y, factor)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _norm_gradient(grad, *ctx.saved_tensors)


class _Smear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        gate = torch.sigmoid(x[:, 1:, : len(weight)] @ weight).unsqueeze(-1)
        ctx.save_for_backward(x, weight, scale, gate)
        y = x.clone()
        y[:, 1:].addcmul_(scale * gate, x[:, :-1])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, scale, gate = ctx.saved_tensors
        gate_inputs = x[:, 1:, : len(weight)]
        strength = (grad[:, 1:] * x[:, :-1]).sum(-1, keepdim=True)
        logit = scale * strength * gate * (1 - gate)
        grad_x = grad.clone()
        grad_x[:, :-1].addcmul_(scale * gate, grad[:, 1:])
        grad_x[:, 1:, : len(weight)].addcmul_(logit, weight)
        return grad_x, (logit * gate_inputs).sum((0, 1)), _dot(strength, gate).view(1)


class _AttentionInputs(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        x0: Tensor,
        resid: Tensor,
        x0_scale: Tensor,
        weight: Tensor,
        cos: Tensor,
        sin: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mixed = (x * resid).addcmul_(x0, x0_scale)
        y, factor = _normed(mixed)
        heads = weight.size(0) // (6 * cos.size(-1))
        query_key_weight, value_weight = weight.split([2 * x.size(-1), x.size(-1)])
        values = F.linear(y, value_weight).unflatten(-1, (heads, -1))
        query_key = F.linear(y, query_key_weight).unflatten(-1, (2 * heads, -1))
        normed, head_factor = _normed(query_key, QK_SCALE)
        rotated = _rotated(normed, cos, sin)
        ctx.save_for_backward(
            x, x0, resid, x0_scale, weight, cos, sin, y, factor, rotated, head_factor
        )
        return mixed, y, rotated, values

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_mixed: Tensor, grad_y: Tensor, grad_rotated: Tensor, grad_values: Tensor
    ) -> Any:
        x, x0, resid, x0_scale, weight, cos, sin, y, factor, rotated, head_factor = (
            ctx.saved_tensors
        )
        # a rotation preserves inner products: the norm's gradient is taken before rotating back
        grad_rotated = _norm_gradient(grad_rotated, rotated, head_factor, QK_SCALE)
        grad_heads = torch.cat([_rotated(grad_rotated, cos, -sin), grad_values], dim=2)
        projected = grad_heads.flatten(0, 1).flatten(1)
        grad_y = torch.addmm(grad_y.flatten(0, 1), projected, weight).view_as(y)
        grad = _norm_gradient(grad_y, y, factor).add_(grad_mixed)
        grad_weight = projected.mT @ y.flatten(0, 1)
        return grad * resid, grad * x0_scale, _dot(grad, x), _dot(grad, x0), grad_weight, None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return each head with its first half rotated against the second."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    y = x * torch.cat([cos, cos], dim=-1)
    y[..., : cos.size(-1)].addcmul_(second, sin)
    y[..., cos.size(-1) :].addcmul_(first, sin, value=-1)
    return y


class _Gated(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, embedded: Tensor, normed: Tensor, gate: Tensor) -> Tensor:
        strength = F.linear(normed[..., : gate.size(1)], gate).sigmoid_().mul_(3).unsqueeze(-1)
        ctx.save_for_backward(embedded, normed, gate, strength)
        return torch.addcmul(values, strength, embedded)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        embedded, normed, gate, strength = ctx.saved_tensors
        strength_grad = (grad * embedded).sum(-1)
        logit = strength_grad * (strength * (1 - strength / 3)).squeeze(-1)
        grad_normed = torch.zeros_like(normed)
        grad_normed[..., : gate.size(1)] = logit @ gate
        grad_gate = logit.flatten(0, 1).mT @ normed[..., : gate.size(1)].flatten(0, 1)
        return grad, grad * strength, grad_normed, grad_gate


class _MLP(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        y, factor = _normed(x)
        active = F.linear(y, up).clamp_min_(0)
        ctx.save_for_backward(y, factor, active, up, down)
        return torch.addmm(x.flatten(0, 1), (active * active).flatten(0, 1), down).view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, factor, active, up, down = ctx.saved_tensors
        grad_down = (active * active).flatten(0, 1).mT @ grad.flatten(0, 1)
        grad_up = F.linear(grad, 2 * down).mul_(active)
        grad_x = _norm_gradient(grad_up @ up, y, factor).add_(grad)
        return grad_x, grad_up.flatten(0, 1).mT @ y.flatten(0, 1), grad_down


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        weight = head.to(x.dtype)
        nats = x.new_zeros((), dtype=wide(x))
        grads, grad_head = [], torch.zeros_like(head)
        for chunk, target in _chunks(x, weight, targets):
            loss, capped, exponents, total = _nats(chunk, weight, target)
            nats += loss.sum()
            # the gradient of a token's logits is (exponents − total·[target])·(1 − capped²) / total
            grad = exponents.scatter_add_(1, target, -total)
            grad.addcmul_(grad, capped.square_(), value=-1)
            share = total.reciprocal_()
            if x.dtype == torch.float16:  # the sums of exponentials exceed its range
                grad.mul_(share)
                share = torch.ones_like(share)
            grad = grad.to(x.dtype)
            share = share.to(x.dtype)
            grads.append((grad @ weight).mul_(share))
            _accumulate(grad_head, grad.mT, chunk * share)
            del capped, exponents, grad  # before the next chunk allocates its own
        ctx.save_for_backward(torch.cat(grads).view_as(x), grad_head)
        return nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_x, grad_head = ctx.saved_tensors
        return grad_x.mul_(grad.to(grad_x.dtype)), grad_head.mul_(grad.to(grad_head.dtype)), None


def _chunks(x: Tensor, head: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Return chunks of tokens (n, d) and their targets (n, 1), whose logits fit into memory at
    once.
    """
    tokens = logit_tokens(x.device.type, head.size(0))
    return zip(x.flatten(0, 1).split(tokens), targets.reshape(-1, 1).split(tokens), strict=True)


def _nats(x: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the nats (n, 1) of targets (n, 1), logits over SOFTCAP, their exponentials (n, V), and
    the sums of those.

    A capped logit is at most SOFTCAP, whose exponential float32 can hold: no maximum needs to be
    subtracted.
    """
    capped = _capped(x, head)
    exponents = (capped * SOFTCAP).exp_()
    total = exponents.sum(-1, keepdim=True)
    return total.log() - SOFTCAP * capped.gather(1, targets), capped, exponents, total


def _accumulate(total: Tensor, x: Tensor, y: Tensor) -> None:
    """Add x·y to total, in total's dtype."""
    if x.dtype == total.dtype:
        total.addmm_(x, y)
    else:
        total += x @ y
