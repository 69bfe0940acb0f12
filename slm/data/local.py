"""Corpora on this machine, prepared: their texts in the order of their SHA-256, bucket by bucket.

The tokeniser learns from the texts at the end of the order, validation takes those that lead it, and training all that
validation left. Files that were added become further buckets behind the old ones, without the documents there are.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from slm.data import corpus as corpora
from slm.data.builder import VALIDATION, Work
from slm.data.corpus import State
from slm.data.dataset import FORMAT, Prepared, of_source, row_shape
from slm.data.external_sort import Bucket, in_buckets, spread
from slm.data.shards import fingerprint
from slm.data.tokenizer import Tokenizer
from slm.files import read_json, write_json
from slm.recipe import Hyperparameters

TOKENIZER_CHARACTERS = 2**26
TOKENIZER_SHARE = 0.8
"""The tokeniser learns from at most so many characters, and this share of a bucket."""
WRITTEN = "written"
"""Under which the bytes of text are noted beside what was left out."""


def source_of(corpus: str) -> str:
    """What tells a corpus from others."""
    return corpus if corpus == "python" else str(Path(corpus).resolve())


def known(
    corpus: str,
    states: Sequence[State],
    given: Hyperparameters,
    tokenizer: Tokenizer | None,
    home: Path,
) -> Prepared | None:
    """What was prepared for a shape from files of a corpus that are all there as they were: of several the most."""
    alike = [
        own
        for own in of_source(home, source_of(corpus), given, tokenizer)
        if files_of(own) <= {*states}
    ]
    return max(alike, key=lambda own: len(files_of(own)), default=None)


def changed(
    corpus: str,
    states: Sequence[State],
    given: Hyperparameters,
    tokenizer: Tokenizer | None,
    home: Path,
) -> str | None:
    """A line on what was prepared from files that are not as they were; None where nothing was."""
    for before in of_source(home, source_of(corpus), given, tokenizer):
        paths = {path for path, *_ in states}
        other = sorted(path for path, *_ in files_of(before) - {*states})
        if other:
            what = "was changed" if other[0] in paths else "is gone"
            more = f", and {len(other) - 1} more" if other[1:] else ""
            kept = f"{before.folder} keeps the rows of before"
            return f"{other[0]} {what} since it was prepared{more}: prepared anew, under another name; {kept}"
    return None


def files_of(prepared: Prepared) -> set[State]:
    """The files that a folder was prepared from, as they were."""
    path = prepared.folder / f"source-{prepared.manifest['of']}.json"
    return {(path, size, changed) for path, size, changed in read_json(path)}


def new_folder(
    corpus: str,
    states: Sequence[State],
    given: Hyperparameters,
    tokenizer: Tokenizer | None,
    home: Path,
) -> Path:
    """Where a first preparation goes."""
    own = [tokenizer.fingerprint] if tokenizer else []
    key = fingerprint(
        json.dumps([FORMAT, source_of(corpus), row_shape(given), states, *own]).encode()
    )
    return home / "data" / f"{corpora.name_of(corpus)}-{key}"


def fill(work: Work, states: Sequence[State]) -> None:
    """Prepare files, or those that a prepared folder does not have yet; manifest and what it rests on come last.

    Raises ValueError for what is no text, and for too little of it.
    """
    before = work.before
    if before and not files_of(before) <= {*states}:
        raise RuntimeError(
            f"corpus {work.name} changed while another preparation of it was waited for: try again"
        )
    new = sorted({*states} - (files_of(before) if before else set()))
    of = fingerprint(json.dumps([FORMAT, new]).encode())
    folder = work.folder / f"buckets-{of}"
    left_out = _spread(work, new, folder)
    buckets = in_buckets(folder, left_out.pop(WRITTEN))
    old = before.files("train") if before else []
    held = tuple(_digests(work, number) for number in range(len(old)))
    validation, taken = (
        (before.files("validation")[0], [0] * len(buckets)) if before else _first(work, buckets)
    )
    shards = [
        replace(bucket, held=held, first=first, kept=_digests(work, number))
        for number, (bucket, first) in enumerate(zip(buckets, taken), len(old))
    ]
    files = [*old, *work.pack(shards, len(old), of)]
    write_json(work.folder / f"source-{of}.json", states)
    work.finish(
        validation, files, left_out + Counter(before.manifest["left_out"] if before else {}), of
    )
    shutil.rmtree(folder)
    for other in work.folder.glob("source-*"):
        if other.stem != f"source-{of}":
            other.unlink()


def _digests(work: Work, number: int) -> Path:
    """Which documents a shard has: it tells them from new ones."""
    return work.folder / f"digests-{number:05d}.npy"


def _spread(work: Work, new: Sequence[State], folder: Path) -> Counter[str]:
    """Bring the texts of new files in order; the bytes written, and what was left out."""
    for other in work.folder.glob("buckets-*"):
        if other != folder:
            shutil.rmtree(other)
    if not folder.exists():
        counts: Counter[str] = Counter()
        unfinished = work.folder / "buckets-unfinished"
        try:
            written = spread(_texts(work, new, counts), unfinished, sum(size for _, size, _ in new))
        except BaseException:
            shutil.rmtree(unfinished)
            raise
        if not work.before and not written:
            raise ValueError(f"corpus {work.name!r} holds no text")
        write_json(unfinished / "counts.json", counts | {WRITTEN: written})
        unfinished.rename(folder)
    return Counter(read_json(folder / "counts.json"))


def _texts(work: Work, states: Sequence[State], counts: Counter[str]) -> Iterator[str]:
    """The texts of some files."""
    work.report(f"reading corpus {work.name}: {len(states):,} files")
    said = work.pace("reading", sum(size for _, size, _ in states), "bytes")
    read = 0
    for path, size, _ in states:
        yield from corpora.texts_of(Path(path), counts)
        read += size
        said(read)


def _first(work: Work, buckets: Sequence[Bucket]) -> tuple[dict[str, Any], list[int]]:
    """Tokeniser and validation of a first preparation: how many documents of each bucket validation took."""
    kept = work.folder / VALIDATION
    if not kept.exists():
        learned = [0] * len(buckets)
        if work.tokenizer:
            work.take(work.tokenizer)
        else:
            texts, learned = _last_texts(buckets)
            work.learn(texts)
        sizes: list[int] = []
        validation = work.validate(_leading(buckets, learned, sizes), Counter())
        left, taken = validation["documents"], [0] * len(buckets)
        for place, size in enumerate(sizes):
            taken[place] = min(left, size)
            left -= taken[place]
        write_json(kept, {"validation": validation, "taken": taken})
    document = read_json(kept)
    return document["validation"], document["taken"]


def _last_texts(buckets: Sequence[Bucket]) -> tuple[list[str], list[int]]:
    """The texts at the end of the order that the tokeniser learns from, and how many they are of each bucket."""
    texts: list[str] = []
    learned, left = [0] * len(buckets), float(TOKENIZER_CHARACTERS)
    for place in reversed(range(len(buckets))):
        found = [*buckets[place].documents(Counter())]
        budget = min(left, TOKENIZER_SHARE * sum(map(len, found)))
        for text in reversed(found):
            if len(text) > budget:
                break
            budget, left = budget - len(text), left - len(text)
            texts.append(text)
            learned[place] += 1
        if left <= budget:
            break
    return texts, learned


def _leading(buckets: Sequence[Bucket], learned: Sequence[int], sizes: list[int]) -> Iterator[str]:
    """The texts from the first on that the tokeniser did not learn from; `sizes` gets how many each bucket has."""
    for bucket, left_out in zip(buckets, learned):
        found = [*bucket.documents(Counter())]
        sizes.append(len(found) - left_out)
        yield from islice(found, sizes[-1])
