"""A corpus -> one prepared folder, identified by content. A killed preparation can be resumed.

    tokeniser   learns from a fixed part of the texts
    validation  comes first, and does not depend on the amount of training data
    training    is packed shard by shard; finished shards are kept
    manifest    is written last: without one there is no dataset

A corpus with new content is extended: shards are added after the old ones, and nothing else
changes.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from slm.data.builder import DatasetBuilder, Report
from slm.data.dataset import DatasetRequest, PreparedDataset
from slm.data.hub import HubCorpus, is_hub
from slm.data.local import LocalCorpus
from slm.data.tokenizer import Tokenizer
from slm.files import hold_lock, lock_holder
from slm.hardware.devices import cores
from slm.recipe import Hyperparameters

WAIT_SECONDS = 0.2
"""Time between two looks at a lock."""


def prepared_for(
    corpus: str, hp: Hyperparameters, home: Path, tokenizer: Tokenizer | None = None
) -> PreparedDataset | None:
    """Return the dataset of a corpus as it is now, with rows for these hyperparameters, or None.

    A hub is not contacted. Raises ValueError for a corpus that does not exist, and for a tokeniser
    that does not fit the vocabulary.
    """
    return _find(_open_corpus(DatasetRequest(corpus, hp, home, tokenizer)))


def _open_corpus(request: DatasetRequest) -> HubCorpus | LocalCorpus:
    return HubCorpus(request) if is_hub(request.corpus) else LocalCorpus(request)


def _find(corpus: HubCorpus | LocalCorpus) -> PreparedDataset | None:
    dataset = corpus.dataset
    if dataset is None or not corpus.is_complete(dataset):
        return None
    dataset.verify()
    return dataset


def prepare(
    corpus: str,
    hp: Hyperparameters,
    home: Path,
    report: Report = lambda line: None,
    processes: int | None = None,
    tokenizer: Tokenizer | None = None,
) -> PreparedDataset:
    """Tokenise and pack a corpus for a recipe's shape; later calls return the dataset or extend it.

    A tokeniser is trained if none is given. Raises ValueError for a corpus that is missing, empty
    or too small, and for a tokeniser that does not fit, which leaves no files behind; RuntimeError
    if a hub does not deliver the corpus.
    """
    request = DatasetRequest(corpus, hp, home, tokenizer)
    source = _open_corpus(request)
    if dataset := _find(source):
        return dataset
    folder = source.folder(report)
    with hold_folder(folder, report):
        # Another process may have prepared it in the meantime.
        if dataset := _find(_open_corpus(request)):
            return dataset
        builder = DatasetBuilder(
            folder, source.name, source.source, hp, tokenizer, report, processes or cores()
        )
        try:
            source.fill(builder)
        except (ValueError, OSError):
            # Finished shards are kept for the next call.
            if not any(path.stat().st_size for path in folder.glob("train-*.bin")):
                shutil.rmtree(folder)
            raise
    return PreparedDataset.read(folder)


@contextmanager
def hold_folder(folder: Path, report: Report) -> Iterator[None]:
    """Create a folder and hold its lock; waits for another preparation of it."""
    while (lock := lock_folder(folder)) is None:
        report(f"waiting for process {lock_holder(folder / 'lock')}, which prepares the same")
        while lock_holder(folder / "lock") is not None:
            time.sleep(WAIT_SECONDS)
    with lock:
        yield


def lock_folder(folder: Path) -> TextIO | None:
    """Create a folder and take its lock; None if another process has it."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # the previous holder removed the folder
            lock = hold_lock(folder / "lock")
            if lock is None or os.fstat(lock.fileno()).st_nlink:
                return lock
            lock.close()
