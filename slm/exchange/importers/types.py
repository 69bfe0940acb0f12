"""What an import is made of: rows under our names, curves, defects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TEXTS = (
    *(
        "label",
        "recipe",
        "horizon",
        "status",
        "reason",
        "host",
        "device_name",
        "commit",
        "corpus",
        "tokenizer",
    ),
    "validation",
)
"""Columns of a row that are text."""
COUNTS = (
    *(
        "depth",
        "seed",
        "parameters_wte",
        "parameters_value_embeds",
        "parameters_lm_head",
        "parameters_matrices",
    ),
    *(
        "parameters_scalars",
        "parameters_scaling",
        "parameters_total",
        "flops_per_token",
        "tokens_asked",
    ),
    *("batch_tokens", "steps", "tokens", "flops", "peak_memory_bytes", "ranks", "sequence_length"),
)
"""Columns that count something: whole, and, seeds and groups of parameters aside, never 0."""
MEASURES = (
    *("train_loss", "val_loss", "val_bpb", "core", "train_seconds", "wall_seconds"),
    *("tokens_per_second", "flops_per_second"),
)
"""Columns that were measured: losses in nats a token, val_bpb in bits a byte."""
COLUMNS = (*TEXTS, *COUNTS, *MEASURES)
"""Every column of an imported row that may be empty."""


@dataclass(frozen=True)
class Defect:
    """Something wrong with a source, or worth knowing before its numbers are used."""

    code: str
    """Stable name of the kind, a key of `defects.CODES`."""
    message: str
    """What was found, with the value."""
    row: int | None = None
    """Number of the row; None for the whole file."""
    column: str | None = None
    """The column: the source's name where a cell is at fault, else ours."""


@dataclass(frozen=True)
class Row:
    """One run of a source."""

    number: int
    """Line of the source (in a log, the number of the run)."""
    values: dict[str, Any]
    """Values by our column names; what is missing is NULL. The checks fill in what they can compute."""
    original: dict[str, Any]
    """The source's own columns, as they stand there."""
    units: Mapping[str, float] = field(default_factory=dict)
    """Unit of the last digit printed, by our column names: 1e16 for 2.15e18."""
    curve: tuple[dict[str, Any], ...] = ()
    """Events of the run as in an attempt's events.jsonl."""

    def get(self, name: str) -> Any:
        """A value, None where it is missing."""
        return self.values.get(name)

    def agrees(self, name: str, value: float, slack: float = 0.0) -> bool:
        """Whether a value read is this one, as far as its digits (and a relative slack) tell; what is missing is."""
        read = self.get(name)
        return read is None or abs(read - value) <= 0.5001 * self.units.get(
            name, 1.0
        ) + slack * abs(value)


@dataclass(frozen=True)
class Found:
    """What a format's reader found in a source."""

    rows: list[Row]
    """Runs, in the source's order."""
    defects: list[Defect] = field(default_factory=list)
    """What the reader saw that the common checks cannot see."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our columns, each with the source's it was read from, and the factor where there is one."""
    name: str | None = None
    """The source's own name of the experiment."""


@dataclass(frozen=True)
class Source:
    """The files of one import, decoded."""

    name: str
    """Name of the file or folder that was given."""
    contents: dict[str, bytes]
    """Bytes by path below a folder; a single file's by its name."""
    texts: dict[str, str]
    """The same as text."""
    defects: list[Defect]
    """Bytes that are no UTF-8."""

    @property
    def text(self) -> str:
        """The text of a single file, or of a folder's first."""
        return next(iter(self.texts.values()))
