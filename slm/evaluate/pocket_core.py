"""pocket-core: a small bundle with CORE's three types of task, made from held-out text, for models
that are at chance on CORE.

Validation rows are cut into windows of 128 tokens. Each window gives one question of every type,
from tokens that no other question scores, so that the tasks are drawn independently:

    next_tokens         language_modeling   the next word of 2 to 4 tokens, after 32 tokens
    which_continuation  multiple_choice     the next text of 8 to 16 tokens, one of 4, after 48
    which_context       schema              the text of 16 tokens, one of 4, before 4 to 8 tokens

Texts begin after a single space between two words and end where a word does: there they are tokens
of their own, in prose as in code. A passage ends at the first such cut after its minimum number of
tokens. Every question fits into a context of 128 tokens.

Wrong choices are the correct ones of three other windows, each a quarter of the held-out part
further on, and so rarely of the same document. Four such windows share their choices, each correct
once at every index: a model that does not read the question is right in exactly one of four,
whichever choices it prefers. A word of several tokens is hardly guessed. No shots are shown: text
that simply continues has no format for them to teach.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from slm.data.dataset import PreparedDataset
from slm.data.tokenizer import Tokenizer
from slm.evaluate import bundle
from slm.evaluate.bundle import BASELINES, EXAMPLES, INDEX, Bundle, Example

if TYPE_CHECKING:
    from slm.plan import Plan

NAME = "pocket-core"
RECIPE = "pocket"
"""Recipe whose runs are evaluated on it by default."""
WINDOW = 128
"""Tokens from which one question of each type is made."""
MAX_WINDOWS = 1024
"""Maximum number of windows: as many as the pocket recipe has validation rows."""
MIN_EXAMPLES = 500
"""Minimum number of examples of each task."""
CHOICES = 4
MAX_PASSAGE = 96
"""Maximum tokens of a passage, if there is no cut before."""
WORD_START = re.compile(rb"(?<=\S) (?=\S)")
"""A single space between two words."""
TEXT_END = re.compile(rb"(?<=\S)(?!\Z)((?<![\w\x80-\xff])|(?![\w\x80-\xff]))")
"""After a character other than a space, and not inside a word; those outside ASCII are letters."""


@dataclass(frozen=True)
class Form:
    """Rules for the questions of a task."""

    label: str
    kind: str
    passage: int
    """Minimum tokens of a passage."""
    answer: tuple[int, int]
    """Minimum and maximum tokens of the scored text after it."""
    baseline: int
    """Accuracy of guessing in percent."""
    starts_after_previous: bool = False
    """Whether the passage begins after the previous form's answer, not with the window."""


