"""A corpus -> one prepared folder: tokenizer.json, validation.bin, train.bin and their manifest, by content.

Validation comes first: the documents that lead the content order fill the validation rows; the others are trained on,
those split into pieces in an order of the pieces' own.
The tokeniser learns from the documents at the end of that order, which are never validation.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from slm import events, locks
from slm.data.corpus import Corpus, read_corpus, source_state
from slm.data.packing import Tokens, pack, shuffled, split
from slm.data.tokenizer import Tokenizer, train_tokenizer
from slm.plan import DataIdentity
from slm.recipe import Hyperparameters

FORMAT = 1
BLOCK_ROWS = 256
"""Rows of a block: the unit of fingerprints and of the order's permutation."""
MAX_EPOCHS = 4
TOKENIZER_CHARACTERS = 2**26
TOKENIZER_SHARE = 0.8
"""The tokeniser learns from at most this many characters and this share of a corpus."""
ENCODE_DOCUMENTS = 256

Report = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """A prepared corpus on disk."""

    folder: Path
    """Where it lies."""
    manifest: dict[str, Any]
    """What prepare() recorded."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Its tokeniser. Raises ValueError when the file is not the one the manifest names."""
        tokenizer = Tokenizer.read(self.folder / "tokenizer.json")
        if tokenizer.fingerprint != self.manifest["tokenizer"]:
            raise ValueError(f"{self.folder}: its tokeniser was changed; remove the folder and prepare again")
        return tokenizer

    @property
    def train_rows(self) -> int:
        """Rows there are to train on."""
        return int(self.manifest["train"]["rows"])

    def identity(self, given: Hyperparameters) -> DataIdentity:
        """The rows that a run of these hyperparameters reads.

        Raises ValueError when its horizon needs more than MAX_EPOCHS passes over the corpus.
        """
        available, needed = self.train_rows, given.train_rows
        if needed > MAX_EPOCHS * available:
            raise ValueError(
                f"depth {given.depth} needs {given.tokens:,} tokens; corpus {self.manifest['corpus']['name']} has "
                f"{available * given.sequence_length:,}, enough for {MAX_EPOCHS} epochs of "
                f"{MAX_EPOCHS * available * given.sequence_length:,}: give more text, or a shorter horizon"
            )
        read = self._blocks_read(given)
        wrapped = [str(available)] if needed > available else []
        return DataIdentity(
            corpus=self.manifest["corpus"]["name"],
            tokenizer=self.manifest["tokenizer"],
            train=_hash("".join(read + wrapped).encode()),
            validation=self.manifest["validation"]["fingerprint"],
            validation_rows=self.manifest["validation"]["rows"],
            rows=available,
            epochs=needed / available,
        )

    def _blocks_read(self, given: Hyperparameters) -> list[str]:
        """Hashes of the row blocks that a run reads."""
        blocks: list[str] = self.manifest["train"]["blocks"]
        return blocks[: -(-min(given.train_rows, self.train_rows) // BLOCK_ROWS)]

    def verify_content(self, given: Hyperparameters, parts: Sequence[str] = ("validation", "train")) -> None:
        """Raise ValueError unless validation rows and the blocks that a run reads hash to what the manifest says."""
        read = {"validation": self.manifest["validation"]["blocks"], "train": self._blocks_read(given)}
        for name in parts:
            blocks = read[name]
            part = self.manifest[name]
            size = BLOCK_ROWS * part["row_tokens"] * np.dtype(part["dtype"]).itemsize
            with (self.folder / f"{name}.bin").open("rb") as file:
                if any(_hash(file.read(size)) != expected for expected in blocks):
                    raise ValueError(f"{file.name} was changed: remove its folder and run `slm data prepare` again")

    def verify(self) -> None:
        """Raise ValueError unless the row files are there and as long as the manifest says."""
        for name in ("train", "validation"):
            path = self.folder / f"{name}.bin"
            if not path.exists():
                raise ValueError(f"{path} is gone: remove {self.folder} and run `slm data prepare` again")
            if path.stat().st_size != self.manifest[name]["bytes"]:
                raise ValueError(f"{path} was changed: remove {self.folder} and run `slm data prepare` again")


def prepared_for(name: str, given: Hyperparameters, home: Path) -> Prepared | None:
    """The prepared folder of a corpus for these hyperparameters, or None when there is none yet.

    Raises ValueError when there is no such corpus.
    """
    wanted = {"format": FORMAT, "source": _source_hash(name), "shape": row_shape(given)}
    for path in sorted((home / "data").glob("*/manifest.json")):
        manifest = events.read_json(path)
        if {key: manifest.get(key) for key in wanted} == wanted:
            prepared = Prepared(path.parent, manifest)
            prepared.verify()
            return prepared
    return None


def prepare(name: str, given: Hyperparameters, home: Path, report: Report = lambda _: None) -> Prepared:
    """Tokenise and pack a corpus for a recipe's shape, once; later calls find what is there.

    Raises ValueError for a corpus that is missing, empty or too small. Interrupted, it leaves nothing behind.
    """
    if prepared := prepared_for(name, given, home):
        return prepared
    report(f"reading corpus {name}")
    corpus = read_corpus(name)
    root = home / "data"
    root.mkdir(parents=True, exist_ok=True)
    _sweep_abandoned(root)
    temporary = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=root))
    lock = locks.hold(temporary / "lock")
    assert lock is not None
    try:
        manifest = _fill(temporary, corpus, given, report) | {"source": _source_hash(name)}
        key = _hash(json.dumps([manifest["shape"], manifest["corpus"], manifest["source"]]).encode())
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        folder = root / f"{corpus.name}-{key}"
        _publish(temporary, folder)
    finally:
        lock.close()
        shutil.rmtree(temporary, ignore_errors=True)
    return Prepared(folder, events.read_json(folder / "manifest.json"))


