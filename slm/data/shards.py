"""A shard of a corpus: documents -> tokens -> rows in a file, with a fingerprint per block.

A shard's rows follow from its documents, the tokeniser and the shape alone, not from the number of
processes that pack shards.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from slm.data.corpus import texts_of
from slm.data.packing import Tokens, pack, shuffled, split
from slm.data.tokenizer import Tokenizer
from slm.files import read_json, replacing, write_json

BLOCK_ROWS = 256
"""Rows per block, the unit of fingerprints and of the order's permutation; the last may be
smaller."""
BATCH_DOCUMENTS = 256
"""Documents tokenised at once."""


class Documents(Protocol):
    """Texts in a fixed order."""

    def documents(self, counts: Counter[str]) -> Iterator[str]:
        """Yield the texts; `counts` gets the number of texts left out, by reason."""


@dataclass(frozen=True)
class FileDocuments:
    """The texts of one file in order, without duplicates."""

    path: Path
    column: str = "text"

    def documents(self, counts: Counter[str]) -> Iterator[str]:
        """Yield the texts; `counts` gets the number of texts left out, by reason."""
        seen: set[bytes] = set()
        for text in texts_of(self.path, counts, self.column):
            digest = hashlib.sha256(text.encode()).digest()[:16]
            if digest in seen:
                counts["duplicates"] += 1
            else:
                seen.add(digest)
                yield text


@dataclass(frozen=True)
class Shape:
    """Format of rows."""

    length: int
    """Tokens per row, the first input and the last target included."""
    dtype: str
    """Numpy type of a token."""
    pieces: bool
    """Whether documents longer than a row are split into pieces, and the pieces shuffled."""


def encode_documents(
    documents: Iterable[str], tokenizer: Tokenizer, counts: Counter[str], threads: int
) -> Iterator[Tokens]:
    """Yield each document's tokens, without `<|bos|>`.

    `counts` gets documents and tokens, `<|bos|>` included, as they are consumed.
    """
    source = iter(documents)
    with ThreadPoolExecutor(threads) as pool:
        while batch := list(islice(source, BATCH_DOCUMENTS)):
            for ids in pool.map(tokenizer.encode_to_numpy, batch):
                counts["documents"] += 1
                counts["tokens"] += len(ids) + 1
                yield ids


def write_rows(path: Path, rows: Iterator[Tokens], dtype: str) -> dict[str, Any]:
    """Write rows to a file atomically, and return its entry of the manifest."""
    blocks: list[str] = []
    count = 0
    size = 0
    with replacing(path) as temporary, temporary.open("wb") as file:
        while block := list(islice(rows, BLOCK_ROWS)):
            content = np.stack(block).astype(dtype).tobytes()
            file.write(content)
            blocks.append(fingerprint(content))
            count += len(block)
            size += len(content)
        file.flush()
        os.fsync(file.fileno())
    return {"file": path.name, "rows": count, "bytes": size, "blocks": blocks}


def pack_shard(
    source: Documents, path: Path, of: str, shape: Shape, threads: int
) -> dict[str, Any]:
    """Pack a shard's documents into a file, and return its entry of the manifest.

    The entry is saved next to the file. `of` identifies the preparation: a shard packed by the same
    one is not packed again.
    """
    entry = path.with_suffix(".json")
    if entry.exists() and (document := read_json(entry))["of"] == of:
        return document
    counts: Counter[str] = Counter()
    tokenizer = Tokenizer.read(path.with_name("tokenizer.json"))
    documents = encode_documents(source.documents(counts), tokenizer, counts, threads)
    pieces = split(documents, tokenizer.bos, shape.length, shape.pieces)
    rows = pack(shuffled(pieces) if shape.pieces else pieces, shape.length, counts)
    document = write_rows(path, rows, shape.dtype) | {"of": of} | counts
    write_json(entry, document)
    return document


def row_dtype(vocab_size: int) -> str:
    """Return the smallest little-endian type that holds every token id."""
    return "<u2" if vocab_size <= 2**16 else "<u4"


def fingerprint(content: bytes) -> str:
    """Return a hash of 16 hex digits."""
    return hashlib.sha256(content).hexdigest()[:16]
