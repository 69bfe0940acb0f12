"""A second, readable implementation of the nanochat recipe: one row, one head, one matrix at a
time, in float64.

Parameters are a dict of single tensors, those of a layer named `query.0`, `value_embeds.3` and so
on. Weights are (out, in). It shares nothing with the trainer but the numbers of Hyperparameters.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slm.recipe import Hyperparameters

Parameters = dict[str, Tensor]

POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
GROUPS = {"smear_gate": "smear", "backout": "smear"}
"""AdamW group of each parameter whose name differs from the group's."""


def windows(pattern: str, depth: int, length: int) -> list[int]:
    """Return the window of each layer, in tokens before the current one: the pattern tiled, the
    last layer long.
    """
    short = min(math.ceil(length / 4 / 128) * 128, length)
    tiled = (pattern * depth)[: depth - 1] + "L"
    return [length if letter == "L" else short for letter in tiled]


def has_value_embedding(layer: int, depth: int) -> bool:
    """Whether a layer has a value embedding: every other one, the last one included."""
    return layer % 2 == (depth - 1) % 2


def logits(hp: Hyperparameters, pattern: str, parameters: Parameters, ids: Tensor) -> Tensor:
    """Return the logits (B, T, V) of token ids (B, T)."""
    layer_windows = windows(pattern, hp.depth, hp.sequence_length)
    return torch.stack([_row(hp, layer_windows, parameters, row) for row in ids])


def losses(
    hp: Hyperparameters, pattern: str, parameters: Parameters, ids: Tensor, targets: Tensor
) -> Tensor:
    """Return minus the log probability of every target (B, T)."""
    scores = logits(hp, pattern, parameters, ids)
    return scores.exp().sum(-1).log() - scores.gather(-1, targets[..., None])[..., 0]


def _row(hp: Hyperparameters, layer_windows: list[int], p: Parameters, ids: Tensor) -> Tensor:
    x = norm(p["wte"][ids])
    before = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
    gate = torch.sigmoid((x[:, :24] * p["smear_gate"]).sum(1))
    x = x0 = x + p["smear"] * gate[:, None] * before
    middle = x
    for layer, window in enumerate(layer_windows):
        x = p["resid"][layer] * x + p["x0"][layer] * x0
        x = x + _attention(hp, p, layer, norm(x), ids, window) @ p[f"out.{layer}"].T
        x = x + (norm(x) @ p[f"up.{layer}"].T).clamp(min=0) ** 2 @ p[f"down.{layer}"].T
        if layer == hp.depth // 2:
            middle = x
    return 15 * torch.tanh(norm(x - p["backout"] * middle) @ p["lm_head"].T / 15)


def _attention(
    hp: Hyperparameters, p: Parameters, layer: int, x: Tensor, ids: Tensor, window: int
) -> Tensor:
    """Return the concatenated heads of one layer (T, d), from the normed stream."""
    position = torch.arange(len(x))
    age = position[:, None] - position[None, :]
    mask = torch.where((age >= 0) & (age <= window), 0.0, -math.inf)
    queries, keys, values = (x @ p[f"{name}.{layer}"].T for name in ("query", "key", "value"))
    heads = []
    for head in range(hp.heads):
        channels = slice(head * hp.head_dim, (head + 1) * hp.head_dim)
        query, key = (1.2 * norm(rotated(side[:, channels])) for side in (queries, keys))
        value = values[:, channels]
        if has_value_embedding(layer, hp.depth):
            strength = 3 * torch.sigmoid(x[:, :12] @ p[f"gate.{layer}"][head])
            value = value + strength[:, None] * p[f"value_embeds.{layer}"][ids][:, channels]
        scores = query @ key.T / math.sqrt(hp.head_dim) + mask
        heads.append(torch.softmax(scores, dim=1) @ value)
    return torch.cat(heads, dim=1)


