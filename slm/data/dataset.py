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
from numpy.typing import NDArray

from slm.data.epochs import check_epochs
from slm.data.tokenizer import TOKENIZER, Tokenizer
from slm.files import fingerprint, read_json
from slm.plan import DataIdentity
from slm.recipe import RECIPES, Hyperparameters

FORMAT = 2
"""Version of the format of prepared folders."""
MANIFEST = "manifest.json"
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
        tokenizer = Tokenizer.read(self.folder / TOKENIZER)
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

    @cached_property
    def source(self) -> Any:
        """Document on what it was prepared from."""
        return read_json(self.folder / f"source-{self.manifest['of']}.json")

    def has_rows_of(self, data: DataIdentity) -> bool:
        """Whether its tokeniser and validation rows are those of a plan's data."""
        manifest = self.manifest
        rows = (manifest["tokenizer"], manifest["validation"]["fingerprint"])
        return rows == (data.tokenizer, data.validation)

    def files(self, part: str) -> list[dict[str, Any]]:
        """Return the manifest's entries of the files of "train" or "validation", in order."""
        return list(self.manifest[part]["files"])

    def blocks(self, part: str, rows: int | None = None) -> list[Block]:
        """Return the blocks of a part, or those that hold its first `rows` rows."""
        blocks: list[Block] = []
        remaining = self.manifest[part]["rows"] if rows is None else rows
        block_rows = self.manifest["block_rows"]
        for file in self.files(part):
            for start, digest in zip(range(0, file["rows"], block_rows), file["blocks"]):
                if remaining <= 0:
                    return blocks
                size = min(block_rows, file["rows"] - start)
                blocks.append(Block(file["file"], size, digest))
                remaining -= size
        return blocks

    def validation_documents(self, tokens: int = -1) -> list[NDArray[Any]]:
        """Return the tokens after each `<|bos|>` of the validation rows, or of their first ones."""
        path = self.folder / self.files("validation")[0]["file"]
        ids = np.fromfile(path, self.manifest["dtype"], tokens)
        documents = np.split(ids, np.flatnonzero(ids == self.tokenizer.bos))
        return [document[1:] for document in documents]

    def identity(self, hp: Hyperparameters, rows: int | None = None) -> DataIdentity:
        """Return the identity of the rows that a run reads, of all or of the first `rows` rows.

        Raises ValueError if the horizon needs more than MAX_EPOCHS passes over the corpus.
        """
        available = self.train_rows if rows is None else rows
        needed = hp.train_rows
        check_epochs(hp, available, self.name)
        parts = [block.hash for block in self.blocks("train", min(needed, available))]
        if needed > available:
            parts.append(str(available))  # rows are read again from the first on
        return DataIdentity(
            corpus=self.name,
            tokenizer=self.manifest["tokenizer"],
            train=fingerprint("".join(parts)),
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
                if not path.exists() or path.stat().st_size != file["bytes"]:
                    problem = "was changed" if path.exists() else "is missing"
                    raise ValueError(
                        f"{path} {problem}: remove {self.folder} and run `slm data prepare` again"
                    )

    def verify_content(self, hp: Hyperparameters) -> None:
        """Raise ValueError unless the blocks that a run reads match the manifest's fingerprints."""
        self.verify_blocks(self.blocks("validation") + self.blocks("train", hp.train_rows))

    def verify_blocks(
        self, blocks: Sequence[Block], report: Callable[[int, int], None] = lambda done, total: None
    ) -> None:
        """Raise ValueError unless the leading blocks of parts match their fingerprints.

        `report` gets the number of rows read and of all rows.
        """
        done = 0
        total = sum(block.rows for block in blocks)
        row_bytes = self.manifest["row_tokens"] * np.dtype(self.manifest["dtype"]).itemsize
        for name, group in groupby(blocks, lambda block: block.file):
            with (self.folder / name).open("rb") as file:
                for block in group:
                    if fingerprint(file.read(block.rows * row_bytes)) != block.hash:
                        raise ValueError(
                            f"{file.name} was changed: remove its folder and run "
                            "`slm data prepare` again"
                        )
                    done += block.rows
                    report(done, total)

    def verify_all(self, report: Callable[[int, int], None]) -> None:
        """Raise ValueError unless everything matches the manifest: tokeniser, files and every row.

        `report` gets the number of rows read and of all rows.
        """
        self.verify()
        assert self.tokenizer
        blocks: list[Block] = []
        for part in PARTS:
            part_blocks = self.blocks(part)
            hashes = "".join(block.hash for block in part_blocks)
            if fingerprint(hashes) != self.manifest[part]["fingerprint"]:
                raise ValueError(
                    f"{self.folder / MANIFEST} was changed: remove its folder and prepare again"
                )
            blocks += part_blocks
        self.verify_blocks(blocks, report)


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
        key = {
            "source": source,
            "shape": row_shape(self.hp),
            "given_tokenizer": self.tokenizer.fingerprint if self.tokenizer else None,
        }
        return [
            dataset
            for dataset in list_datasets(self.home)
            if key.items() <= dataset.manifest.items()
        ]

    def folder(self, name: str, *content: Any) -> Path:
        """Return the folder of a new dataset, named by a hash of what it is prepared from."""
        tokenizer = [self.tokenizer.fingerprint] if self.tokenizer else []
        key = json.dumps([FORMAT, *content, *tokenizer])
        return self.home / "data" / f"{name}-{fingerprint(key)}"


def list_datasets(home: Path) -> list[PreparedDataset]:
    """Return the datasets of a home, by folder name, without those of another version."""
    paths = sorted((home / "data").glob(f"*/{MANIFEST}"))
    datasets = [PreparedDataset(path.parent, read_json(path)) for path in paths]
    return [dataset for dataset in datasets if dataset.manifest.get("format") == FORMAT]


def row_shape(hp: Hyperparameters) -> dict[str, Any]:
    """Return the hyperparameters that decide the rows."""
    names = ("vocab_size", "sequence_length", "validation_rows", "split_documents")
    return {name: getattr(hp, name) for name in names}


def recipe_for(shape: dict[str, Any]) -> str | None:
    """Return the recipe with rows of this shape, None if only a variant has them."""
    for name, recipe in RECIPES.items():
        if row_shape(recipe(recipe.reference_depth)) == shape:
            return name
    return None
