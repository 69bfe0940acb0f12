"""A prepared corpus on disk: tokenizer.json, validation.bin, train-00000.bin and on, and their manifest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np

from slm.data.shards import fingerprint
from slm.data.tokenizer import Tokenizer
from slm.files import read_json
from slm.plan import DataIdentity
from slm.recipe import RECIPES, Hyperparameters

FORMAT = 2
"""Of a prepared folder."""
MANIFEST = "manifest.json"
MAX_EPOCHS = 4
PARTS = ("validation", "train")


@dataclass(frozen=True)
class Block:
    """Rows that lie together."""

    file: str
    """Where."""
    rows: int
    """How many."""
    hash: str
    """Of their bytes."""


@dataclass(frozen=True)
class Prepared:
    """A prepared corpus on disk."""

    folder: Path
    """Where it lies."""
    manifest: dict[str, Any]
    """What prepare() recorded."""

    @classmethod
    def read(cls, folder: Path) -> Prepared:
        """What a folder holds. Raises OSError or ValueError where that is no prepared corpus of this version."""
        manifest = read_json(folder / MANIFEST)
        if manifest.get("format") != FORMAT:
            raise ValueError(
                f"{folder} was prepared by another version of slm: run `slm data prepare` again"
            )
        return cls(folder, manifest)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Its tokeniser. Raises ValueError when the file is not the one the manifest names."""
        tokenizer = Tokenizer.read(self.folder / "tokenizer.json")
        if tokenizer.fingerprint != self.manifest["tokenizer"]:
            raise ValueError(
                f"{self.folder}: its tokeniser was changed; remove the folder and prepare again"
            )
        return tokenizer

    @property
    def train_rows(self) -> int:
        """Rows there are to train on."""
        return int(self.manifest["train"]["rows"])

    def files(self, part: str) -> list[dict[str, Any]]:
        """What the manifest says of the files of a part, "train" or "validation", in order."""
        found: list[dict[str, Any]] = self.manifest[part]["files"]
        return found

    def blocks(self, part: str, rows: int | None = None) -> list[Block]:
        """The blocks of a part, or those in which its first so many rows lie."""
        found: list[Block] = []
        left = self.manifest[part]["rows"] if rows is None else rows
        for file in self.files(part):
            for number, digest in enumerate(file["blocks"]):
                if left <= 0:
                    return found
                size = min(
                    self.manifest["block_rows"], file["rows"] - number * self.manifest["block_rows"]
                )
                found.append(Block(file["file"], size, digest))
                left -= size
        return found

    def identity(self, given: Hyperparameters, rows: int | None = None) -> DataIdentity:
        """The rows that a run of these hyperparameters reads, of all or of the first so many `rows`.

        Raises ValueError when its horizon needs more than MAX_EPOCHS passes over the corpus.
        """
        available, needed = self.train_rows if rows is None else rows, given.train_rows
        if needed > MAX_EPOCHS * available:
            raise ValueError(
                f"depth {given.depth} needs {given.tokens:,} tokens; corpus {self.manifest['corpus']['name']} has "
                f"{available * given.sequence_length:,}, enough for {MAX_EPOCHS} epochs of "
                f"{MAX_EPOCHS * available * given.sequence_length:,}: give more text, or a shorter horizon"
            )
        read = [block.hash for block in self.blocks("train", min(needed, available))]
        wrapped = [str(available)] if needed > available else []
        return DataIdentity(
            corpus=self.manifest["corpus"]["name"],
            tokenizer=self.manifest["tokenizer"],
            train=fingerprint("".join(read + wrapped).encode()),
            validation=self.manifest["validation"]["fingerprint"],
            validation_rows=self.manifest["validation"]["rows"],
            rows=available,
            epochs=needed / available,
        )

    def verify(self) -> None:
        """Raise ValueError unless the files of rows are there and as long as the manifest says."""
        for file in chain.from_iterable(map(self.files, PARTS)):
            path = self.folder / file["file"]
            if not path.exists():
                raise ValueError(
                    f"{path} is gone: remove {self.folder} and run `slm data prepare` again"
                )
            if path.stat().st_size != file["bytes"]:
                raise ValueError(
                    f"{path} was changed: remove {self.folder} and run `slm data prepare` again"
                )

    def verify_content(self, given: Hyperparameters, parts: Sequence[str] = PARTS) -> None:
        """Raise ValueError unless validation rows and the blocks that a run reads hash to what the manifest says."""
        for part in parts:
            self.verify_blocks(self.blocks(part, given.train_rows if part == "train" else None))

    def verify_blocks(
        self, blocks: Sequence[Block], report: Callable[[int], None] = lambda rows: None
    ) -> None:
        """Raise ValueError unless some blocks, from the first of a part on, hash to what the manifest says.

        `report` is told how many rows are read.
        """
        read, row_bytes = 0, self.manifest["row_tokens"] * np.dtype(self.manifest["dtype"]).itemsize
        for name, own in groupby(blocks, lambda block: block.file):
            with (self.folder / name).open("rb") as file:
                for block in own:
                    if fingerprint(file.read(block.rows * row_bytes)) != block.hash:
                        raise ValueError(
                            f"{file.name} was changed: remove its folder and run `slm data prepare` again"
                        )
                    read += block.rows
                    report(read)

    def verify_all(self, report: Callable[[int, int], None]) -> None:
        """Raise ValueError unless everything is what the manifest says, the tokeniser and every row.

        `report` is told how many rows are read, and of how many.
        """
        self.verify()
        assert self.tokenizer
        done, rows = 0, sum(self.manifest[part]["rows"] for part in PARTS)
        for part in PARTS:
            blocks = self.blocks(part)
            if (
                fingerprint("".join(block.hash for block in blocks).encode())
                != self.manifest[part]["fingerprint"]
            ):
                raise ValueError(
                    f"{self.folder / MANIFEST} was changed: remove its folder and prepare again"
                )
            self.verify_blocks(blocks, lambda read, done=done: report(done + read, rows))  # type: ignore[misc]
            done += self.manifest[part]["rows"]


def all_prepared(home: Path) -> list[Prepared]:
    """The prepared corpora of a home, by name; those of another version's format are none."""
    paths = sorted((home / "data").glob(f"*/{MANIFEST}"))
    manifests = [(path.parent, read_json(path)) for path in paths]
    return [
        Prepared(folder, manifest)
        for folder, manifest in manifests
        if manifest.get("format") == FORMAT
    ]


def of_source(
    home: Path, source: str, given: Hyperparameters, tokenizer: Tokenizer | None
) -> list[Prepared]:
    """What was prepared of a corpus for a shape, with a tokeniser that was given, or one of its own."""
    wanted = (source, row_shape(given), tokenizer.fingerprint if tokenizer else None)
    keys = ("source", "shape", "given_tokenizer")
    return [own for own in all_prepared(home) if tuple(own.manifest[key] for key in keys) == wanted]


def row_shape(given: Hyperparameters) -> dict[str, Any]:
    """What of a recipe decides the rows."""
    return {
        "vocab_size": given.vocab_size,
        "sequence_length": given.sequence_length,
        "validation_rows": given.validation_rows,
        "split_documents": given.split_documents,
    }


def recipe_for(shape: dict[str, Any]) -> str | None:
    """The recipe that has rows of a shape; None where that is a variant of one."""
    return next(
        (name for name, own in RECIPES.items() if row_shape(own(own.reference_depth)) == shape),
        None,
    )
