"""Exported files of a home: their names, and copies of them with their hashes."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from store.documents import File, rows_of, scan

Json = dict[str, Any]
EXPORT_FORMAT = 1
"""Version of export.json."""
CHUNK_BYTES = 2**20
NAME = r"[A-Za-z0-9][A-Za-z0-9._@-]{0,149}"
RUN_FILE = (
    r"(?P<run>[0-9a-f]{12})/(plan\.json|done\.json|model\.safetensors"
    rf"|attempts/[0-9]{{3,9}}/(attempt\.json|events\.jsonl|exit\.json)|evals/{NAME}\.json)"
)
IMPORT_FILE = (
    rf"imports/[0-9a-f]{{12}}/(import\.json|curves/{NAME}\.jsonl"
    r"|original(/(?!\.)[^/\\\x00-\x1f]{1,200})+)"
)
EXPORTED = re.compile(
    rf"{RUN_FILE}|experiments/{NAME}\.json|fits/[0-9a-f]{{12}}\.json|{IMPORT_FILE}"
)
"""Files that an export holds, by name below the home: all that the database is made from, the
originals of imports, and final weights."""
GLOBS = (
    "*/*.json",
    "*/attempts/*/*",
    "*/evals/*.json",
    "*/model.safetensors",
    "imports/*/*.json",
    "imports/*/curves/*",
    "imports/*/original/**/*",
)


def exported_files(home: Path) -> list[str]:
    """List the files of a home to export, by name.

    Events come last, so that a running run's other files are no older than what it has reached.
    Documents that the store cannot read are left out, as is a run without a plan.
    """
    paths = {path for pattern in GLOBS for path in home.glob(pattern) if _is_regular(path)}
    names = {path.relative_to(home).as_posix() for path in paths}
    names = {name for name in names if EXPORTED.fullmatch(name)}
    names -= {file.name for file in scan(home) if file.kind != "events" and not _is_readable(file)}
    complete = []
    for name in names:
        run = run_of(name)
        if run is None or f"{run}/plan.json" in names:
            complete.append(name)
    return sorted(complete, key=lambda name: (name.endswith(".jsonl"), name))


def run_of(name: str) -> str | None:
    """Return the run that a file belongs to, None if it belongs to none."""
    match = EXPORTED.fullmatch(name)
    return match["run"] if match else None


def _is_readable(file: File) -> bool:
    try:
        rows_of(file)
    except ValueError:
        return False
    return True


def _is_regular(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def complete_bytes(file: BinaryIO) -> int:
    """Return the size of a file up to its last newline; the file is rewound."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - CHUNK_BYTES)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            file.seek(0)
            return start + newline + 1
        end = start
    file.seek(0)
    return 0


def copy_file(source: BinaryIO, target: BinaryIO, size: int | None = None) -> str:
    """Copy a file, or its first `size` bytes; return the SHA-256 of what was copied."""
    digest = hashlib.sha256()
    for chunk in _chunks(source, size):
        digest.update(chunk)
        target.write(chunk)
    return digest.hexdigest()


def sha256_of_beginning(file: BinaryIO, size: int) -> str:
    """Return the SHA-256 of a file's first `size` bytes."""
    digest = hashlib.sha256()
    for chunk in _chunks(file, size):
        digest.update(chunk)
    return digest.hexdigest()


def _chunks(file: BinaryIO, size: int | None) -> Iterator[bytes]:
    remaining = size
    while chunk := file.read(CHUNK_BYTES if remaining is None else min(CHUNK_BYTES, remaining)):
        yield chunk
        if remaining is not None:
            remaining -= len(chunk)