FORMS = (
    Form("next_tokens", "language_modeling", 32, (2, 4), 0),
    Form("which_continuation", "multiple_choice", 48, (8, 16), 100 // CHOICES),
    Form("which_context", "schema", 16, (4, 8), 100 // CHOICES, starts_after_previous=True),
)
"""Forms in the order in which they take their tokens from a window."""


Question = tuple[str, str]
"""Passage and answer: two texts that follow each other in a window, with a space between them."""


def bundle_of(prepared: PreparedDataset, home: Path) -> Bundle:
    """Make and install the pocket-core of a dataset; equal rows and tokeniser give the equal
    bundle.

    It holds text of validation rows only. Raises ValueError if they are missing or changed, or give
    fewer than MIN_EXAMPLES examples of a task.
    """
    prepared.verify_blocks(prepared.blocks("validation"))
    manifest = prepared.manifest
    tasks = _tasks(prepared)
    for form, examples in zip(FORMS, tasks, strict=True):
        if len(examples) < MIN_EXAMPLES:
            raise ValueError(
                f"corpus {manifest['corpus']['name']} holds out too little text for {NAME}: its "
                f"{manifest['validation']['rows']:,} validation rows give {len(examples)} examples "
                f"of {form.label}, {MIN_EXAMPLES} are needed: use more validation tokens, and text "
                "with spaces between words"
            )
    with tempfile.TemporaryDirectory() as temporary:
        _write(Path(temporary), tasks, manifest)
        return bundle.install(Path(temporary), home)


def bundle_for(
    plan: Plan, home: Path, name: str | None, prepared: Callable[[], PreparedDataset]
) -> Bundle:
    """Return the bundle of a name or an id, or the default of the run's recipe: pocket-core or
    CORE.

    pocket-core is that of the run's own dataset, made if it is not installed. Raises ValueError as
    `bundle.installed` and `bundle_of` do.
    """
    if is_pocket_core(name, plan.recipe):
        return bundle_of(prepared(), home)
    return bundle.installed(home, name)


def is_pocket_core(name: str | None, recipe: str) -> bool:
    """Whether the bundle of this name, None for the default of a recipe, is pocket-core."""
    return name == NAME or (name is None and recipe == RECIPE)


def _tasks(prepared: PreparedDataset) -> list[list[Example]]:
    """Return the examples of each form."""
    questions: dict[Form, list[Question]] = {form: [] for form in FORMS}
    for ids in islice(_windows(prepared), MAX_WINDOWS):
        for form, question in _questions(ids, prepared.tokenizer):
            questions[form].append(question)
    return [_examples(form, questions[form]) for form in FORMS]


def _windows(prepared: PreparedDataset) -> Iterator[list[int]]:
    """Cut the documents of the validation rows into at most WINDOW tokens."""
    for document in prepared.validation_documents():
        for start in range(0, len(document), WINDOW):
            yield document[start : start + WINDOW].tolist()


def _questions(ids: list[int], tokenizer: Tokenizer) -> Iterator[tuple[Form, Question]]:
    """Yield the question of each form that has room for one in a window."""
    pieces = [tokenizer.tokens[token] for token in ids]
    text = b"".join(pieces)
    offsets = np.cumsum([0, *map(len, pieces)]).tolist()
    words = [token for token, at in enumerate(offsets) if WORD_START.match(text, at)]
    ends = [token for token, at in enumerate(offsets) if TEXT_END.match(text, at)]
    used = 0
    for form in FORMS:
        cuts = _cuts(form, words, ends, used)
        if cuts is None:
            continue
        first, middle, end = cuts
        passage = text[offsets[first] + 1 : offsets[middle]].decode()
        answer = text[offsets[middle] + 1 : offsets[end]].decode()
        if tokenizer.encode(f" {passage}") + tokenizer.encode(f" {answer}") == ids[first:end]:
            yield form, (passage, answer)
            used = end


def _cuts(form: Form, words: list[int], ends: list[int], used: int) -> tuple[int, int, int] | None:
    """Return the tokens at which the passage begins, the answer begins and the answer ends."""
    start = used if form.starts_after_previous else 0
    first = next((token for token in words if token >= start), None)
    if first is None:
        return None
    shortest, longest = form.answer
    for middle in words:
        if max(first + form.passage, used) <= middle <= first + MAX_PASSAGE:
            end = next((end for end in ends if end >= middle + shortest), None)
            if end is not None and end <= middle + longest:
                return first, middle, end
    return None


def _examples(form: Form, questions: list[Question]) -> list[Example]:
    """Return the examples of a form's questions, without groups that have equal choices."""
    if form.kind == "language_modeling":
        return [{"context": passage, "continuation": answer} for passage, answer in questions]
    examples: list[Example] = []
    groups = len(questions) // CHOICES
    for start in range(groups):
        passages, answers = zip(*questions[start : groups * CHOICES : groups])
        options = passages if form.kind == "schema" else answers
        if len(set(options)) < CHOICES:
            continue
        for gold in range(CHOICES):
            example: Example = {"query": passages[gold], "choices": answers, "gold": gold}
            if form.kind == "schema":
                answer = answers[gold]
                example = {"context_options": passages, "continuation": answer, "gold": gold}
            examples.append(example)
    return examples


def _write(folder: Path, tasks: list[list[Example]], manifest: dict[str, Any]) -> None:
    """Write the files of a bundle, with the identity of the dataset that it is made from."""
    (folder / EXAMPLES).mkdir()
    entries = []
    baselines = "Eval Task,Task Category,Random baseline\n"
    for form, examples in zip(FORMS, tasks, strict=True):
        file = f"{form.label}.jsonl"
        lines = "".join(json.dumps(example) + "\n" for example in examples)
        (folder / EXAMPLES / file).write_text(lines)
        entries.append(
            {
                "label": form.label,
                "dataset_uri": file,
                "num_fewshot": [0],
                "icl_task_type": form.kind,
                "continuation_delimiter": " ",
            }
        )
        baselines += f"{form.label},{form.kind},{form.baseline}\n"
    held_out = {
        "validation": manifest["validation"]["fingerprint"],
        "tokenizer": manifest["tokenizer"],
    }
    index = {"name": NAME, "held_out": held_out, "icl_tasks": entries}
    (folder / INDEX).write_text(yaml.safe_dump(index))
    (folder / BASELINES).write_text(baselines)
