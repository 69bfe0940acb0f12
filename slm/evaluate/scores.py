"""CORE scores: losses of rows -> decisions -> accuracies -> CORE, the mean of the centred
accuracies of all tasks.

The chosen row is the one with the lowest mean loss per token, the first of equals; a row without
tokens has no mean and is chosen only if it comes first. A continuation is correct if every token of
it is the greedy one.

Centred accuracy is (accuracy - baseline) / (1 - baseline); its standard error is the binomial one
over (1 - baseline). Tasks count as independent: the standard error of CORE is the root of the
summed squares over the number of tasks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf, isfinite, log, nan, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slm.evaluate.batching import PackedTask
from slm.evaluate.bundle import Task
from slm.evaluate.prompts import TokenizedTask

TIE = 1e-5
"""Relative distance below which the order of summation may swap two scores."""
MEANS = (
    "centred",
    "centred_error",
    "centred_corrected",
    "centred_corrected_error",
    "bits_per_byte",
    "greedy_share",
    "core",
    "core_corrected",
)
"""Means over tasks: centred accuracy with its standard error, by the bundle's baselines and by
those that DCLM corrected; bits per byte and greedy share of the correct rows."""
COUNTS = ("examples", "cropped", "skipped", "ties")
"""Counts summed over tasks."""
Floats = NDArray[np.float64]


class TaskError(RuntimeError):
    """A task that cannot be evaluated."""


@dataclass(frozen=True)
class Score:
    """A share, or a mean of shares, with its standard error."""

    value: float
    error: float


@dataclass(frozen=True)
class Decision:
    """Outcome of one example."""

    correct: bool
    """Whether the correct row was chosen, or every token of the continuation is the greedy one."""
    tie: bool
    """Whether another order of summation may decide otherwise."""
    choice: int | None
    """Chosen row; None if there is only one."""
    gold_nats: float
    """Summed loss of the correct row's span."""
    gold_tokens: int
    """Tokens of that span."""
    gold_greedy: int
    """Greedy tokens in that span."""
    gold_bytes: int
    """UTF-8 bytes of that span."""
    gold_probability: float | None
    """Share of the correct row in the sum of exp(-mean loss) over rows; None for a single row, or
    if a row has no tokens."""


def accuracy(correct: int, examples: int) -> Score:
    """Return the share of correct examples."""
    share = correct / examples
    return Score(share, sqrt(share * (1 - share) / examples))


def centred(accuracy: Score, baseline: float) -> Score:
    """Return the accuracy on a scale from 0 (guessing) to 1 (all correct)."""
    return Score((accuracy.value - baseline) / (1 - baseline), accuracy.error / (1 - baseline))


def mean_score(scores: Iterable[Score]) -> Score:
    """Return the mean of independent scores: CORE, for the centred accuracies of all tasks."""
    scores = list(scores)
    mean = sum(score.value for score in scores) / len(scores)
    return Score(mean, sqrt(sum(score.error**2 for score in scores)) / len(scores))


def decide(
    task: Task, tokenized: TokenizedTask, sums: Floats, packed: PackedTask
) -> list[Decision | None]:
    """Return the decision on every example, None for skipped ones.

    `sums` (3, R) are each row's summed nats, greedy tokens and ties among logits. Raises TaskError
    if a loss is not finite.
    """
    return [
        None if skipped else _decide_example(task, tokenized, example, sums)
        for example, skipped in enumerate(packed.skipped)
    ]


def _decide_example(task: Task, tokenized: TokenizedTask, example: int, sums: Floats) -> Decision:
    rows = tokenized.rows_of(example)
    nats, greedy, ties = sums[:, rows].tolist()
    tokens = tokenized.spans[rows].tolist()
    if not all(map(isfinite, nats)):
        raise TaskError(f"task {task.label}: the loss of example {example} is not finite")
    row = int(tokenized.golds[example])
    size = int(tokenized.gold_bytes[example])
    gold = (nats[row], tokens[row], int(greedy[row]), size)
    if task.kind == "language_modeling":
        is_greedy = greedy[0] == tokens[0]
        return Decision(is_greedy, ties[0] > 0, None, *gold, None)
    means = [total / count if count else nan for total, count in zip(nats, tokens)]
    choice = min(range(len(means)), key=means.__getitem__)
    if not all(tokens):
        return Decision(choice == row, False, choice, *gold, None)
    best, second = sorted([*means, inf])[:2]
    tie = second - best <= TIE * best
    weights = [exp(best - mean) for mean in means]
    probability = weights[row] / sum(weights)
    return Decision(choice == row, tie, choice, *gold, probability)


def task_document(
    task: Task, decisions: list[Decision | None], packed: PackedTask
) -> dict[str, Any]:
    """Return a task's part of an evaluation record: totals, and the decision on each example."""
    decided = [decision for decision in decisions if decision]
    correct, ties, nats, tokens, greedy, size = (
        sum(getattr(decision, name) for decision in decided)
        for name in ("correct", "tie", "gold_nats", "gold_tokens", "gold_greedy", "gold_bytes")
    )
    probabilities = [decision.gold_probability for decision in decided]
    score = accuracy(correct, len(decided))
    return {
        "kind": task.kind,
        "shots": task.shots,
        "baseline": task.baseline,
        "examples": len(decided),
        "cropped": int(packed.cropped.sum()),
        "skipped": int(packed.skipped.sum()),
        "ties": ties,
        "accuracy": score.value,
        "standard_error": score.error,
        "centred": centred(score, task.baseline).value,
        "centred_corrected": centred(score, task.corrected).value,
        "bits_per_byte": nats / log(2) / size if size else None,
        "greedy_share": greedy / tokens if tokens else None,
        "gold_probability": _mean([value for value in probabilities if value is not None]),
        "each": {
            name: [decision and getattr(decision, name) for decision in decisions]
            for name in Decision.__annotations__
        },
    }


def summary(
    tasks: Sequence[Task], documents: Mapping[str, Mapping[str, Any]], complete: bool
) -> dict[str, Any]:
    """Return means and counts over tasks, whose documents are in the same order.

    The means are None if a task has an error. Only over a `complete` bundle is the mean its CORE.
    """
    records = [record for record in documents.values() if "error" not in record]
    counts = {name: sum(record[name] for record in records) for name in COUNTS}
    if len(records) < len(tasks):
        return dict.fromkeys(MEANS) | counts
    scores = [Score(record["accuracy"], record["standard_error"]) for record in records]
    published = mean_score(map(centred, scores, [task.baseline for task in tasks]))
    corrected = mean_score(map(centred, scores, [task.corrected for task in tasks]))
    means = (
        published.value,
        published.error,
        corrected.value,
        corrected.error,
        _mean([record["bits_per_byte"] for record in records]),
        _mean([record["greedy_share"] for record in records]),
        published.value if complete else None,
        corrected.value if complete else None,
    )
    return dict(zip(MEANS, means, strict=True)) | counts


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean; None if a value is None, or there are none."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return sum(known) / len(known)
