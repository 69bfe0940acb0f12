"""Documents of tokens -> rows of a fixed length, by best fit."""

from __future__ import annotations

import hashlib
from bisect import bisect_right, insort
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int64]

SHUFFLE = 2**16
"""Pieces that are shuffled together."""
BUFFER = 1000
"""Documents to choose from while a row is filled."""


def split(documents: Iterable[list[int]], bos: int, length: int, pieces: bool) -> Iterator[Tokens]:
    """Each document's tokens with `<|bos|>` in front; with `pieces`, those longer than a row of `length` tokens are cut
    into pieces that fill one, each with its own `<|bos|>`."""
    for document in documents:
        step = length - 1 if pieces else max(len(document), 1)
        for start in range(0, len(document), step):
            yield np.array([bos, *document[start : start + step]], dtype=np.int64)


def shuffled(pieces: Iterable[Tokens]) -> Iterator[Tokens]:
    """Pieces in the order of their SHA-256, SHUFFLE at a time: a long document's pieces do not follow one another."""
    source = iter(pieces)
    while chunk := list(islice(source, SHUFFLE)):
        yield from sorted(chunk, key=lambda piece: hashlib.sha256(piece.tobytes()).digest())


def pack(documents: Iterable[Tokens], length: int) -> Iterator[tuple[Tokens, int]]:
    """Rows of `length` tokens, and how many tokens were cropped away for each.

    A row takes, again and again, the longest of BUFFER documents that still fits; when none fits, the shortest is
    cropped to fill it. Documents left when the last row cannot be filled are dropped.
    """
    buffer = _ByLength()
    source = iter(documents)
    parts: list[Tokens] = []
    space, cropped = length, 0
    while True:
        while buffer.count < BUFFER and (document := next(source, None)) is not None:
            buffer.add(document)
        if not buffer.count:
            return
        document = buffer.longest_within(space)
        if document is None:
            document = buffer.shortest()
            cropped = len(document) - space
            document = document[:space]
        parts.append(document)
        space -= len(document)
        if space == 0:
            yield np.concatenate(parts), cropped
            parts, space, cropped = [], length, 0


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

    def shortest(self) -> Tokens:
        return self._take(0)

    def _take(self, place: int) -> Tokens:
        queue = self._queues[self._lengths[place]]
        document = queue.popleft()
        if not queue:
            del self._lengths[place]
        self.count -= 1
        return document
