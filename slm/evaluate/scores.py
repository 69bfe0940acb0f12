"""Losses of rows -> decisions -> accuracies -> CORE: the mean over tasks of what each reaches beyond guessing.

Of several rows the one of the lowest mean loss a token is chosen, the first of equals; one without tokens has no mean,
and is chosen where it comes first. A continuation is right when each of its tokens is the greedy one.

Centred accuracy is (accuracy - baseline) / (1 - baseline), its standard error the binomial one over (1 - baseline).
Tasks count as independent: CORE's standard error is the root of their summed squares over the number of tasks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf, isfinite, log, nan, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slm.evaluate.batching import Lanes
from slm.evaluate.bundle import Task
from slm.evaluate.prompts import Planned

TIE = 1e-5
"""Scores that lie closer, relative to the smaller, may change places with the order in which sums are taken."""
MEANS = (
    "centred",
    "centred_error",
    "centred_corrected",
    "centred_corrected_error",
    "bits_per_byte",
    "greedy_share",
)
"""Means over tasks: centred accuracy with its standard error, by the bundle's and by DCLM's corrected baselines; bits
per byte and greedy share of the right rows."""
Floats = NDArray[np.float64]


class Unanswered(RuntimeError):
    """A task that cannot be evaluated: no number stands for it."""


@dataclass(frozen=True)
class Score:
    """A share, or a mean of shares."""

    value: float
    """As measured."""
    error: float
    """Its standard error."""


@dataclass(frozen=True)
class Decision:
    """What a model made of an example."""

    correct: bool
    """Whether the right row was chosen, or the continuation all greedy."""
    tie: bool
    """Whether another order of sums may decide otherwise."""
    choice: int | None
    """The chosen row, None where there is one only."""
    gold_nats: float
    """Summed loss of the right row's span."""
    gold_tokens: int
    """Tokens of that span."""
    gold_greedy: int
    """Of these, how many are the greedy one."""
    gold_bytes: int
    """UTF-8 bytes of that span."""
    gold_probability: float | None
    """The right row's e^-mean loss over the sum of all rows'; None where there is one only, or one has no tokens."""


def accuracy(right: int, examples: int) -> Score:
    """The share of examples that are right."""
    share = right / examples
    return Score(share, sqrt(share * (1 - share) / examples))


def centred(accuracy: Score, baseline: float) -> Score:
    """0 for guessing, 1 for all right."""
    return Score((accuracy.value - baseline) / (1 - baseline), accuracy.error / (1 - baseline))


def core(tasks: Iterable[Score]) -> Score:
    """CORE of the centred accuracies of all its tasks."""
    scores = list(tasks)
    return Score(
        sum(own.value for own in scores) / len(scores),
        sqrt(sum(own.error**2 for own in scores)) / len(scores),
    )


def decided(task: Task, plan: Planned, sums: Floats, lanes: Lanes) -> list[Decision | None]:
    """What the rows' sums (3, R), of nats, of greedy tokens and of ties among logits, say; None of skipped examples.

    Raises Unanswered where a loss is no number.
    """
    examples = enumerate(lanes.skipped)
    return [
        None if skipped else _decision(task, plan, example, sums) for example, skipped in examples
    ]


def _decision(task: Task, plan: Planned, example: int, sums: Floats) -> Decision:
    own = slice(*plan.first[example : example + 2].tolist())
    (nats, greedy, ties), tokens = sums[:, own].tolist(), plan.spans[own].tolist()
    if not all(map(isfinite, nats)):
        raise Unanswered(f"task {task.label}: the loss of example {example} is no number")
    gold = int(plan.golds[example])
    of_gold = nats[gold], tokens[gold], int(greedy[gold]), int(plan.bytes[example])
    if task.kind == "language_modeling":
        return Decision(greedy[0] == tokens[0], ties[0] > 0, None, *of_gold, None)
    means = [total / count if count else nan for total, count in zip(nats, tokens)]
    choice = min(range(len(means)), key=means.__getitem__)
    if not all(tokens):
        return Decision(choice == gold, False, choice, *of_gold, None)
    best, second = sorted([*means, inf])[:2]
    shares = [exp(best - mean) for mean in means]
    return Decision(
        choice == gold, second - best <= TIE * best, choice, *of_gold, shares[gold] / sum(shares)
    )


def task_document(task: Task, decisions: list[Decision | None], lanes: Lanes) -> dict[str, Any]:
    """What a task says of a model: counts, accuracy by either baseline, its smoother companions, and each example."""
    found = [decision for decision in decisions if decision]
    reached = accuracy(sum(own.correct for own in found), len(found))
    size, tokens = (
        sum(getattr(own, name) for own in found) for name in ("gold_bytes", "gold_tokens")
    )
    return {
        "kind": task.kind,
        "shots": task.shots,
        "baseline": task.baseline,
        "examples": len(found),
        "cropped": int(lanes.cropped.sum()),
        "skipped": int(lanes.skipped.sum()),
        "ties": sum(own.tie for own in found),
        "accuracy": reached.value,
        "standard_error": reached.error,
        "centred": centred(reached, task.baseline).value,
        "centred_corrected": centred(reached, task.corrected).value,
        "bits_per_byte": sum(own.gold_nats for own in found) / log(2) / size if size else None,
        "greedy_share": sum(own.gold_greedy for own in found) / tokens if tokens else None,
        "gold_probability": _mean(
            [own.gold_probability for own in found if own.gold_probability is not None]
        ),
        "each": {
            name: [own and getattr(own, name) for own in decisions]
            for name in Decision.__annotations__
        },
    }


def summary(
    tasks: Sequence[Task], documents: Mapping[str, Mapping[str, Any]], whole: bool
) -> dict[str, Any]:
    """What some tasks say together, None where one of them has an error; over a `whole` bundle the mean is its CORE."""
    found = [
        (task, documents[task.label])
        for task in tasks
        if "error" not in documents.get(task.label, {"error": ""})
    ]
    counts = {
        name: sum(own[name] for _, own in found)
        for name in ("examples", "cropped", "skipped", "ties")
    }
    if len(found) < len(tasks):
        return dict.fromkeys((*MEANS, "core", "core_corrected")) | counts
    reached = [(task, Score(own["accuracy"], own["standard_error"])) for task, own in found]
    old = core(centred(score, task.baseline) for task, score in reached)
    new = core(centred(score, task.corrected) for task, score in reached)
    smooth = [_mean([own[name] for _, own in found]) for name in ("bits_per_byte", "greedy_share")]
    means = dict(zip(MEANS, (old.value, old.error, new.value, new.error, *smooth), strict=True))
    return (
        means
        | {"core": old.value if whole else None, "core_corrected": new.value if whole else None}
        | counts
    )


def _mean(values: Sequence[float | None]) -> float | None:
    """None where one of them is None, or there is none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
