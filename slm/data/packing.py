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
    """Each document's tokens with `<|bos|>` in front; with `pieces`, those longer than a row of `length` tokens are cut
    into pieces that fill one, each with its own `<|bos|>`."""
    for document in documents:
        step = length - 1 if pieces else max(len(document), 1)
        for start in range(0, len(document), step):
            part = document[start : start + step]
            piece = np.empty(len(part) + 1, np.uint32)
            piece[0], piece[1:] = bos, part
            yield piece


def shuffled(pieces: Iterable[Tokens]) -> Iterator[Tokens]:
    """Pieces in the order of the SHA-256 of their tokens as int64, SHUFFLE at a time: a long document's pieces do not
    follow one another."""
    source = iter(pieces)
    while chunk := list(islice(source, SHUFFLE)):
        yield from sorted(
            chunk, key=lambda piece: hashlib.sha256(piece.astype("<i8").tobytes()).digest()
        )


def pack(documents: Iterable[Tokens], length: int, counts: Counter[str]) -> Generator[Tokens]:
    """Rows of `length` tokens; `counts` gets the tokens that are in none, cropped_tokens and dropped_tokens.

    A row takes, again and again, the longest of BUFFER documents that still fits; when none fits, the shortest is
    cropped to fill it. Documents left when the last row cannot be filled, or is not asked for, are dropped.
    """
    buffer, source = _ByLength(), iter(documents)
    parts: list[Tokens] = []
    space = length
    try:
        while True:
            if buffer.count < BUFFER:
                for new in islice(source, BUFFER - buffer.count):
                    buffer.add(new)
            if not buffer.count:
                return
            document = buffer.longest_within(space)
            if document is None:
                document = buffer.shortest()
                counts["cropped_tokens"] += len(document) - space
                document = document[:space]
            parts.append(document)
            space -= len(document)
            if space == 0:
                row = np.concatenate(parts) if len(parts) > 1 else parts[0]
                parts, space = [], length
                yield row
    finally:
        counts["dropped_tokens"] += length - space + buffer.tokens


class _ByLength:
    """A buffer of documents, found by length in logarithmic time; first in, first out among equals."""

    def __init__(self) -> None:
        self.count = 0
        self._lengths: list[int] = []
        self._queues: defaultdict[int, deque[Tokens]] = defaultdict(deque)

    def add(self, document: Tokens) -> None:
        queue = self._queues[len(document)]
        if not queue:
            insort(self._lengths, len(document))
        queue.append(document)
        self.count += 1

    def longest_within(self, space: int) -> Tokens | None:
        place = bisect_right(self._lengths, space) - 1
        return None if place < 0 else self._take(place)

    @property
    def tokens(self) -> int:
        return sum(length * len(queue) for length, queue in self._queues.items())

    def shortest(self) -> Tokens:
        return self._take(0)

    def _take(self, place: int) -> Tokens:
        queue = self._queues[self._lengths[place]]
        document = queue.popleft()
        if not queue:
            del self._lengths[place]
        self.count -= 1
        return document
