"""Incoming export: verified before anything of it is merged, then copied file by file."""

from __future__ import annotations

import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from slm.exchange.archive import EXPORT_FORMAT, EXPORTED, NAME, Json, has_plan
from slm.files import read_json, replacing, sha256_of
from slm.monitor.progress import Report
from store.documents import rows_of, scan

MANIFEST_FILE = re.compile(
    rf"runs/({EXPORTED.pattern})|tables/[a-z_]{{1,99}}\.parquet|columns\.json|README\.md"
)
"""Files that a manifest lists."""
COPY_ORDER = ("events.jsonl", "exit.json", "import.json", "done.json", "plan.json")
"""Files copied last, in this order: an interrupted copy never claims more than it holds."""


@dataclass(frozen=True)
class MergeResult:
    """Outcome of a merge."""

    counts: Counter[str] = field(default_factory=Counter)
    """Number of runs by outcome: new, further (the other home had trained further), replaced, kept,
    same, waiting (until they stop running here); and of evaluations, experiments, fits, imports and
    weights taken."""
    lines: list[str] = field(default_factory=list)
    """Messages for the user."""


@dataclass(frozen=True)
class Export:
    """A verified export, and the home that it is merged into."""

    folder: Path
    """Files of the exported home."""
    home: Path
    """The home that receives them."""
    home_id: str
    """Id of the exported home."""
    hashes: dict[str, str]
    """SHA-256 of each file, by name."""
    holds_sweep_lock: bool
    """Whether no sweep can be running in the receiving home."""

    def take(self, name: str) -> bool:
        """Copy a file into the home, whole or not at all; return False if it is the same."""
        path = self.home / name
        if path.is_file() and sha256_of(path) == self.hashes[name]:
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            shutil.copyfile(self.folder / name, temporary)
            if sha256_of(temporary) != self.hashes[name]:
                raise ValueError(f"{self.folder / name} changed during the merge: export it again")
        return True

    @cached_property
    def names(self) -> dict[str, list[str]]:
        """Return the files of each top-level folder, in the order to copy them."""
        names: defaultdict[str, list[str]] = defaultdict(list)
        for name in sorted(self.hashes, key=_copy_position):
            names[name.partition("/")[0]].append(name)
        return names


def _copy_position(name: str) -> int:
    file_name = name.rpartition("/")[2]
    return COPY_ORDER.index(file_name) if file_name in COPY_ORDER else -1


def verify_export(folder: Path, report: Report) -> tuple[str, dict[str, str]]:
    """Verify every file of an export; return its home's id, and SHA-256 by file name.

    Raises ValueError for a folder that is not an export, and for a damaged one.
    """
    home, files = _read_manifest(folder / "export.json")
    hashes = {}
    for number, (name, (size, sha256)) in enumerate(files.items()):
        report(number, 2 * len(files))
        _check_file(folder, name, size, sha256)
        if name.startswith("runs/"):
            hashes[name.removeprefix("runs/")] = sha256
    _check_documents(folder / "runs", hashes)
    return home, hashes


def _read_manifest(path: Path) -> tuple[str, dict[str, tuple[int, str]]]:
    """Return the home's id, and size and SHA-256 of each file. Raises ValueError if unsafe."""
    document = read_json(path)
    try:
        if document["format"] != EXPORT_FORMAT:
            raise ValueError(f"format {document['format']!r} belongs to another version of slm")
        home = document["home"]["id"]
        if not re.fullmatch("[0-9a-f]{8}", home):
            raise ValueError(f"home id {home!r} is not valid")
        files = {row["name"]: (row["bytes"], row["sha256"]) for row in document["files"]}
        for name in files:
            if not MANIFEST_FILE.fullmatch(name):
                raise ValueError(f"{name!r} is not the name of an exported file")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is not the manifest of an export: {reason}") from None
    return home, files


def _check_file(folder: Path, name: str, size: int, sha256: str) -> None:
    """Raise ValueError for a file that is missing, behind a link, or not what was exported."""
    path = folder / name
    parts = [path, *path.parents][: len(Path(name).parts)]
    if any(part.is_symlink() for part in parts):
        raise ValueError(f"{path} is a link: an export has none")
    if not path.is_file():
        raise ValueError(f"{path} is missing: the export is incomplete, copy it again")
    if path.stat().st_size != size or sha256_of(path) != sha256:
        raise ValueError(
            f"{path} is not what was exported: it was changed or truncated, copy it again"
        )


def _check_documents(folder: Path, names: Collection[str]) -> None:
    """Raise ValueError for documents that the store cannot read, and for unsafe names in them."""
    for file in scan(folder):
        if file.kind != "events" and file.name in names:
            rows_of(file)
            try:
                _check_document(file.kind, read_json(file.path))
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise ValueError(f"{file.path}: {error}") from None
    for name in names:
        if not has_plan(name, names):
            raise ValueError(f"{folder / name}: the run has no plan.json in this export")


def _check_document(kind: str, document: Json) -> None:
    """Check the values that a merge builds paths and decisions from."""
    for moment in ("time", "created"):
        float(document.get(moment) or 0)
    match kind:
        case "experiment":
            declared = document.get("declared") or {}
            _check_names("[0-9a-f]{12}", document["runs"])
            _check_names(".*", (declared.get("recipes") or {}).keys())
        case "plan":
            data = document["data"]
            _check_names(".*", (document["code"], data["tokenizer"], data["validation"]))
        case "fit":
            _check_names(NAME, document["experiments"])
        case "import":
            _check_names(NAME, [document["experiment"]])
            _check_names("x[0-9a-f]{11}", [row["run_id"] for row in document["rows"]])


def _check_names(pattern: str, names: Iterable[Any]) -> None:
    for name in names:
        if not re.fullmatch(pattern, name):
            raise ValueError(f"{name!r} is not a valid name")
