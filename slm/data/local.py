"""Corpora on this machine: texts in the order of their SHA-256, one bucket after another.

The tokeniser learns from the texts at the end of the order, validation gets the texts at its
beginning, and training all others. Added files become further buckets after the old ones, without
the documents that the corpus already has.
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

from slm.data.builder import TOKENIZER_CHARACTERS, VALIDATION, DatasetBuilder, Report
from slm.data.corpus import FileState, file_states, texts_of
from slm.data.dataset import FORMAT, DatasetRequest, PreparedDataset, row_shape
from slm.data.external_sort import Bucket, in_buckets, spread
from slm.files import fingerprint, read_json, write_json
from slm.text import progress_lines

TOKENIZER_SHARE = 0.8
"""Maximum share of a bucket that the tokeniser learns from."""
WRITTEN = "written"
"""Key of the bytes of text among the counts of texts left out."""


class LocalCorpus:
    """The corpus of a request on this machine, with its files as they are now."""

    def __init__(self, request: DatasetRequest) -> None:
        """Raises ValueError for a corpus that does not exist or has no files."""
        self._request = request
        self._states = file_states(request.corpus)
        self.name = self.source = request.corpus
        if request.corpus != "python":
            self.source = str(Path(request.corpus).resolve())
            self.name = Path(self.source).name
        # Of several datasets whose files are all unchanged, the one with the most files.
        candidates = [
            dataset
            for dataset in request.datasets(self.source)
            if _files_of(dataset) <= {*self._states}
        ]
        self.dataset: PreparedDataset | None = max(
            candidates, key=lambda dataset: len(_files_of(dataset)), default=None
        )

    def is_complete(self, dataset: PreparedDataset) -> bool:
        """Whether a dataset was prepared from all the files."""
        return len(_files_of(dataset)) == len(self._states)

    def folder(self, report: Report) -> Path:
        """Return the folder to prepare, and report files that changed since they were prepared."""
        if self.dataset:
            return self.dataset.folder
        paths = {path for path, *_ in self._states}
        for dataset in self._request.datasets(self.source):
            changed = sorted(path for path, *_ in _files_of(dataset) - {*self._states})
            if changed:
                change = "was changed" if changed[0] in paths else "is missing"
                more = f", and {len(changed) - 1} more" if changed[1:] else ""
                report(
                    f"{changed[0]} {change} since it was prepared{more}: preparing a new dataset; "
                    f"{dataset.folder} keeps the old rows"
                )
                break
        shape = row_shape(self._request.hp)
        return self._request.folder(self.name, self.source, shape, self._states)

    def fill(self, builder: DatasetBuilder) -> None:
        """Prepare the files that the dataset does not have yet; the manifest is written last.

        Raises ValueError for content that is not text, and for too little text.
        """
        previous = builder.previous
        prepared = _files_of(previous) if previous else set()
        if not prepared <= {*self._states}:
            raise RuntimeError(
                f"corpus {builder.name} changed while another preparation of it ran: try again"
            )
        # 1) sort the texts of new files into buckets
        new = sorted({*self._states} - prepared)
        of = fingerprint(json.dumps([FORMAT, new]))
        folder = builder.folder / f"buckets-{of}"
        left_out = _spread(builder, new, folder)
        buckets = in_buckets(folder, left_out.pop(WRITTEN))
        # 2) tokeniser and validation rows, in a first preparation
        files: list[dict[str, Any]] = []
        left_out += Counter(previous.manifest["left_out"] if previous else {})
        if previous:
            files = previous.files("train")
            validation = previous.files("validation")[0]
            skips = [0] * len(buckets)
        else:
            validation, skips = _first(builder, buckets)
        # 3) training rows
        digests = [
            builder.folder / f"digests-{number:05d}.npy"
            for number in range(len(files) + len(buckets))
        ]
        known = tuple(digests[: len(files)])
        shards = [
            replace(bucket, known=known, skip=skip, digests=path)
            for bucket, skip, path in zip(buckets, skips, digests[len(files) :])
        ]
        files += builder.pack_shards(shards, len(files), of)
        # 4) finish
        builder.finish(validation, files, left_out, of, self._states)
        shutil.rmtree(folder)


def _files_of(dataset: PreparedDataset) -> set[FileState]:
    """Return the states of the files that a dataset was prepared from."""
    return {(path, size, changed) for path, size, changed in dataset.source}


def _spread(builder: DatasetBuilder, new: Sequence[FileState], folder: Path) -> Counter[str]:
    """Spread the texts of new files over buckets; return the bytes written and texts left out."""
    for path in builder.folder.glob("buckets-*"):
        if path != folder:
            shutil.rmtree(path)
    if not folder.exists():
        counts: Counter[str] = Counter()
        unfinished = builder.folder / "buckets-unfinished"
        size = sum(size for _, size, _ in new)
        try:
            counts[WRITTEN] = spread(_texts(builder, new, size, counts), unfinished, size)
        except BaseException:
            shutil.rmtree(unfinished)
            raise
        if not builder.previous and not counts[WRITTEN]:
            raise ValueError(f"corpus {builder.name!r} holds no text")
        write_json(unfinished / "counts.json", counts)
        unfinished.rename(folder)
    return Counter(read_json(folder / "counts.json"))


def _texts(
    builder: DatasetBuilder, states: Sequence[FileState], total: int, counts: Counter[str]
) -> Iterator[str]:
    builder.report(f"reading corpus {builder.name}: {len(states):,} files")
    progress = progress_lines("bytes read", builder.report)
    done = 0
    for path, size, _ in states:
        yield from texts_of(Path(path), counts)
        done += size
        progress(done, total)


def _first(builder: DatasetBuilder, buckets: Sequence[Bucket]) -> tuple[dict[str, Any], list[int]]:
    """Make tokeniser and validation rows; return their entry, and the documents used per bucket."""
    entry = builder.folder / VALIDATION
    if not entry.exists():
        learned = [0] * len(buckets)
        builder.make_tokenizer(_last_texts(buckets, learned))
        sizes: list[int] = []
        validation = builder.write_validation(_first_texts(buckets, learned, sizes), Counter())
        remaining = validation["documents"]
        used = [0] * len(buckets)
        for number, size in enumerate(sizes):
            used[number] = min(remaining, size)
            remaining -= used[number]
        write_json(entry, {"validation": validation, "taken": used})
    document = read_json(entry)
    return document["validation"], document["taken"]


def _last_texts(buckets: Sequence[Bucket], learned: list[int]) -> Iterator[str]:
    """Yield the texts that the tokeniser learns from; `learned` gets their number by bucket."""
    remaining = float(TOKENIZER_CHARACTERS)
    for number in reversed(range(len(buckets))):
        documents = [*buckets[number].documents(Counter())]
        budget = min(remaining, TOKENIZER_SHARE * sum(map(len, documents)))
        for text in reversed(documents):
            if len(text) > budget:
                break
            budget -= len(text)
            remaining -= len(text)
            learned[number] += 1
            yield text
        if remaining <= budget:
            return


def _first_texts(
    buckets: Sequence[Bucket], learned: Sequence[int], sizes: list[int]
) -> Iterator[str]:
    """Yield the texts that the tokeniser did not learn from; `sizes` gets their number by
    bucket."""
    for bucket, count in zip(buckets, learned):
        documents = [*bucket.documents(Counter())]
        sizes.append(len(documents) - count)
        yield from islice(documents, sizes[-1])
