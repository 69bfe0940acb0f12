"""CORE prompts: examples of a task rendered as rows of tokens, with the span of each row that is
scored.

An example becomes one row per choice (language modelling: one row). A row is `<|bos|>`, the shots,
each followed by a blank line, and the example itself. Its span runs from a start to the end of the
row:

    multiple_choice     choices differ: the span follows the tokens that all rows begin with
    schema              contexts differ: the span is the tokens that all rows end with
    language_modeling   the span is the continuation, after the tokens of the stripped context

Examples are shuffled by Random(1337), then cut to the maximum; the shots of example i are drawn by
Random(1234 + i) from the remaining ones. The semantics are those of DCLM (arXiv 2406.11794) as
nanochat implements them.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from slm.data.tokenizer import Tokenizer
from slm.evaluate.bundle import Bundle, Example, Task
from slm.evaluate.request import FORMAT
from slm.files import fingerprint, replacing
from slm.hardware.devices import cores

CHUNK = 256
"""Examples whose rows are in memory at once."""
ARRAYS = ("tokens", "prompts", "tails", "starts", "first", "golds", "bytes")
"""Names in a cache file of the fields of TokenizedTask."""

Ints = NDArray[np.int64]
Row = TypeVar("Row", str, list[int])
"""Row of characters or of tokens."""


@dataclass(frozen=True)
class TokenizedTask:
    """Examples of a task as tokens: their shared prefix, then the suffix of every row."""

    tokens: NDArray[np.unsignedinteger[Any]]
    """Prefix and suffixes, one example after another."""
    prefixes: Ints
    """Tokens of each example's shared prefix (E,)."""
    suffixes: Ints
    """Tokens of each row's suffix (R,)."""
    starts: Ints
    """Index in its row at which each span begins (R,); spans end with the row."""
    first_rows: Ints
    """First row of each example, and the number of rows (E + 1,)."""
    golds: Ints
    """Correct row of each example, counted from its first row (E,)."""
    gold_bytes: Ints
    """UTF-8 bytes of the text in the correct row's span (E,)."""

    @cached_property
    def example_of(self) -> Ints:
        """Example of each row (R,)."""
        return np.repeat(np.arange(len(self.golds)), np.diff(self.first_rows))

    @cached_property
    def lengths(self) -> Ints:
        """Tokens of each row (R,)."""
        return self.prefixes[self.example_of] + self.suffixes

    @cached_property
    def spans(self) -> Ints:
        """Tokens of each row's span (R,)."""
        return self.lengths - self.starts

    @cached_property
    def suffix_starts(self) -> Ints:
        """Index in `tokens` at which the suffix of each row begins (R,)."""
        sizes = self.suffixes.copy()
        sizes[self.first_rows[:-1]] += self.prefixes
        return np.cumsum(sizes) - self.suffixes

    def at(self, rows: Ints, positions: Ints) -> Ints:
        """Return the token ids of rows at some positions."""
        examples = self.example_of[rows]
        in_suffix = positions - self.prefixes[examples]
        # The prefix lies before the suffix of the first row.
        rows = np.where(in_suffix < 0, self.first_rows[examples], rows)
        return self.tokens[self.suffix_starts[rows] + in_suffix].astype(np.int64)

    def rows_of(self, example: int) -> range:
        """Return the row numbers of an example."""
        return range(int(self.first_rows[example]), int(self.first_rows[example + 1]))


def select_examples(
    task: Task, examples: Sequence[Example], maximum: int | None = None
) -> list[Example]:
    """Return a task's examples in CORE's order: shuffled, then cut to `maximum`.

    Raises ValueError if too few remain for the shots.
    """
    selected = list(examples)
    random.Random(1337).shuffle(selected)
    selected = selected[:maximum]
    if len(selected) <= task.shots:
        raise ValueError(
            f"task {task.label} needs {task.shots} shots: {len(selected)} examples are too few, "
            f"use at least {task.shots + 1} per task"
        )
    return selected


def draw_shots(task: Task, index: int, count: int) -> list[int]:
    """Return the indices among `count` examples of the shots of example `index`, in order."""
    drawn = random.Random(1234 + index).sample(range(count - 1), task.shots)
    return [shot + (shot >= index) for shot in drawn]  # drawn from the other examples


def render(task: Task, examples: Sequence[Example], index: int) -> tuple[list[str], str]:
    """Return the text of every row of an example, and of the row without its continuation.

    The latter is empty unless the task is language modelling.
    """
    shots = ""
    for shot in draw_shots(task, index, len(examples)):
        rows, _ = _render_example(task, examples[shot])
        shots += rows[_gold(examples[shot])] + "\n\n"
    rows, context = _render_example(task, examples[index])
    stripped = (shots + context).strip() if task.kind == "language_modeling" else ""
    return [shots + row for row in rows], stripped


