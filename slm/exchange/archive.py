"""Exported files of a home, and their names."""

from __future__ import annotations

import re
from collections.abc import Container
from pathlib import Path
from typing import Any

from store.documents import File, rows_of, scan

Json = dict[str, Any]
EXPORT_FORMAT = 1
"""Version of export.json."""
FOLDERS = ("experiments", "fits", "imports")
"""Folders of a home that hold no run."""
NAME = r"[A-Za-z0-9][A-Za-z0-9._@-]{0,149}"
RUN_FILE = (
    r"[0-9a-f]{12}/(plan\.json|done\.json|model\.safetensors"
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
    paths = {path for pattern in GLOBS for path in home.glob(pattern)}
    names = {
        path.relative_to(home).as_posix()
        for path in paths
        if path.is_file() and not path.is_symlink()
    }
    names = {name for name in names if EXPORTED.fullmatch(name)}
    documents = [file for file in scan(home) if file.kind != "events"]
    names -= {file.name for file in documents if not _is_readable(file)}
    incomplete = {name for name in names if not has_plan(name, names)}
    return sorted(names - incomplete, key=lambda name: (name.endswith(".jsonl"), name))


def has_plan(name: str, names: Container[str]) -> bool:
    """Whether a file's run, if it belongs to one, has its plan among these names."""
    folder = name.partition("/")[0]
    return folder in FOLDERS or f"{folder}/plan.json" in names


def _is_readable(file: File) -> bool:
    try:
        rows_of(file)
    except ValueError:
        return False
    return True
