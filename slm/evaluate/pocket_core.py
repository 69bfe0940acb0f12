"""pocket-core: a small bundle of CORE's three types of task, of held-out text, for families that sit at chance on CORE.

Validation rows are cut into windows of 128 tokens. Each asks one question of every type, of tokens that no other
question asks, so that what one task draws says nothing of another:

    next_tokens         language_modeling   after 32 tokens the next word, 2 to 4 tokens, all of them greedy
    which_continuation  multiple_choice     after 48 tokens: which of 4 texts of 8 to 16 tokens goes on
    which_context       schema              before a text of 4 to 8 tokens: which of 4 texts of 16 tokens comes

Texts begin after a single space between two words and end where a word does: there they are tokens of their own, in
prose as in code. A passage ends at the first such place after so many tokens. Every question fits into a context of
128 tokens.

Wrong choices are the right ones of three other windows, each a quarter of the held-out part further on, and so hardly
ever of one document. Four such windows ask each other's choices, each once in every place: a model that does not read
the question is right in exactly one of four, whichever choices it likes. A word of several tokens is hardly guessed.
No examples are shown before a question: text that goes on has no form that they would teach.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from slm.data.dataset import Prepared
from slm.data.tokenizer import Tokenizer
from slm.evaluate import bundle
from slm.evaluate.bundle import BASELINES, EXAMPLES, INDEX, Bundle, Example

if TYPE_CHECKING:
    from slm.plan import Plan

NAME = "pocket-core"
RECIPE = "pocket"
"""The family that is judged by it."""
WINDOW = 128
"""Tokens that one question of each type is taken from."""
WINDOWS = 1024
"""So many at most: as many as pocket's validation rows."""
LEAST = 500
"""Examples that a task has at least."""
CHOICES = 4
LATEST = 96
"""Tokens of a passage at most, where no place to end comes sooner."""
SPACES = b" \t\r\n\f\v"


@dataclass(frozen=True)
class Form:
    """How a task asks."""

    label: str
    """Its name."""
    kind: str
    """Its type."""
    passage: int
    """Tokens of a passage at least."""
    asked: tuple[int, int]
    """Tokens of what is asked after it, least and most."""
    baseline: int
    """What guessing reaches, in percent."""
    anew: bool = False
    """Whether a passage begins after what the form before asks; else where the window does."""


