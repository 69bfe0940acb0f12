"""CORE of a model: planned rows read in batches, and what each example, each task and all of them say.

A model is judged by the losses of spans. `judge_of` reads the family's GPT with every prompt once and logits where
they are asked; `judge_by` reads any callable row by row. Both answer the same batches, and decide alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from slm import events
from slm.attention import attend, kernel
from slm.evaluate.batches import PAD, Batch, Batches, Lane, Lanes, grouped, lanes_of
from slm.evaluate.bundle import Bundle, Task
from slm.evaluate.scores import TIE, Unanswered, decided, summary, task_document
from slm.evaluate.tasks import FORMAT, Known, Planned, planned
from slm.layers import FEWEST, LOGITS
from slm.model import GPT, Attended

TOKENS = {"cpu": 2**12, "cuda": 2**16}
"""Tokens of one forward pass, padding included, at most."""
Report = Callable[[int, int], None]
"""Told how many of how many tokens are read, by this rank."""


@dataclass(frozen=True)
class Judge:
    """A model as CORE asks it."""

    score: Callable[[Batch], Tensor]
    """Of a batch's asked tokens (3, S): nats, whether greedy, whether its logit ties with the greatest other."""
    context: int | None
    """Tokens of a row at most."""
    shares: bool
    """Whether rows with a common prompt may share a lane."""
    device: torch.device
    """Where it computes."""


@dataclass(frozen=True)
class Asked:
    """Which examples a model is asked."""

    bundle: Bundle
    """Where they are from."""
    most: int | None = None
    """Of each task at most so many; None: all."""
    labels: tuple[str, ...] | None = None
    """Of these tasks alone; None: of all."""

    @property
    def tasks(self) -> list[Task]:
        """The tasks, in the bundle's order. Raises ValueError for a label that is none's."""
        known = [task.label for task in self.bundle.tasks]
        if unknown := [label for label in self.labels or () if label not in known]:
            raise ValueError(f"bundle {self.bundle.id} has no task {unknown[0]}: it has {', '.join(known)}")
        return [task for task in self.bundle.tasks if self.labels is None or task.label in self.labels]

    def settings(self) -> dict[str, Any]:
        """What makes two results incomparable, beside the tokeniser."""
        labels = [task.label for task in self.tasks]
        return {"bundle": self.bundle.id, "format": FORMAT, "max_per_task": self.most, "asked": labels}


def judge_by(logits: Callable[[Tensor], Tensor], context: int | None, device: torch.device) -> Judge:
    """Of a callable from token ids (B, T) to logits (B, T, V): rows by themselves, padded at the end."""

    def score(batch: Batch) -> Tensor:
        ids, asked = _rows(batch, device)
        return _asked(logits(ids).flatten(0, 1)[asked], torch.from_numpy(batch.targets).to(device))

    return Judge(score, context, False, device)


