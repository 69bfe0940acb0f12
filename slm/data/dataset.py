"""A prepared dataset on disk: tokenizer.json, validation.bin, train-00000.bin …, and a manifest."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from slm.data.shards import fingerprint
from slm.data.tokenizer import Tokenizer
from slm.files import read_json
from slm.plan import DataIdentity
from slm.recipe import RECIPES, Hyperparameters

FORMAT = 2
"""Version of the format of prepared folders."""
MANIFEST = "manifest.json"
MAX_EPOCHS = 4
"""Most passes over a corpus that a run may make."""
PARTS = ("validation", "train")


@dataclass(frozen=True)
class Block:
    """Consecutive rows of a file."""

    file: str
    rows: int
    hash: str
    """Fingerprint of their bytes."""


@dataclass(frozen=True)
class PreparedDataset:
    """A prepared corpus on disk."""

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> PreparedDataset:
        """Read a folder. Raises OSError or ValueError if it is no dataset of this version."""
        manifest = read_json(folder / MANIFEST)
        if manifest.get("format") != FORMAT:
            raise ValueError(
                f"{folder} was prepared by another version of slm: run `slm data prepare` again"
            )
        return cls(folder, manifest)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Tokeniser of the rows.

        Raises ValueError if the file is not the one that the manifest names.
        """
        tokenizer = Tokenizer.read(self.folder / "tokenizer.json")
        if tokenizer.fingerprint != self.manifest["tokenizer"]:
            raise ValueError(
                f"{self.folder}: its tokeniser was changed; remove the folder and prepare again"
            )
        return tokenizer

    @property
    def name(self) -> str:
        """Name of the corpus."""
        return str(self.manifest["corpus"]["name"])

    @property
    def train_rows(self) -> int:
        """Number of training rows."""
        return int(self.manifest["train"]["rows"])

    def files(self, part: str) -> list[dict[str, Any]]:
        """Return the manifest's entries of the files of "train" or "validation", in order."""
        files: list[dict[str, Any]] = self.manifest[part]["files"]
        return files

    def blocks(self, part: str, rows: int | None = None) -> list[Block]:
        """Return the blocks of a part, or those that hold its first `rows` rows."""
        blocks: list[Block] = []
        remaining = self.manifest[part]["rows"] if rows is None else rows
        block_rows = self.manifest["block_rows"]
        for file in self.files(part):
            for number, digest in enumerate(file["blocks"]):
                if remaining <= 0:
                    return blocks
                size = min(block_rows, file["rows"] - number * block_rows)
                blocks.append(Block(file["file"], size, digest))
                remaining -= size
        return blocks

    def identity(self, hp: Hyperparameters, rows: int | None = None) -> DataIdentity:
        """Return the identity of the rows that a run reads, of all or of the first `rows` rows.

        Raises ValueError if the horizon needs more than MAX_EPOCHS passes over the corpus.
        """
        available = self.train_rows if rows is None else rows
        needed = hp.train_rows
        if needed > MAX_EPOCHS * available:
            tokens = available * hp.sequence_length
            raise ValueError(
                f"depth {hp.depth} needs {hp.tokens:,} tokens; corpus {self.name} has "
                f"{tokens:,}, enough for {MAX_EPOCHS} epochs of "
                f"{MAX_EPOCHS * tokens:,}: give more text, or a shorter horizon"
            )
        parts = [block.hash for block in self.blocks("train", min(needed, available))]
        if needed > available:
            parts.append(str(available))  # rows are read again from the first on
        return DataIdentity(
            corpus=self.name,
            tokenizer=self.manifest["tokenizer"],
            train=fingerprint("".join(parts).encode()),
            validation=self.manifest["validation"]["fingerprint"],
            validation_rows=self.manifest["validation"]["rows"],
            rows=available,
            epochs=needed / available,
        )

    def verify(self) -> None:
        """Raise ValueError unless the files of rows exist with the sizes of the manifest."""
        for part in PARTS:
            for file in self.files(part):
                path = self.folder / file["file"]
                if not path.exists():
                    raise ValueError(
                        f"{path} is missing: remove {self.folder} and run `slm data prepare` again"
                    )
                if path.stat().st_size != file["bytes"]:
                    raise ValueError(
                        f"{path} was changed: remove {self.folder} and run `slm data prepare` again"
                    )

    def verify_content(self, hp: Hyperparameters, parts: Sequence[str] = PARTS) -> None:
        """Raise ValueError unless the blocks that a run reads match the manifest's fingerprints."""
        for part in parts:
            self.verify_blocks(self.blocks(part, hp.train_rows if part == "train" else None))

    def verify_blocks(
        self, blocks: Sequence[Block], report: Callable[[int], None] = lambda rows: None
    ) -> None:
        """Raise ValueError unless the leading blocks of a part match their fingerprints.

        `report` gets the number of rows read.
        """
        rows = 0
        row_bytes = self.manifest["row_tokens"] * np.dtype(self.manifest["dtype"]).itemsize
        for name, group in groupby(blocks, lambda block: block.file):
            with (self.folder / name).open("rb") as file:
                for block in group:
                    if fingerprint(file.read(block.rows * row_bytes)) != block.hash:
                        raise ValueError(
                            f"{file.name} was changed: remove its folder and run "
                            "`slm data prepare` again"
                        )
                    rows += block.rows
                    report(rows)

    def verify_all(self, report: Callable[[int, int], None]) -> None:
        """Raise ValueError unless everything matches the manifest: tokeniser, files and every row.

        `report` gets the number of rows read and of all rows.
        """
        self.verify()
        assert self.tokenizer
        total = sum(self.manifest[part]["rows"] for part in PARTS)
        done = 0
        for part in PARTS:
            blocks = self.blocks(part)
            hashes = "".join(block.hash for block in blocks)
            if fingerprint(hashes.encode()) != self.manifest[part]["fingerprint"]:
                raise ValueError(
                    f"{self.folder / MANIFEST} was changed: remove its folder and prepare again"
                )
            self.verify_blocks(blocks, lambda rows, done=done: report(done + rows, total))  # type: ignore[misc]
            done += self.manifest[part]["rows"]


