"""Data: preparation, packing, loader and memory, next to a plain way; the README has the columns.

SLM_BENCH_SMALL=1 measures the smallest size.
"""

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
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch

from slm.data import PreparedDataset, Tokenizer, prepare
from slm.data.corpus import file_states, texts_of
from slm.data.loader import Order, Rows
from slm.data.packing import BUFFER, Tokens, pack, shuffled, split
from slm.data.tokenizer import train_tokenizer
from slm.recipe import Recipe, nanochat, pocket

SMALL = bool(os.environ.get("SLM_BENCH_SMALL"))
"""Whether to run at the smallest size, as a smoke test."""
RECIPES = (pocket, replace(nanochat, vocab_size=8192, validation_tokens=2**17))[: 1 if SMALL else 2]
"""Rows of 129 tokens with split documents, and rows of 2,049 with cropped ones."""
CHARACTERS = 3000
"""Characters of a document: library files are split, since a buffer needs more documents."""
DOCUMENTS = 600 if SMALL else None
"""Maximum documents; None for all."""
SIZES = (2**20, 2**21) if SMALL else (2**26, 2**28, 2**30)
"""Bytes of text whose preparation is watched."""
LARGE = 10 * 2**30
VALIDATION_TOKENS = 2**14 if SMALL else 2**20
"""Validation tokens of the watched preparations."""
STEPS = 20 if SMALL else 200
"""Steps that the loader reads."""
REPEATS = 1 if SMALL else 3
"""Repetitions of which the fastest counts."""
PREPARE = """
import sys
from dataclasses import replace
from pathlib import Path
from slm.data import prepare
from slm.recipe import nanochat

if __name__ == "__main__":
    recipe = replace(nanochat, vocab_size=8192, validation_tokens=int(sys.argv[3]))
    hp = recipe(2, steps=1)
    prepare(sys.argv[1], hp, Path(sys.argv[2]), processes=2)
"""


class Row(NamedTuple):
    """A line of the table."""

    work: str
    slm: float
    plain: float | None = None
    ratio: float | None = None
    goal: str = ""
    remark: str = ""


HEADERS = ("work", "slm", "plain way", "times", "goal", "remark")


def rows() -> Iterator[Row]:
    """Yield the rows of HEADERS; seconds are processor time over all threads."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        texts = list(islice(_library(), DOCUMENTS))
        (folder / "texts").mkdir()
        _write(folder / "texts" / "all.jsonl", texts)
        for recipe in RECIPES:
            tokenizer = train_tokenizer(texts, recipe.vocab_size)
            dataset, row = _preparation(folder, recipe, tokenizer)
            yield row
            yield _packing(texts, tokenizer, recipe)
            yield _loading(dataset, texts, tokenizer, recipe)
        yield from _memory(folder, texts)


def _library() -> Iterator[str]:
    """Yield the texts of the corpus `python` in pieces."""
    for path, *_ in file_states("python"):
        for text in texts_of(Path(path), Counter()):
            for start in range(0, len(text), CHARACTERS):
                yield text[start : start + CHARACTERS]


def _write(path: Path, texts: Iterable[str]) -> None:
    with path.open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)


def _seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    began = time.process_time()
    result = function()
    return time.process_time() - began, result


def _preparation(folder: Path, recipe: Recipe, tokenizer: Tokenizer) -> tuple[PreparedDataset, Row]:
    """Measure one process from files to manifest, and reading plus tiktoken's batch encoding."""
    path = folder / "texts" / "all.jsonl"
    hp = recipe(2, steps=1)
    prepare_in = partial(prepare, str(path.parent), hp, processes=1, tokenizer=tokenizer)

    def plain() -> int:
        texts = list(texts_of(path, Counter()))
        encode = tokenizer.encoding.encode_ordinary_batch
        return sum(map(len, encode(texts, num_threads=1)))

    fastest = [float("inf"), float("inf")]
    for number in range(REPEATS):
        seconds, dataset = _seconds(partial(prepare_in, folder / f"{recipe.name}-{number}"))
        plain_seconds, tokens = _seconds(plain)
        fastest = [min(fastest[0], seconds), min(fastest[1], plain_seconds)]
    rate, plain_rate = (tokens / seconds for seconds in fastest)
    work = f"preparation, rows of {recipe.sequence_length + 1:,}, tokens/s a core"
    remark = "plain: reading and tiktoken's batch encoding"
    return dataset, Row(work, rate, plain_rate, rate / plain_rate, "0.7", remark)


def _packing(texts: list[str], tokenizer: Tokenizer, recipe: Recipe) -> Row:
    """Measure packing of encoded documents, and a best fit that scans its buffer."""
    length = recipe.sequence_length + 1
    ids = (tokenizer.encode_to_numpy(text) for text in texts)
    pieces = list(split(ids, tokenizer.bos, length, recipe.split_documents))
    if recipe.split_documents:
        pieces = list(shuffled(pieces))
    tokens = sum(map(len, pieces))
    seconds, packed = _seconds(lambda: sum(1 for _ in pack(pieces, length, Counter())))
    plain_seconds, scanned = _seconds(lambda: sum(1 for _ in scanning(pieces, length)))
    loss, plain_loss = (1 - rows * length / tokens for rows in (packed, scanned))
    remark = f"lost {loss:.3%} of the tokens, scanning {plain_loss:.3%}"
    work = f"packing, rows of {length:,}, tokens/s"
    ratio = plain_seconds / seconds
    return Row(work, tokens / seconds, tokens / plain_seconds, ratio, "10", remark)


