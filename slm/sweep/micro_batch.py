"""Micro-batch per rank: the closed-form estimate, lowered where an attempt ran out of memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slm.hardware.block_sizes import EVALUATION_TOKENS
from slm.hardware.memory import largest_micro_batch
from slm.hardware.slot import MicroBatch, Slot
from slm.recipe import Hyperparameters

CPU_TOKENS = 2**13
"""Tokens of a forward pass on a CPU, about: larger passes are no faster and take memory."""
KEY = ("device_name", "ranks", "depth", "width", "sequence_length", "vocab_size")
"""Columns that decide whether a micro-batch fits."""
Key = tuple[str | int, ...]
"""Values of these columns."""
QUERY = """
SELECT device_name, ranks, depth, width, sequence_length, vocab_size,
       coalesce(training, 0) AS training, coalesce(evaluation_tokens, 0) AS evaluation_tokens
FROM micro_batches
"""


class MicroBatches:
    """Largest micro-batches that may fit, by device and model shape."""

    def __init__(self, rows: Sequence[Mapping[str, Any]] = ()) -> None:
        """Take rows of the store's view `micro_batches`: limits learnt from earlier attempts."""
        self._training: dict[Key, int] = {}
        self._evaluation: dict[Key, int] = {}
        for row in rows:
            key = tuple(row[name] for name in KEY)
            if row["training"]:
                self._training[key] = row["training"]
            if row["evaluation_tokens"]:
                self._evaluation[key] = row["evaluation_tokens"]

    @classmethod
    def from_store(cls, home: Path) -> MicroBatches:
        """Return the limits that a home's database knows; none while it cannot be read."""
        import store

        try:
            return cls(store.sql(QUERY, home=home).to_dict("records"))  # type: ignore[arg-type]
        except store.StoreError:  # no database yet, or the next ingest reports its defect
            return cls()

    def choose(self, hp: Hyperparameters, slot: Slot) -> MicroBatch:
        """Return the micro-batch of a run on a slot. Raises ValueError if not even one row fits."""
        rows = max(1, CPU_TOKENS // hp.sequence_length)
        if slot.memory is not None:
            largest = largest_micro_batch(hp, slot.memory, slot.device, slot.ranks_of(hp))
            rows = min(rows, largest) if slot.device == "cpu" else largest
        key = _key(hp, slot)
        rows = min(rows, self._training.get(key, rows))
        return MicroBatch(rows, self._evaluation.get(key, EVALUATION_TOKENS))

    def halve(
        self, hp: Hyperparameters, slot: Slot, failed: MicroBatch, evaluating: bool
    ) -> MicroBatch | None:
        """Record a micro-batch that ran out of memory; return the next to try, if any."""
        key = _key(hp, slot)
        known = self.choose(hp, slot)
        if evaluating and failed.evaluation_tokens > hp.sequence_length:
            self._evaluation[key] = min(known.evaluation_tokens, failed.evaluation_tokens // 2)
        elif not evaluating and failed.training > 1:
            self._training[key] = min(known.training, failed.training // 2)
        else:
            return None
        return self.choose(hp, slot)


def _key(hp: Hyperparameters, slot: Slot) -> Key:
    ranks = slot.ranks_of(hp)
    return (slot.device_name, ranks, hp.depth, hp.width, hp.sequence_length, hp.vocab_size)
