"""The folders under a home's `data`: their state, the runs that read them, and their
compression."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slm.data.dataset import FORMAT, MANIFEST, MAX_EPOCHS, PARTS, PreparedDataset, recipe_for
from slm.data.prepare import lock_folder
from slm.data.tokenizer import Tokenizer, tokenizer_of
from slm.files import lock_holder, read_json
from slm.plan import Plan
from slm.recipe import RECIPES, Hyperparameters
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
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).exists() else None
    dataset = None
    state = "unfinished"
    if manifest:
        state = "of another version"
        if manifest.get("format") == FORMAT:
            dataset = PreparedDataset(folder, manifest)
            state = "prepared"
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
    manifest = dataset.manifest
    rows = (manifest["tokenizer"], manifest["validation"]["fingerprint"])
    return [plan for plan in plans(home) if (plan.data.tokenizer, plan.data.validation) == rows]


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


def epochs(dataset: PreparedDataset, hp: Hyperparameters) -> dict[str, Any]:
    """Return the tokens that a model would read, and in how many epochs."""
    return {
        "depth": hp.depth,
        "tokens": hp.tokens,
        "epochs": hp.train_rows / dataset.train_rows,
    }


def reach(dataset: PreparedDataset, max_depth: int) -> dict[str, Any] | None:
    """Return the deepest compute-optimal models for one epoch, and for the maximum of epochs.

    Models of up to `max_depth` layers are considered. None if no recipe has rows of this shape; a
    depth is None if even one layer needs more rows.
    """
    recipe = recipe_for(dataset.manifest["shape"])
    if recipe is None:
        return None
    needs = {
        depth: RECIPES[recipe](depth).train_rows / dataset.train_rows
        for depth in range(1, max_depth + 1)
    }
    deepest = {
        limit: max((depth for depth, need in needs.items() if need <= limit), default=None)
        for limit in (1, MAX_EPOCHS)
    }
    return {
        "recipe": recipe,
        "one_epoch": deepest[1],
        "most_epochs": MAX_EPOCHS,
        "at_most": deepest[MAX_EPOCHS],
    }


def compression(dataset: PreparedDataset, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return bytes per token on the validation text, of the dataset's tokeniser and of others.

    A tokeniser that cannot be loaded has the reason under `missing`.
    """
    texts = validation_texts(dataset)
    rows = [_compression("its own", dataset.tokenizer, texts)]
    for name in names:
        try:
            rows.append(_compression(name, tokenizer_of(name), texts))
        except RuntimeError as error:
            unknown = {"tokenizer": name, "vocab_size": None, "bytes_per_token": None}
            rows.append(unknown | {"missing": str(error)})
    return rows


def _compression(name: str, tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, Any]:
    return {
        "tokenizer": name,
        "vocab_size": tokenizer.vocab_size,
        "bytes_per_token": bytes_per_token(tokenizer, texts),
    }


def validation_texts(dataset: PreparedDataset) -> list[str]:
    """Return the texts after each `<|bos|>` of the first SAMPLE_TOKENS of the validation rows."""
    tokenizer = dataset.tokenizer
    path = dataset.folder / dataset.files("validation")[0]["file"]
    ids = np.fromfile(path, dtype=dataset.manifest["dtype"], count=SAMPLE_TOKENS)
    pieces = np.split(ids, np.flatnonzero(ids == tokenizer.bos))
    return [tokenizer.decode(piece[1:].tolist()) for piece in pieces if len(piece) > 1]


def bytes_per_token(tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """Return the UTF-8 bytes of texts divided by their tokens, `<|bos|>` left out."""
    tokens = sum(len(tokenizer.encode_to_numpy(text)) for text in texts)
    return sum(len(text.encode()) for text in texts) / tokens


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
