"""What lies under a home's `data`: prepared corpora and unfinished ones, the runs that read them, their compression."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slm.data.dataset import FORMAT, MANIFEST, Prepared
from slm.data.prepare import lock_of
from slm.data.tokenizer import Tokenizer
from slm.files import lock_holder, read_json
from slm.plan import Plan
from slm.run import plans

SAMPLE_TOKENS = 2**22
"""Of the validation rows, for compression."""


@dataclass(frozen=True)
class Entry:
    """A folder of data."""

    folder: Path
    """Where it lies."""
    prepared: Prepared | None
    """What it holds; None where that is unfinished, or of another version's format."""
    state: str
    """Whether it is prepared, unfinished, at work, or of another version."""
    size: int
    """Bytes on disk."""


def entries(home: Path) -> list[Entry]:
    """All there are, by name."""
    folders = {
        path.parent for name in (MANIFEST, "lock") for path in (home / "data").glob(f"*/{name}")
    }
    return [_entry(folder) for folder in sorted(folders)]


def _entry(folder: Path) -> Entry:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).exists() else None
    prepared = Prepared(folder, manifest) if manifest and manifest.get("format") == FORMAT else None
    state = "prepared" if prepared else "of another version" if manifest else "unfinished"
    return Entry(folder, prepared, "at work" if lock_holder(folder / "lock") else state, size)


def named(home: Path, name: str) -> list[Entry]:
    """Those of a corpus, or whose folder's name begins so. Raises ValueError where there is none."""
    found = [
        entry
        for entry in entries(home)
        if name == _corpus(entry) or entry.folder.name.startswith(name)
    ]
    if not found:
        known = ", ".join(entry.folder.name for entry in entries(home)) or "nothing"
        raise ValueError(f"no data of {name!r} in {home / 'data'}; there is {known}")
    return found


def _corpus(entry: Entry) -> str | None:
    return entry.prepared.manifest["corpus"]["name"] if entry.prepared else None


def plans_on(prepared: Prepared, home: Path) -> list[Plan]:
    """The plans of a home that read these rows."""
    wanted = (prepared.manifest["tokenizer"], prepared.manifest["validation"]["fingerprint"])
    return [plan for plan in plans(home) if (plan.data.tokenizer, plan.data.validation) == wanted]


def remove(entry: Entry) -> None:
    """Remove a folder; its manifest goes first, so that what is left of it is no prepared corpus.

    Raises ValueError while it is prepared.
    """
    lock = lock_of(entry.folder)
    if lock is None:
        holder = lock_holder(entry.folder / "lock")
        raise ValueError(
            f"{entry.folder} is prepared by process {holder} just now: wait for it, or end it"
        )
    with lock:
        (entry.folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(entry.folder)


def validation_texts(prepared: Prepared) -> list[str]:
    """The texts of the validation rows, a piece for each `<|bos|>`, of at most SAMPLE_TOKENS tokens."""
    manifest, tokenizer = prepared.manifest, prepared.tokenizer
    path = prepared.folder / prepared.files("validation")[0]["file"]
    ids = np.fromfile(path, dtype=manifest["dtype"], count=SAMPLE_TOKENS)
    pieces = np.split(ids, np.flatnonzero(ids == tokenizer.bos))
    return [tokenizer.decode(piece[1:].tolist()) for piece in pieces if len(piece) > 1]


def bytes_per_token(tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """UTF-8 bytes of texts over the tokens that they are, `<|bos|>` left out."""
    tokens = sum(len(tokenizer.encode_to_numpy(text)) for text in texts)
    return sum(len(text.encode()) for text in texts) / tokens
