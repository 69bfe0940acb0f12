"""Data: preparation, packing, the loader and memory, each beside the plain way; see the README for the columns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
import torch

from slm.data import Prepared, Tokenizer, prepare
from slm.data import corpus as corpora
from slm.data.loader import Order, Rows
from slm.data.packing import BUFFER, Tokens, pack, shuffled, split
from slm.data.tokenizer import train_tokenizer
from slm.recipe import Recipe, nanochat, pocket

HEADERS = ("what", "ours", "beside it", "times", "goal", "remark")
Row = tuple[str, float, float | None, float | None, str, str]
RECIPES = (pocket, replace(nanochat, vocab_size=8192, validation_tokens=2**17))
"""Rows of 129 tokens, documents cut; rows of 2,049, documents cropped."""
CHARACTERS = 3000
"""Of a document: the library's files are cut, since there are too few of them for a buffer."""
SIZES = (2**26, 2**28, 2**30)
"""Bytes of text whose preparation is watched."""
LARGE = 10 * 2**30
PREPARE = """
import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from slm.data import prepare
from slm.recipe import nanochat

if __name__ == "__main__":
    given = replace(nanochat, vocab_size=8192, validation_tokens=2**20)(2, steps=1)
    prepare(sys.argv[1], given, Path(sys.argv[2]), processes=2)
"""


def rows() -> Iterator[Row]:
    """Figures as HEADERS says; seconds are the processor's, of all threads."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        texts = list(_library())
        (folder / "texts").mkdir()
        _write(folder / "texts" / "all.jsonl", texts)
        for recipe in RECIPES:
            tokenizer = train_tokenizer(texts, recipe.vocab_size)
            prepared, row = _preparation(folder, recipe, tokenizer)
            yield row
            yield _packing(texts, tokenizer, recipe)
            yield _loading(prepared, texts, tokenizer, recipe)
        yield from _memory(folder, texts)


def _library() -> Iterator[str]:
    """The texts of `python` in pieces."""
    for path, *_ in corpora.states("python"):
        for text in corpora.texts_of(Path(path), Counter()):
            yield from (
                text[start : start + CHARACTERS] for start in range(0, len(text), CHARACTERS)
            )


def _write(path: Path, texts: Iterable[str]) -> None:
    with path.open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)


def _seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    began = time.process_time()
    result = function()
    return time.process_time() - began, result


def _preparation(folder: Path, recipe: Recipe, tokenizer: Tokenizer) -> tuple[Prepared, Row]:
    """One process, from the files to the manifest, beside reading them and tiktoken's batch encoding."""
    path = folder / "texts" / "all.jsonl"

    def plain() -> int:
        texts = list(corpora.texts_of(path, Counter()))
        return sum(map(len, tokenizer.encode_batch(texts, threads=1)))

    best = float("inf"), float("inf")
    ours = partial(prepare, str(path.parent), recipe(2, steps=1), processes=1, tokenizer=tokenizer)
    for attempt in range(3):
        own, prepared = _seconds(partial(ours, folder / f"{recipe.name}-{attempt}"))
        beside, tokens = _seconds(plain)
        best = min(best[0], own), min(best[1], beside)
    what = f"preparation, rows of {recipe.sequence_length + 1:,}, tokens/s a core"
    rates = tokens / best[0], tokens / best[1]
    return prepared, (
        what,
        *rates,
        rates[0] / rates[1],
        "0.7",
        "beside reading and tiktoken's batch encoding",
    )


def _packing(texts: list[str], tokenizer: Tokenizer, recipe: Recipe) -> Row:
    """Documents that are encoded already, beside a best fit that scans its buffer."""
    length, counts = recipe.sequence_length + 1, Counter[str]()
    ids = (tokenizer.encode_to_numpy(text) for text in texts)
    pieces = list(split(ids, tokenizer.bos, length, recipe.split_documents))
    pieces = list(shuffled(pieces)) if recipe.split_documents else pieces
    tokens = sum(map(len, pieces))
    own, packed = _seconds(lambda: sum(1 for _ in pack(pieces, length, counts)))
    beside, scanned = _seconds(lambda: sum(1 for _ in scanning(pieces, length)))
    remark = f"lost {1 - packed * length / tokens:.3%} of the tokens, scanning {1 - scanned * length / tokens:.3%}"
    return (
        f"packing, rows of {length:,}, tokens/s",
        tokens / own,
        tokens / beside,
        beside / own,
        "10",
        remark,
    )


