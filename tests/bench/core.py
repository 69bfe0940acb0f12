"""CORE: one example at a time against batches with shared prefixes, from text to decision.

Needs SLM_REFERENCE, the folder with the bundle. The last row of each model is the sum over tasks.
SLM_BENCH_SMALL=1 measures a few examples of a synthetic bundle and needs no reference.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from slm.data import prepare
from slm.data.tokenizer import Tokenizer
from slm.evaluate import bundle, prompts
from slm.evaluate.batching import pack
from slm.evaluate.bundle import Bundle, Task
from slm.evaluate.core import Scorer, evaluate_task
from slm.hardware.devices import cores
from slm.model.gpt import GPT
from slm.recipe import Hyperparameters, pocket
from tests import bundles
from tests.bench.trainer import SMALL
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
EXAMPLES = 5 if SMALL else 50
"""Maximum examples per task."""
LARGER = replace(pocket, vocab_size=4096, sequence_length=256)
MODELS = {"pocket d4": pocket(4)}
if not SMALL:
    MODELS["pocket d4, 4,096 tokens, context 256"] = LARGER(4)

Row = tuple[str, str, int, int, int, float, float, float, float, float, int, int]
Result = TypeVar("Result")


def rows() -> Iterator[Row]:
    """Yield one row of HEADERS per model and task, and one over all tasks."""
    reference = os.environ.get("SLM_REFERENCE")
    if not reference and not SMALL:
        print("SLM_REFERENCE is unset: no bundle to measure on", file=sys.stderr)
        return
    torch.set_num_threads(cores())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if SMALL:
            measured = bundle.read(bundles.write(folder / "bundle"))
            tokenizer = bundles.tokenizer()
        else:
            measured = bundle.install(Path(reference, "core", "core_bundle.zip"), folder)
            tokenizer = prepare("python", pocket(4), folder).tokenizer
        for model_name, hp in MODELS.items():
            model = random_model(hp)
            tasks = [row(model_name, measured, task, tokenizer, model) for task in measured.tasks]
            yield from tasks
            columns = [sum(column) for column in [*zip(*tasks)][2:]]
            one_by_one, plan, evaluate = columns[3:6]
            ratios = (one_by_one / evaluate, one_by_one / (plan + evaluate))
            yield model_name, "all", *columns[:6], *ratios, *columns[8:]


def random_model(hp: Hyperparameters) -> GPT:
    """Return a model in which no parameter is zero."""
    model = GPT(hp)
    model.initialise(0)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=draw)
    return model


def row(name: str, measured: Bundle, task: Task, tokenizer: Tokenizer, model: GPT) -> Row:
    """Measure both methods on the same examples, from their texts."""
    examples = prompts.select_examples(task, measured.examples(task), EXAMPLES)
    indices = range(len(examples))
    context = model.hp.sequence_length

    @torch.no_grad()
    def decide_all() -> list[bool | None]:
        return [
            decide(task, examples, index, tokenizer, model, context).get("correct")
            for index in indices
        ]

    decisions, one_by_one = timed(decide_all)
    tokenized, plan = timed(lambda: prompts.tokenize(task, examples, indices, tokenizer))
    scorer = Scorer(model, tokenizer)
    document, evaluate = timed(
        lambda: evaluate_task(scorer, task, tokenized, pack(tokenized, context))
    )
    pairs = zip(decisions, document["each"]["correct"], strict=True)
    return (
        name,
        task.label,
        document["examples"],
        document["cropped"],
        document["skipped"],
        one_by_one,
        plan,
        evaluate,
        one_by_one / evaluate,
        one_by_one / (plan + evaluate),
        sum(a != b for a, b in pairs),
        document["ties"],
    )


def timed(work: Callable[[], Result]) -> tuple[Result, float]:
    """Return the result of some work, and its wall seconds."""
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start