def scanning(documents: Iterable[Tokens], length: int) -> Iterator[Tokens]:
    """Yield rows by a best fit that looks at the whole buffer for each document."""
    source = iter(documents)
    buffer = list(islice(source, BUFFER))
    while buffer:
        parts: list[Tokens] = []
        space = length
        while space and buffer:
            best = -1
            longest = 0
            for index, document in enumerate(buffer):
                if longest < len(document) <= space:
                    best = index
                    longest = len(document)
            if best < 0:
                best = min(range(len(buffer)), key=lambda index: len(buffer[index]))
            parts.append(buffer.pop(best)[:space])
            space -= len(parts[-1])
            buffer += islice(source, BUFFER - len(buffer))
        if not space:
            yield np.concatenate(parts)


def _loading(
    dataset: PreparedDataset, texts: list[str], tokenizer: Tokenizer, recipe: Recipe
) -> Row:
    """Measure the rows of steps as tensors, and tokenising and packing on the fly."""
    length = recipe.sequence_length + 1
    batch = max(1, 2**16 // recipe.sequence_length)
    order = Order([block.rows for block in dataset.blocks("train")], 0)
    rows = Rows.open(dataset, "train")
    pairs = (rows.pair(order.step(step, batch)) for step in range(STEPS))
    seconds, _ = _seconds(lambda: deque(pairs, maxlen=0))

    def on_the_fly() -> int:
        ids = map(tokenizer.encode_to_numpy, texts)
        packed = pack(split(ids, tokenizer.bos, length, recipe.split_documents), length, Counter())
        read = 0
        while block := list(islice(packed, batch)):
            tensor = torch.from_numpy(np.stack(block).astype(np.int64))
            read += tensor[:, 1:].numel()
        return read

    plain_seconds, tokens = _seconds(on_the_fly)
    rate = STEPS * batch * recipe.sequence_length / seconds
    plain_rate = tokens / plain_seconds
    work = f"loader, rows of {length:,}, tokens/s a core"
    remark = "plain: tokenising on the fly"
    return Row(work, rate, plain_rate, rate / plain_rate, "1,000,000 tokens/s", remark)


def _memory(folder: Path, texts: list[str]) -> Iterator[Row]:
    """Measure the peak memory of a preparation by two processes, at several sizes of text."""
    peaks: list[float] = []
    for size in SIZES:
        corpus = folder / f"synthetic-{size}"
        corpus.mkdir()
        _write_synthetic(corpus, texts, size)
        began = time.perf_counter()
        peak, tokens = _watch(corpus, folder)
        peaks.append(peak)
        seconds = time.perf_counter() - began
        growth = (peaks[-1] - peaks[0]) / max(1, size - SIZES[0])
        remark = ""
        if growth:
            remark = f"{tokens / seconds:,.0f} tokens/s; grew by {growth:.1%} of the text"
        yield Row(f"memory at {size // 2**20:,} MB of text, MB", peak / 2**20, remark=remark)
    slope = max(0.0, (peaks[-1] - peaks[-2]) / (SIZES[-1] - SIZES[-2]))
    expected = peaks[-1] + slope * (LARGE - SIZES[-1])
    remark = f"slope {slope:.1%} of the text"
    yield Row("memory at 10 GB, extrapolated, MB", expected / 2**20, goal="2,048", remark=remark)


def _write_synthetic(folder: Path, texts: list[str], size: int) -> None:
    """Write documents of lines drawn from texts, in files of 32 MB, with so many bytes in all."""
    lines: list[str] = []
    for text in texts[:400]:
        lines += [line for line in text.splitlines(keepends=True) if len(line) > 20]
    draw = np.random.default_rng(0)
    number = 0
    written = 0
    while written < size:
        number += 1
        with (folder / f"{number:03d}.jsonl").open("w") as file:
            while file.tell() < 2**25 and written < size:
                indices = draw.integers(0, len(lines), draw.integers(10, 200))
                text = "".join(lines[index] for index in indices)
                file.write(json.dumps({"text": text}) + "\n")
                written += len(text.encode())


def _watch(corpus: Path, folder: Path) -> tuple[float, int]:
    """Return the peak resident bytes of a preparation with its processes, and its tokens."""
    home = folder / f"home-{corpus.name}"
    command = [sys.executable, "-c", PREPARE, str(corpus), str(home), str(VALIDATION_TOKENS)]
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
    """Return the bytes of a process and its children; shared memory counts for each."""
    total = 0.0
    with suppress(psutil.NoSuchProcess):
        for member in (process, *process.children(recursive=True)):
            total += member.memory_info().rss
    return total
