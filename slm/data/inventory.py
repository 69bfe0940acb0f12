"""The folders under a home's `data`: their state, the runs that read them, and their
compression."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm.data.dataset import FORMAT, MANIFEST, PARTS, PreparedDataset
from slm.data.prepare import lock_folder
from slm.data.tokenizer import Tokenizer, tokenizer_of
from slm.files import lock_holder, read_json
from slm.plan import Plan
from slm.run import plans

SAMPLE_TOKENS = 2**22
"""Maximum tokens of the validation rows that compression is measured on."""


@dataclass(frozen=True)
class Entry:
    """A folder of data."""

    folder: Path
    dataset: PreparedDataset | None
    """None if the folder is unfinished, or of another version."""
    state: str
    """prepared, unfinished, at work, or of another version."""
    size: int
    """Bytes on disk."""


def entries(home: Path) -> list[Entry]:
    """Return the folders of data of a home, by name."""
    data = home / "data"
    paths = [*data.glob(f"*/{MANIFEST}"), *data.glob("*/lock")]
    return [_entry(folder) for folder in sorted({path.parent for path in paths})]


def _entry(folder: Path) -> Entry:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    dataset = None
    state = "unfinished"
    if (folder / MANIFEST).exists():
        dataset = PreparedDataset(folder, read_json(folder / MANIFEST))
        state = "prepared"
        if dataset.manifest.get("format") != FORMAT:
            dataset = None
            state = "of another version"
    if lock_holder(folder / "lock"):
        state = "at work"
    return Entry(folder, dataset, state, size)


def find_entries(home: Path, name: str) -> list[Entry]:
    """Return the folders of a corpus, or whose name starts with `name`.

    Raises ValueError if there is none.
    """
    known = entries(home)
    matches = [
        entry
        for entry in known
        if entry.folder.name.startswith(name) or (entry.dataset and entry.dataset.name == name)
    ]
    if not matches:
        names = ", ".join(entry.folder.name for entry in known) or "nothing"
        raise ValueError(f"no data of {name!r} in {home / 'data'}; there is {names}")
    return matches


def plans_on(dataset: PreparedDataset, home: Path) -> list[Plan]:
    """Return the plans of a home that read these rows."""
    return [plan for plan in plans(home) if dataset.has_rows_of(plan.data)]


def summary(entry: Entry, home: Path) -> dict[str, Any]:
    """Return a description of a folder: sizes, fingerprints, and the runs that read it."""
    document: dict[str, Any] = {
        "folder": str(entry.folder),
        "state": entry.state,
        "bytes": entry.size,
    }
    if entry.dataset is None:
        return document
    manifest = entry.dataset.manifest
    document |= {name: manifest[name] for name in ("corpus", "source", "shape", "tokenizer")}
    document["given_tokenizer"] = manifest["given_tokenizer"] is not None
    for part in PARTS:
        rows = manifest[part]["rows"]
        document[part] = {
            "rows": rows,
            "tokens": rows * (manifest["row_tokens"] - 1),
            "files": len(manifest[part]["files"]),
            "fingerprint": manifest[part]["fingerprint"],
        }
    return document | {"runs": [plan.run_id for plan in plans_on(entry.dataset, home)]}


def compression(dataset: PreparedDataset, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return bytes per token on the validation text, of the dataset's tokeniser and of others.

    A tokeniser that cannot be loaded has the reason under `missing`.
    """
    documents = dataset.validation_documents(SAMPLE_TOKENS)
    texts = [dataset.tokenizer.decode(ids.tolist()) for ids in documents]
    rows = [{"tokenizer": "its own", **_compression(dataset.tokenizer, texts)}]
    for name in names:
        try:
            values = _compression(tokenizer_of(name), texts)
        except RuntimeError as error:
            values = {"vocab_size": None, "bytes_per_token": None, "missing": str(error)}
        rows.append({"tokenizer": name, **values})
    return rows


def _compression(tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, Any]:
    """Return the size of a vocabulary, and bytes per token of texts without `<|bos|>`."""
    size = sum(len(text.encode()) for text in texts)
    tokens = sum(len(tokenizer.encode_to_numpy(text)) for text in texts)
    return {"vocab_size": tokenizer.vocab_size, "bytes_per_token": size / tokens}


def remove(entry: Entry) -> None:
    """Remove a folder. The manifest goes first: what an interrupted removal leaves is no dataset.

    Raises ValueError while another process prepares it.
    """
    lock = lock_folder(entry.folder)
    if lock is None:
        holder = lock_holder(entry.folder / "lock")
        raise ValueError(
            f"{entry.folder} is being prepared by process {holder}: wait for it, or stop it"
        )
    with lock:
        (entry.folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(entry.folder)
