"""Records of an import: source files, rows under the project's column names, curves, defects."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

from slm.files import fingerprint

Values = dict[str, Any]
"""Values by column, or the fields of an event."""
Names = Mapping[str, str]
"""Names of one side by those of the other: columns by their headers, or the other way round."""
TEXTS = (
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
    "validation",
)
"""Text columns of a row."""
COUNTS = (
    "depth",
    "seed",
    "parameters_wte",
    "parameters_value_embeds",
    "parameters_lm_head",
    "parameters_matrices",
    "parameters_scalars",
    "parameters_scaling",
    "parameters_total",
    "flops_per_token",
    "tokens_asked",
    "batch_tokens",
    "steps",
    "tokens",
    "flops",
    "peak_memory_bytes",
    "ranks",
    "sequence_length",
)
"""Columns of whole numbers. Only seeds and groups of parameters may be 0."""
MEASURES = (
    "train_loss",
    "val_loss",
    "val_bpb",
    "core",
    "train_seconds",
    "wall_seconds",
    "tokens_per_second",
    "flops_per_second",
)
"""Measured columns: losses in nats per token, val_bpb in bits per byte."""
COLUMNS = (*TEXTS, *COUNTS, *MEASURES)
"""Every column of an imported row. Any of them may be NULL."""


@dataclass(frozen=True)
class Defect:
    """A fault of a source, or a fact to know before its numbers are used."""

    code: str
    """Stable name of the kind: a key of `checks.CODES`."""
    message: str
    row: int | None = None
    """Row number; None for the whole file."""
    column: str | None = None
    """The source's column name where a cell is faulty, else the project's."""


@dataclass(frozen=True)
class Row:
    """Run of a source."""

    number: int
    """Line in the source; in a log, the number of the run."""
    values: Values
    """Values by the project's column names. The checks fill in what they can compute."""
    original: Values
    """Columns as the source has them."""
    units: dict[str, float] = field(default_factory=dict)
    """Value of the last printed digit, by column: 1e16 for 2.15e18."""
    curve: Sequence[Values] = ()
    """Events of the run, as in an attempt's events.jsonl."""

    def get(self, name: str) -> Any:
        """Return a value, None where it is missing."""
        return self.values.get(name)

    def agrees(self, name: str, value: float, slack: float = 0.0) -> bool:
        """Whether a value agrees with the one read, within its digits plus a relative slack.

        A missing value agrees.
        """
        read = self.get(name)
        if read is None:
            return True
        rounding = 0.5001 * self.units.get(name, 1.0)
        return abs(read - value) <= rounding + slack * abs(value)


@dataclass(frozen=True)
class ParsedSource:
    """Rows that a reader parsed from a source."""

    rows: list[Row]
    defects: list[Defect] = field(default_factory=list)
    """Defects that only the reader of the format can see."""
    columns: dict[str, str] = field(default_factory=dict)
    """Source column of each of the project's columns, with its factor if it has one."""
    name: str = ""
    """The source's own name of the experiment."""


@dataclass(frozen=True)
class Source:
    """Decoded files of one import."""

    name: str
    """File or folder name."""
    contents: dict[str, bytes]
    """Bytes by path below the folder, or by file name."""
    texts: dict[str, str]
    """The same, decoded."""
    defects: list[Defect]
    """Invalid UTF-8."""

    @property
    def stem(self) -> str:
        """Name without its ending."""
        return PurePosixPath(self.name).stem

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the content; of several files, of their hashes by name."""
        hashes = {name: fingerprint(data, 64) for name, data in self.contents.items()}
        if len(hashes) == 1:
            return next(iter(hashes.values()))
        return fingerprint(json.dumps(hashes, sort_keys=True), 64)

    @property
    def text(self) -> str:
        """Return the text of a single file, or of a folder's first."""
        return next(iter(self.texts.values()))
