"""Texts -> documents in the order of their SHA-256, in bounded memory: shuffled, and the same wherever they lie.

Texts are spread over files by the leading bits of their digests. Adjacent files are a bucket, as many as the bytes of
text ask for; a bucket read into memory and sorted gives its part of the order, and has both copies of a text that came
twice.
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
"""Bytes of text in a bucket, about."""
FILES = 2**8
"""Files that texts are spread over, at least."""
EXPANDED = 4
"""Bytes of text that a byte of a file holds, at most: Parquet is compressed."""
PENDING = 2**16
"""Bytes that are written to a file at once."""
DIGEST = 16
"""Bytes of a digest that are kept."""
_HEAD, _DIGEST = struct.Struct(f"<{DIGEST}sI"), np.dtype(f"S{DIGEST}")


def spread(texts: Iterable[str], folder: Path, size: int) -> int:
    """Write texts from files of `size` bytes, each with its digest, into a new folder; how many bytes of text."""
    count = max(FILES, _number_of(EXPANDED * size))
    shift, written = 32 - (count.bit_length() - 1), 0
    folder.mkdir()
    paths = [folder / f"{place:05d}" for place in range(count)]
    pending = [bytearray() for _ in paths]
    for text in texts:
        content = text.encode()
        digest = hashlib.sha256(content).digest()[:DIGEST]
        place = int.from_bytes(digest[:4]) >> shift
        own = pending[place]
        own += _HEAD.pack(digest, len(content)) + content
        written += len(content)
        if len(own) >= PENDING:
            _append(paths[place], own)
    for path, own in zip(paths, pending):
        _append(path, own)
    return written


def _number_of(size: int) -> int:
    """Buckets for so many bytes of text: a power of two."""
    return 1 << max(0, -(-size // BUCKET_BYTES) - 1).bit_length()


def _append(path: Path, content: bytearray) -> None:
    with path.open("ab") as file:
        file.write(content)
    content.clear()


@dataclass(frozen=True)
class Bucket:
    """Documents whose digests begin alike."""

    paths: tuple[Path, ...]
    """Where they lie."""
    held: tuple[Path, ...] = ()
    """Digests of documents that the corpus has already, as other buckets kept them."""
    first: int = 0
    """How many documents at the beginning of the order are left out."""
    kept: Path | None = None
    """Where the digests of all of them are kept when they are read, whatever is left out."""

    def documents(self, counts: Counter[str]) -> Iterator[str]:
        """The texts, by digest; `counts` gets duplicates."""
        contents, seen = self._contents()
        for digest in self._known(contents):
            del contents[digest]
        counts["duplicates"] += seen - len(contents)
        digests = sorted(contents)
        if self.kept:
            _keep(self.kept, digests)
        for digest in digests[: self.first]:
            del contents[digest]
        for digest in digests[self.first :]:
            yield contents.pop(digest).decode()

    def _contents(self) -> tuple[dict[bytes, bytes], int]:
        """Each text by its digest, and how many there were with those that came again."""
        contents: dict[bytes, bytes] = {}
        seen = 0
        for path in self.paths:
            content, at = path.read_bytes(), 0
            while at < len(content):
                digest, size = _HEAD.unpack_from(content, at)
                at += _HEAD.size + size
                contents[digest] = content[at - size : at]
                seen += 1
        return contents, seen

    def _known(self, contents: Iterable[bytes]) -> set[bytes]:
        """Which of these digests the corpus has already."""
        own = np.sort(np.array([*contents], dtype=_DIGEST))
        found: set[bytes] = set()
        for path in self.held if len(own) else ():
            held = np.load(path, mmap_mode="r")
            first, last = np.searchsorted(held, own[0]), np.searchsorted(held, own[-1], "right")
            found |= {
                digest.ljust(DIGEST, b"\0")
                for digest in own[np.isin(own, held[first:last])].tolist()
            }
        return found


def in_buckets(folder: Path, written: int) -> list[Bucket]:
    """What was spread into a folder, as buckets in order."""
    paths = sorted(folder.glob("[0-9]*"))
    step = max(1, len(paths) // _number_of(written))
    return [Bucket(tuple(paths[start : start + step])) for start in range(0, len(paths), step)]


def _keep(path: Path, digests: Sequence[bytes]) -> None:
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, np.array(digests, dtype=_DIGEST))
