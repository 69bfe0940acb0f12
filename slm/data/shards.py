"""One shard of a corpus: documents -> tokens -> rows in a file, fingerprinted block by block.

A shard's rows follow from its documents, the tokeniser and the shape alone, whoever packs it beside how many others.
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
"""Rows of a block: the unit of fingerprints and of the order's permutation. A shard's last block may have fewer."""
AT_ONCE = 256
"""Documents that are encoded at once."""


class Documents(Protocol):
    """Texts in an order; `counts` gets what of their source is left out, by why."""

    def documents(self, counts: Counter[str]) -> Iterator[str]:
        """The texts, from the first."""


@dataclass(frozen=True)
class File:
    """The texts of one file in its order, each once."""

    path: Path
    """Which."""
    column: str = "text"
    """Where in it the texts are."""

    def documents(self, counts: Counter[str]) -> Iterator[str]:
        """The texts, from the first."""
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
    """How rows are made."""

    length: int
    """Tokens of a row, the first input and the last target included."""
    dtype: str
    """Of a token."""
    pieces: bool
    """Whether documents longer than a row are cut into pieces, and these shuffled."""


def packed(
    documents: Iterable[str], tokenizer: Tokenizer, shape: Shape, counts: Counter[str], threads: int
) -> Iterator[Tokens]:
    """Rows of training."""
    pieces = split(
        encoded(documents, tokenizer, counts, threads), tokenizer.bos, shape.length, shape.pieces
    )
    return pack(shuffled(pieces) if shape.pieces else pieces, shape.length, counts)


def encoded(
    documents: Iterable[str], tokenizer: Tokenizer, counts: Counter[str], threads: int
) -> Iterator[Tokens]:
    """Each document's tokens, without `<|bos|>`; `counts` gets documents and tokens, `<|bos|>` included, as taken."""
    source = iter(documents)
    with ThreadPoolExecutor(threads) as pool:
        while batch := list(islice(source, AT_ONCE)):
            for ids in pool.map(tokenizer.encode_to_numpy, batch):
                counts["documents"] += 1
                counts["tokens"] += len(ids) + 1
                yield ids


def write_rows(path: Path, rows: Iterator[Tokens], dtype: str) -> dict[str, Any]:
    """Write rows to a file, whole or not at all; what a manifest says of it."""
    blocks: list[str] = []
    count = size = 0
    with replacing(path) as temporary, temporary.open("wb") as file:
        while block := list(islice(rows, BLOCK_ROWS)):
            content = np.stack(block).astype(dtype).tobytes()
            file.write(content)
            blocks.append(fingerprint(content))
            count, size = count + len(block), size + len(content)
        file.flush()
        os.fsync(file.fileno())
    return {"file": path.name, "rows": count, "bytes": size, "blocks": blocks}


def pack_shard(
    source: Documents, path: Path, of: str, shape: Shape, threads: int
) -> dict[str, Any]:
    """Pack a shard's documents into a file; what the manifest says of it, kept beside it.

    `of` is what the shard follows from beside its number: a file of another is written anew.
    """
    kept = path.with_suffix(".json")
    if kept.exists() and (document := read_json(kept))["of"] == of:
        return document
    counts: Counter[str] = Counter()
    tokenizer = Tokenizer.read(path.with_name("tokenizer.json"))
    rows = packed(source.documents(counts), tokenizer, shape, counts, threads)
    document = write_rows(path, rows, shape.dtype) | {"of": of} | counts
    write_json(kept, document)
    return document


def row_dtype(vocab_size: int) -> str:
    """The smallest little-endian type that holds every token id."""
    return "<u2" if vocab_size <= 2**16 else "<u4"


def fingerprint(content: bytes) -> str:
    """A hash of some bytes."""
    return hashlib.sha256(content).hexdigest()[:16]