def judge_of(model: GPT) -> Judge:
    """Of the family's GPT: every prompt read once, the head only where logits are asked."""
    device, packed = model.wte.device, _Packed(model)
    size = max(FEWEST, LOGITS.get(device.type, LOGITS["cuda"]) // model.given.vocab_size)

    def score(batch: Batch) -> Tensor:
        # FlexAttention would be compiled anew for every length.
        if batch.tails.size or kernel(device, model.dtype) == "flex":
            stream = packed.read(batch)[torch.from_numpy(batch.asked).to(device)]
        else:
            ids, asked = _rows(batch, device)
            stream = model.features(ids).flatten(0, 1)[asked]
        targets = torch.from_numpy(batch.targets).to(device)
        parts = zip(stream.split(size), targets.split(size), strict=True)
        return torch.cat([_asked(model.capped(part), wanted) for part, wanted in parts], dim=1)

    return Judge(score, model.given.sequence_length, True, device)


def _rows(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Lanes without tails as rows of ids (B, P), padded at the end, and where in (B·P) the asked tokens are (A,)."""
    assert not batch.tails.size
    real = batch.prompts != PAD
    ids = torch.from_numpy(np.where(real, batch.ids[batch.prompts], 0)).to(device)
    return ids, torch.from_numpy(np.flatnonzero(real)[batch.asked]).to(device)


def _asked(logits: Tensor, targets: Tensor) -> Tensor:
    """Judge.score of logits (S, V) and targets (S,)."""
    logits, targets = logits.float(), targets[:, None]
    gold = logits.gather(1, targets)
    other = logits.scatter(1, targets, -torch.inf).amax(1, keepdim=True)
    ties = (gold - other).abs() <= TIE * gold.abs().clamp_min(1)
    greedy = logits.argmax(1, keepdim=True) == targets
    return torch.stack([logits.logsumexp(1, keepdim=True) - gold, greedy, ties]).squeeze(2)


class _Packed(nn.Module):
    """The GPT over lanes: to the model all tokens are one row; attention alone tells them apart."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def read(self, batch: Batch) -> Tensor:
        """The stream (N, d) that the head reads."""
        model, device = self.model, self.model.wte.device
        ids, places, before = (torch.from_numpy(own).to(device) for own in (batch.ids, batch.places, batch.before))
        embedded = model.embedded(ids[None])[0]
        previous = embedded[before].masked_fill_((places == 0)[:, None], 0)
        x0 = model.smeared(torch.stack([previous, embedded], dim=1))[:, 1]
        rotation = {"model.cos": model.cos[places], "model.sin": model.sin[places]}
        stream: Tensor = functional_call(self, rotation, (ids[None], x0[None], _attention(model, batch, places)))
        return stream[0]

    def forward(self, ids: Tensor, x0: Tensor, attended: Attended) -> Tensor:
        """The stream (1, N, d)."""
        return self.model.stream(ids, x0, 0, attended)


def _attention(model: GPT, batch: Batch, places: Tensor) -> Attended:
    """Attention in which a token sees the prompt and its own tail up to itself, within the layer's window."""
    device, windows = places.device, model.given.windows
    prompts, tails, parts = (torch.from_numpy(own).to(device) for own in (batch.prompts, batch.tails, batch.parts))
    length = prompts.size(1)
    every = torch.cat([prompts, tails], dim=1)
    back = torch.empty_like(places).scatter_(0, every[every != PAD], (every != PAD).flatten().nonzero()[:, 0])
    masks = {window: _mask(prompts, tails, parts, places, window).to(model.dtype) for window in {*windows}}

    def attended(layer: int, query_key: Tensor, values: Tensor) -> Tensor:
        query, key = query_key[0, every].transpose(1, 2).chunk(2, dim=1)
        value, window = values[0, every].transpose(1, 2), windows[layer]
        mixed = _causal(query[:, :, :length], key[:, :, :length], value[:, :, :length], window)
        if tails.size(1):
            tailed = F.scaled_dot_product_attention(query[:, :, length:], key, value, attn_mask=masks[window])
            mixed = torch.cat([mixed, tailed], dim=2)
        return mixed.transpose(1, 2).flatten(2).flatten(0, 1)[back][None]

    return attended


def _causal(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """Attention within prompts, as in training; FlexAttention would be compiled anew for every length."""
    length = query.size(2)
    if window >= length - 1 or kernel(query.device, query.dtype) != "flex":
        return attend(query, key, value, window)
    place = torch.arange(length, device=query.device)
    age = place[:, None] - place
    return F.scaled_dot_product_attention(query, key, value, attn_mask=(age >= 0) & (age <= window))


def _mask(prompts: Tensor, tails: Tensor, parts: Tensor, places: Tensor, window: int) -> Tensor:
    """What attention adds to the scores of tails over prompts and tails (B, 1, S, P + S): 0, or minus infinity."""
    own = places[tails].int()
    in_prompt = torch.arange(prompts.size(1), dtype=torch.int32, device=own.device).expand(prompts.shape)
    age = own[:, :, None] - torch.cat([in_prompt, own], dim=1)[:, None]
    of_prompt = (prompts != PAD)[:, None].expand(-1, own.size(1), -1)
    sees = torch.cat([of_prompt, parts[:, None] == parts[:, :, None]], dim=2) & (age >= 0) & (age <= window)
    return torch.zeros(sees.shape, device=own.device).masked_fill_(~sees, -torch.inf)[:, None]


def evaluate_all(
    asked: Asked,
    tokenizer: Known,
    judge: Judge,
    parts: Path,
    rank: int = 0,
    ranks: int = 1,
    report: Report = lambda done, of: None,
    planning: Report = lambda done, of: None,
) -> dict[str, Any]:
    """What a judge reaches on every task asked, and over all. The same on every rank.

    Finished tasks are kept in the folder `parts`, by rank 0, and not done again. A task that cannot be evaluated is an
    `error` there, and then there is no mean over tasks. `planning` is told of tasks, `report` of tokens. Raises
    ValueError as `tasks.planned` does.
    """
    kept = {task.label: parts / f"{task.label}.json" for task in asked.tasks}
    if rank:
        dist.barrier()  # until rank 0 has planned: its plans are found
    documents = {label: events.read_json(path) for label, path in kept.items() if path.exists()}
    left = [task for task in asked.tasks if task.label not in documents]
    plans = []
    for task in left:
        plans.append(planned(asked.bundle, task, tokenizer, asked.most))
        planning(len(plans), len(left))
    if ranks > 1 and rank == 0:
        dist.barrier()
    lanes = [lanes_of(plan, judge.context, judge.shares) for plan in plans]
    read, of = 0, sum(own.tokens for own in lanes) // ranks
    for task, plan, own in zip(left, plans, lanes, strict=True):
        try:
            documents[task.label] = evaluate(task, plan, own, judge, rank, ranks, report=_later(report, read, of))
            if rank == 0:
                parts.mkdir(parents=True, exist_ok=True)
                events.write_json(kept[task.label], documents[task.label])
        except Unanswered as error:
            documents[task.label] = {"error": str(error)}
        read += own.tokens // ranks
    found = {task.label: documents[task.label] for task in asked.tasks}
    return summary(asked.tasks, found, asked.labels is None) | {"tasks": found}


def _later(report: Report, read: int, of: int) -> Report:
    """A report of one task as one of them all."""
    return lambda done, _: report(read + done, of)


def evaluate(
    task: Task,
    plan: Planned,
    lanes: Lanes,
    judge: Judge,
    rank: int = 0,
    ranks: int = 1,
    tokens: int | None = None,
    report: Report = lambda done, of: None,
) -> dict[str, Any]:
    """What a judge reaches on the lanes of a planned task: the whole, and each example. The same on every rank.

    A forward pass reads so many `tokens` at most, but a lane at least. Raises Unanswered where no example fits into
    the context, or a loss is no number.
    """
    if not lanes.lanes:
        raise Unanswered(f"task {task.label}: no example fits into a context of {judge.context} tokens")
    groups = grouped(lanes.lanes, tokens or TOKENS.get(judge.device.type, TOKENS["cuda"]))
    sums = summed(plan, groups[rank::ranks], judge, report)
    if ranks > 1:
        dist.all_reduce(sums)
    return task_document(task, decided(task, plan, sums.cpu().double().numpy(), lanes), lanes)


@torch.no_grad()
def summed(plan: Planned, groups: list[list[Lane]], judge: Judge, report: Report = lambda done, of: None) -> Tensor:
    """Each row's sums (3, R) of what Judge.score gives for its span; 0 where a row is in no group."""
    wide = torch.float32 if judge.device.type == "mps" else torch.float64  # which that device lacks
    sums = torch.zeros(3, len(plan.tails), dtype=wide, device=judge.device)
    batches, done, of = Batches(plan), 0, sum(lane.length for group in groups for lane in group)
    for group in groups:
        batch = batches.batch(group)
        sums.index_add_(1, torch.from_numpy(batch.rows).to(judge.device), judge.score(batch).to(wide))
        done += len(batch.ids)
        report(done, of)
    return sums
