"""Texts -> documents in the order of their SHA-256, in bounded memory.

The order is a shuffle that does not depend on how texts are spread over files. Texts are written to
files by the leading bits of their digests. Adjacent files form a bucket, and the bytes of text
decide how many buckets there are. Reading a bucket into memory and sorting it gives its part of the
order, and brings the copies of a duplicate together.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slm.files import replacing

BUCKET_BYTES = 2**26
"""Approximate bytes of text per bucket."""
MIN_FILES = 2**8
"""Minimum number of files that texts are spread over."""
EXPANSION = 4
"""Maximum bytes of text per byte of a source file: Parquet is compressed."""
WRITE_BYTES = 2**16
"""Bytes buffered for a file before they are written."""
DIGEST = 16
"""Bytes of a digest."""
_HEADER = struct.Struct(f"<{DIGEST}sI")
"""Digest, and bytes of the text that follows."""
_DIGEST_TYPE = np.dtype(f"S{DIGEST}")


def spread(texts: Iterable[str], folder: Path, size: int) -> int:
    """Write texts with their digests into a new folder, and return the bytes of text.

    `size` is the bytes of the files that the texts come from.
    """
    count = max(MIN_FILES, _bucket_count(EXPANSION * size))
    shift = 32 - (count.bit_length() - 1)
    written = 0
    folder.mkdir()
    paths = [folder / f"{number:05d}" for number in range(count)]
    buffers = [bytearray() for _ in paths]
    for text in texts:
        content = text.encode()
        digest = hashlib.sha256(content).digest()[:DIGEST]
        number = int.from_bytes(digest[:4]) >> shift
        buffers[number] += _HEADER.pack(digest, len(content)) + content
        written += len(content)
        if len(buffers[number]) >= WRITE_BYTES:
            _append(paths[number], buffers[number])
    for path, buffer in zip(paths, buffers):
        _append(path, buffer)
    return written


def _bucket_count(size: int) -> int:
    """Return the number of buckets for so many bytes of text, a power of two."""
    return 1 << max(0, -(-size // BUCKET_BYTES) - 1).bit_length()


def _append(path: Path, content: bytearray) -> None:
    with path.open("ab") as file:
        file.write(content)
    content.clear()


@dataclass(frozen=True)
class Bucket:
    """Documents whose digests start with the same bits."""

    paths: tuple[Path, ...]
    known: tuple[Path, ...] = ()
    """Files of digests of documents that the corpus already has."""
    skip: int = 0
    """Number of leading documents to leave out."""
    digests: Path | None = None
    """File to write the digests of all documents to, the skipped ones included."""

    def documents(self, counts: Counter[str]) -> Iterator[str]:
        """Yield the texts by digest; `counts` gets duplicates."""
        contents: dict[bytes, bytes] = {}
        total = 0
        for path in self.paths:
            for digest, content in _texts_in(path):
                contents[digest] = content
                total += 1
        digests = sorted(contents)
        known = self._known_digests(digests)
        order = [digest for digest in digests if digest not in known]
        counts["duplicates"] += total - len(order)
        if self.digests:
            with replacing(self.digests) as temporary, temporary.open("wb") as file:
                np.save(file, np.array(order, dtype=_DIGEST_TYPE))
        for number, digest in enumerate(order):
            content = contents.pop(digest)
            if number >= self.skip:
                yield content.decode()

    def _known_digests(self, ordered: Sequence[bytes]) -> set[bytes]:
        """Return those of the ordered digests that the corpus already has."""
        digests = np.array(ordered, dtype=_DIGEST_TYPE)
        matches: set[bytes] = set()
        for path in self.known if len(digests) else ():
            known = np.load(path, mmap_mode="r")
            first = np.searchsorted(known, digests[0])
            last = np.searchsorted(known, digests[-1], "right")
            common = np.intersect1d(digests, known[first:last])
            matches |= {digest.ljust(DIGEST, b"\0") for digest in common.tolist()}
        return matches


def _texts_in(path: Path) -> Iterator[tuple[bytes, bytes]]:
    """Yield digest and content of each text that `spread` wrote to a file."""
    content = path.read_bytes()
    offset = 0
    while offset < len(content):
        digest, size = _HEADER.unpack_from(content, offset)
        offset += _HEADER.size + size
        yield digest, content[offset - size : offset]


def in_buckets(folder: Path, written: int) -> list[Bucket]:
    """Return the buckets of a folder that `spread` filled with so many bytes of text, in order."""
    paths = sorted(folder.glob("[0-9]*"))
    step = max(1, len(paths) // _bucket_count(written))
    return [Bucket(tuple(paths[start : start + step])) for start in range(0, len(paths), step)]
