"""Parts of a step: time on one thread at pocket's depth 6, by torch's profiler."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from slm.model.gpt import GPT
from slm.recipe import pocket
from slm.train.optimizer import Optimizer
from tests.bench.trainer import SMALL

HEADERS = ("part", "milliseconds", "share %")
WARM_UP = 1 if SMALL else 3
"""Steps before the profile."""
STEPS = 1 if SMALL else 10
DEPTH = 2 if SMALL else 6
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
PARTS = {
    "attention inputs, forward": "_AttentionInputs",
    "attention inputs, backward": "_AttentionInputsBackward",
    "attention, forward": ATTENTION,
    "attention, backward": f"{ATTENTION}_backward",
    "MLP, forward": "_MLP",
    "MLP, backward": "_MLPBackward",
    "head and loss, both ways": "_CrossEntropy",
    "optimiser": "optimiser",
}


def rows() -> Iterator[tuple[str, float, float]]:
    """Yield each part, its milliseconds a step, and its share of the step."""
    torch.set_num_threads(1)
    hp = pocket(DEPTH)
    model = GPT(hp)
    model.initialise(0)
    optimizer = Optimizer(model)
    ids = torch.randint(0, hp.vocab_size, (hp.batch_rows, hp.sequence_length + 1))

    def step(number: int) -> None:
        with record_function("step"):
            optimizer.zero_grad()
            (model.loss(ids[:, :-1], ids[:, 1:]) / hp.batch_tokens).backward()
            with record_function("optimiser"):
                optimizer.step(number)

    for number in range(WARM_UP):
        step(number)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for number in range(STEPS):
            step(number)
    averages = profiler.key_averages()
    milliseconds = {entry.key: entry.cpu_time_total / 1e3 / STEPS for entry in averages}
    total = milliseconds["step"]
    for part, key in PARTS.items():
        yield part, milliseconds[key], 100 * milliseconds[key] / total
    rest = total - sum(milliseconds[key] for key in PARTS.values())
    yield "the rest", rest, 100 * rest / total
