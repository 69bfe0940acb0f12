"""A shard of a corpus: documents -> tokens -> rows in a file, with a fingerprint per block.

A shard's rows follow from its documents, the tokeniser and the shape of rows alone, not from the
number of processes that pack shards.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from slm.data.packing import Tokens, pack, shuffled, split
from slm.data.tokenizer import TOKENIZER, Tokenizer
from slm.files import fingerprint, read_json, replacing, write_json
from slm.recipe import Hyperparameters

BLOCK_ROWS = 256
"""Rows per block, the unit of fingerprints and of the order's permutation; the last may be
smaller."""
BATCH_DOCUMENTS = 256
"""Documents tokenised at once."""


class Documents(Protocol):
    """Texts in a fixed order."""

    def documents(self, counts: Counter[str]) -> Iterator[str]:
        """Yield the texts; `counts` gets the number of texts left out, by reason."""


def pack_shard(
    source: Documents, path: Path, of: str, hp: Hyperparameters, threads: int
) -> dict[str, Any]:
    """Pack a shard's documents into a file, and return its entry of the manifest.

    The entry is saved next to the file. `of` identifies the preparation: a shard packed by the same
    one is not packed again.
    """
    entry = path.with_suffix(".json")
    if entry.exists() and (document := read_json(entry))["of"] == of:
        return document
    counts: Counter[str] = Counter()
    texts = source.documents(counts)
    document = pack_texts(texts, path, hp, counts, threads) | {"of": of}
    write_json(entry, document)
    return document


def pack_texts(
    texts: Iterable[str],
    path: Path,
    hp: Hyperparameters,
    counts: Counter[str],
    threads: int,
    maximum: int | None = None,
) -> dict[str, Any]:
    """Tokenise texts, pack them into rows in a file, and return its entry of the manifest.

    Pieces of long documents are shuffled, unless only the first `maximum` rows are written.
    `counts` gets the documents and tokens read, `<|bos|>` included, and the tokens in no row.
    """
    tokenizer = Tokenizer.read(path.with_name(TOKENIZER))
    length = hp.sequence_length + 1
    documents = _encode(texts, tokenizer, counts, threads)
    pieces = split(documents, tokenizer.bos, length, hp.split_documents)
    if hp.split_documents and maximum is None:
        pieces = shuffled(pieces)
    with closing(pack(pieces, length, counts)) as rows:
        entry = _write_rows(path, islice(rows, maximum), row_dtype(hp))
    return entry | counts


def _encode(
    texts: Iterable[str], tokenizer: Tokenizer, counts: Counter[str], threads: int
) -> Iterator[Tokens]:
    source = iter(texts)
    with ThreadPoolExecutor(threads) as pool:
        while batch := list(islice(source, BATCH_DOCUMENTS)):
            for ids in pool.map(tokenizer.encode_to_numpy, batch):
                counts["documents"] += 1
                counts["tokens"] += len(ids) + 1
                yield ids


def _write_rows(path: Path, rows: Iterator[Tokens], dtype: str) -> dict[str, Any]:
    """Write rows to a file atomically."""
    blocks: list[str] = []
    count = 0
    with replacing(path) as temporary, temporary.open("wb") as file:
        while block := list(islice(rows, BLOCK_ROWS)):
            content = np.stack(block).astype(dtype).tobytes()
            file.write(content)
            blocks.append(fingerprint(content))
            count += len(block)
        file.flush()
        os.fsync(file.fileno())
    return {"file": path.name, "rows": count, "bytes": path.stat().st_size, "blocks": blocks}


def row_dtype(hp: Hyperparameters) -> str:
    """Return the smallest little-endian type that holds every token id."""
    return "<u2" if hp.vocab_size <= 2**16 else "<u4"
