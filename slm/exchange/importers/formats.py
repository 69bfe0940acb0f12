"""Read results of another program: recognise the format, parse it, check every row."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from slm.exchange.importers.base_train_log import is_base_train_log, read_base_train_log
from slm.exchange.importers.checks import CODES, check, usable
from slm.exchange.importers.harness import is_harness, read_harness
from slm.exchange.importers.known_tables import (
    is_autoresearch,
    is_core_by_task,
    is_nanochat,
    is_wandb,
    read_autoresearch,
    read_core_by_task,
    read_nanochat,
    read_wandb,
)
from slm.exchange.importers.run_table import is_run_table, read_run_table
from slm.exchange.importers.types import Defect, Names, ParsedSource, Row, Source
from slm.files import fingerprint

MAX_BYTES = 64 * 2**20
MAX_FILES = 1000
"""Runs in one folder."""
Reader = Callable[[Source, Names], ParsedSource]
FORMATS: tuple[tuple[str, Callable[[str], bool], Reader], ...] = (
    ("harness", is_harness, read_harness),
    ("base-train-log", is_base_train_log, read_base_train_log),
    ("wandb-csv", is_wandb, read_wandb),
    ("core-csv", is_core_by_task, read_core_by_task),
    ("autoresearch", is_autoresearch, read_autoresearch),
    ("nanochat-csv", is_nanochat, read_nanochat),
    ("table", is_run_table, read_run_table),
)
"""Name, test and reader of each format. The first format whose test holds reads the source."""


@dataclass(frozen=True)
class Import:
    """A source that was read and checked."""

    hash: str
    """First 12 hex digits of the SHA-256 of content, format, mapping and axis."""
    experiment: str
    format: str
    source: Source
    axis: str | None
    """Comparison axis that the user vouches for; None: comparable with nothing else."""
    columns: Names
    """Source column of each of the project's columns."""
    rows: list[Row]
    defects: list[Defect]
    """Every defect, worst first, then by row."""

    def flags(self, row: Row) -> list[str]:
        """Return the codes of a row's defects."""
        return sorted(self._codes[row.number])

    @cached_property
    def _codes(self) -> dict[int | None, set[str]]:
        codes: defaultdict[int | None, set[str]] = defaultdict(set)
        for defect in self.defects:
            codes[defect.row].add(defect.code)
        return codes

    def usable(self, row: Row) -> bool:
        """Whether fits may use a row."""
        return usable(self.flags(row))

    def faults(self) -> list[Defect]:
        """Return the defects that do more than note."""
        return [defect for defect in self.defects if CODES[defect.code].weight != "notes"]


def read_import(
    path: Path,
    name: str | None = None,
    format_name: str | None = None,
    mapping: Names | None = None,
    axis: str | None = None,
) -> Import:
    """Read the runs of a file, or of a folder of nanochat's harness. Nothing is written.

    Raises ValueError for a source in none of the formats or without runs, with the way out.
    """
    # 1) read and parse
    source = _open_source(path)
    columns = dict(mapping or {})
    try:
        chosen, parsed = _parse(source, format_name, columns)
    except (ValueError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not parsed.rows:
        raise ValueError(f"{path}: no runs in it")
    # 2) name and axis
    experiment = name or plain_name(parsed.name or source.stem)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", experiment):
        raise ValueError(f"experiment name {experiment!r}: only letters, digits, '.', '_' and '-'")
    if axis is not None and not re.fullmatch(r"[^\s=,]{1,100}", axis):
        raise ValueError(f"--axis {axis!r}: one word without '=' and ','")
    # 3) check the rows
    defects = [*source.defects, *parsed.defects, *check(parsed.rows)]
    identity = json.dumps([source.sha256, chosen, columns, axis], sort_keys=True)
    return Import(
        hash=fingerprint(identity, 12),
        experiment=experiment,
        format=chosen,
        source=source,
        axis=axis,
        columns=parsed.columns,
        rows=parsed.rows,
        defects=sorted(dict.fromkeys(defects), key=_severity),
    )


def _severity(defect: Defect) -> tuple[int, int]:
    """Sort key: worst first, then by row."""
    return list(CODES).index(defect.code), defect.row or 0


def _parse(source: Source, format_name: str | None, mapping: Names) -> tuple[str, ParsedSource]:
    """Return the format of a source and what its reader parsed."""
    if format_name == "table":
        return format_name, read_run_table(source, mapping, force=True)
    for name, recognises, reader in FORMATS:
        if name == format_name or (
            format_name is None and any(recognises(text) for text in source.texts.values())
        ):
            return name, reader(source, mapping)
    names = ", ".join(name for name, *_ in FORMATS)
    if format_name is not None:
        raise ValueError(f"--format {format_name}: unknown; there are {names}")
    raise ValueError(f"the format is not recognised; --format names one of {names}")


def _open_source(path: Path) -> Source:
    """Read and decode the files of a path.

    Raises ValueError for a path that does not exist, is not text, or is too large.
    """
    # 1) the files: one, or the logs of a harness folder
    if path.is_dir():
        logs = sorted(path.glob("*/base_train.log"))
        files = {
            str(file.relative_to(path)): file
            for file in (path / "meta.json", *logs)
            if file.is_file() and not file.is_symlink()
        }
        if not any(name.endswith(".log") for name in files):
            raise ValueError(
                f"{path}: a folder without d<N>/base_train.log or export.json; name its files"
            )
    elif path.is_file():
        files = {path.name: path}
    else:
        raise ValueError(f"{path}: no such file")
    # 2) limits, before anything is read
    size = sum(file.stat().st_size for file in files.values())
    if size > MAX_BYTES or len(files) > MAX_FILES:
        raise ValueError(
            f"{path}: {len(files)} files of {size:,} bytes; at most {MAX_FILES} files "
            f"of {MAX_BYTES:,} bytes are read"
        )
    # 3) decode
    contents = {name: file.read_bytes() for name, file in files.items()}
    texts = {name: content.decode("utf-8-sig", "replace") for name, content in contents.items()}
    defects = []
    for name, text in texts.items():
        if "\0" in text[:4096]:
            raise ValueError(f"{path}: not a text file")
        valid, mark, _ = text.partition("�")
        if mark:
            line = valid.count("\n") + 1
            defects.append(Defect("invalid-utf8", f"{name}, line {line}"))
    return Source(path.resolve().name, contents, texts, defects)


def plain_name(text: str) -> str:
    """Return a name of safe characters."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("._-")[:100] or "imported"
