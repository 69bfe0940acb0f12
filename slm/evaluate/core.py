"""CORE of a model: planned rows read in batches, and what each example, each task and all of them say.

A model is judged by the losses of spans. `judge_of` reads the family's GPT with every prompt once and logits where
they are asked; `judge_by` reads any callable row by row. Both answer the same batches, and decide alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from slm.evaluate.batching import PAD, Batch, Batches, Lane, Lanes, grouped, lanes_of
from slm.evaluate.bundle import Bundle, Task
from slm.evaluate.prompts import FORMAT, Ints, Known, Planned, planned
from slm.evaluate.scores import TIE, Unanswered, decided, summary, task_document
from slm.files import read_json, write_json
from slm.model.attention import attend, kernel
from slm.model.gpt import GPT, Attended
from slm.model.layers import FEWEST, LOGITS

TOKENS = {"cpu": 2**12, "cuda": 2**16}
"""Tokens of one forward pass, padding included, at most."""
PROMPT = -2
"""The tail that a prompt's token is of."""
ALIGNED = 16
"""Lengths of lanes are a multiple of it."""
Report = Callable[[int, int], None]
"""Told how many of how many tokens are read, by this rank."""


Found = TypeVar("Found")
WELL, FULL, STOPPED = range(3)
"""How a rank's part of a task ends: with its sums, without memory for them, or asked to stop."""


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
            raise ValueError(
                f"bundle {self.bundle.id} has no task {unknown[0]}: it has {', '.join(known)}"
            )
        return [
            task for task in self.bundle.tasks if self.labels is None or task.label in self.labels
        ]

    def without(self, labels: Sequence[str]) -> Asked:
        """All tasks but some. Raises ValueError for a label that is none's, and where none is left."""
        left = replace(self, labels=tuple(labels)).tasks
        kept = tuple(task.label for task in self.bundle.tasks if task not in left)
        if not kept:
            raise ValueError(f"without {', '.join(labels)} bundle {self.bundle.id} has no task")
        return replace(self, labels=kept)

    @property
    def whole(self) -> bool:
        """Whether all tasks are asked."""
        return len(self.tasks) == len(self.bundle.tasks)

    @property
    def mode(self) -> str:
        """How much of the bundle, in words: results of two modes are never one curve."""
        asked = [task.label for task in self.tasks]
        left = [task.label for task in self.bundle.tasks if task.label not in asked]
        parts = [f"{self.most} per task"] if self.most else []
        if left:
            parts.append(
                f"without {','.join(left)}"
                if len(left) < len(asked)
                else f"tasks {','.join(asked)}"
            )
        return ", ".join(parts) or "full"

    def settings(self) -> dict[str, Any]:
        """What makes two results incomparable, beside the tokeniser."""
        labels, own = [task.label for task in self.tasks], self.bundle
        how = {"mode": self.mode, "format": FORMAT, "max_per_task": self.most, "asked": labels}
        return {"bundle": own.id, "name": own.name, **how}


def judge_by(
    logits: Callable[[Tensor], Tensor], context: int | None, device: torch.device
) -> Judge:
    """Of a callable from token ids (B, T) to logits (B, T, V): rows by themselves, padded at the end."""

    def score(batch: Batch) -> Tensor:
        ids, asked = _rows(batch, device)
        return _asked(logits(ids).flatten(0, 1)[asked], torch.from_numpy(batch.targets).to(device))

    return Judge(score, context, False, device)


