"""Corpora on this machine: `python`, or a folder -> its files, and the texts in them."""

from __future__ import annotations

import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

TEXTS = (".txt", ".md", ".rst")
"""A document a file."""
READERS = (*TEXTS, ".jsonl", ".parquet")
LONGEST = 2**24
"""Characters of a document; a text that is longer is read as several."""
BATCH = 1024
"""Rows of Parquet that are held at once."""
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
State = tuple[str, int, int]
"""Path, size and time of change of a file: equal states hold equal texts."""


def name_of(corpus: str) -> str:
    """What a corpus is called in results: "python", or its folder's name."""
    return corpus if corpus == "python" else Path(corpus).resolve().name


def states(corpus: str) -> list[State]:
    """The files of "python" (the running interpreter's standard library without its tests) or of a folder, by path.

    Raises ValueError where there is no such corpus, or no file in it.
    """
    files = _library() if corpus == "python" else _in_folder(Path(corpus))
    found = [(path, path.stat()) for path in files]
    return [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in found]


def _library() -> list[Path]:
    found: list[Path] = []
    for folder, inner, names in os.walk(sysconfig.get_path("stdlib")):
        inner[:] = set(inner) - NOT_LIBRARY  # not entered: they hold most files
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found)


def _in_folder(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"corpus {str(folder)!r}: neither a known corpus (python) nor a folder")
    files = sorted(
        path.resolve() for path in folder.rglob("*") if path.suffix in READERS and path.is_file()
    )
    if not files:
        raise ValueError(f"corpus {str(folder)!r}: no {', '.join(READERS)} file in it")
    return files


def texts_of(path: Path, counts: Counter[str], column: str = "text") -> Iterator[str]:
    """The texts of a file that hold something; `counts` gets what was left out or mended: empty, null, invalid_utf8.

    Raises ValueError naming file and line, or column, of what is no text.
    """
    for text in _READ.get(path.suffix, _whole)(path, counts, column):
        if not text.strip():
            counts["empty"] += 1
        elif len(text) <= LONGEST:
            yield text
        else:
            yield from (text[start : start + LONGEST] for start in range(0, len(text), LONGEST))


def _whole(path: Path, counts: Counter[str], column: str) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        text = file.read(LONGEST)
        yield _decoded(text.encode(errors="surrogateescape"), counts)
        while text := file.read(LONGEST):
            yield _decoded(text.encode(errors="surrogateescape"), counts)


def _decoded(content: bytes, counts: Counter[str]) -> str:
    """UTF-8; what is none is replaced by a mark, and the document counted."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        counts["invalid_utf8"] += 1
        return content.decode(errors="replace")


def _json_lines(path: Path, counts: Counter[str], column: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(_decoded(line, counts))[column]
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"{path}, line {number}: not a JSON object with a field {column!r}"
                ) from None
            if not isinstance(text, str | None):
                raise ValueError(f"{path}, line {number}: its {column!r} is not a string")
            if text is None:
                counts["null"] += 1
            else:
                yield _decoded(text.encode(errors="surrogatepass"), counts)


def _parquet(path: Path, counts: Counter[str], column: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet, types

    try:
        with parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise ValueError(
                    f"{path}: no column {column!r} (it has {', '.join(file.schema_arrow.names)})"
                )
            for batch in file.iter_batches(batch_size=BATCH, columns=[column]):
                found = batch.column(0)
                found = found.dictionary_decode() if types.is_dictionary(found.type) else found
                if not any(
                    check(found.type)
                    for check in (types.is_string, types.is_large_string, types.is_null)
                ):
                    raise ValueError(
                        f"{path}: its column {column!r} holds {found.type}, not strings"
                    )
                counts["null"] += found.null_count
                for content in found.drop_null().cast(pyarrow.large_binary()).to_pylist():
                    yield _decoded(content, counts)
    except pyarrow.ArrowException as error:
        raise ValueError(
            f"{path}: not readable as Parquet ({str(error).splitlines()[0]})"
        ) from None


_READ = {".jsonl": _json_lines, ".parquet": _parquet}
