"""Muon for the matrices of the blocks, AdamW for the rest, on the recipe's schedules, distributed
over the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from slm.hardware.block_sizes import SHARED_ELEMENTS
from slm.model.gpt import GPT, compute_dtype
from slm.model.layers import wide
from slm.model.ranks import ALONE, Ranks
from slm.recipe import AdamW, Hyperparameters

POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""Five steps, safety 2e-2, cushion 2 (arXiv 2505.16932)."""
ADAM_EPS = 1e-10
MUON = (("attention_in", "attention_out"), ("mlp_up", "mlp_down"), ("value_gates",))
"""Stacks of matrices of one shape, updated together."""
TRANSPOSED = ("mlp_down",)
"""Stacks that hold their matrices transposed; they come last."""
TABLES = ("lm_head", "wte", "value_embeds")
SCALARS = {
    "resid": "resid",
    "x0": "x0",
    "smear_gate": "smear",
    "smear": "smear",
    "backout": "smear",
}
"""Group of the recipe for each parameter that AdamW updates and that is not a table."""
MATRIX = (-2, -1)
"""Dimensions of a matrix in a stack."""
STATUS = 3
"""Numbers of the trainer that travel with the gradients."""


def lr_multiplier(hp: Hyperparameters, step: int) -> float:
    """Return the share of the peak learning rate at a step counted from 0.

    It warms up, stays constant, then falls linearly to final_lr.
    """
    if step < hp.warmup_steps:
        return (step + 1) / hp.warmup_steps
    share = _warmdown_left(hp, step)
    return share + (1 - share) * hp.final_lr


def muon_momentum(hp: Hyperparameters, step: int) -> float:
    """Return Muon's momentum at a step counted from 0: warm-up, constant, then down with the
    learning rate.
    """
    start, peak, end = hp.momentum
    if step < hp.momentum_warmup_steps:
        return start + (peak - start) * step / hp.momentum_warmup_steps
    return peak + (end - peak) * (1 - _warmdown_left(hp, step))


def _warmdown_left(hp: Hyperparameters, step: int) -> float:
    """Return the share of the warm-down that remains; 1 before it starts."""
    return min(1.0, (hp.steps - step) / max(hp.warmdown_steps, 1))


def muon_decay(hp: Hyperparameters, step: int) -> float:
    """Return Muon's weight decay at a step counted from 0: a cosine to zero."""
    return hp.matrix_decay * 0.5 * (1 + math.cos(math.pi * step / hp.steps))


