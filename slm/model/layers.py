"""The layers of the GPT with hand-written gradients: few passes over memory, and little saved for
the backward pass.

Each is an ordinary differentiable function of its tensors, so that a changed model may mix them
with plain operations. Shapes: B rows, T tokens, d width, h heads of q channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

QK_SCALE = 1.2


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


def wide(x: Tensor) -> torch.dtype:
    """Return float32, or x's dtype where that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


def _normed(x: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return y = factor·x, with scale as its root mean square, and the factor (..., 1)."""
    factor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide(x))
    factor.square_().div_(x.size(-1))
    factor.add_(torch.finfo(factor.dtype).eps).rsqrt_()
    if scale != 1:
        factor.mul_(scale)
    return (x * factor).to(x.dtype), factor


def _norm_gradient(grad: Tensor, y: Tensor, factor: Tensor, scale: float = 1.0) -> Tensor:
    """Return the gradient of a norm's input from the gradient of its output y = factor·input."""
    share = (grad * y).sum(-1, keepdim=True, dtype=factor.dtype)
    share.div_(y.size(-1) * scale**2)
    orthogonal = torch.addcmul(grad, y, share.to(y.dtype), value=-1)
    return orthogonal.mul_(factor.to(y.dtype))


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
        gate_inputs = x[:, 1:, : len(weight)]
        gate = torch.sigmoid(gate_inputs @ weight).unsqueeze(-1)
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
        grad_weight = (logit * gate_inputs).sum((0, 1))
        grad_scale = _dot(strength, gate).view(1)
        return grad_x, grad_weight, grad_scale


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
        width = x.size(-1)
        heads = (-1, 2 * cos.size(-1))
        query_key_weight, value_weight = weight.split([2 * width, width])
        values = F.linear(y, value_weight).unflatten(-1, heads)
        query_key = F.linear(y, query_key_weight).unflatten(-1, heads)
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
        x, x0, resid, x0_scale, weight, cos, sin = ctx.saved_tensors[:7]
        y, factor, rotated, head_factor = ctx.saved_tensors[7:]
        # a rotation preserves inner products: the norm's gradient is taken before rotating back
        grad_rotated = _norm_gradient(grad_rotated, rotated, head_factor, QK_SCALE)
        grad_query_key = _rotated(grad_rotated, cos, -sin)
        grad_heads = torch.cat([grad_query_key, grad_values], dim=2)
        projected = grad_heads.flatten(0, 1).flatten(1)
        grad_y = torch.addmm(grad_y.flatten(0, 1), projected, weight).view_as(y)
        grad = _norm_gradient(grad_y, y, factor).add_(grad_mixed)
        return (
            grad * resid,
            grad * x0_scale,
            _dot(grad, x),
            _dot(grad, x0),
            projected.mT @ y.flatten(0, 1),
            None,
            None,
        )


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return each head with its first half rotated against the second."""
    cos = cos.to(x.dtype)
    sin = sin.to(x.dtype)
    half = cos.size(-1)
    first, second = x.chunk(2, dim=-1)
    y = x * torch.cat([cos, cos], dim=-1)
    y[..., :half].addcmul_(second, sin)
    y[..., half:].addcmul_(first, sin, value=-1)
    return y


class _Gated(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, embedded: Tensor, normed: Tensor, gate: Tensor) -> Tensor:
        gate_inputs = normed[..., : gate.size(1)]
        strength = F.linear(gate_inputs, gate).sigmoid_().mul_(3).unsqueeze(-1)
        ctx.save_for_backward(embedded, normed, gate, strength)
        return torch.addcmul(values, strength, embedded)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        embedded, normed, gate, strength = ctx.saved_tensors
        gate_inputs = normed[..., : gate.size(1)]
        slope = strength * (1 - strength / 3)
        logit = (grad * embedded).sum(-1) * slope.squeeze(-1)
        grad_normed = torch.zeros_like(normed)
        grad_normed[..., : gate.size(1)] = logit @ gate
        grad_gate = logit.flatten(0, 1).mT @ gate_inputs.flatten(0, 1)
        return grad, grad * strength, grad_normed, grad_gate


class _MLP(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        y, factor = _normed(x)
        active = F.linear(y, up).clamp_min_(0)
        ctx.save_for_backward(y, factor, active, up, down)
        squared = active * active
        return torch.addmm(x.flatten(0, 1), squared.flatten(0, 1), down).view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, factor, active, up, down = ctx.saved_tensors
        grad_down = (active * active).flatten(0, 1).mT @ grad.flatten(0, 1)
        grad_active = F.linear(grad, 2 * down).mul_(active)
        grad_x = _norm_gradient(grad_active @ up, y, factor).add_(grad)
        grad_up = grad_active.flatten(0, 1).mT @ y.flatten(0, 1)
        return grad_x, grad_up, grad_down
