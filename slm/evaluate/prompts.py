"""Examples of a task -> rows of tokens and the spans in them that are scored: what CORE asks, without a model.

An example becomes one row a choice (language modelling: one row). A row is `<|bos|>`, the shots, each followed by a
blank line, and the example itself; its span, from a start to the row's end, is what the model is judged by:

    multiple_choice     choices differ: what follows the tokens that all rows begin with
    schema              contexts differ: the tokens that all rows end with
    language_modeling   the continuation: what follows the tokens of the stripped row without it

Examples are shuffled by Random(1337), then cut; the shots of example i are drawn by Random(1234 + i) from the others
that the cut left. Semantics of DCLM (arXiv 2406.11794) as nanochat implements them.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from slm.evaluate.bundle import Bundle, Example, Task
from slm.files import replacing
from slm.hardware.devices import cores

FORMAT = 1
"""Of plans: to be raised with every change of what is asked, so that kept plans and results are told apart."""
Ints = NDArray[np.int64]
Sequenced = TypeVar("Sequenced", str, list[int])
"""A row of characters or of tokens."""
AT_ONCE = 256
"""Examples whose texts are held at once."""


class Encoder(Protocol):
    """What a tokeniser has to know."""

    @property
    def bos(self) -> int:
        """The token that begins every row."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without `bos`."""


class Known(Encoder, Protocol):
    """A tokeniser whose plans can be found again."""

    @property
    def fingerprint(self) -> str:
        """A hash of what decides the encoding."""


@dataclass(frozen=True)
class Planned:
    """Examples of a task as tokens: of each the prompt that its rows share, then the tail of every row."""

    tokens: NDArray[np.unsignedinteger[Any]]
    """Prompt and tails, one example after another."""
    prompts: Ints
    """Tokens of each example's prompt (E,)."""
    tails: Ints
    """Tokens of each row's tail (R,)."""
    starts: Ints
    """Where in its row, prompt and tail, each span begins (R,); it ends with the row."""
    first: Ints
    """Each example's first row (E + 1,), and the number of rows."""
    golds: Ints
    """The right row of each example, counted from its first (E,)."""
    bytes: Ints
    """UTF-8 bytes of what the right row's span says (E,)."""

    def __len__(self) -> int:
        return len(self.golds)

    @cached_property
    def owners(self) -> Ints:
        """Each row's example (R,)."""
        return np.repeat(np.arange(len(self)), np.diff(self.first))

    @cached_property
    def lengths(self) -> Ints:
        """Tokens of each row (R,)."""
        return self.prompts[self.owners] + self.tails

    @cached_property
    def spans(self) -> Ints:
        """Tokens of each row's span (R,)."""
        return self.lengths - self.starts


def ordered(task: Task, examples: Sequence[Example], most: int | None = None) -> list[Example]:
    """A task's examples as CORE counts them: shuffled, then cut to `most`.

    Raises ValueError when those are too few for the shots.
    """
    shuffled = list(examples)
    random.Random(1337).shuffle(shuffled)
    kept = shuffled[:most]
    if len(kept) <= task.shots:
        raise ValueError(
            f"task {task.label} shows {task.shots} examples before each: {len(kept)} examples are too few, take at "
            f"least {task.shots + 1} per task"
        )
    return kept


def shots_of(task: Task, index: int, count: int) -> list[int]:
    """Which of `count` examples are shown before one of them, in the order in which they are shown."""
    drawn = random.Random(1234 + index).sample(
        range(count - 1), task.shots
    )  # places among the others
    return [place + (place >= index) for place in drawn]


def texts_of(task: Task, examples: Sequence[Example], index: int) -> tuple[list[str], str]:
    """The text of every row of an example; and, in language modelling, of the row without its continuation."""
    shown = "".join(
        _answered(task, examples[shot]) + "\n\n" for shot in shots_of(task, index, len(examples))
    )
    rows, without = _asked(task, examples[index])
    return [shown + row for row in rows], (
        shown + without
    ).strip() if task.kind == "language_modeling" else ""


def _answered(task: Task, example: Example) -> str:
    return _asked(task, example)[0][example.get("gold", 0)]


