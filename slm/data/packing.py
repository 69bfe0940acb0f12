"""Documents of tokens -> rows of a fixed length, by best fit."""

from __future__ import annotations

import hashlib
from bisect import bisect_right, insort
from collections import Counter, defaultdict, deque
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
    source = iter(documents)
    # The buffer: documents by length, these lengths sorted and each once, and a count of documents.
    queues: defaultdict[int, deque[Tokens]] = defaultdict(deque)
    lengths: list[int] = []
    count = 0
    parts: list[Tokens] = []
    space = length
    try:
        while True:
            # 1) refill the buffer
            for document in islice(source, BUFFER - count):
                queue = queues[len(document)]
                if not queue:
                    insort(lengths, len(document))
                queue.append(document)
                count += 1
            if not lengths:
                return
            # 2) take the longest that fits, or the shortest
            index = bisect_right(lengths, space, 1) - 1
            queue = queues[lengths[index]]
            document = queue.popleft()
            count -= 1
            if not queue:
                del lengths[index]
            # 3) add it to the row, cropped if it is too long
            if len(document) > space:
                counts["cropped_tokens"] += len(document) - space
                document = document[:space]
            parts.append(document)
            space -= len(document)
            if space == 0:
                row = np.concatenate(parts) if len(parts) > 1 else parts[0]
                parts = []
                space = length
                yield row  # the caller may stop here, and this row is not dropped
    finally:
        buffered = sum(size * len(queue) for size, queue in queues.items())
        counts["dropped_tokens"] += length - space + buffered