@dataclass(frozen=True)
class DatasetRequest:
    """A dataset to look for or to prepare."""

    corpus: str
    """Name of the corpus, folder, or hub address."""
    hp: Hyperparameters
    """Hyperparameters of the longest run on it."""
    home: Path
    tokenizer: Tokenizer | None = None
    """A given tokeniser; None trains one."""

    def __post_init__(self) -> None:
        """Raise ValueError unless the vocabulary holds the tokeniser."""
        size = self.tokenizer.vocab_size if self.tokenizer else 0
        if size > self.hp.vocab_size:
            raise ValueError(
                f"the tokeniser has {size:,} tokens, the recipe's vocabulary "
                f"{self.hp.vocab_size:,}: declare one with vocab_size={size} in a file of "
                "experiments/, or give a smaller tokeniser"
            )

    def datasets(self, source: str) -> list[PreparedDataset]:
        """Return the datasets of a source with this shape and tokeniser."""
        tokenizer = self.tokenizer.fingerprint if self.tokenizer else None
        key = (source, row_shape(self.hp), tokenizer)
        names = ("source", "shape", "given_tokenizer")
        return [
            dataset
            for dataset in list_datasets(self.home)
            if tuple(dataset.manifest[name] for name in names) == key
        ]

    def folder(self, name: str, *content: Any) -> Path:
        """Return the folder of a new dataset, named by a hash of what it is prepared from."""
        tokenizer = [self.tokenizer.fingerprint] if self.tokenizer else []
        key = json.dumps([FORMAT, *content, *tokenizer])
        return self.home / "data" / f"{name}-{fingerprint(key.encode())}"


def list_datasets(home: Path) -> list[PreparedDataset]:
    """Return the datasets of a home, by folder name, without those of another version."""
    datasets = []
    for path in sorted((home / "data").glob(f"*/{MANIFEST}")):
        manifest = read_json(path)
        if manifest.get("format") == FORMAT:
            datasets.append(PreparedDataset(path.parent, manifest))
    return datasets


def row_shape(hp: Hyperparameters) -> dict[str, Any]:
    """Return the hyperparameters that decide the rows."""
    return {
        "vocab_size": hp.vocab_size,
        "sequence_length": hp.sequence_length,
        "validation_rows": hp.validation_rows,
        "split_documents": hp.split_documents,
    }


def recipe_for(shape: dict[str, Any]) -> str | None:
    """Return the recipe with rows of this shape, None if only a variant has them."""
    for name, recipe in RECIPES.items():
        if row_shape(recipe(recipe.reference_depth)) == shape:
            return name
    return None