def _publish(temporary: Path, folder: Path) -> None:
    """Give a finished folder its name, unless another preparation was first."""
    try:
        temporary.rename(folder)
    except OSError:
        if not (folder / "manifest.json").exists():
            raise


def _fill(folder: Path, corpus: Corpus, given: Hyperparameters, report: Report) -> dict[str, Any]:
    """Write tokeniser and rows into a folder; the manifest."""
    report(f"training a tokeniser of {given.vocab_size} tokens")
    texts = _tokenizer_texts(corpus)
    tokenizer = train_tokenizer(texts, given.vocab_size)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer.document()))

    source = _Encoded(corpus, tokenizer, report)
    leading = islice(source, len(corpus.documents) - len(texts))
    validation = _validation_rows(folder, leading, corpus, tokenizer, given)
    validation_documents = source.documents
    train = _train_rows(folder, source, corpus, tokenizer, given)
    return {
        "format": FORMAT,
        "shape": row_shape(given),
        "corpus": {
            "name": corpus.name,
            "fingerprint": corpus.fingerprint,
            "documents": len(corpus.documents),
            "duplicates": corpus.duplicates,
            "validation_documents": validation_documents,
            "tokens": source.tokens,
        },
        "tokenizer": tokenizer.fingerprint,
        "validation": validation,
        "train": train,
    }


def _validation_rows(
    folder: Path, leading: Iterable[list[int]], corpus: Corpus, tokenizer: Tokenizer, given: Hyperparameters
) -> dict[str, Any]:
    """Fill the validation rows from the documents that lead the order; what the manifest says of them."""
    length = given.sequence_length + 1
    packed = pack(split(leading, tokenizer.bos, length, given.split_documents), length)
    written = _Rows(folder / "validation.bin", length, tokenizer).write(islice(packed, given.validation_rows))
    if written["rows"] < given.validation_rows:
        raise ValueError(
            f"corpus {corpus.name} is too small: it fills {written['rows']} of the {given.validation_rows} validation "
            f"rows ({given.validation_tokens:,} tokens) that the recipe needs"
        )
    return written


