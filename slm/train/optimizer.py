"""Muon for the matrices inside the blocks, AdamW for the rest, on the recipe's schedules, shared out over the ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from slm.model.gpt import GPT, compute_dtype
from slm.model.layers import wide
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
TURNED = ("mlp_down",)
"""Stacks that hold their matrices transposed; they come last."""
TABLES = ("lm_head", "wte", "value_embeds")
SCALARS = {
    "resid": "resid",
    "x0": "x0",
    "smear_gate": "smear",
    "smear": "smear",
    "backout": "smear",
}
"""Parameter -> group of the recipe, where AdamW updates it and it is no table."""
STATUS = 3
"""Numbers of the trainer's that travel with the gradients."""
SHARED = 2**17
"""Elements from which ranks share the update of a buffer: below, sending the results round costs more than it saves."""


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
    """Both optimisers over one model, on one rank of several.

    It lays the parameters out anew, side by side in a few buffers, and their gradients alike. A large buffer is cut
    into equal parts, one a rank: a rank receives the summed gradients of its part, updates it, holds the state of it
    alone, and sends it to all. Small buffers are summed together and updated on every rank.
    """

    def __init__(self, model: GPT, rank: int = 0, ranks: int = 1) -> None:
        given, parameters = model.given, dict(model.named_parameters())
        groups = [*MUON, *_of_one_type(TABLES, parameters), tuple(SCALARS)]
        buffers = [
            _Buffer({name: parameters[name] for name in names}, names in MUON, rank, ranks)
            for names in groups
        ]
        small, self._large = (
            [own for own in buffers if own.large == large] for large in (False, True)
        )
        self._rank, self._ranks = rank, ranks
        sizes = [STATUS, *(len(own.values) for own in small)]
        self._exchanged = model.resid.new_zeros(sum(sizes))
        self.status, *rooms = self._exchanged.split(sizes)
        """What the trainer adds to the gradients' exchange: zeroed with them, summed over ranks with them."""
        rooms += [torch.zeros_like(own.values) for own in self._large]
        for buffer, room in zip([*small, *self._large], rooms, strict=True):
            buffer.hold_gradients(room)
        self._parts: list[_Muon | _AdamW] = [_Muon(own, given) for own in buffers[: len(MUON)]]
        self._parts += [_AdamW(own, given) for own in buffers[len(MUON) :]]
        self._parts.sort(key=lambda part: part.buffer.shared)

    def zero_grad(self) -> None:
        """Set gradients and status to zero."""
        self._exchanged.zero_()
        for buffer in self._large:
            buffer.gradients.zero_()

    @torch.no_grad()
    def step(self, step: int, scale: float = 1.0, measured: bool = False) -> Tensor | None:
        """Sum gradients (times `scale`) and status over ranks and update every parameter; `step` counts from 0.

        Where `measured`, it gives [the gradient's norm, the size of the matrices' update as a share of theirs].
        """
        arriving = self._reduce()
        sums = torch.zeros(3, device=self.status.device) if measured else None
        sending = []
        for part in self._parts:
            if part.buffer in arriving:
                arriving.pop(part.buffer).wait()
            if scale != 1:
                part.buffer.own_gradients.mul_(scale)
            part.update(step, sums)
            if part.buffer.shared:
                sending.append(part.buffer.gather())
        for work in sending:
            work.wait()
        return None if sums is None else self._measures(sums)

    def _reduce(self) -> dict[_Buffer, dist.Work]:
        """Start the exchange of gradients; small buffers and status have arrived when this returns."""
        if self._ranks == 1:
            return {}
        first = dist.all_reduce(self._exchanged, async_op=True)
        arriving = {buffer: buffer.reduce() for buffer in self._large}
        first.wait()
        return arriving

    def _measures(self, sums: Tensor) -> Tensor:
        if self._ranks > 1:
            dist.all_reduce(sums)
        gradient, update, values = sums.unbind()
        return torch.stack([gradient, update / values]).sqrt()

    def state(self) -> dict[str, Tensor]:
        """Every tensor of the state by name, flat, on the CPU of rank 0; the others must call it too, and get none."""
        tensors: dict[str, Tensor] = {}
        for part in self._parts:
            for key, own in part.state.items():
                whole = part.buffer.whole(own)
                if self._rank == 0:
                    named = part.buffer.named(whole.cpu())
                    tensors |= {f"{name}.{key}": tensor for name, tensor in named.items()}
        return tensors

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Continue from a state that `state` gave, on whatever number of ranks."""
        for part in self._parts:
            for key, own in part.state.items():
                part.buffer.take(own, [tensors[f"{name}.{key}"] for name in part.buffer.spans])


def _of_one_type(
    names: Sequence[str], parameters: dict[str, nn.Parameter]
) -> list[tuple[str, ...]]:
    """The names by the type of their parameters."""
    types = dict.fromkeys(parameters[name].dtype for name in names)
    return [tuple(name for name in names if parameters[name].dtype == own) for own in types]


class _Buffer:
    """Parameters side by side in memory, their gradients alike, and the part of both that is this rank's."""

    def __init__(
        self, parameters: dict[str, nn.Parameter], of_matrices: bool, rank: int, ranks: int
    ) -> None:
        self._parameters = parameters
        first, total = (
            next(iter(parameters.values())),
            sum(own.numel() for own in parameters.values()),
        )
        self.large = total >= SHARED or first.dtype.itemsize < 4
        self.shared = ranks > 1 and self.large
        self._world, self._ranks = ranks, ranks if self.shared else 1
        self.matrix = first.shape[-2:]
        unit = self.matrix.numel() if of_matrices else 1
        size = -(-total // (self._ranks * unit)) * unit
        self.own = slice(rank * size, (rank + 1) * size) if self.shared else slice(0, size)
        """This rank's part, of whole matrices; the last parts may hold zeros that belong to no parameter."""
        self.values = first.new_zeros(self._ranks * size)
        self.spans: dict[str, slice] = {}
        place = 0
        for name, parameter in parameters.items():
            self.spans[name] = span = slice(place, place + parameter.numel())
            self.values[span] = parameter.detach().flatten()
            parameter.data = self.values[span].view_as(parameter)
            place = span.stop

    def hold_gradients(self, room: Tensor) -> None:
        """Lay the gradients out in some memory of the values' size."""
        self.gradients = room
        for name, parameter in self._parameters.items():
            parameter.grad = room[self.spans[name]].view_as(parameter)

    @property
    def own_values(self) -> Tensor:
        return self.values[self.own]

    @property
    def own_gradients(self) -> Tensor:
        return self.gradients[self.own]

    def reduce(self) -> dist.Work:
        """Start to sum this rank's part of the gradients over all ranks."""
        return dist.reduce_scatter_tensor(self.own_gradients, self.gradients, async_op=True)

    def gather(self) -> dist.Work:
        """Start to send this rank's part of the parameters to all, and to receive theirs."""
        return dist.all_gather_into_tensor(self.values, self.own_values, async_op=True)

    def weighed(self, *tensors: Tensor) -> Tensor:
        """Sums of squares of up to three tensors, (3,), which over all ranks count each parameter once."""
        squares = [torch.linalg.vector_norm(own, dtype=wide(own)).square() for own in tensors]
        sums = torch.stack(squares + [torch.zeros_like(squares[0])] * (3 - len(squares)))
        return sums / (1 if self.shared else self._world)

    def whole(self, own: Tensor) -> Tensor:
        """The parts that all ranks hold of something, put together."""
        if not self.shared:
            return own
        whole = own.new_empty(self._ranks * own.numel())
        dist.all_gather_into_tensor(whole, own.flatten())
        return whole

    def named(self, whole: Tensor) -> dict[str, Tensor]:
        """What belongs to each parameter of something laid out as they are, or in proportion."""
        ratio = len(self.values) // whole.numel()
        flat = whole.flatten()
        return {
            name: flat[span.start // ratio : span.stop // ratio]
            for name, span in self.spans.items()
        }

    def take(self, own: Tensor, tensors: list[Tensor]) -> None:
        """Fill this rank's part of something from what belongs to each parameter."""
        whole = torch.cat(
            [*(tensor.to(own) for tensor in tensors), own.new_zeros(self._ranks * own.numel())]
        )
        begin = own.numel() * (self.own.start // len(self.own_values))
        own.copy_(whole[begin : begin + own.numel()].view_as(own))


class _Muon:
    """Muon over a buffer of equal matrices (m, n)."""

    def __init__(self, buffer: _Buffer, given: Hyperparameters) -> None:
        self.buffer = buffer
        self._given = given
        rows, columns = shape = buffer.matrix
        self._values, self._gradients = (
            own.view(-1, *shape) for own in (buffer.own_values, buffer.own_gradients)
        )
        turned = min(
            (span.start for name, span in buffer.spans.items() if name in TURNED),
            default=len(buffer.values),
        )
        self._upright = min(max(turned - buffer.own.start, 0) // shape.numel(), len(self._values))
        self._axis = -1 if rows >= columns else -2
        momentum = torch.zeros_like(self._values)
        self.state = {"momentum": momentum, "second": momentum.sum(self._axis, keepdim=True)}
        self._rates = momentum.new_ones(len(momentum), 1, 1)
        self._rates[: self._upright] = max(1.0, rows / columns) ** 0.5
        self._rates[self._upright :] = max(1.0, columns / rows) ** 0.5

    def update(self, step: int, sums: Tensor | None) -> None:
        """Nesterov momentum, orthogonalisation, variance reduction, cautious decay; rate times √max(1, m/n)."""
        given = self._given
        momentum, decay = muon_momentum(given, step), muon_decay(given, step)
        self.state["momentum"].lerp_(self._gradients, 1 - momentum)
        update = self._gradients.lerp(self.state["momentum"], momentum)
        update = self._variance_reduced(orthogonalised(update, self._upright))
        if decay:
            update.add_(self._values * (update * self._values >= 0), alpha=decay)
        update.mul_(self._rates)
        rate = given.matrix_lr * lr_multiplier(given, step)
        if sums is not None:
            sums += self.buffer.weighed(self._gradients, rate * update, self._values)
        self._values.sub_(update, alpha=rate)

    def _variance_reduced(self, update: Tensor) -> Tensor:
        """NorMuon (arXiv 2510.05491): divided by the running root mean square of rows (or columns), norm kept."""
        mean_square = update.square().mean(dim=self._axis, keepdim=True)
        second = self.state["second"].lerp_(mean_square, 1 - self._given.matrix_beta2)
        scale = second.clamp_min(1e-10).rsqrt_()
        before = mean_square.sum(dim=(-2, -1), keepdim=True).sqrt_()
        after = mean_square.mul_(scale).mul_(scale).sum(dim=(-2, -1), keepdim=True).sqrt_()
        return update.mul_(scale.mul_(before / after.clamp_min_(1e-10)))


def orthogonalised(update: Tensor, upright: int) -> Tensor:
    """The nearest (semi-)orthogonal matrices to a stack (k, m, n), of which those after the first `upright` are stored
    transposed.

    Rows rescaled to their root mean square norm (MuonEq, arXiv 2603.28254), five Polar Express steps
    (arXiv 2505.16932), Frobenius norm set to √min(m, n) (Muon+, arXiv 2602.21545). In bfloat16 on GPUs that have it.
    """
    narrow = update.is_cuda and compute_dtype(update.device) == torch.bfloat16
    x = update.bfloat16() if narrow else update.clone()
    _equalise_rows(x[:upright], -1)
    _equalise_rows(x[upright:], -2)
    x.div_(1.01 * x.norm(dim=(-2, -1), keepdim=True) + 1e-6)
    rows, columns = x.shape[-2:]
    if rows > columns:
        x = x.mT.contiguous()
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    if rows > columns:
        x = x.mT
    x = x.to(update.dtype)
    return x * (min(rows, columns) ** 0.5 / x.norm(dim=(-2, -1), keepdim=True).clamp_min_(1e-6))


def _equalise_rows(x: Tensor, axis: int) -> None:
    """Rescale the rows, which lie along `axis`, of every matrix of a stack to their root mean square norm, in place."""
    if len(x):
        norms = torch.linalg.vector_norm(x, dim=axis, keepdim=True, dtype=wide(x))
        mean = norms.square().mean(dim=(-2, -1), keepdim=True).sqrt_()
        x.mul_((mean / norms.clamp_min_(1e-6)).to(x.dtype))


class _AdamW:
    """AdamW over a buffer of anything."""

    def __init__(self, buffer: _Buffer, given: Hyperparameters) -> None:
        self.buffer = buffer
        self._given = given
        self.settings = {name: getattr(given, SCALARS.get(name, name)) for name in buffer.spans}
        self.state = {
            "first": torch.zeros_like(buffer.own_values),
            "second": torch.zeros_like(buffer.own_values),
        }
        kept = (buffer.own_values, buffer.own_gradients, self.state["first"], self.state["second"])
        pieces: dict[AdamW, list[tuple[Tensor, ...]]] = {}
        for name, span in buffer.spans.items():
            begin, end = (
                min(max(end - buffer.own.start, 0), len(buffer.own_values))
                for end in (span.start, span.stop)
            )
            if begin < end:
                step = torch.zeros((), device=buffer.values.device)
                pieces.setdefault(self.settings[name], []).append(
                    (*(flat[begin:end] for flat in kept), step)
                )
        self._groups = {settings: list(map(list, zip(*own))) for settings, own in pieces.items()}

    def update(self, step: int, sums: Tensor | None) -> None:
        """One step of every piece by the settings of its group."""
        if sums is not None:
            sums += self.buffer.weighed(self.buffer.own_gradients)
        for settings, (values, gradients, first, second, steps) in self._groups.items():
            # What torch.optim.AdamW(fused=True) runs, without its import of the compiler, which takes a second.
            for own in steps:
                own.fill_(step + 1)
            torch._fused_adamw_(
                values,
                gradients,
                first,
                second,
                [],
                steps,
                amsgrad=False,
                maximize=False,
                lr=settings.lr * lr_multiplier(self._given, step),
                beta1=settings.beta1,
                beta2=settings.beta2,
                weight_decay=settings.decay,
                eps=ADAM_EPS,
            )
