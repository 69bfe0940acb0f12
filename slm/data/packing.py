"""Documents of tokens -> rows of a fixed length, by best fit."""

from __future__ import annotations

import hashlib
from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.uint32]

SHUFFLE = 2**16
"""Pieces that are shuffled together."""
BUFFER = 1000
"""Documents to choose from while a row is filled."""


def split(
    documents: Iterable[NDArray[Any]], bos: int, length: int, pieces: bool
) -> Iterator[Tokens]:
    """Yield each document's tokens after a `<|bos|>`.

    With `pieces`, documents longer than a row of `length` tokens are split into pieces that fill a
    row, each with its own `<|bos|>`.
    """
    for document in documents:
        step = length - 1 if pieces else max(len(document), 1)
        for start in range(0, len(document), step):
            part = document[start : start + step]
            yield np.append(bos, part).astype(np.uint32)


def shuffled(pieces: Iterable[Tokens]) -> Iterator[Tokens]:
    """Yield pieces by the SHA-256 of their tokens as int64, SHUFFLE at a time.

    This separates the pieces of a long document.
    """
    source = iter(pieces)
    while chunk := list(islice(source, SHUFFLE)):
        yield from sorted(
            chunk, key=lambda piece: hashlib.sha256(piece.astype("<i8").tobytes()).digest()
        )


def pack(documents: Iterable[Tokens], length: int, counts: Counter[str]) -> Generator[Tokens]:
    """Yield rows of `length` tokens.

    A row takes, repeatedly, the longest of BUFFER documents that still fits; when none fits, the
    shortest is cropped to fill it. Of equally long documents the first one is taken. Documents left
    over when the last row cannot be filled, or when the caller stops, are dropped. `counts` gets
    cropped_tokens and dropped_tokens.
    """
    source = enumerate(documents)
    # Sorted by length, the first document last among equals: (length, -number, document).
    buffer: list[tuple[int, int, Tokens]] = []
    parts: list[Tokens] = []
    space = length
    try:
        while True:
            # 1) refill the buffer
            for number, document in islice(source, BUFFER - len(buffer)):
                insort(buffer, (len(document), -number, document))
            if not buffer:
                return
            # 2) choose the longest that fits, or crop the shortest
            shortest = buffer[0][0]
            limit = max(space, shortest)
            choice = buffer.pop(bisect_right(buffer, (limit, 1)) - 1)[2]
            if shortest > space:
                counts["cropped_tokens"] += shortest - space
                choice = choice[:space]
            parts.append(choice)
            space -= len(choice)
            # 3) finish the row
            if space == 0:
                row = np.concatenate(parts)
                parts = []
                space = length
                yield row
    finally:
        buffered = sum(size for size, *_ in buffer)
        counts["dropped_tokens"] += length - space + buffered