def norm(x: Tensor) -> Tensor:
    """Return the RMSNorm of x, without parameters."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + torch.finfo(x.dtype).eps)


def rotation(length: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Return the cosine and sine (T, q/2): pair i of a head turns by 100000^(-2i/q) a token."""
    speed = torch.tensor(
        [100_000 ** (-2 * pair / head_dim) for pair in range(head_dim // 2)], dtype=torch.float64
    )
    angle = torch.arange(length)[:, None] * speed
    return angle.cos(), angle.sin()


def rotated(x: Tensor) -> Tensor:
    """Return one head (T, q) with its first half rotated against its second."""
    cos, sin = rotation(*x.shape)
    first, second = x[:, : x.size(1) // 2], x[:, x.size(1) // 2 :]
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=1)


def lr_share(hp: Hyperparameters, step: int) -> float:
    """Return the share of the peak rate: warm-up, constant, then linear down over the last 65 % to
    5 %.
    """
    down = round(0.65 * hp.steps)
    if step < hp.warmup_steps:
        return (step + 1) / hp.warmup_steps
    return 1 - 0.95 * max(step - (hp.steps - down), 0) / down


def momentum(hp: Hyperparameters, step: int) -> float:
    """Return the momentum: 0.85 -> 0.97 at first, then 0.97 -> 0.90 over the warm-down."""
    down = round(0.65 * hp.steps)
    if step < hp.momentum_warmup_steps:
        return 0.85 + 0.12 * step / hp.momentum_warmup_steps
    return 0.97 - 0.07 * max(step - (hp.steps - down), 0) / down


def decay(hp: Hyperparameters, step: int) -> float:
    """Return the weight decay: a cosine to zero over training."""
    return hp.matrix_decay * (1 + math.cos(math.pi * step / hp.steps)) / 2


class Optimiser:
    """Muon for the matrices of the layers, AdamW for the rest; updates parameters in place."""

    def __init__(self, hp: Hyperparameters, parameters: Parameters) -> None:
        self.hp = hp
        self.parameters = parameters
        self.first = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self.second: dict[str, Tensor | float] = dict.fromkeys(parameters, 0.0)

    @torch.no_grad()
    def step(self, step: int, gradients: Parameters) -> None:
        """Update every parameter; `step` counts from 0."""
        for name in self.parameters:
            matrix = name.split(".")[0] in ("query", "key", "value", "out", "up", "down", "gate")
            (self._muon if matrix else self._adamw)(name, step, gradients[name])

    def _adamw(self, name: str, step: int, gradient: Tensor) -> None:
        group = name.split(".")[0]
        settings = getattr(self.hp, GROUPS.get(group, group))
        rate = settings.lr * lr_share(self.hp, step)
        self.first[name] = settings.beta1 * self.first[name] + (1 - settings.beta1) * gradient
        self.second[name] = settings.beta2 * self.second[name] + (1 - settings.beta2) * gradient**2
        mean = self.first[name] / (1 - settings.beta1 ** (step + 1))
        square = self.second[name] / (1 - settings.beta2 ** (step + 1))
        p = self.parameters[name]
        p.copy_(p * (1 - rate * settings.decay) - rate * mean / (torch.sqrt(square) + 1e-10))

    def _muon(self, name: str, step: int, gradient: Tensor) -> None:
        p, share = self.parameters[name], momentum(self.hp, step)
        rows, columns = p.shape
        self.first[name] = share * self.first[name] + (1 - share) * gradient
        update = orthogonal(share * self.first[name] + (1 - share) * gradient)

        across = 1 if rows >= columns else 0
        square = (update**2).mean(across, keepdim=True)
        self.second[name] = (
            self.hp.matrix_beta2 * self.second[name] + (1 - self.hp.matrix_beta2) * square
        )
        reduced = torch.where(update == 0, 0, update / torch.sqrt(self.second[name]))
        reduced = reduced * update.norm() / reduced.norm()

        rate = self.hp.matrix_lr * lr_share(self.hp, step) * math.sqrt(max(1, rows / columns))
        agrees = (reduced * p >= 0).to(p.dtype)
        p.copy_(p - rate * (reduced + decay(self.hp, step) * p * agrees))


def orthogonal(matrix: Tensor) -> Tensor:
    """Scale rows to their mean norm, divide by 1.01 times the Frobenius norm, take five steps, set
    the final norm.
    """
    norms = matrix.norm(dim=1, keepdim=True)
    x = torch.where(norms == 0, 0, matrix / norms) * norms.mean()
    x = x / (1.01 * x.norm())
    for a, b, c in POLAR_EXPRESS:
        x = a * x + b * (x @ x.T @ x) + c * (x @ x.T @ x @ x.T @ x)
    return x * math.sqrt(min(x.shape)) / x.norm()
