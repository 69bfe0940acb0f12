"""Data: the `python` corpus from text to rows, each stage alone, in tokens a second."""

from __future__ import annotations

import time
from collections.abc import Iterator

from slm.data.corpus import read_corpus
from slm.data.packing import pack, split
from slm.data.tokenizer import train_tokenizer
from slm.recipe import pocket

HEADERS = ("stage", "seconds", "tokens/s")


def rows() -> Iterator[tuple[str, float, float]]:
    """Stage, seconds and tokens per second."""
    began = time.perf_counter()
    corpus = read_corpus("python")
    reading = time.perf_counter() - began
    began = time.perf_counter()
    tokenizer = train_tokenizer(corpus.documents, pocket.vocab_size)
    training = time.perf_counter() - began
    began = time.perf_counter()
    encoded = tokenizer.encode_batch(corpus.documents, threads=1)
    encoding = time.perf_counter() - began
    began = time.perf_counter()
    length = pocket.sequence_length + 1
    for _ in pack(split(encoded, tokenizer.bos, length, pieces=True), length):
        pass
    packing = time.perf_counter() - began
    tokens = sum(map(len, encoded))
    stages = {"read": reading, "train tokeniser": training, "encode, one thread": encoding, "pack": packing}
    for stage, seconds in stages.items():
        yield stage, seconds, tokens / seconds