def _render_example(task: Task, example: Example) -> tuple[list[str], str]:
    """Render an example without shots. Only the context of language modelling is stripped."""
    if task.kind == "multiple_choice":
        question = example["query"] + task.delimiter
        return [question + choice for choice in example["choices"]], ""
    if task.kind == "schema":
        answer = task.delimiter + example["continuation"]
        return [option + answer for option in example["context_options"]], ""
    context = example["context"].strip() + task.delimiter
    return [context + example["continuation"]], context.strip()


def _span_starts(task: Task, rows: list[Row], context: Row) -> list[int]:
    """Return the index at which the span of each row begins, in tokens or in characters."""
    if task.kind == "schema":
        shared = _common_prefix([row[::-1] for row in rows])
        return [len(row) - shared for row in rows]
    start = _common_prefix(rows) if task.kind == "multiple_choice" else len(context)
    return [start] * len(rows)


def _common_prefix(rows: list[Row]) -> int:
    """Return the length of the longest prefix that all rows share."""
    return len(os.path.commonprefix(rows))  # noqa: RUF071 - of any sequences, not of paths


def tokenize(
    task: Task,
    examples: Sequence[Example],
    indices: Sequence[int],
    tokenizer: Tokenizer,
) -> TokenizedTask:
    """Return rows and spans of the examples at `indices` of a task's selected examples.

    Raises ValueError if a continuation has no tokens of its own after the row without it, or if the
    tokenizer has no `bos`.
    """
    if getattr(tokenizer, "bos", None) is None:
        raise ValueError("this tokeniser has no <|bos|>, the token that begins every row of CORE")
    pieces = [np.zeros(0, np.uint32)]
    prefixes: list[int] = []
    suffixes: list[int] = []
    starts: list[int] = []
    first_rows = [0]
    encode = partial(_encode, task, examples, tokenizer)
    with ThreadPoolExecutor(cores()) as pool:
        for start in range(0, len(indices), CHUNK):
            for rows, span_starts in pool.map(encode, indices[start : start + CHUNK]):
                shared = _common_prefix(rows)
                pieces.append(np.array(rows[0][:shared], np.uint32))
                pieces += [np.array(row[shared:], np.uint32) for row in rows]
                prefixes.append(shared)
                suffixes += [len(row) - shared for row in rows]
                starts += span_starts
                first_rows.append(len(suffixes))
    tokens = np.concatenate(pieces)
    golds = [_gold(examples[index]) for index in indices]
    sizes = [_gold_bytes(task, examples[index]) for index in indices]
    counts = (prefixes, suffixes, starts, first_rows, golds, sizes)
    return TokenizedTask(
        tokens.astype(np.uint16) if tokens.max(initial=0) < 2**16 else tokens,
        *(np.array(values, np.int64) for values in counts),
    )


def _encode(
    task: Task, examples: Sequence[Example], tokenizer: Tokenizer, index: int
) -> tuple[list[list[int]], list[int]]:
    """Return the tokens of an example's rows, and their span starts."""
    texts, stripped = render(task, examples, index)
    rows = [[tokenizer.bos, *tokenizer.encode(text)] for text in texts]
    context = [tokenizer.bos, *tokenizer.encode(stripped)]
    if len(context) > 1:
        shared = _common_prefix([rows[0], context])
        if not len(context) == shared < len(rows[0]):
            raise ValueError(
                f"task {task.label}, example {index}: its continuation has no tokens of its own"
            )
    return rows, _span_starts(task, rows, context)


def _gold_bytes(task: Task, example: Example) -> int:
    """Return the UTF-8 bytes of the correct row's span, which is found in characters."""
    rows, context = _render_example(task, example)
    gold = _gold(example)
    start = _span_starts(task, rows, context)[gold]
    return len(rows[gold][start:].encode())


def _gold(example: Example) -> int:
    """Return the number of the correct row."""
    return int(example.get("gold", 0))


def load_or_tokenize(
    bundle: Bundle,
    task: Task,
    tokenizer: Tokenizer,
    maximum: int | None = None,
) -> TokenizedTask:
    """Return all of a task's examples, or `maximum` of them, as tokens; cached in the bundle's
    folder.

    Raises ValueError as `select_examples` and `tokenize` do.
    """
    key = [FORMAT, bundle.id, task.label, tokenizer.fingerprint, maximum]
    path = bundle.folder / "plans" / f"{task.label}-{fingerprint(json.dumps(key))}.npz"
    if path.exists():
        with np.load(path) as arrays:
            return TokenizedTask(*(arrays[name] for name in ARRAYS))
    examples = select_examples(task, bundle.examples(task), maximum)
    tokenized = tokenize(task, examples, range(len(examples)), tokenizer)
    path.parent.mkdir(exist_ok=True)
    arrays = dict(zip(ARRAYS, vars(tokenized).values()))
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)
        os.fsync(file.fileno())
    return tokenized
