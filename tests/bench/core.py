"""CORE: fifty examples of each task one at a time, and in batches that share prompts; all cores, from text to decision.

Needs SLM_REFERENCE, where the bundle is. The last row of each model is all tasks together.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from slm.data import prepare
from slm.data.tokenizer import Tokenizer
from slm.evaluate import bundle
from slm.evaluate import prompts as tasks
from slm.evaluate.batching import lanes_of
from slm.evaluate.bundle import Bundle, Task
from slm.evaluate.core import evaluate, judge_of
from slm.hardware.devices import cores
from slm.model.gpt import GPT
from slm.recipe import Hyperparameters, pocket
from tests.one_by_one import decide

HEADERS = (
    "model",
    "task",
    "examples",
    "cropped",
    "skipped",
    "one by one s",
    "plan s",
    "evaluate s",
    "times faster",
    "with the plan",
    "other decisions",
    "ties",
)
EXAMPLES = 50
"""Of each task, at most."""
MODELS = {
    "pocket d4": pocket(4),
    "pocket d4, 4,096 tokens, context 256": replace(pocket, vocab_size=4096, sequence_length=256)(
        4
    ),
}

Row = tuple[str, str, int, int, int, float, float, float, float, float, int, int]


def rows() -> Iterator[Row]:
    """One row of HEADERS a model and task, and one of all."""
    reference = os.environ.get("SLM_REFERENCE")
    if not reference:
        print("SLM_REFERENCE is unset: no bundle to measure on", file=sys.stderr)
        return
    torch.set_num_threads(cores())
    with tempfile.TemporaryDirectory() as folder:
        own = bundle.install(Path(reference, "core", "core_bundle.zip"), Path(folder))
        tokenizer = prepare("python", pocket(4), Path(folder)).tokenizer
        for name, given in MODELS.items():
            model = random_model(given)
            found = [row(name, own, task, tokenizer, model) for task in own.tasks]
            yield from found
            examples, cropped, skipped, alone, plan, ours, _, _, *decided = (
                sum(each) for each in [*zip(*found)][2:]
            )
            times = alone, plan, ours, alone / ours, alone / (plan + ours)
            yield name, "all", examples, cropped, skipped, *times, *decided


def random_model(given: Hyperparameters) -> GPT:
    """A model in which no parameter is zero."""
    model = GPT(given)
    model.initialise(0)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=draw)
    return model


def row(name: str, own: Bundle, task: Task, tokenizer: Tokenizer, model: GPT) -> Row:
    """Both ways on the same examples, each from its texts on."""
    examples, context = (
        tasks.ordered(task, own.examples(task), EXAMPLES),
        model.hp.sequence_length,
    )
    indices = range(len(examples))
    began = time.perf_counter()
    with torch.no_grad():
        plain = [
            decide(task, examples, index, tokenizer, model, context).get("correct")
            for index in indices
        ]
    alone = time.perf_counter() - began
    began = time.perf_counter()
    plan = tasks.plan(task, examples, indices, tokenizer)
    planning = time.perf_counter() - began
    began = time.perf_counter()
    found = evaluate(task, plan, lanes_of(plan, context), judge_of(model))
    ours = time.perf_counter() - began
    others = sum(one != other for one, other in zip(plain, found["each"]["correct"], strict=True))
    counts = found["examples"], found["cropped"], found["skipped"]
    times = alone, planning, ours, alone / ours, alone / (planning + ours)
    return name, task.label, *counts, *times, others, found["ties"]
