"""How much a rank computes at once: what closed forms promise, less where that was found too much before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from slm.hardware.block_sizes import EVALUATION_TOKENS
from slm.hardware.memory import largest_micro_batch
from slm.hardware.slot import MicroBatch, Slot
from slm.recipe import Hyperparameters

CPU_TOKENS = 2**13
"""Tokens of a forward pass on a CPU, about: more gain nothing, and take memory."""
Key = tuple[str, int, int, int, int, int]
KEY = ("device_name", "ranks", "depth", "width", "sequence_length", "vocab_size")
"""What decides whether a micro-batch fits."""


class MicroBatches:
    """What fits on which device at which depth."""

    def __init__(self, found: Iterable[Mapping[str, Any]] = ()) -> None:
        """`found` are the rows of the store's view `micro_batches`."""
        self._training: dict[Key, int] = {}
        self._evaluation: dict[Key, int] = {}
        for row in found:
            key: Any = tuple(row[name] for name in KEY)
            if row["training"]:
                self._training[key] = row["training"]
            if row["evaluation_tokens"]:
                self._evaluation[key] = row["evaluation_tokens"]

    def rows(self, given: Hyperparameters, where: Slot) -> MicroBatch:
        """MicroBatch a pass on a slot. Raises ValueError when its memory does not hold one."""
        key, computed = _key(given, where), _closed_form(given, where)
        return MicroBatch(
            min(computed, self._training.get(key, computed)),
            self._evaluation.get(key, EVALUATION_TOKENS),
        )

    def halve(
        self, given: Hyperparameters, where: Slot, rows: MicroBatch, evaluating: bool
    ) -> MicroBatch | None:
        """What to try after these were too much, remembered; None when there is nothing smaller."""
        key, known = _key(given, where), self.rows(given, where)
        if evaluating and rows.evaluation_tokens > given.sequence_length:
            self._evaluation[key] = min(known.evaluation_tokens, rows.evaluation_tokens // 2)
        elif not evaluating and rows.training > 1:
            self._training[key] = min(known.training, rows.training // 2)
        else:
            return None
        return self.rows(given, where)


def _key(given: Hyperparameters, where: Slot) -> Key:
    ranks = where.ranks_of(given)
    return (
        where.device_name,
        ranks,
        given.depth,
        given.width,
        given.sequence_length,
        given.vocab_size,
    )


def _closed_form(given: Hyperparameters, where: Slot) -> int:
    ranks, few = where.ranks_of(given), max(1, CPU_TOKENS // given.sequence_length)
    if where.memory is None:
        return few
    fits = largest_micro_batch(given, where.memory, where.device, ranks)
    return min(few, fits) if where.device == "cpu" else fits
