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
            piece = np.empty(len(part) + 1, np.uint32)
            piece[0] = bos
            piece[1:] = part
            yield piece


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
    shortest is cropped to fill it. Documents left over when the last row cannot be filled, or when
    the caller stops, are dropped. `counts` gets cropped_tokens and dropped_tokens.
    """
    buffer = _LengthBuffer()
    source = iter(documents)
    parts: list[Tokens] = []
    space = length
    try:
        while True:
            # 1) refill the buffer
            if buffer.count < BUFFER:
                for document in islice(source, BUFFER - buffer.count):
                    buffer.add(document)
            if not buffer.count:
                return
            # 2) choose the best fit, or crop
            choice = buffer.pop_longest(space)
            if choice is None:
                choice = buffer.pop_shortest()
                counts["cropped_tokens"] += len(choice) - space
                choice = choice[:space]
            parts.append(choice)
            space -= len(choice)
            # 3) finish the row
            if space == 0:
                row = np.concatenate(parts) if len(parts) > 1 else parts[0]
                parts = []
                space = length
                yield row
    finally:
        counts["dropped_tokens"] += length - space + buffer.tokens


class _LengthBuffer:
    """Documents by length, found in logarithmic time; equal ones come out first in, first out."""

    def __init__(self) -> None:
        self.count = 0
        self._lengths: list[int] = []
        self._queues: defaultdict[int, deque[Tokens]] = defaultdict(deque)

    @property
    def tokens(self) -> int:
        return sum(length * len(queue) for length, queue in self._queues.items())

    def add(self, document: Tokens) -> None:
        queue = self._queues[len(document)]
        if not queue:
            insort(self._lengths, len(document))
        queue.append(document)
        self.count += 1

    def pop_longest(self, limit: int) -> Tokens | None:
        """Remove and return the longest document of at most `limit` tokens, None if there is
        none."""
        index = bisect_right(self._lengths, limit) - 1
        return None if index < 0 else self._pop(index)

    def pop_shortest(self) -> Tokens:
        return self._pop(0)

    def _pop(self, index: int) -> Tokens:
        queue = self._queues[self._lengths[index]]
        document = queue.popleft()
        if not queue:
            del self._lengths[index]
        self.count -= 1
        return document
