"""Corpora: named or a folder -> documents in an order that their content decides."""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

READERS = (".txt", ".jsonl", ".parquet")
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """Documents in the order of their SHA-256: shuffled, and the same wherever the same texts lie."""

    name: str
    """"python", or the folder's name."""
    documents: tuple[str, ...]
    """Distinct, non-empty texts."""
    fingerprint: str
    """Hash of the documents' hashes."""
    duplicates: int
    """Documents left out because their text was there already."""


def read_corpus(name: str) -> Corpus:
    """The corpus of a name ("python": the running interpreter's standard library without its tests) or a folder of
    .txt, .jsonl and .parquet files (a document a file, or the column `text`).

    Raises ValueError when there is no such corpus or it holds no text.
    """
    texts = _library_sources() if name == "python" else _folder(Path(name))
    by_digest: dict[bytes, str] = {}
    seen = 0
    for text in texts:
        if text.strip():
            by_digest[hashlib.sha256(text.encode()).digest()] = text
            seen += 1
    if not by_digest:
        raise ValueError(f"corpus {name!r} holds no text")
    order = sorted(by_digest)
    return Corpus(
        name=name if name == "python" else Path(name).resolve().name,
        documents=tuple(by_digest[digest] for digest in order),
        fingerprint=hashlib.sha256(b"".join(order)).hexdigest()[:16],
        duplicates=seen - len(by_digest),
    )


def source_state(name: str) -> list[tuple[str, int, int]]:
    """Path, size and modification time of every file of a corpus: equal states hold equal texts."""
    files = _library_files() if name == "python" else _folder_files(Path(name))
    stats = [(path, path.stat()) for path in files]
    return [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats]


def _library_files() -> list[Path]:
    found: list[Path] = []
    for folder, inner, names in os.walk(sysconfig.get_path("stdlib")):
        inner[:] = set(inner) - NOT_LIBRARY  # not entered: they hold most files
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found)


def _library_sources() -> Iterator[str]:
    for path in _library_files():
        yield path.read_text(encoding="utf-8", errors="replace")


def _folder_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"corpus {str(folder)!r}: neither a known corpus (python) nor a folder")
    files = sorted(path for path in folder.rglob("*") if path.suffix in READERS and path.is_file())
    if not files:
        raise ValueError(f"corpus {str(folder)!r}: no {', '.join(READERS)} file in it")
    return files


def _folder(folder: Path) -> Iterator[str]:
    for path in _folder_files(folder):
        if path.suffix == ".txt":
            yield path.read_text(encoding="utf-8", errors="replace")
        elif path.suffix == ".jsonl":
            yield from _json_lines(path)
        else:
            yield from _parquet_column(path)


def _json_lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}, line {number}: not a JSON object with a field 'text'") from None
            if not isinstance(text, str):
                raise ValueError(f"{path}, line {number}: its 'text' is not a string")
            yield text


def _parquet_column(path: Path) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        if "text" not in file.schema_arrow.names:
            raise ValueError(f"{path}: no column 'text' (it has {', '.join(file.schema_arrow.names)})")
        for batch in file.iter_batches(columns=["text"]):
            yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not readable as Parquet ({str(error).splitlines()[0]})") from None