class Optimizer:
    """Both optimisers of one model, on one rank of several.

    They lay the parameters out anew, contiguously in a few buffers, and their gradients alike. A
    large buffer is cut into equal parts, one a rank: a rank receives the summed gradients of its
    part, updates it, holds the optimiser state of it alone, and sends it to all ranks. Small
    buffers are summed together and updated on every rank.
    """

    def __init__(self, model: GPT, ranks: Ranks = ALONE) -> None:
        parameters = dict(model.named_parameters())
        buffers = []
        for names in [*MUON, *_by_dtype(TABLES, parameters), tuple(SCALARS)]:
            group = {name: parameters[name] for name in names}
            buffers.append(_Buffer(group, names in MUON, ranks))
        small = [buffer for buffer in buffers if not buffer.is_large]
        self._large = [buffer for buffer in buffers if buffer.is_large]
        self._ranks = ranks
        sizes = [STATUS, *(len(buffer.values) for buffer in small)]
        self._exchanged = model.resid.new_zeros(sum(sizes))
        self.status, *gradients = self._exchanged.split(sizes)
        """Numbers of the trainer that travel with the gradients: zeroed with them, summed over
        ranks with them."""
        for buffer, storage in zip(small, gradients, strict=True):
            buffer.move_gradients(storage)
        self._updates: list[_Muon | _AdamW] = []
        for buffer in sorted(buffers, key=lambda buffer: buffer.is_shared):
            kind = _Muon if buffer.has_matrices else _AdamW
            self._updates.append(kind(buffer, model.hp))

    def zero_grad(self) -> None:
        """Set gradients and status to zero."""
        self._exchanged.zero_()
        for buffer in self._large:
            buffer.gradients.zero_()

    @torch.no_grad()
    def step(self, step: int, scale: float = 1.0, measured: bool = False) -> Tensor | None:
        """Sum gradients (times `scale`) and status over ranks and update every parameter; `step`
        counts from 0.

        If `measured`, return [the gradient's norm, the size of the matrices' update as a share of
        the matrices' size].
        """
        # 1) start the exchange of gradients; small buffers and status must have arrived
        receiving = self._reduce()
        sums = torch.zeros(3, device=self.status.device) if measured else None
        sending = []
        # 2) update each buffer as its gradients arrive, and send it while the next one is updated
        for update in self._updates:
            buffer = update.buffer
            if buffer in receiving:
                receiving.pop(buffer).wait()
            if scale != 1:
                buffer.part_gradients.mul_(scale)
            update.step(step, sums)
            if buffer.is_shared:
                sending.append(buffer.gather())
        for work in sending:
            work.wait()
        if sums is None:
            return None
        self._ranks.sum(sums)
        gradient, update_size, values = sums.unbind()
        return torch.stack([gradient, update_size / values]).sqrt()

    def _reduce(self) -> dict[_Buffer, dist.Work]:
        """Start the exchange of gradients; small buffers and status have arrived on return."""
        if self._ranks.world_size == 1:
            return {}
        first = dist.all_reduce(self._exchanged, async_op=True)
        receiving = {buffer: buffer.reduce() for buffer in self._large}
        first.wait()
        return receiving

    def state(self) -> dict[str, Tensor]:
        """Return every tensor of the state by name, flat, on the CPU of rank 0.

        Every rank must call it; ranks other than 0 get {}.
        """
        tensors: dict[str, Tensor] = {}
        for update in self._updates:
            for key, part in update.state.items():
                full = update.buffer.gather_state(part)
                if not self._ranks.is_first:
                    continue
                for name, tensor in update.buffer.split_by_name(full.cpu()).items():
                    tensors[f"{name}.{key}"] = tensor
        return tensors

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Continue from the result of `state`, on any number of ranks."""
        for update in self._updates:
            buffer = update.buffer
            for key, part in update.state.items():
                buffer.load_state(part, [tensors[f"{name}.{key}"] for name in buffer.spans])


def _by_dtype(names: Sequence[str], parameters: dict[str, nn.Parameter]) -> list[tuple[str, ...]]:
    """Group names by the dtype of their parameters."""
    groups: dict[torch.dtype, tuple[str, ...]] = {}
    for name in names:
        dtype = parameters[name].dtype
        groups[dtype] = (*groups.get(dtype, ()), name)
    return list(groups.values())


class _Buffer:
    """Parameters contiguous in memory, their gradients alike, and this rank's part of both."""

    def __init__(
        self, parameters: dict[str, nn.Parameter], has_matrices: bool, ranks: Ranks
    ) -> None:
        self._parameters = parameters
        self.has_matrices = has_matrices
        first = next(iter(parameters.values()))
        total = sum(parameter.numel() for parameter in parameters.values())
        self.is_large = total >= SHARED_ELEMENTS or first.dtype.itemsize < 4
        self.is_shared = ranks.world_size > 1 and self.is_large
        self._parts = ranks.world_size if self.is_shared else 1
        self._copies = ranks.world_size // self._parts
        """Ranks that hold each part."""
        self.matrix = first.shape[-2:]
        unit = self.matrix.numel() if has_matrices else 1
        size = -(-total // (self._parts * unit)) * unit
        start = ranks.rank * size if self.is_shared else 0
        self.part = slice(start, start + size)
        """Slice of this rank, in units of matrices; the last parts may hold zeros that belong to no
        parameter."""
        self.values = first.new_zeros(self._parts * size)
        self.part_values = self.values[self.part]
        self.gradients = torch.zeros_like(self.values)
        self.spans: dict[str, slice] = {}
        offset = 0
        for name, parameter in parameters.items():
            span = slice(offset, offset + parameter.numel())
            self.spans[name] = span
            self.values[span] = parameter.detach().flatten()
            parameter.data = self.values[span].view_as(parameter)
            offset = span.stop
        self.move_gradients(self.gradients)

    @property
    def part_gradients(self) -> Tensor:
        return self.gradients[self.part]

    def move_gradients(self, storage: Tensor) -> None:
        """Let the gradients live in `storage`, of the values' size."""
        self.gradients = storage
        for name, parameter in self._parameters.items():
            parameter.grad = storage[self.spans[name]].view_as(parameter)

    def reduce(self) -> dist.Work:
        """Start to sum this rank's part of the gradients over all ranks."""
        return dist.reduce_scatter_tensor(self.part_gradients, self.gradients, async_op=True)

    def gather(self) -> dist.Work:
        """Start to send this rank's part of the parameters to all ranks, and to receive theirs."""
        return dist.all_gather_into_tensor(self.values, self.part_values, async_op=True)

    def add_squares(self, sums: Tensor, *tensors: Tensor) -> None:
        """Add to `sums` the sum of squares of each tensor, scaled so that the sum over ranks counts
        each parameter once.
        """
        for index, tensor in enumerate(tensors):
            norm = torch.linalg.vector_norm(tensor, dtype=wide(tensor))
            sums[index] += norm.square() / self._copies

    def gather_state(self, part: Tensor) -> Tensor:
        """Return the parts of a state tensor that all ranks hold, joined and flat."""
        if not self.is_shared:
            return part.flatten()
        full = part.new_empty(self._parts * part.numel())
        dist.all_gather_into_tensor(full, part.flatten())
        return full

    def split_by_name(self, full: Tensor) -> dict[str, Tensor]:
        """Split a flat state tensor, laid out as the parameters or in proportion, by parameter."""
        ratio = len(self.values) // len(full)
        split = {}
        for name, span in self.spans.items():
            split[name] = full[span.start // ratio : span.stop // ratio]
        return split

    def load_state(self, part: Tensor, tensors: list[Tensor]) -> None:
        """Fill this rank's part of a state tensor from the tensors of each parameter."""
        size = part.numel()
        padding = part.new_zeros(self._parts * size)
        full = torch.cat([*(tensor.to(part) for tensor in tensors), padding])
        start = size * (self.part.start // len(self.part_values))
        part.copy_(full[start : start + size].view_as(part))


class _Muon:
    """Muon for a buffer of equal matrices (m, n)."""

    def __init__(self, buffer: _Buffer, hp: Hyperparameters) -> None:
        self.buffer = buffer
        self._hp = hp
        rows, columns = buffer.matrix
        self._values = buffer.part_values.view(-1, rows, columns)
        self._gradients = buffer.part_gradients.view(-1, rows, columns)
        starts = [span.start for name, span in buffer.spans.items() if name in TRANSPOSED]
        first_transposed = min(starts, default=len(buffer.values)) - buffer.part.start
        self._upright = min(max(first_transposed, 0) // (rows * columns), len(self._values))
        self._axis = -1 if rows >= columns else -2
        momentum = torch.zeros_like(self._values)
        self.state = {"momentum": momentum, "second": momentum.sum(self._axis, keepdim=True)}
        self._rates = momentum.new_ones(len(momentum), 1, 1)
        self._rates[: self._upright] = max(1.0, rows / columns) ** 0.5
        self._rates[self._upright :] = max(1.0, columns / rows) ** 0.5

    def step(self, step: int, sums: Tensor | None) -> None:
        """Update by Nesterov momentum, orthogonalisation, variance reduction and cautious decay.

        The learning rate is multiplied by √max(1, m/n).
        """
        hp = self._hp
        momentum = muon_momentum(hp, step)
        average = self.state["momentum"]
        average.lerp_(self._gradients, 1 - momentum)
        update = self._gradients.lerp(average, momentum)
        update = orthogonalised(update, self._upright)
        update = self._variance_reduced(update)
        decay = muon_decay(hp, step)
        if decay:
            is_cautious = update * self._values >= 0
            update.add_(self._values * is_cautious, alpha=decay)
        update.mul_(self._rates)
        rate = hp.matrix_lr * lr_multiplier(hp, step)
        if sums is not None:
            self.buffer.add_squares(sums, self._gradients, rate * update, self._values)
        self._values.sub_(update, alpha=rate)

    def _variance_reduced(self, update: Tensor) -> Tensor:
        """Divide by the running root mean square of rows (or columns) and restore the norm
        (NorMuon, arXiv 2510.05491).
        """
        mean_square = update.square().mean(dim=self._axis, keepdim=True)
        second = self.state["second"]
        second.lerp_(mean_square, 1 - self._hp.matrix_beta2)
        scale = second.clamp_min(1e-10).rsqrt_()
        before = mean_square.sum(dim=MATRIX, keepdim=True).sqrt_()
        mean_square.mul_(scale).mul_(scale)
        after = mean_square.sum(dim=MATRIX, keepdim=True).sqrt_()
        scale.mul_(before / after.clamp_min_(1e-10))
        return update.mul_(scale)


def orthogonalised(update: Tensor, upright: int) -> Tensor:
    """Return the nearest (semi-)orthogonal matrices to a stack (k, m, n).

    Matrices after the first `upright` are stored transposed. Rows are rescaled to their root mean
    square norm (MuonEq, arXiv 2603.28254), then follow five Polar Express steps (arXiv 2505.16932),
    and the Frobenius norm is set to √min(m, n) (Muon+, arXiv 2602.21545). In bfloat16 on GPUs that
    have it.
    """
    narrow = update.is_cuda and compute_dtype(update.device) == torch.bfloat16
    x = update.bfloat16() if narrow else update.clone()
    _equalise_rows(x[:upright], -1)
    _equalise_rows(x[upright:], -2)
    x.div_(1.01 * x.norm(dim=MATRIX, keepdim=True) + 1e-6)
    rows, columns = x.shape[-2:]
    is_tall = rows > columns
    if is_tall:
        x = x.mT.contiguous()
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    if is_tall:
        x = x.mT
    x = x.to(update.dtype)
    norm = x.norm(dim=MATRIX, keepdim=True).clamp_min_(1e-6)
    return x * (min(rows, columns) ** 0.5 / norm)


def _equalise_rows(x: Tensor, axis: int) -> None:
    """Rescale the rows of every matrix, along `axis`, to their root mean square norm, in place."""
    if len(x):
        norms = torch.linalg.vector_norm(x, dim=axis, keepdim=True, dtype=wide(x))
        mean = norms.square().mean(dim=MATRIX, keepdim=True).sqrt_()
        factors = mean / norms.clamp_min_(1e-6)
        x.mul_(factors.to(x.dtype))


class _AdamW:
    """AdamW for a buffer of any parameters."""

    def __init__(self, buffer: _Buffer, hp: Hyperparameters) -> None:
        self.buffer = buffer
        self._hp = hp
        self.settings = {name: getattr(hp, SCALARS.get(name, name)) for name in buffer.spans}
        values = buffer.part_values
        self.state = {"first": torch.zeros_like(values), "second": torch.zeros_like(values)}
        self._groups: dict[AdamW, list[list[Tensor]]] = {}
        """Pieces of values, gradients and both moments, and their steps, by settings."""
        for name, span in buffer.spans.items():
            start = max(span.start - buffer.part.start, 0)
            stop = min(span.stop - buffer.part.start, len(values))
            if start >= stop:
                continue
            group = self._groups.setdefault(self.settings[name], [[], [], [], [], []])
            flat = (values, buffer.part_gradients, *self.state.values())
            step = torch.zeros((), device=values.device)
            for pieces, piece in zip(group, [*(x[start:stop] for x in flat), step], strict=True):
                pieces.append(piece)

    def step(self, step: int, sums: Tensor | None) -> None:
        """Update every piece by the settings of its group."""
        if sums is not None:
            self.buffer.add_squares(sums, self.buffer.part_gradients)
        multiplier = lr_multiplier(self._hp, step)
        for settings, (values, gradients, first, second, steps) in self._groups.items():
            for tensor in steps:
                tensor.fill_(step + 1)
            # the kernel of torch.optim.AdamW(fused=True), whose class takes a second to import
            torch._fused_adamw_(
                values,
                gradients,
                first,
                second,
                [],
                steps,
                amsgrad=False,
                maximize=False,
                lr=settings.lr * multiplier,
                beta1=settings.beta1,
                beta2=settings.beta2,
                weight_decay=settings.decay,
                eps=ADAM_EPS,
            )
