"""The files of a home that travel: their names, and copies of them with their hashes."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any, BinaryIO

from store.documents import File, rows_of, scan

Json = dict[str, Any]
FORMAT = 1
"""Of export.json."""
CHUNK = 2**20
"""Bytes copied at a time."""
NAMED = r"[A-Za-z0-9][A-Za-z0-9._@-]{0,149}"
SHAPE = re.compile(
    r"(?P<run>[0-9a-f]{12})/(plan\.json|done\.json|model\.safetensors"
    rf"|attempts/[0-9]{{3,9}}/(attempt\.json|events\.jsonl|exit\.json)|evals/{NAMED}\.json)"
    rf"|experiments/{NAMED}\.json|fits/[0-9a-f]{{12}}\.json"
    rf"|imports/(?P<import>[0-9a-f]{{12}})/(import\.json|curves/{NAMED}\.jsonl|original(/(?!\.)[^/\\\x00-\x1f]{{1,200}})+)"
)
"""The files of a home that travel, by their names below it: what the database is made from, originals, weights."""
PLACES = (
    *("*/*.json", "*/attempts/*/*", "*/evals/*.json", "*/model.safetensors"),
    *("imports/*/*.json", "imports/*/curves/*", "imports/*/original/**/*"),
)
"""Where they are looked for."""


def files_of(home: Path) -> list[str]:
    """The files of a home that travel, events last: those of a run at work are then no older than what it has reached.

    Documents that the store cannot read stay behind, as its ingest says; a run without a plan is none.
    """
    found = {
        path.relative_to(home).as_posix()
        for place in PLACES
        for path in home.glob(place)
        if _is_plain(path)
    }
    names = {name for name in found if SHAPE.fullmatch(name)}
    names -= {file.name for file in scan(home) if file.kind != "events" and not _is_readable(file)}
    there = [name for name in names if (run := run_of(name)) is None or f"{run}/plan.json" in names]
    return sorted(there, key=lambda name: (name.endswith(".jsonl"), name))


def run_of(name: str) -> str | None:
    """The run that a file is of; None where it is of none."""
    match = SHAPE.fullmatch(name)
    return match["run"] if match else None


def _is_readable(file: File) -> bool:
    try:
        rows_of(file)
    except ValueError:
        return False
    return True


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def end_of_lines(file: BinaryIO) -> int:
    """Bytes of a file up to its last newline; it is left at its beginning."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - CHUNK)
        file.seek(start)
        if found := file.read(end - start).rfind(b"\n") + 1:
            file.seek(0)
            return start + found
        end = start
    file.seek(0)
    return 0


def copied(source: BinaryIO, target: BinaryIO | None, most: int | None = None) -> str:
    """Copy a file, or `most` bytes of it; the SHA-256 of what was copied. Without a target that of the file alone."""
    digest = hashlib.sha256()
    while chunk := source.read(CHUNK if most is None else min(CHUNK, most)):
        digest.update(chunk)
        if target:
            target.write(chunk)
        most = None if most is None else most - len(chunk)
    return digest.hexdigest()


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return copied(file, None)
