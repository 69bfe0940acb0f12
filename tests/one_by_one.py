"""Reference implementation of CORE: one example at a time, whole rows, every logit.

It shares only the examples and settings of a task with the package.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slm.evaluate.bundle import Task

Logits = Callable[[Tensor], Tensor]


def decide(
    task: Task,
    data: list[dict[str, Any]],
    index: int,
    tokenizer: Any,
    logits: Logits,
    context: int | None,
) -> dict[str, Any]:
    """Return spans, losses and the decision on example `index` of shuffled and cut data."""
    rng = random.Random(1234 + index)
    shots = [data[i] for i in rng.sample([i for i in range(len(data)) if i != index], task.shots)]
    item = data[index]
    gap = task.delimiter
    if task.kind == "multiple_choice":
        shot_text = "".join(
            f"{shot['query']}{gap}{shot['choices'][shot['gold']]}\n\n" for shot in shots
        )
        prompts = [shot_text + item["query"] + gap + choice for choice in item["choices"]]
    elif task.kind == "schema":
        shot_text = "".join(
            f"{shot['context_options'][shot['gold']]}{gap}{shot['continuation']}\n\n"
            for shot in shots
        )
        prompts = [
            shot_text + option + gap + item["continuation"] for option in item["context_options"]
        ]
    else:
        shot_text = "".join(
            f"{shot['context'].strip()}{gap}{shot['continuation']}\n\n" for shot in shots
        )
        without = shot_text + item["context"].strip() + gap
        prompts = [without.strip(), without + item["continuation"]]
    rows = [[tokenizer.bos, *tokenizer.encode(prompt)] for prompt in prompts]
    starts = [_start(task.kind, rows, row) for row in rows]
    if task.kind == "language_modeling":
        rows, starts = rows[1:], starts[1:]
    crops = [max(0, len(row) - (context or len(row))) for row in rows]
    rows = [row[crop:] for row, crop in zip(rows, crops)]
    starts = [start - crop for start, crop in zip(starts, crops)]
    if any(start < 1 <= len(row) - start for row, start in zip(rows, starts)):
        return {"starts": starts, "ends": [len(row) for row in rows]}
    return {"starts": starts, "ends": [len(row) for row in rows]} | _judged(
        task, item, rows, starts, logits
    )


def _start(kind: str, rows: list[list[int]], row: list[int]) -> int:
    if kind == "language_modeling":
        return len(rows[0])
    same = 0
    columns = zip(*rows) if kind == "multiple_choice" else zip(*(reversed(other) for other in rows))
    for column in columns:
        if len(set(column)) > 1:
            break
        same += 1
    return same if kind == "multiple_choice" else len(row) - same


def _judged(
    task: Task, item: dict[str, Any], rows: list[list[int]], starts: list[int], logits: Logits
) -> dict[str, Any]:
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
    scores = logits(ids)
    losses = F.cross_entropy(scores[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    greedy = scores[:, :-1].argmax(-1) == ids[:, 1:]
    spans = [slice(start - 1, len(row) - 1) for row, start in zip(rows, starts)]
    nats = [float(row[span].sum()) for row, span in zip(losses, spans)]
    if task.kind == "language_modeling":
        return {"nats": nats, "correct": bool(greedy[0, spans[0]].all())}
    means = [float(row[span].mean()) for row, span in zip(losses, spans)]
    choice = means.index(min(means))
    return {"nats": nats, "means": means, "choice": choice, "correct": choice == item["gold"]}
