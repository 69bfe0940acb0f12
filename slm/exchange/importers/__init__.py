"""Other people's results as rows of the store: read, checked, and kept with their source in $SLM_HOME/imports/<hash>/.

The format is told by content. Every defect is named; what it forbids is marked, and nothing that was read is changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from slm.exchange.importers import (
    autoresearch,
    base_train_log,
    core_csv,
    harness,
    nanochat_csv,
    wandb_csv,
)
from slm.exchange.importers import run_table as table
from slm.exchange.importers.checks import CODES, check, usable
from slm.exchange.importers.types import COLUMNS, Defect, Found, Row, Source
from slm.files import read_json, write_json

LARGEST = 64 * 2**20
"""Bytes of one import."""
MOST_FILES = 1000
"""Runs of one folder."""
FORMATS: tuple[
    tuple[str, Callable[[str], bool], Callable[[Source, Mapping[str, str]], Found]], ...
] = (
    ("harness", harness.recognises, harness.read),
    ("base-train-log", base_train_log.recognises, base_train_log.read),
    ("wandb-csv", wandb_csv.recognises, wandb_csv.read),
    ("core-csv", core_csv.recognises, core_csv.read),
    ("autoresearch", autoresearch.recognises, autoresearch.read),
    ("nanochat-csv", nanochat_csv.recognises, nanochat_csv.read),
    ("table", table.recognises, table.read),
)
"""Name, test and reader of each format; the first whose test holds reads the source."""


@dataclass(frozen=True)
class Import:
    """A source that was read."""

    hash: str
    """First 12 hex digits of the SHA-256 of content, format, mapping and axis."""
    experiment: str
    """Name that its rows are found under."""
    format: str
    """Which reader read it."""
    source: Source
    """Its files."""
    axis: str | None
    """What the user says its rows may be compared with; None: with nothing else."""
    columns: Mapping[str, str]
    """Our columns, each with the source's."""
    rows: tuple[Row, ...]
    """Its runs."""
    defects: tuple[Defect, ...]
    """Everything wrong or worth knowing, worst first, then by row."""

    @property
    def sha256(self) -> str:
        """Of the content."""
        return _sha256(self.source)

    def flags(self, row: Row) -> list[str]:
        """Codes of a row's defects."""
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
        """Defects that do more than note."""
        return [defect for defect in self.defects if CODES[defect.code].weight != "notes"]