def _asked(task: Task, example: Example) -> tuple[list[str], str]:
    """`texts_of` without shots. Contexts of language modelling are stripped, and nothing else is."""
    if task.kind == "multiple_choice":
        return [example["query"] + task.delimiter + choice for choice in example["choices"]], ""
    if task.kind == "schema":
        return [
            option + task.delimiter + example["continuation"]
            for option in example["context_options"]
        ], ""
    without = example["context"].strip() + task.delimiter
    return [without + example["continuation"]], without.strip()


def _starts(task: Task, rows: list[Sequenced], without: Sequenced) -> list[int]:
    """Where the span of each row begins; rows of tokens, or of characters."""
    if task.kind == "schema":
        shared = _common([row[::-1] for row in rows])
        return [len(row) - shared for row in rows]
    return [_common(rows) if task.kind == "multiple_choice" else len(without)] * len(rows)


def _common(rows: list[Sequenced]) -> int:
    """How long all rows are equal from their first element on."""
    least, greatest = min(rows), max(rows)
    pairs = enumerate(zip(least, greatest))
    return next(
        (place for place, (one, other) in pairs if one != other), min(len(least), len(greatest))
    )


def plan(
    task: Task, examples: Sequence[Example], indices: Sequence[int], tokenizer: Encoder
) -> Planned:
    """Rows and spans of some of a task's `ordered` examples.

    Raises ValueError where a continuation is not tokens of its own after the row without it, and for a tokeniser that
    has no `bos`.
    """
    if getattr(tokenizer, "bos", None) is None:
        raise ValueError("this tokeniser has no <|bos|>, the token that begins every row of CORE")
    pieces, prompts, tails, starts, first = [np.zeros(0, np.uint32)], [], [], [], [0]
    for rows, begins in _encoded(task, examples, indices, tokenizer):
        shared = _common(rows)
        pieces.append(
            np.array(
                rows[0][:shared] + [token for row in rows for token in row[shared:]], np.uint32
            )
        )
        prompts.append(shared)
        tails += [len(row) - shared for row in rows]
        starts += begins
        first.append(len(tails))
    tokens = np.concatenate(pieces)
    golds = [examples[index].get("gold", 0) for index in indices]
    sizes = [_bytes(task, examples[index]) for index in indices]
    arrays = (
        np.array(values, np.int64) for values in (prompts, tails, starts, first, golds, sizes)
    )
    return Planned(tokens.astype(np.uint16) if tokens.max(initial=0) < 2**16 else tokens, *arrays)


def _encoded(
    task: Task, examples: Sequence[Example], indices: Sequence[int], tokenizer: Encoder
) -> Iterator[tuple[list[list[int]], list[int]]]:
    """The rows of each example as tokens, and where their spans begin; some examples at once, on all cores."""
    with ThreadPoolExecutor(cores()) as pool:
        for place in range(0, len(indices), AT_ONCE):
            asked = [texts_of(task, examples, index) for index in indices[place : place + AT_ONCE]]
            encoded = pool.map(
                tokenizer.encode, [text for rows, without in asked for text in (*rows, without)]
            )
            for index, (texts, _) in enumerate(asked, place):
                rows = [[tokenizer.bos, *next(encoded)] for _ in texts]
                without = [tokenizer.bos, *next(encoded)]
                if without[1:] and not len(without) == _common([rows[0], without]) < len(rows[0]):
                    raise ValueError(
                        f"task {task.label}, example {indices[index]}: its continuation is no tokens of its own"
                    )
                yield rows, _starts(task, rows, without)


def _bytes(task: Task, example: Example) -> int:
    """UTF-8 bytes of the right row's span, found on characters as it is on tokens."""
    (rows, without), gold = _asked(task, example), example.get("gold", 0)
    return len(rows[gold][_starts(task, rows, without)[gold] :].encode())


def planned(bundle: Bundle, task: Task, tokenizer: Known, most: int | None = None) -> Planned:
    """The plan of all of a task's examples, or of `most`, made once for each tokeniser and kept beside the bundle.

    Raises ValueError as `ordered` and `plan` do.
    """
    key = [FORMAT, bundle.id, task.label, tokenizer.fingerprint, most]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    path = bundle.folder / "plans" / f"{task.label}-{name}.npz"
    if path.exists():
        with np.load(path) as arrays:
            return Planned(**arrays)
    examples = ordered(task, bundle.examples(task), most)
    made = plan(task, examples, range(len(examples)), tokenizer)
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **{field.name: getattr(made, field.name) for field in fields(made)})
        os.fsync(file.fileno())
    return made