def scanning(documents: Iterable[Tokens], length: int) -> Iterator[Tokens]:
    """Best fit that looks at every document of its buffer for each that it places."""
    source = iter(documents)
    buffer = list(islice(source, BUFFER))
    while buffer:
        parts, space = [], length
        while space and buffer:
            best, longest = -1, 0
            for place, document in enumerate(buffer):
                if longest < len(document) <= space:
                    best, longest = place, len(document)
            if best < 0:
                best = min(range(len(buffer)), key=lambda place: len(buffer[place]))
            parts.append(buffer.pop(best)[:space])
            space -= len(parts[-1])
            buffer += islice(source, BUFFER - len(buffer))
        if not space:
            yield np.concatenate(parts)


def _loading(prepared: Prepared, texts: list[str], tokenizer: Tokenizer, recipe: Recipe) -> Row:
    """Rows of steps as tensors, beside tokenising and packing as they are asked for."""
    length, batch = recipe.sequence_length + 1, max(1, 2**16 // recipe.sequence_length)
    order, own_rows = (
        Order([block.rows for block in prepared.blocks("train")], 0),
        Rows.of(prepared, "train"),
    )
    steps = 200
    own, _ = _seconds(
        lambda: deque((own_rows.pair(order.step(step, batch)) for step in range(steps)), maxlen=0)
    )

    def on_the_fly() -> int:
        ids = map(tokenizer.encode_to_numpy, texts)
        packed = pack(split(ids, tokenizer.bos, length, recipe.split_documents), length, Counter())
        read = 0
        while block := list(islice(packed, batch)):
            both = torch.from_numpy(np.stack(block).astype(np.int64))
            read += both[:, 1:].numel()
        return read

    beside, tokens = _seconds(on_the_fly)
    rates = steps * batch * recipe.sequence_length / own, tokens / beside
    what = f"loader, rows of {length:,}, tokens/s a core"
    return what, *rates, rates[0] / rates[1], "1,000,000 tokens/s", "beside tokenising on the fly"


def _memory(folder: Path, texts: list[str]) -> Iterator[Row]:
    """The most that a preparation by two processes holds, at several sizes of text."""
    peaks: list[float] = []
    for size in SIZES:
        corpus = folder / f"synthetic-{size}"
        corpus.mkdir()
        _synthetic(corpus, texts, size)
        began, (peak, tokens) = time.perf_counter(), _watched(corpus, folder)
        peaks.append(peak)
        seconds = time.perf_counter() - began
        grown = (peaks[-1] - peaks[0]) / max(1, size - SIZES[0])
        remark = (
            f"{tokens / seconds:,.0f} tokens/s; grew by {grown:.1%} of the text" if grown else ""
        )
        yield f"memory at {size // 2**20:,} MB of text, MB", peak / 2**20, None, None, "", remark
    slope = max(0.0, (peaks[-1] - peaks[-2]) / (SIZES[-1] - SIZES[-2]))
    expected = peaks[-1] + slope * (LARGE - SIZES[-1])
    yield (
        "memory at 10 GB, by the growth, MB",
        expected / 2**20,
        None,
        None,
        "2,048",
        f"slope {slope:.1%} of the text",
    )


def _synthetic(folder: Path, texts: list[str], size: int) -> None:
    """Documents of lines drawn from texts, in files of 32 MB, until they are so many bytes."""
    lines = [
        line for text in texts[:400] for line in text.splitlines(keepends=True) if len(line) > 20
    ]
    draw, number, written = np.random.default_rng(0), 0, 0
    while written < size:
        number += 1
        with (folder / f"{number:03d}.jsonl").open("w") as file:
            while file.tell() < 2**25 and written < size:
                text = "".join(
                    lines[place] for place in draw.integers(0, len(lines), draw.integers(10, 200))
                )
                file.write(json.dumps({"text": text}) + "\n")
                written += len(text.encode())


def _watched(corpus: Path, folder: Path) -> tuple[float, int]:
    """The most resident bytes of a preparation and its processes, and its tokens."""
    home = folder / f"home-{corpus.name}"
    command = [sys.executable, "-c", PREPARE, str(corpus), str(home)]
    peak = 0.0
    with subprocess.Popen(command, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"}) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, _resident(watched))
            time.sleep(0.05)
    assert process.returncode == 0
    (path,) = (home / "data").glob("*/manifest.json")
    return peak, json.loads(path.read_text())["corpus"]["tokens"]


def _resident(process: psutil.Process) -> float:
    """Bytes of a process and those below it; what they share counts for each."""
    total = 0.0
    with suppress(psutil.NoSuchProcess):
        for own in (process, *process.children(recursive=True)):
            total += own.memory_info().rss
    return total
