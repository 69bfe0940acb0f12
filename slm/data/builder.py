"""The steps that all preparations share, and the files that they write."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from slm.data.dataset import FORMAT, MANIFEST, PreparedDataset, row_shape
from slm.data.shards import BLOCK_ROWS, Documents, pack_shard, pack_texts, row_dtype
from slm.data.tokenizer import TOKENIZER, Tokenizer, train_tokenizer
from slm.files import fingerprint, write_json
from slm.recipe import Hyperparameters
from slm.text import progress_lines

TOKENIZER_CHARACTERS = 2**26
"""Maximum characters of text that a tokeniser is trained on."""
VALIDATION = "validation.json"
"""Entry of the validation rows, while the preparation is unfinished."""
COUNTS = (
    "documents",
    "tokens",
    "duplicates",
    "cropped_tokens",
    "dropped_tokens",
    "empty",
    "null",
    "invalid_utf8",
)
"""Counts of a corpus: documents and tokens read (`<|bos|>` included), tokens in no row, texts left
out, and texts with invalid bytes, which are repaired and used."""

Report = Callable[[str], None]


@dataclass(frozen=True)
class DatasetBuilder:
    """A running preparation, which holds the lock of its folder."""

    folder: Path
    name: str
    """Name of the corpus in results."""
    source: str
    """Origin of its texts."""
    hp: Hyperparameters
    tokenizer: Tokenizer | None
    """A given tokeniser; None trains one."""
    report: Report
    processes: int
    """Maximum number of processes."""

    @cached_property
    def previous(self) -> PreparedDataset | None:
        """The dataset to extend; None in a first preparation."""
        if (self.folder / MANIFEST).exists():
            return PreparedDataset.read(self.folder)
        return None

    def make_tokenizer(self, texts: Iterable[str]) -> None:
        """Save the given tokeniser, or one trained on texts. Raises ValueError for too few."""
        tokenizer = self.tokenizer
        if tokenizer is None:
            sample = list(texts)
            if not sample:
                raise ValueError(
                    f"corpus {self.name}: its documents are too few to hold some out for "
                    "validation; split them into more files or lines"
                )
            self.report(f"training a tokeniser of {self.hp.vocab_size} tokens")
            tokenizer = train_tokenizer(sample, self.hp.vocab_size)
        write_json(self.folder / TOKENIZER, tokenizer.document())

    def write_validation(self, texts: Iterable[str], counts: Counter[str]) -> dict[str, Any]:
        """Fill the validation rows from the first texts, and return their entry of the manifest.

        `counts` gets the texts read and left out. Raises ValueError if they do not fill the rows.
        """
        path = self.folder / "validation.bin"
        required = self.hp.validation_rows
        entry = pack_texts(texts, path, self.hp, counts, self.processes, required)
        if entry["rows"] < required:
            raise ValueError(
                f"corpus {self.name} is too small: it fills {entry['rows']} of the {required} "
                f"validation rows ({self.hp.validation_tokens:,} tokens) that the recipe needs"
            )
        return entry

    def pack_shards(self, shards: Sequence[Documents], first: int, of: str) -> list[dict[str, Any]]:
        """Pack shards numbered from `first`, several at once, and return their manifest entries.

        `of` identifies the preparation: shards that it has finished before are not packed again.
        """
        workers = max(1, min(self.processes, len(shards)))
        threads = max(1, self.processes // workers)
        jobs = [
            (shard, self.folder / f"train-{number:05d}.bin", of, self.hp, threads)
            for number, shard in enumerate(shards, first)
        ]
        self.report(f"packing rows: {len(jobs):,} shards")
        progress = progress_lines("shards packed", self.report)
        if workers > 1:
            return _pack_in_parallel(jobs, workers, progress)
        files = []
        for job in jobs:
            files.append(pack_shard(*job))
            progress(len(files), len(jobs))
        return files

    def finish(
        self,
        validation: Mapping[str, Any],
        files: list[dict[str, Any]],
        left_out: Mapping[str, int],
        of: str,
        source: Any,
    ) -> None:
        """Write the manifest of all rows after `source-{of}.json`, and remove temporary files.

        `of` identifies the preparation, and `source` is what it read. Raises ValueError if there is
        nothing to train on.
        """
        if not any(file["rows"] for file in files):
            raise ValueError(f"corpus {self.name} is too small: nothing is left to train on")
        parts = (left_out, validation, *files)
        manifest = {
            "format": FORMAT,
            "source": self.source,
            "given_tokenizer": self.tokenizer.fingerprint if self.tokenizer else None,
            "of": of,
            "shape": row_shape(self.hp),
            "corpus": {
                "name": self.name,
                **{name: sum(part.get(name, 0) for part in parts) for name in COUNTS},
                "validation_documents": validation["documents"],
            },
            "left_out": left_out,
            "tokenizer": Tokenizer.read(self.folder / TOKENIZER).fingerprint,
            "row_tokens": self.hp.sequence_length + 1,
            "block_rows": BLOCK_ROWS,
            "dtype": row_dtype(self.hp),
            "validation": _part([validation]),
            "train": _part(files),
        }
        source_file = self.folder / f"source-{of}.json"
        write_json(source_file, source)
        write_json(self.folder / MANIFEST, manifest)
        for pattern in (".*", "train-*.json", VALIDATION, "source-*"):
            for path in self.folder.glob(pattern):
                if path != source_file:
                    path.unlink(missing_ok=True)


def _part(files: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the manifest's entry of the rows of some files."""
    blocks = "".join("".join(file["blocks"]) for file in files)
    return {
        "rows": sum(file["rows"] for file in files),
        "fingerprint": fingerprint(blocks),
        "files": files,
    }


def _pack_in_parallel(
    jobs: Sequence[tuple[Documents, Path, str, Hyperparameters, int]],
    workers: int,
    progress: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    """Call `pack_shard` in several processes. Raises RuntimeError if one of them is killed."""
    context = multiprocessing.get_context("spawn")
    unrelated = {*multiprocessing.active_children()}
    with ProcessPoolExecutor(workers, context, _follow_parent) as pool:
        tasks = [pool.submit(pack_shard, *job) for job in jobs]
        try:
            for done, task in enumerate(as_completed(tasks), 1):
                task.result()
                progress(done, len(tasks))
        except BrokenExecutor:
            raise RuntimeError(
                "a process that packed rows was killed, perhaps for lack of memory: "
                "run the same command again to resume, with --processes 1 to use least memory"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            if not all(task.done() for task in tasks):
                for process in {*multiprocessing.active_children()} - unrelated:
                    process.terminate()
    return [task.result() for task in tasks]


def _follow_parent() -> None:
    """Make this process end with the one that started it, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