def _train_rows(
    folder: Path, source: Iterable[list[int]], corpus: Corpus, tokenizer: Tokenizer, given: Hyperparameters
) -> dict[str, Any]:
    """Pack the other documents; what the manifest says of their rows."""
    length = given.sequence_length + 1
    pieces = split(source, tokenizer.bos, length, given.split_documents)
    rows = pack(shuffled(pieces) if given.split_documents else pieces, length)
    written = _Rows(folder / "train.bin", length, tokenizer).write(rows)
    if not written["rows"]:
        raise ValueError(f"corpus {corpus.name} is too small: nothing is left to train on")
    return written


class _Encoded:
    """Iterates over a corpus's documents as token ids, once, and counts them."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, report: Report) -> None:
        self.documents = self.tokens = 0
        self._ids = self._encode(corpus, tokenizer, report)

    def __iter__(self) -> Iterator[list[int]]:
        return self._ids

    def _encode(self, corpus: Corpus, tokenizer: Tokenizer, report: Report) -> Iterator[list[int]]:
        documents, threads = iter(corpus.documents), os.cpu_count() or 1
        while batch := list(islice(documents, ENCODE_DOCUMENTS)):
            for ids in tokenizer.encode_batch(batch, threads):
                self.documents += 1
                self.tokens += len(ids) + 1
                yield ids
            report(f"packing rows: {self.documents:,} of {len(corpus.documents):,} documents")


class _Rows:
    """Writes rows to a file as uint16 (uint32 for large vocabularies) and fingerprints them block by block."""

    def __init__(self, path: Path, length: int, tokenizer: Tokenizer) -> None:
        self._path = path
        self._length = length
        self._dtype = row_dtype(tokenizer.vocab_size)

    def write(self, rows: Iterator[tuple[Tokens, int]]) -> dict[str, Any]:
        blocks: list[str] = []
        count = cropped = 0
        with self._path.open("wb") as file:
            while block := list(islice(rows, BLOCK_ROWS)):
                content = np.stack([row for row, _ in block]).astype(self._dtype).tobytes()
                file.write(content)
                blocks.append(_hash(content))
                count += len(block)
                cropped += sum(lost for _, lost in block)
            file.flush()
            os.fsync(file.fileno())
        return {
            "rows": count,
            "row_tokens": self._length,
            "block_rows": BLOCK_ROWS,
            "cropped_tokens": cropped,
            "dtype": self._dtype,
            "bytes": self._path.stat().st_size,
            "blocks": blocks,
            "fingerprint": _hash("".join(blocks).encode()),
        }


def row_dtype(vocab_size: int) -> str:
    """The smallest little-endian type that holds every token id."""
    return "<u2" if vocab_size <= 2**16 else "<u4"


def _tokenizer_texts(corpus: Corpus) -> list[str]:
    """The documents at the end of the order that the tokeniser may learn from."""
    total = sum(len(text) for text in corpus.documents)
    budget = min(TOKENIZER_CHARACTERS, TOKENIZER_SHARE * total)
    texts: list[str] = []
    for text in reversed(corpus.documents):
        budget -= len(text)
        if budget < 0:
            break
        texts.append(text)
    if not texts:
        raise ValueError(
            f"corpus {corpus.name}: its {len(corpus.documents)} documents are too few to hold some out for validation; "
            "split them into more files or lines"
        )
    return texts


def row_shape(given: Hyperparameters) -> dict[str, Any]:
    """What of a recipe decides the rows."""
    return {
        "vocab_size": given.vocab_size,
        "sequence_length": given.sequence_length,
        "validation_rows": given.validation_rows,
        "split_documents": given.split_documents,
    }


def _source_hash(name: str) -> str:
    return _hash(json.dumps(source_state(name)).encode())


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _sweep_abandoned(root: Path) -> None:
    """Remove what preparations that no longer live left behind."""
    for path in root.glob(".unfinished-*"):
        if (path / "lock").exists() and locks.holder(path / "lock") is None:
            shutil.rmtree(path, ignore_errors=True)
