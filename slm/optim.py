"""Muon for the matrices inside the blocks, AdamW for the rest, on the recipe's schedules."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slm.model import GPT
from slm.recipe import Hyperparameters

POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""Five steps, safety 2e-2, cushion 2 (arXiv 2505.16932)."""
ADAM_EPS = 1e-10
MUON = ("attention_in", "attention_out", "mlp_up", "mlp_down", "value_gates")
ADAMW = {
    "lm_head": "lm_head",
    "wte": "wte",
    "value_embeds": "value_embeds",
    "resid": "resid",
    "x0": "x0",
    "smear_gate": "smear",
    "smear": "smear",
    "backout": "smear",
}
"""Parameter -> group of the recipe."""


def lr_multiplier(given: Hyperparameters, step: int) -> float:
    """Share of the peak learning rate at a step counted from 0: warm-up, constant, linear down to final_lr."""
    if step < given.warmup_steps:
        return (step + 1) / given.warmup_steps
    left = (given.steps - step) / max(given.warmdown_steps, 1)
    return 1.0 if left >= 1 else left + (1 - left) * given.final_lr


def muon_momentum(given: Hyperparameters, step: int) -> float:
    """Muon's momentum at a step counted from 0: its whole warm-up first, then constant, then down with the rate."""
    start, peak, end = given.momentum
    if step < given.momentum_warmup_steps:
        return start + (peak - start) * step / given.momentum_warmup_steps
    left = (given.steps - step) / max(given.warmdown_steps, 1)
    return peak if left >= 1 else peak + (end - peak) * (1 - left)


def muon_decay(given: Hyperparameters, step: int) -> float:
    """Muon's weight decay at a step counted from 0: cosine to zero."""
    return given.matrix_decay * 0.5 * (1 + math.cos(math.pi * step / given.steps))


class Optimizer:
    """Both optimisers over one model; its state is a flat dict of tensors."""

    def __init__(self, model: GPT) -> None:
        self._given = model.given
        self._muon = {name: _Muon(getattr(model, name), model.given.matrix_beta2) for name in MUON}
        self._names = list(ADAMW)
        groups = []
        for name, group in ADAMW.items():
            settings = getattr(model.given, group)
            betas = (settings.beta1, settings.beta2)
            parameters = [getattr(model, name)]
            groups.append({"params": parameters, "lr": settings.lr, "betas": betas, "weight_decay": settings.decay})
        self._rates = [group["lr"] for group in groups]
        self._adamw = torch.optim.AdamW(groups, eps=ADAM_EPS, fused=True)

    @torch.no_grad()
    def step(self, step: int) -> None:
        """Update every parameter from its gradient; `step` counts from 0."""
        given = self._given
        multiplier = lr_multiplier(given, step)
        for group, rate in zip(self._adamw.param_groups, self._rates, strict=True):
            group["lr"] = rate * multiplier
        self._adamw.step()
        for muon in self._muon.values():
            muon.step(given.matrix_lr * multiplier, muon_momentum(given, step), muon_decay(given, step))

    def state(self) -> dict[str, Tensor]:
        """Every tensor of the state by name."""
        tensors = {f"muon.{name}.{key}": tensor for name, muon in self._muon.items() for key, tensor in muon.state()}
        for name, group in zip(self._names, self._adamw.param_groups, strict=True):
            state = self._adamw.state[group["params"][0]]
            tensors |= {f"adamw.{name}.{key}": tensor for key, tensor in state.items()}
        return tensors

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Continue from a state that `state` gave."""
        for name, muon in self._muon.items():
            for key, tensor in muon.state():
                tensor.copy_(tensors[f"muon.{name}.{key}"])
        for name, group in zip(self._names, self._adamw.param_groups, strict=True):
            prefix = f"adamw.{name}."
            state = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
            self._adamw.state[group["params"][0]] = state


class _Muon:
    """Muon over one stack of equal matrices (..., m, n)."""

    def __init__(self, parameter: Tensor, beta2: float) -> None:
        self._parameter = parameter
        self._beta2 = beta2
        *stack, rows, columns = parameter.shape
        self._axis = -1 if rows >= columns else -2
        self._rate_scale = max(1.0, rows / columns) ** 0.5
        self._momentum = torch.zeros_like(parameter)
        factored = (*stack, rows, 1) if rows >= columns else (*stack, 1, columns)
        self._second = torch.zeros(factored, dtype=torch.float32, device=parameter.device)

    def state(self) -> list[tuple[str, Tensor]]:
        return [("momentum", self._momentum), ("second", self._second)]

    def step(self, lr: float, momentum: float, decay: float) -> None:
        """Nesterov momentum, orthogonalisation, variance reduction, cautious decay; rate times √max(1, m/n)."""
        assert self._parameter.grad is not None
        self._momentum.lerp_(self._parameter.grad, 1 - momentum)
        update = self._parameter.grad.lerp(self._momentum, momentum)
        update = self._variance_reduced(orthogonalised(update))
        rate = lr * self._rate_scale
        if decay:
            agrees = update * self._parameter >= 0
            update = update + decay * self._parameter * agrees
        self._parameter.sub_(update, alpha=rate)

    def _variance_reduced(self, update: Tensor) -> Tensor:
        """NorMuon (arXiv 2510.05491): divided by the running root mean square of rows (or columns), norm kept."""
        mean_square = update.square().mean(dim=self._axis, keepdim=True)
        self._second.lerp_(mean_square, 1 - self._beta2)
        scale = self._second.clamp_min(1e-10).rsqrt()
        before = mean_square.sum(dim=(-2, -1), keepdim=True).sqrt()
        after = (mean_square * scale.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
        return update * (scale * (before / after.clamp_min(1e-10)))


def orthogonalised(update: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrices to a stack (..., m, n).

    Rows rescaled to their root mean square norm (MuonEq, arXiv 2603.28254), five Polar Express steps
    (arXiv 2505.16932), Frobenius norm set to √min(m, n) (Muon+, arXiv 2602.21545). In bfloat16 on GPUs.
    """
    x = update.bfloat16() if update.is_cuda else update
    rows, columns = x.shape[-2:]
    norm = x.float().norm(dim=(-2, -1), keepdim=True) / rows**0.5
    x = x * (norm / x.float().norm(dim=-1, keepdim=True).clamp_min(1e-6)).to(x.dtype)
    x = x / (1.01 * x.norm(dim=(-2, -1), keepdim=True) + 1e-6)
    tall = rows > columns
    if tall:
        x = x.mT
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    if tall:
        x = x.mT
    x = x.to(update.dtype)
    return x * (min(rows, columns) ** 0.5 / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-6))
