"""CORE of a model: packed sequences are read in batches, and rows, tasks and the bundle are scored.

The model reads every shared prefix once and computes logits only for scored tokens. Ranks share the
batches of a task and sum their results.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from slm.data.tokenizer import Tokenizer
from slm.evaluate.batching import (
    PAD,
    Batch,
    PackedSequence,
    PackedTask,
    build_batch,
    group_sequences,
    pack,
)
from slm.evaluate.bundle import Bundle, Task
from slm.evaluate.prompts import Ints, TokenizedTask, load_or_tokenize
from slm.evaluate.request import TASKS, TOKENS, CoreRequest, Report, ignore
from slm.evaluate.scores import TIE, TaskError, decide, summary, task_document
from slm.files import read_json, write_json
from slm.hardware.block_sizes import logit_tokens
from slm.model.attention import attend, kernel, masked
from slm.model.gpt import GPT, Attended
from slm.model.ranks import ALONE, Ranks

ALIGNMENT = 16
"""Lengths of index tables are multiples of it: attention kernels are slow at odd lengths."""
COMPLETE, OUT_OF_MEMORY, INTERRUPTED = range(3)
"""Outcomes of a rank's share of a task; the greatest over all ranks counts."""


class OutOfMemory(RuntimeError):
    """Raised if a single packed sequence does not fit into memory."""


class Interrupted(Exception):
    """Raised by a report to end an evaluation on every rank; finished tasks stay on disk."""


ERRORS = (ValueError, OSError, Interrupted)
"""Errors of rank 0 that are raised on every rank."""


@dataclass(frozen=True)
class Scorer:
    """A model with its tokenizer, and how this process computes with it."""

    model: GPT
    tokenizer: Tokenizer
    ranks: Ranks = ALONE
    batch_tokens: int | None = None
    """Maximum tokens of one forward pass, padding included; None for the default of the device."""
    report: Report = ignore

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.wte.device

    @property
    def context(self) -> int:
        """Maximum tokens of a row."""
        return self.model.hp.sequence_length

    def score(self, batch: Batch) -> Tensor:
        """Return nats, greediness and ties (3, A) of the scored tokens (see `score_logits`)."""
        model = self.model
        stream = _stream(model, batch)
        targets = torch.from_numpy(batch.targets).to(self.device)
        size = logit_tokens(self.device.type, model.hp.vocab_size)
        scores = [
            score_logits(model.capped(part), part_targets)
            for part, part_targets in zip(stream.split(size), targets.split(size), strict=True)
        ]
        return torch.cat(scores, dim=1)


def default_batch_tokens(device: torch.device) -> int:
    """Return the maximum tokens of one forward pass, padding included."""
    return 2**12 if device.type == "cpu" else 2**16


