"""The steps that every preparation takes, and what they leave in its folder."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from slm.data.dataset import FORMAT, MANIFEST, Prepared, row_shape
from slm.data.packing import pack, split
from slm.data.shards import (
    BLOCK_ROWS,
    Documents,
    Shape,
    encoded,
    fingerprint,
    pack_shard,
    row_dtype,
    write_rows,
)
from slm.data.tokenizer import Tokenizer, train_tokenizer
from slm.files import write_json
from slm.recipe import Hyperparameters

PAUSE_SECONDS = 5.0
"""Between two lines on how far something is."""
TOKENIZER, VALIDATION = "tokenizer.json", "validation.json"
"""The tokeniser; and what is known of the validation rows of a preparation that is not finished."""
COUNTED = (
    "documents",
    "tokens",
    "duplicates",
    "cropped_tokens",
    "dropped_tokens",
    "empty",
    "null",
    "invalid_utf8",
)
"""Of a corpus: documents and tokens that were read, `<|bos|>` included; tokens in no row; texts left out, and those
with invalid bytes, which are mended and kept."""

Report = Callable[[str], None]


@dataclass(frozen=True)
class Work:
    """A preparation at work; its folder's lock is held."""

    folder: Path
    """Where everything goes."""
    name: str
    """What the corpus is called in results."""
    source: str
    """Where its texts are from."""
    given: Hyperparameters
    """What rows are made for."""
    tokenizer: Tokenizer | None
    """The tokeniser that was asked for; None where one is trained."""
    report: Report
    """Told how far it is."""
    processes: int
    """How many may work."""

    @property
    def shape(self) -> Shape:
        """How rows are made."""
        return Shape(
            self.given.sequence_length + 1,
            row_dtype(self.given.vocab_size),
            self.given.split_documents,
        )

    @cached_property
    def before(self) -> Prepared | None:
        """What is to be extended; None in a first preparation."""
        return Prepared.read(self.folder) if (self.folder / MANIFEST).exists() else None

    def pace(self, doing: str, of: int, unit: str) -> Callable[[int], None]:
        """Says now and then how much is done, and how long the rest will take."""
        began = said = time.monotonic()

        def tell(done: int) -> None:
            nonlocal said
            now = time.monotonic()
            if now - said > PAUSE_SECONDS and 0 < done < of:
                said = now
                self.report(
                    f"{doing}: {done:,} of {of:,} {unit}, {(now - began) / done * (of - done):,.0f} s left"
                )

        return tell

    def learn(self, texts: Sequence[str]) -> None:
        """Train the tokeniser, and keep it. Raises ValueError where the texts are too few."""
        if not texts:
            raise ValueError(
                f"corpus {self.name}: its documents are too few to hold some out for validation; "
                "split them into more files or lines"
            )
        self.report(f"training a tokeniser of {self.given.vocab_size} tokens")
        self.take(train_tokenizer(texts, self.given.vocab_size))

    def take(self, tokenizer: Tokenizer) -> None:
        """Keep a tokeniser as the corpus's own."""
        write_json(self.folder / TOKENIZER, tokenizer.document())

    def validate(self, texts: Iterable[str], counts: Counter[str]) -> dict[str, Any]:
        """Fill the validation rows from the first of some texts; what the manifest says of them.

        `counts` gets what became of the texts. Raises ValueError where they do not fill the rows.
        """
        tokenizer = Tokenizer.read(self.folder / TOKENIZER)
        length, wanted = self.shape.length, self.given.validation_rows
        documents = encoded(texts, tokenizer, counts, self.processes)
        with closing(
            pack(split(documents, tokenizer.bos, length, self.shape.pieces), length, counts)
        ) as rows:
            written = write_rows(
                self.folder / "validation.bin", islice(rows, wanted), self.shape.dtype
            )
        if written["rows"] < wanted:
            raise ValueError(
                f"corpus {self.name} is too small: it fills {written['rows']} of the {wanted} validation rows "
                f"({self.given.validation_tokens:,} tokens) that the recipe needs"
            )
        return written | counts

    def pack(self, shards: Sequence[Documents], first: int, of: str) -> list[dict[str, Any]]:
        """What the manifest says of the rows of shards, numbered from `first`; packed side by side.

        `of` is what they follow from beside their numbers: those of another are packed anew, those finished are not.
        """
        paths = [
            self.folder / f"train-{number:05d}.bin" for number in range(first, first + len(shards))
        ]
        workers = max(1, min(self.processes, len(shards)))
        rest = (of, self.shape, max(1, self.processes // workers))
        self.report(f"packing rows: {len(shards):,} shards")
        said = self.pace("packing rows", len(shards), "shards")
        if workers > 1:
            return _side_by_side([(*pair, *rest) for pair in zip(shards, paths)], workers, said)
        files = []
        for shard, path in zip(shards, paths):
            files.append(pack_shard(shard, path, *rest))
            said(len(files))
        return files

    def finish(
        self,
        validation: Mapping[str, Any],
        files: list[dict[str, Any]],
        left_out: Mapping[str, int],
        of: str,
    ) -> None:
        """Write the manifest of all rows there are now; `of` tells the newest preparation from others before it.

        Raises ValueError where nothing is left to train on.
        """
        if not any(file["rows"] for file in files):
            raise ValueError(f"corpus {self.name} is too small: nothing is left to train on")
        parts = (left_out, validation, *files)
        manifest = {
            "format": FORMAT,
            "source": self.source,
            "given_tokenizer": self.tokenizer.fingerprint if self.tokenizer else None,
            "of": of,
            "shape": row_shape(self.given),
            "corpus": {
                "name": self.name,
                **{name: sum(part.get(name, 0) for part in parts) for name in COUNTED},
                "validation_documents": validation["documents"],
            },
            "left_out": dict(left_out),
            "tokenizer": Tokenizer.read(self.folder / TOKENIZER).fingerprint,
            "row_tokens": self.shape.length,
            "block_rows": BLOCK_ROWS,
            "dtype": self.shape.dtype,
            "validation": _part([dict(validation)]),
            "train": _part(files),
        }
        write_json(self.folder / MANIFEST, manifest)
        for left in (
            *self.folder.glob(".*"),
            *self.folder.glob("train-*.json"),
            self.folder / VALIDATION,
        ):
            left.unlink(missing_ok=True)


def _part(files: list[dict[str, Any]]) -> dict[str, Any]:
    """What the manifest says of the rows of some files."""
    blocks = [block for file in files for block in file["blocks"]]
    return {
        "rows": sum(file["rows"] for file in files),
        "fingerprint": fingerprint("".join(blocks).encode()),
        "files": files,
    }


def _side_by_side(
    shards: Sequence[tuple[Documents, Path, str, Shape, int]],
    workers: int,
    said: Callable[[int], None],
) -> list[dict[str, Any]]:
    """Pack shards, each as `pack_shard` takes it, several at once. Raises RuntimeError where a process was killed."""
    context, others = multiprocessing.get_context("spawn"), multiprocessing.active_children()
    with ProcessPoolExecutor(workers, context, _follow_parent) as pool:
        tasks = [pool.submit(pack_shard, *shard) for shard in shards]
        try:
            for done, task in enumerate(as_completed(tasks), 1):
                task.result()
                said(done)
        except BrokenExecutor:
            raise RuntimeError(
                "a process that packed rows was killed, for want of memory maybe: the same command goes on, and "
                "with --processes 1 it needs least"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            if not all(task.done() for task in tasks):
                for process in {*multiprocessing.active_children()} - {*others}:
                    process.terminate()
    return [task.result() for task in tasks]


def _follow_parent() -> None:
    """End with the process that started this one, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
