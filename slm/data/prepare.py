"""A corpus -> one prepared folder, by content; killed at any moment, the next preparation goes on where it ended.

    tokeniser   learns from a fixed part of the texts, whatever else there is
    validation  comes first, and never changes with the amount of training data
    training    shard by shard, each packed by itself and kept when it is finished
    manifest    written last: there is a prepared corpus, or there is none

A corpus that has more to give is extended: further shards behind the old ones; everything else stays.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from slm.data import corpus as corpora
from slm.data import hub
from slm.data import local as folders
from slm.data.builder import Report, Work
from slm.data.dataset import Prepared
from slm.data.tokenizer import Tokenizer
from slm.files import hold_lock, lock_holder
from slm.hardware.devices import cores
from slm.recipe import Hyperparameters

WAIT_SECONDS = 0.2


def prepared_for(
    corpus: str, given: Hyperparameters, home: Path, tokenizer: Tokenizer | None = None
) -> Prepared | None:
    """The prepared folder of a corpus as it is now, with rows for these hyperparameters, or None when there is none.

    Raises ValueError when there is no such corpus, or a tokeniser does not fit. A hub is not asked.
    """
    _check(tokenizer, given)
    if hub.is_hub(corpus):
        prepared = hub.known(corpus, given, tokenizer, home)
        enough = prepared is not None and hub.suffices(prepared, given)
    else:
        states = corpora.states(corpus)
        prepared = folders.known(corpus, states, given, tokenizer, home)
        enough = prepared is not None and len(folders.files_of(prepared)) == len(states)
    if prepared is None or not enough:
        return None
    prepared.verify()
    return prepared


def prepare(
    corpus: str,
    given: Hyperparameters,
    home: Path,
    report: Report = lambda line: None,
    processes: int | None = None,
    tokenizer: Tokenizer | None = None,
) -> Prepared:
    """Tokenise and pack a corpus for a recipe's shape, once; later calls find what is there, or add to it.

    Without a tokeniser one is trained. Raises ValueError for a corpus that is missing, empty or too small, and for a
    tokeniser that does not fit, which leaves nothing behind; RuntimeError where a hub does not give the corpus.
    """
    if prepared := prepared_for(corpus, given, home, tokenizer):
        return prepared
    if hub.is_hub(corpus):
        source = hub.source(corpus, given, tokenizer, home)
        folder, name, place = (
            hub.folder(corpus, source, given, tokenizer, home),
            source.name,
            corpus,
        )
    else:
        states = corpora.states(corpus)
        before = folders.known(corpus, states, given, tokenizer, home)
        if before is None and (line := folders.changed(corpus, states, given, tokenizer, home)):
            report(line)
        folder = (
            before.folder if before else folders.new_folder(corpus, states, given, tokenizer, home)
        )
        name, place = corpora.name_of(corpus), folders.source_of(corpus)
    with alone(folder, report):
        if prepared := prepared_for(
            corpus, given, home, tokenizer
        ):  # by another preparation meanwhile
            return prepared
        work = Work(folder, name, place, given, tokenizer, report, processes or cores())
        try:
            hub.fill(work, source) if hub.is_hub(corpus) else folders.fill(work, states)
        except (ValueError, OSError):  # and what is finished is gone on with
            if not any(path.stat().st_size for path in folder.glob("train-*.bin")):
                shutil.rmtree(folder)
            raise
    return Prepared.read(folder)


def _check(tokenizer: Tokenizer | None, given: Hyperparameters) -> None:
    """Raise ValueError unless a recipe's vocabulary holds a tokeniser."""
    if tokenizer and tokenizer.vocab_size > given.vocab_size:
        raise ValueError(
            f"the tokeniser has {tokenizer.vocab_size:,} tokens, the recipe's vocabulary {given.vocab_size:,}: declare "
            f"one with vocab_size={tokenizer.vocab_size} in a file of experiments/, or give a smaller tokeniser"
        )


@contextmanager
def alone(folder: Path, report: Report) -> Iterator[None]:
    """Hold the lock of a folder, which is made; another preparation of it is waited for."""
    while (lock := lock_of(folder)) is None:
        report(f"waiting for process {lock_holder(folder / 'lock')}, which prepares the same")
        while lock_holder(folder / "lock") is not None:
            time.sleep(WAIT_SECONDS)
    with lock:
        yield


def lock_of(folder: Path) -> TextIO | None:
    """The lock of a folder; None while another has it."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # who had it removed the folder
            lock = hold_lock(folder / "lock")
            if lock is None or os.fstat(lock.fileno()).st_nlink:
                return lock
            lock.close()