def score_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Return (3, A) of logits (A, V) and targets (A,): nats, whether greedy, whether tied.

    Among equal logits the first is the greedy one. A target is tied if its logit and the greatest
    other one may swap with the order of summation.
    """
    logits = logits.float()
    targets = targets[:, None]
    gold = logits.gather(1, targets)
    rest = logits.scatter(1, targets, -torch.inf)
    other = rest.amax(1, keepdim=True)
    ties = (gold - other).abs() <= TIE * gold.abs().clamp_min(1)
    greedy = gold > other
    # argmax is slow on a CPU, and reading back whether there is a tie is slow on a GPU.
    if logits.device.type != "cpu" or (gold == other).any():
        greedy = logits.argmax(1, keepdim=True) == targets
    greatest = torch.maximum(gold, other)
    total = rest.sub_(greatest).exp_().sum(1, keepdim=True)
    total.add_((gold - greatest).exp())
    nats = total.log() + (greatest - gold)
    return torch.stack([nats, greedy, ties]).squeeze(2)


def _stream(model: GPT, batch: Batch) -> Tensor:
    """Return the stream (A, d) of the scored tokens that the head reads.

    To the model all tokens are one row; attention alone separates the sequences.
    """
    arrays = (batch.ids, batch.positions, batch.previous, batch.scored)
    ids, positions, previous, scored = (
        torch.from_numpy(array).to(model.wte.device) for array in arrays
    )
    embedded = model.embedded(ids[None])[0]
    is_first = (positions == 0)[:, None]
    before = embedded[previous].masked_fill_(is_first, 0)
    pairs = torch.stack([before, embedded], dim=1)
    x0 = model.smeared(pairs)[:, 1]
    attention = _attention(model, batch, positions)
    return model.stream(ids[None], x0[None], positions, attention, scored)[0]


def _attention(model: GPT, batch: Batch, positions: Tensor) -> Attended:
    """Return attention in which a token sees the prefix and its own suffix up to itself.

    Windows are those of the layers. The last layer returns the scored tokens only.
    """
    windows = model.hp.windows
    last = model.hp.depth - 1
    # 1) index tables as tensors, aligned; the keys of a sequence are its prefix, then its suffixes
    prefixes, suffixes, queries = (
        torch.from_numpy(_aligned(table)).to(positions.device)
        for table in (batch.prefixes, batch.suffixes, batch.queries)
    )
    pieces = torch.from_numpy(batch.pieces).to(positions.device)
    length = prefixes.size(1)
    keys = torch.cat([prefixes, suffixes], dim=1)
    # 2) the way back from the tables to the row of tokens
    cells = (keys != PAD).flatten().nonzero()[:, 0]
    cell_of_token = torch.empty_like(positions)
    cell_of_token[keys.flatten()[cells]] = cells
    query_cells = (queries != PAD).flatten().nonzero()[:, 0]
    # 3) one mask per window
    masks = {
        window: _mask(suffixes, keys, pieces, positions, window).to(model.dtype)
        for window in {*windows[:last]}
        if suffixes.size(1)
    }
    last_mask = _mask(queries, keys, pieces, positions, windows[last]).to(model.dtype)

    def attended(layer: int, query_key: Tensor, values: Tensor) -> Tensor:
        heads = query_key.size(2) // 2
        key = query_key[0, keys, heads:].transpose(1, 2)
        value = values[0, keys].transpose(1, 2)
        window = windows[layer]

        def query(table: Tensor) -> Tensor:
            return query_key[0, table, :heads].transpose(1, 2)

        if layer == last:
            mixed = scaled_dot_product_attention(query(queries), key, value, attn_mask=last_mask)
            return _rows(mixed, query_cells)
        mixed = _causal(query(prefixes), key[:, :, :length], value[:, :, :length], window)
        if suffixes.size(1):
            mask = masks[window]
            of_suffixes = scaled_dot_product_attention(query(suffixes), key, value, attn_mask=mask)
            mixed = torch.cat([mixed, of_suffixes], dim=2)
        return _rows(mixed, cell_of_token)

    return attended


def _rows(mixed: Tensor, cells: Tensor) -> Tensor:
    """Return one row (1, n, d) of the cells of attention (B, h, T, q)."""
    rows = mixed.transpose(1, 2).flatten(2)
    return rows.flatten(0, 1)[cells][None]


def _aligned(table: Ints) -> Ints:
    """Pad a table to a multiple of ALIGNMENT columns."""
    columns = -table.shape[1] % ALIGNMENT
    return np.pad(table, ((0, 0), (0, columns)), constant_values=PAD)


def _causal(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """Attention within prefixes, as in training."""
    if window >= query.size(2) - 1 or kernel(query.device, query.dtype) != "flex":
        return attend(query, key, value, window)
    # FlexAttention would be compiled anew for every length.
    return masked(query, key, value, window)


def _mask(queries: Tensor, keys: Tensor, pieces: Tensor, positions: Tensor, window: int) -> Tensor:
    """Return what is added to the scores (B, 1, Q, K) of queries (B, Q) and keys (B, K).

    0 where the key is not padding, in the prefix or in the suffix of the query, and 0 to `window`
    tokens before it; minus infinity elsewhere.
    """
    key_pieces = torch.where(keys == PAD, PAD, pieces[keys])[:, None]
    query_pieces = pieces[queries][:, :, None]
    key_positions = positions[keys].int()[:, None]
    query_positions = positions[queries].int()[:, :, None]
    age = query_positions - key_positions
    sees = (key_pieces == 0) | (key_pieces == query_pieces)
    sees &= (age >= 0) & (age <= window)
    mask = torch.zeros(sees.shape, device=sees.device)
    return mask.masked_fill_(~sees, -torch.inf)[:, None]


def evaluate_bundle(
    scorer: Scorer,
    bundle: Bundle,
    request: CoreRequest,
    folder: Path,
) -> dict[str, Any]:
    """Return the results of every requested task, and their means; equal on every rank.

    Rank 0 writes finished tasks to `folder`, and they are not evaluated again. A task that cannot
    be evaluated has an `error` instead of results, and then there are no means. Raises ValueError
    as `load_or_tokenize` does, OutOfMemory and Interrupted as `evaluate_task` does: each on every
    rank.
    """
    ranks = scorer.ranks
    tasks = request.tasks_of(bundle)
    files = {task: folder / f"{task.label}.json" for task in tasks}

    def load(task: Task) -> TokenizedTask:
        return load_or_tokenize(bundle, task, scorer.tokenizer, request.max_per_task)

    def tokenize_missing() -> list[Task]:
        missing = [task for task in tasks if not files[task].exists()]
        for number, task in enumerate(missing, 1):
            load(task)
            scorer.report(TASKS, number, len(missing))
        return missing

    # 1) rank 0 tokenizes and caches; the others load its files
    missing = ranks.broadcast_from_rank0(tokenize_missing, scorer.device, ERRORS)
    finished = {task: read_json(files[task]) for task in tasks if task not in missing}
    tokenized = {task: load(task) for task in missing}
    packed = {task: pack(rows, scorer.context) for task, rows in tokenized.items()}
    # 2) evaluate task by task, with progress over all of them
    total = sum(sequences.tokens for sequences in packed.values()) // ranks.world_size
    tokens = 0
    results: dict[str, Any] = {}
    for task in tasks:
        if task in finished:
            results[task.label] = finished[task]
            continue
        task_scorer = replace(scorer, report=_with_offset(scorer.report, tokens, total))
        try:
            document = evaluate_task(task_scorer, task, tokenized[task], packed[task])
            if ranks.is_first:
                _save(files[task], document)
        except TaskError as error:
            document = {"error": str(error)}
        results[task.label] = document
        tokens += packed[task].tokens // ranks.world_size
    # 3) means over tasks
    complete = len(tasks) == len(bundle.tasks)
    return summary(tasks, results, complete) | {"tasks": results}


def _save(path: Path, document: dict[str, Any]) -> None:
    with suppress(OSError):  # costs no more than another evaluation after an interruption
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, document)


def _with_offset(report: Report, offset: int, total: int) -> Report:
    return lambda unit, done, _: report(unit, offset + done, total)


def evaluate_task(
    scorer: Scorer,
    task: Task,
    tokenized: TokenizedTask,
    packed: PackedTask,
) -> dict[str, Any]:
    """Return the results of a packed task, in total and per example; equal on every rank.

    Forward passes are halved, down to one sequence, if memory does not suffice. Raises TaskError if
    no example fits into the context or a loss is not finite; and, if one rank does, all ranks raise
    OutOfMemory when a single sequence does not fit into memory, or Interrupted.
    """
    if not packed.sequences:
        raise TaskError(
            f"task {task.label}: no example fits into a context of {scorer.context} tokens"
        )
    batch_tokens = scorer.batch_tokens or default_batch_tokens(scorer.device)
    while True:
        batches = group_sequences(packed.sequences, batch_tokens)
        sums = _sum_over_ranks(scorer, tokenized, batches)
        if sums is not None:
            decisions = decide(task, tokenized, sums.cpu().double().numpy(), packed)
            return task_document(task, decisions, packed)
        if max(map(len, batches)) == 1:
            raise OutOfMemory(f"task {task.label}: a single example does not fit into memory")
        batch_tokens //= 2


def _sum_over_ranks(
    scorer: Scorer,
    tokenized: TokenizedTask,
    batches: list[list[PackedSequence]],
) -> Tensor | None:
    """Return `sum_scores` over the batches of all ranks; None if a rank ran out of memory.

    Raises Interrupted on every rank if it is raised on one.
    """
    ranks = scorer.ranks
    sums = None
    outcome = COMPLETE
    try:
        sums = sum_scores(scorer, tokenized, batches[ranks.rank :: ranks.world_size])
    except Interrupted:
        outcome = INTERRUPTED
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        outcome = OUT_OF_MEMORY
    outcome = ranks.maximum(outcome, scorer.device)
    if outcome == INTERRUPTED:
        raise Interrupted
    if outcome == COMPLETE and sums is not None:
        ranks.sum(sums)
        return sums
    if scorer.device.type == "cuda":
        torch.cuda.empty_cache()
    return None


def out_of_memory(error: Exception) -> bool:
    """Whether a device ran out of memory; torch's CPU allocator says so in the message alone."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "can't allocate memory" in str(error)


@torch.no_grad()
def sum_scores(
    scorer: Scorer,
    tokenized: TokenizedTask,
    batches: list[list[PackedSequence]],
) -> Tensor:
    """Return each row's sums (3, R) of `Scorer.score` over its span, 0 for rows in no batch."""
    device = scorer.device
    wide = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    sums = torch.zeros(3, len(tokenized.suffixes), dtype=wide, device=device)
    total = sum(sequence.length for sequence in chain.from_iterable(batches))
    done = 0
    for sequences in batches:
        batch = build_batch(tokenized, sequences)
        rows = torch.from_numpy(batch.rows).to(device)
        scores = scorer.score(batch)
        sums.index_add_(1, rows, scores.to(wide))
        done += len(batch.ids)
        scorer.report(TOKENS, done, total)
    return sums