def judge_of(model: GPT) -> Judge:
    """Of the family's GPT: every prompt read once, the head only where logits are asked."""
    device = model.wte.device
    size = max(FEWEST, LOGITS.get(device.type, LOGITS["cuda"]) // model.given.vocab_size)

    def score(batch: Batch) -> Tensor:
        stream = _stream(model, batch)
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
    """Judge.score of logits (S, V) and targets (S,); among equal logits the first is the greedy one."""
    logits, targets = logits.float(), targets[:, None]
    gold, rest = logits.gather(1, targets), logits.scatter(1, targets, -torch.inf)
    other = rest.amax(1, keepdim=True)
    ties = (gold - other).abs() <= TIE * gold.abs().clamp_min(1)
    greedy = gold > other
    if (
        logits.device.type != "cpu" or (gold == other).any()
    ):  # finding places is slow there, asking a GPU is
        greedy = logits.argmax(1, keepdim=True) == targets
    greatest = torch.maximum(gold, other)
    total = rest.sub_(greatest).exp_().sum(1, keepdim=True).add_((gold - greatest).exp())
    return torch.stack([total.log() + (greatest - gold), greedy, ties]).squeeze(2)


def _stream(model: GPT, batch: Batch) -> Tensor:
    """The stream (A, d) that the head reads of the tokens asked.

    To the model all tokens are one row; attention alone tells the lanes apart.
    """
    own = (batch.ids, batch.places, batch.before, batch.asked)
    ids, places, before, asked = (torch.from_numpy(each).to(model.wte.device) for each in own)
    embedded = model.embedded(ids[None])[0]
    previous = embedded[before].masked_fill_((places == 0)[:, None], 0)
    x0 = model.smeared(torch.stack([previous, embedded], dim=1))[:, 1]
    return model.stream(ids[None], x0[None], places, _attention(model, batch, places), asked)[0]


def _attention(model: GPT, batch: Batch, places: Tensor) -> Attended:
    """Attention in which a token sees the prompt and its own tail up to itself, within the layer's window.

    The last layer gives what is asked alone.
    """
    device, windows, last = places.device, model.given.windows, model.given.depth - 1
    asking = np.where(batch.questions == PAD, PAD, batch.asked[batch.questions])
    part = np.full(len(batch.ids), PROMPT)
    part[batch.tails[batch.tails != PAD]] = batch.parts[batch.tails != PAD]
    own = map(_aligned, (batch.prompts, batch.tails, asking, batch.parts, part[asking]))
    prompts, tails, questions, parts, asking_parts = (
        torch.from_numpy(each).to(device) for each in own
    )
    length = prompts.size(1)
    every = torch.cat([prompts, tails], dim=1)
    back = torch.empty_like(places).scatter_(
        0, every[every != PAD], (every != PAD).flatten().nonzero()[:, 0]
    )
    answers = (questions != PAD).flatten().nonzero()[:, 0]
    masks = {
        window: _mask(prompts, tails, parts, tails, parts, places, window).to(model.dtype)
        for window in {*windows[:last]}
        if tails.size(1)
    }
    final = _mask(prompts, tails, parts, questions, asking_parts, places, windows[last]).to(
        model.dtype
    )

    def attended(layer: int, query_key: Tensor, values: Tensor) -> Tensor:
        key, value = (
            query_key[0, every, query_key.size(2) // 2 :].transpose(1, 2),
            values[0, every].transpose(1, 2),
        )
        if layer == last:
            query = query_key[0, questions, : key.size(1)].transpose(1, 2)
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=final)
            return mixed.transpose(1, 2).flatten(2).flatten(0, 1)[answers][None]
        query = query_key[0, every, : key.size(1)].transpose(1, 2)
        mixed = _causal(
            query[:, :, :length], key[:, :, :length], value[:, :, :length], windows[layer]
        )
        if tails.size(1):
            tailed = F.scaled_dot_product_attention(
                query[:, :, length:], key, value, attn_mask=masks[windows[layer]]
            )
            mixed = torch.cat([mixed, tailed], dim=2)
        return mixed.transpose(1, 2).flatten(2).flatten(0, 1)[back][None]

    return attended


def _aligned(table: Ints) -> Ints:
    """A table with more columns of PAD: kernels of attention are slow at odd lengths."""
    return np.pad(table, ((0, 0), (0, -table.shape[1] % ALIGNED)), constant_values=PAD)


def _causal(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """Attention within prompts, as in training; FlexAttention would be compiled anew for every length."""
    length = query.size(2)
    if window >= length - 1 or kernel(query.device, query.dtype) != "flex":
        return attend(query, key, value, window)
    place = torch.arange(length, device=query.device)
    age = place[:, None] - place
    return F.scaled_dot_product_attention(query, key, value, attn_mask=(age >= 0) & (age <= window))


def _mask(
    prompts: Tensor,
    tails: Tensor,
    parts: Tensor,
    queries: Tensor,
    of: Tensor,
    places: Tensor,
    window: int,
) -> Tensor:
    """What attention adds to the scores of queries (B, Q), tokens `of` some tail or the prompt, over prompts and tails
    (B, 1, Q, P + S): 0, or minus infinity."""
    own, in_tails = places[queries].int(), places[tails].int()
    in_prompt = torch.arange(prompts.size(1), dtype=torch.int32, device=own.device).expand(
        prompts.shape
    )
    age = own[:, :, None] - torch.cat([in_prompt, in_tails], dim=1)[:, None]
    of_prompt = (prompts != PAD)[:, None].expand(-1, own.size(1), -1)
    sees = (
        torch.cat([of_prompt, parts[:, None] == of[:, :, None]], dim=2)
        & (age >= 0)
        & (age <= window)
    )
    return torch.zeros(sees.shape, device=own.device).masked_fill_(~sees, -torch.inf)[:, None]


class OutOfMemory(RuntimeError):
    """One example alone is too much for the memory there is."""


class Interrupted(Exception):
    """A report raises it to end an evaluation, on every rank. What is finished is kept."""


def evaluate_all(
    asked: Asked,
    tokenizer: Known,
    judge: Judge,
    parts: Path,
    rank: int = 0,
    ranks: int = 1,
    tokens: int | None = None,
    report: Report = lambda done, of: None,
    planning: Report = lambda done, of: None,
) -> dict[str, Any]:
    """What a judge reaches on every task asked, and over all. The same on every rank.

    Finished tasks are kept in the folder `parts`, by rank 0, and not done again. A task that cannot be evaluated is an
    `error` there, and then there is no mean over tasks. `planning` is told of tasks, `report` of tokens. Raises
    ValueError as `tasks.planned` does, OutOfMemory and Interrupted as `evaluate` does: each on every rank.
    """
    kept = {task.label: parts / f"{task.label}.json" for task in asked.tasks}

    def plan_left() -> list[Task]:
        left = [task for task in asked.tasks if not kept[task.label].exists()]
        for number, task in enumerate(left, 1):
            planned(asked.bundle, task, tokenizer, asked.most)
            planning(number, len(left))
        return left

    left = of_first(plan_left, rank, ranks, judge.device)
    plans = [
        planned(asked.bundle, task, tokenizer, asked.most) for task in left
    ]  # the first rank's, found again
    documents = {
        task.label: read_json(kept[task.label]) for task in asked.tasks if task not in left
    }
    lanes = [lanes_of(plan, judge.context, judge.shares) for plan in plans]
    read, of = 0, sum(own.tokens for own in lanes) // ranks
    for task, plan, own in zip(left, plans, lanes, strict=True):
        try:
            documents[task.label] = evaluate(
                task, plan, own, judge, rank, ranks, tokens, _later(report, read, of)
            )
            if rank == 0:
                _keep(kept[task.label], documents[task.label])
        except Unanswered as error:
            documents[task.label] = {"error": str(error)}
        read += own.tokens // ranks
    found = {task.label: documents[task.label] for task in asked.tasks}
    return summary(asked.tasks, found, asked.whole) | {"tasks": found}


def of_first(work: Callable[[], Found], rank: int, ranks: int, device: torch.device) -> Found:
    """What the first rank finds, on every rank; or what it raises, of ValueError, OSError and Interrupted."""
    told: list[Any] = [None, None]
    if rank == 0:
        try:
            told[0] = work()
        except (ValueError, OSError, Interrupted) as error:
            told[1] = error
    if ranks > 1:
        dist.broadcast_object_list(told, device=device)
    if told[1]:
        raise told[1]
    return cast(Found, told[0])


def _keep(path: Path, document: dict[str, Any]) -> None:
    with suppress(
        OSError
    ):  # a task that is not kept is done again after an interruption, and no more
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, document)


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

    A forward pass reads so many `tokens` at most, but a lane at least; half as many where memory does not suffice.
    Raises Unanswered where no example fits into the context, or a loss is no number; and what ends one rank on all:
    OutOfMemory where a lane alone is too much, Interrupted.
    """
    if not lanes.lanes:
        raise Unanswered(
            f"task {task.label}: no example fits into a context of {judge.context} tokens"
        )
    tokens, end = tokens or TOKENS.get(judge.device.type, TOKENS["cuda"]), FULL
    while end == FULL:
        groups = grouped(lanes.lanes, tokens)
        sums, end = _summed_by_all(plan, groups[rank::ranks], judge, ranks, report)
        if end == FULL and max(map(len, groups)) == 1:
            raise OutOfMemory(f"task {task.label}: no memory is left for one example at a time")
        tokens //= 2
    if end == STOPPED:
        raise Interrupted
    return task_document(task, decided(task, plan, sums.cpu().double().numpy(), lanes), lanes)


def _summed_by_all(
    plan: Planned, groups: list[list[Lane]], judge: Judge, ranks: int, report: Report
) -> tuple[Tensor, int]:
    """The `summed` of all ranks, and how they ended: WELL, FULL or STOPPED where one of them did."""
    sums, end = _zeros(plan, judge), WELL
    try:
        sums = summed(plan, groups, judge, report)
    except Interrupted:
        end = STOPPED
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        end = FULL
    if ranks > 1:
        ends = torch.tensor(end, device=judge.device)
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        dist.all_reduce(sums)
        end = int(ends)
    if end == FULL and judge.device.type == "cuda":
        torch.cuda.empty_cache()
    return sums, end


def out_of_memory(error: Exception) -> bool:
    """Whether a device had no memory left; torch's allocator of the CPU says it in words alone."""
    return isinstance(
        error, MemoryError | torch.OutOfMemoryError
    ) or "can't allocate memory" in str(error)


def _zeros(plan: Planned, judge: Judge) -> Tensor:
    wide = torch.float32 if judge.device.type == "mps" else torch.float64  # which that device lacks
    return torch.zeros(3, len(plan.tails), dtype=wide, device=judge.device)


@torch.no_grad()
def summed(
    plan: Planned, groups: list[list[Lane]], judge: Judge, report: Report = lambda done, of: None
) -> Tensor:
    """Each row's sums (3, R) of what Judge.score gives for its span; 0 where a row is in no group."""
    sums = _zeros(plan, judge)
    batches, done, of = Batches(plan), 0, sum(lane.length for group in groups for lane in group)
    for group in groups:
        batch = batches.batch(group)
        sums.index_add_(
            1, torch.from_numpy(batch.rows).to(judge.device), judge.score(batch).to(sums.dtype)
        )
        done += len(batch.ids)
        report(done, of)
    return sums
