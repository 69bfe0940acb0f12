"""Texts in files: `python` or a folder -> its files, and the texts in them."""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

TEXT_ENDINGS = (".txt", ".md", ".rst")
"""Endings of files that are one document each."""
ENDINGS = (*TEXT_ENDINGS, ".jsonl", ".parquet")
MAX_CHARACTERS = 2**24
"""Characters of a document; a longer text is split into several."""
COLUMN = "text"
"""Field or column of the texts."""
BATCH_ROWS = 1024
"""Rows of Parquet in memory at a time."""
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
FileState = tuple[str, int, int]
"""Path, size and modification time of a file: equal states mean equal texts."""


def file_states(corpus: str) -> list[FileState]:
    """Return the files of a corpus, by path: a folder, or "python" for the standard library.

    The standard library is the running interpreter's, without its tests. Raises ValueError for a
    corpus that does not exist or has no files.
    """
    files = _library() if corpus == "python" else _files_in(Path(corpus))
    stats = [path.stat() for path in files]
    return [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in zip(files, stats)]


def _library() -> list[Path]:
    files: list[Path] = []
    for folder, subfolders, names in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = set(subfolders) - NOT_LIBRARY  # not entered: they hold most of the files
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files)


def _files_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"corpus {str(folder)!r}: neither a known corpus (python) nor a folder")
    files = sorted(
        path.resolve() for path in folder.rglob("*") if path.suffix in ENDINGS and path.is_file()
    )
    if not files:
        raise ValueError(f"corpus {str(folder)!r}: it has no {', '.join(ENDINGS)} file")
    return files


def unique_texts_of(path: Path, counts: Counter[str]) -> Iterator[str]:
    """Yield the texts of a file as `texts_of` does; `counts` gets duplicates too."""
    seen: set[bytes] = set()
    for text in texts_of(path, counts):
        digest = hashlib.sha256(text.encode()).digest()[:16]
        if digest in seen:
            counts["duplicates"] += 1
        else:
            seen.add(digest)
            yield text


def texts_of(path: Path, counts: Counter[str]) -> Iterator[str]:
    """Yield the non-empty texts of a file.

    `counts` gets the texts left out or repaired: empty, null, invalid_utf8. Raises ValueError with
    the file, and the line or column, for content that is not text.
    """
    if path.suffix == ".jsonl":
        texts = _read_json_lines(path, counts)
    elif path.suffix == ".parquet":
        texts = _read_parquet(path, counts)
    else:
        texts = _read_text(path, counts)
    for text in texts:
        if not text.strip():
            counts["empty"] += 1
            continue
        for start in range(0, len(text), MAX_CHARACTERS):
            yield text[start : start + MAX_CHARACTERS]


def _read_text(path: Path, counts: Counter[str]) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        text = file.read(MAX_CHARACTERS)
        while True:
            yield _decode(text.encode(errors="surrogateescape"), counts)
            text = file.read(MAX_CHARACTERS)
            if not text:
                return


def _decode(content: bytes, counts: Counter[str]) -> str:
    """Decode UTF-8; invalid bytes become replacement characters, and the document is counted."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        counts["invalid_utf8"] += 1
        return content.decode(errors="replace")


def _read_json_lines(path: Path, counts: Counter[str]) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(_decode(line, counts))[COLUMN]
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"{path}, line {number}: not a JSON object with a field {COLUMN!r}"
                ) from None
            if not isinstance(text, str | None):
                raise ValueError(f"{path}, line {number}: its {COLUMN!r} is not a string")
            if text is None:
                counts["null"] += 1
            else:
                yield _decode(text.encode(errors="surrogatepass"), counts)


def _read_parquet(path: Path, counts: Counter[str]) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if COLUMN not in names:
                raise ValueError(f"{path}: no column {COLUMN!r} (it has {', '.join(names)})")
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=[COLUMN]):
                values = batch.column(0)
                if isinstance(values, pyarrow.DictionaryArray):
                    values = values.dictionary_decode()
                if values.type not in (pyarrow.string(), pyarrow.large_string(), pyarrow.null()):
                    raise ValueError(
                        f"{path}: its column {COLUMN!r} holds {values.type}, not strings"
                    )
                counts["null"] += values.null_count
                for content in values.drop_null().cast(pyarrow.large_binary()).to_pylist():
                    yield _decode(content, counts)
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: not readable as Parquet ({reason})") from None
