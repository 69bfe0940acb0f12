"""Synthetic bundles of counting tasks of all three types, and a model that has learned to count."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from slm.data.tokenizer import Tokenizer, train_tokenizer
from slm.model.gpt import GPT
from slm.recipe import pocket
from slm.train.optimizer import Optimizer

WORDS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
)
TASKS = {
    "follows": ("multiple_choice", 4, " "),
    "follows_zeroshot": ("multiple_choice", 0, " "),
    "fits": ("schema", 1, " "),
    "goes_on": ("language_modeling", 3, " "),
}
"""Type, shots and delimiter of each task."""
BASELINES = {"follows": 25, "follows_zeroshot": 25, "fits": 50, "goes_on": 0}
CONTEXT = 256


def counted(start: int, words: int) -> str:
    """Return number words in order, cyclically."""
    return " ".join(WORDS[(start + index) % len(WORDS)] for index in range(words))


def example(kind: str, draw: random.Random) -> dict[str, Any]:
    """Return a random example of a type of task."""
    start, words = draw.randrange(len(WORDS)), draw.randrange(3, 12)
    right = counted(start + words, draw.randrange(1, 4))
    if kind == "language_modeling":
        return {"context": f"{counted(start, words)} ", "continuation": right}
    gold, options = draw.randrange(4), 4 if kind == "multiple_choice" else 2
    if kind == "multiple_choice":
        wrong = [counted(start + words + shift, draw.randrange(1, 5)) for shift in (2, 3, 5)]
        return {
            "query": counted(start, words),
            "choices": [*wrong[:gold], right, *wrong[gold:]],
            "gold": gold,
        }
    contexts = [counted(start + shift, words) for shift in (0, draw.randrange(1, 5))]
    gold %= options
    return {"context_options": contexts[:: -1 if gold else 1], "continuation": right, "gold": gold}


def write(folder: Path, examples: int = 40, seed: int = 0) -> Path:
    """Write a bundle to a folder, and return the folder."""
    draw = random.Random(seed)
    for label, (kind, _, _) in TASKS.items():
        path = folder / "eval_data" / "counting" / f"{label}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(example(kind, draw)) + "\n" for _ in range(examples)))
    entries = [
        {
            "label": label,
            "dataset_uri": f"counting/{label}.jsonl",
            "num_fewshot": [shots],
            "icl_task_type": kind,
            "continuation_delimiter": delimiter,
        }
        for label, (kind, shots, delimiter) in TASKS.items()
    ]
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": entries}))  # JSON is YAML
    rows = "".join(f'{label},"a, b",{baseline}\n' for label, baseline in BASELINES.items())
    (folder / "eval_meta_data.csv").write_text(f"Eval Task,Task Category,Random baseline\n{rows}")
    return folder


def tokenizer() -> Tokenizer:
    """Return a tokeniser trained on counting."""
    return train_tokenizer([counted(start, 200) for start in range(50)], 280)


def learned(tokenizer: Tokenizer, steps: int = 60) -> GPT:
    """Return a GPT of three layers, two with short windows, trained on counting for some steps."""
    family = replace(
        pocket, sequence_length=CONTEXT, vocab_size=tokenizer.vocab_size, window_pattern="SSL"
    )
    hp = replace(family(3, steps=steps), batch_tokens=8 * CONTEXT)
    model = GPT(hp)
    model.initialise(0)
    optimizer, draw = Optimizer(model), random.Random(0)
    for step in range(steps):
        texts = [
            "\n\n".join(counted(draw.randrange(12), draw.randrange(3, 15)) for _ in range(40))
            for _ in range(8)
        ]
        ids = torch.tensor([[tokenizer.bos, *tokenizer.encode(text)[:CONTEXT]] for text in texts])
        optimizer.zero_grad()
        (model.loss(ids[:, :-1], ids[:, 1:]) / hp.batch_tokens).backward()
        optimizer.step(step)
    return model