def read(
    path: Path,
    name: str | None = None,
    format: str | None = None,
    mapping: Mapping[str, str] | None = None,
    axis: str | None = None,
) -> Import:
    """The runs of a file, or of a folder of nanochat's harness. Nothing is written.

    Raises ValueError with one line for a source that is none of the formats or holds no runs, and the way out.
    """
    source = _source(path)
    given = dict(mapping or {})
    try:
        chosen, found = _found(source, format, given)
    except (ValueError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not found.rows:
        raise ValueError(f"{path}: it holds no run")
    experiment = name or _plain_name(found.name or PurePosixPath(source.name).stem)
    _check_name(experiment)
    return Import(
        hash=hashlib.sha256(
            json.dumps([_sha256(source), chosen, given, axis], sort_keys=True).encode()
        ).hexdigest()[:12],
        experiment=experiment,
        format=chosen,
        source=source,
        axis=_axis(axis),
        columns=found.columns,
        rows=tuple(found.rows),
        defects=tuple(_sorted([*source.defects, *found.defects, *check(found.rows)])),
    )


def _found(source: Source, format: str | None, mapping: Mapping[str, str]) -> tuple[str, Found]:
    names = [name for name, *_ in FORMATS]
    if format is not None and format not in names:
        raise ValueError(f"--format {format}: unknown; there are {', '.join(names)}")
    if format == "table":
        return format, table.read(source, mapping, insisting=True)
    for name, recognises, reader in FORMATS:
        if name == format or (
            format is None and any(recognises(text) for text in source.texts.values())
        ):
            return name, reader(source, mapping)
    raise ValueError(f"no format is recognised; --format names one of {', '.join(names)}")


def _sorted(defects: list[Defect]) -> list[Defect]:
    order = list(CODES)
    unique = dict.fromkeys(defects)
    return sorted(unique, key=lambda defect: (order.index(defect.code), defect.row or 0))


def _source(path: Path) -> Source:
    """The files of a path, decoded. Raises ValueError for what is not there, is no text, or is too large."""
    if path.is_dir():
        found = [path / "meta.json", *sorted(path.glob("*/base_train.log"))]
        files = {
            str(file.relative_to(path)): file
            for file in found
            if file.is_file() and not file.is_symlink()
        }
        if not any(name.endswith(".log") for name in files):
            raise ValueError(
                f"{path}: a folder without d<N>/base_train.log, and without export.json; name files"
            )
    elif path.is_file():
        files = {path.name: path}
    else:
        raise ValueError(f"{path}: no such file")
    size = sum(file.stat().st_size for file in files.values())
    if size > LARGEST or len(files) > MOST_FILES:
        raise ValueError(
            f"{path}: {len(files)} files of {size:,} bytes are more than {MOST_FILES} of {LARGEST:,}"
        )
    contents = {name: file.read_bytes() for name, file in files.items()}
    texts = {name: content.decode("utf-8-sig", "replace") for name, content in contents.items()}
    if any("\0" in text[:4096] for text in texts.values()):
        raise ValueError(f"{path}: not a text")
    return Source(path.resolve().name, contents, texts, [*_undecoded(texts)])


def _undecoded(texts: Mapping[str, str]) -> list[Defect]:
    bad = {
        name: text[: text.index("\ufffd")].count("\n") + 1
        for name, text in texts.items()
        if "\ufffd" in text
    }
    return [Defect("invalid-utf8", f"{name}, line {line}") for name, line in bad.items()]


def _sha256(source: Source) -> str:
    if len(source.contents) == 1:
        return hashlib.sha256(next(iter(source.contents.values()))).hexdigest()
    parts = {name: hashlib.sha256(content).hexdigest() for name, content in source.contents.items()}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _plain_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("._-")[:100] or "imported"


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise ValueError(f"experiment name {name!r}: letters, digits, '.', '_' and '-' only")


def _axis(axis: str | None) -> str | None:
    if axis is not None and not re.fullmatch(r"[^\s=,]{1,100}", axis):
        raise ValueError(f"--axis {axis!r}: one word without '=' and ','")
    return axis


def document(found: Import, strict: bool, created: float) -> dict[str, Any]:
    """What import.json holds."""
    return {
        "hash": found.hash,
        "experiment": found.experiment,
        "format": found.format,
        "source": found.source.name,
        "sha256": found.sha256,
        "created": created,
        "strict": strict,
        "axis": found.axis,
        "mapping": dict(found.columns),
        "defects": [asdict(defect) for defect in found.defects],
        "rows": [_document_of(found, row) for row in found.rows],
    }


def _document_of(found: Import, row: Row) -> dict[str, Any]:
    digest = hashlib.sha256(f"{found.hash}:{row.number}".encode()).hexdigest()
    values = {name: row.get(name) for name in COLUMNS}
    return {
        "run_id": f"x{digest[:11]}",
        "row": row.number,
        **values,
        "recipe": values["recipe"] or found.experiment,
        "status": values["status"] or "finished",
        "flags": found.flags(row),
        "usable": found.usable(row),
        "original": row.original,
    }


def write(found: Import, home: Path, strict: bool = False) -> bool:
    """Keep an import in a home, whole or not at all; False where it is there already.

    Raises ValueError where its name is another experiment's, or it is there under another name.
    """
    folder = home / "imports" / found.hash
    before = kept(home)
    if found.hash in before:
        if before[found.hash] != found.experiment:
            other = before[found.hash]
            raise ValueError(
                f"imported already as {other!r}; `slm import --remove {other}` first, to rename it"
            )
        return False
    if (
        found.experiment in before.values()
        or (home / "experiments" / f"{found.experiment}.json").exists()
    ):
        raise ValueError(
            f"experiment {found.experiment!r} is there already: choose another with --name"
        )
    temporary = folder.with_name(f".{found.hash}.{os.getpid()}")
    try:
        _fill(temporary, found, strict)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return True


def _fill(folder: Path, found: Import, strict: bool) -> None:
    """Curves and originals first, then the document. Names of files are made of safe letters alone."""
    told = document(found, strict, time.time())
    for name, content in found.source.contents.items():
        parts = [_plain_name(part) for part in PurePosixPath(name).parts]
        path = folder.joinpath("original", *parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for row, values in zip(found.rows, told["rows"]):
        if row.curve:
            path = folder / "curves" / f"{values['run_id']}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(f"{json.dumps(event)}\n" for event in row.curve))
    write_json(folder / "import.json", told)


def kept(home: Path) -> dict[str, str]:
    """Imports of a home: hash -> experiment. Raises ValueError naming a file that is none."""
    found = {}
    for path in home.glob("imports/[0-9a-f]*/import.json"):
        known = read_json(path)
        if not isinstance(known, dict) or not isinstance(known.get("experiment"), str):
            raise ValueError(
                f"{path}: it names no experiment; remove its folder, and import it anew"
            )
        found[path.parent.name] = known["experiment"]
    return found


def remove(home: Path, name: str) -> str:
    """Take an import out of a home, by experiment or hash; gives the experiment.

    Raises ValueError for none, and for a name that several have.
    """
    there = kept(home)
    hashes = [digest for digest, experiment in there.items() if name in (digest, experiment)]
    if not hashes:
        raise ValueError(
            f"no import {name!r}; there are {', '.join(sorted(there.values())) or 'none'}"
        )
    if len(hashes) > 1:
        raise ValueError(
            f"{name!r} are {len(hashes)} imports: name one by its hash, {' or '.join(sorted(hashes))}"
        )
    gone = home / "imports" / f".{hashes[0]}.{os.getpid()}"
    (home / "imports" / hashes[0]).rename(gone)
    shutil.rmtree(gone)
    return there[hashes[0]]
