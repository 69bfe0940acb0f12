"""Soft-capped logits and the cross-entropy, with hand-written gradients.

Logits are computed a few tokens at a time and never held all at once. Shapes: B rows, T tokens, n
tokens of a chunk, d width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from slm.hardware.block_sizes import logit_tokens
from slm.model.layers import wide

SOFTCAP = 15.0
"""Logits are SOFTCAP·tanh(x·head / SOFTCAP)."""


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


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        weight = head.to(x.dtype)
        nats = x.new_zeros((), dtype=wide(x))
        grads = []
        grad_head = torch.zeros_like(head)
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
        grad_x.mul_(grad.to(grad_x.dtype))
        grad_head.mul_(grad.to(grad_head.dtype))
        return grad_x, grad_head, None


def _chunks(x: Tensor, head: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Return chunks of tokens (n, d) and their targets (n, 1), whose logits fit into memory at
    once.
    """
    tokens = logit_tokens(x.device.type, head.size(0))
    chunks = x.flatten(0, 1).split(tokens)
    return zip(chunks, targets.reshape(-1, 1).split(tokens), strict=True)


def _nats(x: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the nats (n, 1) of targets (n, 1), logits over SOFTCAP, their exponentials (n, V), and
    the sums of those.

    A capped logit is at most SOFTCAP, whose exponential float32 can hold: no maximum needs to be
    subtracted.
    """
    capped = _capped(x, head)
    exponents = (capped * SOFTCAP).exp_()
    total = exponents.sum(-1, keepdim=True)
    nats = total.log() - SOFTCAP * capped.gather(1, targets)
    return nats, capped, exponents, total


def _accumulate(total: Tensor, x: Tensor, y: Tensor) -> None:
    """Add x·y to total, in total's dtype."""
    if x.dtype == total.dtype:
        total.addmm_(x, y)
    else:
        total += x @ y