FORMS = (
    Form("next_tokens", "language_modeling", 32, (2, 4), 0),
    Form("which_continuation", "multiple_choice", 48, (8, 16), 100 // CHOICES),
    Form("which_context", "schema", 16, (4, 8), 100 // CHOICES, anew=True),
)
"""In the order in which they take their tokens from a window."""


@dataclass(frozen=True)
class Question:
    """Two texts with a space between them, as a window has them."""

    passage: str
    """What comes first."""
    asked: str
    """What follows it."""


def bundle_of(prepared: Prepared, home: Path) -> Bundle:
    """The pocket-core of a prepared corpus, installed in a home. The same rows and tokeniser give the same bundle.

    It holds text of validation rows alone. Raises ValueError where those are gone or changed, or too few for LEAST
    examples of each task.
    """
    prepared.verify_blocks(prepared.blocks("validation"))
    tasks = _tasks(prepared)
    for form, examples in zip(FORMS, tasks, strict=True):
        if len(examples) < LEAST:
            raise ValueError(
                f"corpus {prepared.manifest['corpus']['name']} holds out too little text for {NAME}: its "
                f"{prepared.manifest['validation']['rows']:,} validation rows give {len(examples)} examples of "
                f"{form.label}, {LEAST} are needed: more validation tokens, and words with spaces between"
            )
    with tempfile.TemporaryDirectory() as temporary:
        _write(Path(temporary), tasks, prepared.manifest)
        return bundle.install(Path(temporary), home)


def bundle_for(
    plan: Plan, home: Path, named: str | None, prepared: Callable[[], Prepared]
) -> Bundle:
    """The bundle that a run is asked: the one of a name or an id; without, its family's, pocket-core or CORE.

    pocket-core is that of the run's own data, made if it is not there. Raises ValueError as `bundle.installed` and
    `bundle_of` do.
    """
    if named == NAME or (named is None and plan.recipe == RECIPE):
        return bundle_of(prepared(), home)
    return bundle.installed(home, named)


def _tasks(prepared: Prepared) -> list[list[Example]]:
    """The examples of each form."""
    tokenizer = prepared.tokenizer
    asked = [_questions(ids, tokenizer) for ids in islice(_windows(prepared), WINDOWS)]
    columns = [[own for own in column if own] for column in zip(*asked, strict=True)]
    return [_examples(form, column) for form, column in zip(FORMS, columns)]


def _windows(prepared: Prepared) -> Iterator[list[int]]:
    """Validation rows cut at `<|bos|>`, which is left out, and into WINDOW tokens at most."""
    manifest, bos = prepared.manifest, prepared.tokenizer.bos
    tokens = np.fromfile(
        prepared.folder / prepared.files("validation")[0]["file"], manifest["dtype"]
    )
    for row in tokens.reshape(-1, manifest["row_tokens"]):
        for text in np.split(row, np.flatnonzero(row == bos)):
            ids = text[text != bos].tolist()
            yield from (ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW))


def _questions(ids: list[int], tokenizer: Tokenizer) -> list[Question | None]:
    """What each form asks of a window; None where it has no place for it."""
    pieces = [tokenizer.tokens[token] for token in ids]
    text, starts = b"".join(pieces), np.cumsum([0, *map(len, pieces)]).tolist()
    words, ends = _words(text, starts), _ends(text, starts)
    asked: list[Question | None] = []
    taken = 0
    for form in FORMS:
        asked.append(None)
        found = _places(form, words, ends, taken)
        if found is None:
            continue
        first, cut, end = found
        passage, own = (
            text[starts[a] + 1 : starts[b]].decode() for a, b in ((first, cut), (cut, end))
        )
        if tokenizer.encode(f" {passage}") + tokenizer.encode(f" {own}") == ids[first:end]:
            asked[-1], taken = Question(passage, own), end
    return asked


def _words(text: bytes, starts: list[int]) -> list[int]:
    """Tokens that begin with a single space between two words."""
    middle = ((k, text[at - 1 : at + 2]) for k, at in enumerate(starts) if 0 < at < len(text) - 1)
    return [
        k
        for k, (before, own, after) in middle
        if own == 32 and before not in SPACES and after not in SPACES
    ]


def _ends(text: bytes, starts: list[int]) -> list[int]:
    """Tokens that begin after a character which is no space, and not inside a word."""
    pairs = ((k, text[at - 1], text[at]) for k, at in enumerate(starts) if 0 < at < len(text))
    return [
        k
        for k, before, own in pairs
        if before not in SPACES and not (_in_word(before) and _in_word(own))
    ]


def _in_word(byte: int) -> bool:
    """Of a letter, digit or underscore; or of a character outside ASCII, which is never cut."""
    return byte > 127 or chr(byte).isalnum() or byte == ord("_")


def _places(
    form: Form, words: list[int], ends: list[int], taken: int
) -> tuple[int, int, int] | None:
    """The tokens at which passage and asked text begin, and the latter ends."""
    first = next((word for word in words if word >= taken * form.anew), None)
    if first is None:
        return None
    least, most = form.asked
    for cut in words:
        if max(first + form.passage, taken) <= cut <= first + LATEST:
            end = next((end for end in ends if end >= cut + least), None)
            if end is not None and end <= cut + most:
                return first, cut, end
    return None


def _examples(form: Form, asked: list[Question]) -> list[Example]:
    """What a form makes of the questions that it found; four with equal choices among them are left out."""
    if form.kind == "language_modeling":
        return [{"context": own.passage, "continuation": own.asked} for own in asked]
    apart = len(asked) // CHOICES
    made = []
    for start in range(apart):
        group = asked[start : apart * CHOICES : apart]
        passages, texts = [own.passage for own in group], [own.asked for own in group]
        if form.kind == "schema" and len({*passages}) == CHOICES:
            made += [
                {"context_options": passages, "continuation": text, "gold": k}
                for k, text in enumerate(texts)
            ]
        if form.kind == "multiple_choice" and len({*texts}) == CHOICES:
            made += [
                {"query": passage, "choices": texts, "gold": k}
                for k, passage in enumerate(passages)
            ]
    return made


def _write(folder: Path, tasks: list[list[Example]], manifest: dict[str, Any]) -> None:
    """A bundle's files; of what data it is, too."""
    (folder / EXAMPLES).mkdir()
    for form, examples in zip(FORMS, tasks, strict=True):
        lines = "".join(json.dumps(example) + "\n" for example in examples)
        (folder / EXAMPLES / f"{form.label}.jsonl").write_text(lines)
    entries = [
        {
            "label": form.label,
            "dataset_uri": f"{form.label}.jsonl",
            "num_fewshot": [0],
            "icl_task_type": form.kind,
            "continuation_delimiter": " ",
        }
        for form in FORMS
    ]
    held_out = {
        "validation": manifest["validation"]["fingerprint"],
        "tokenizer": manifest["tokenizer"],
    }
    (folder / INDEX).write_text(
        yaml.safe_dump({"name": NAME, "held_out": held_out, "icl_tasks": entries})
    )
    rows = "".join(f"{form.label},{form.kind},{form.baseline}\n" for form in FORMS)
    (folder / BASELINES).write_text(f"Eval Task,Task Category,Random baseline\n{rows}")
