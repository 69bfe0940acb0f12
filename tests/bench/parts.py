"""Parts of a step: where its time goes on one thread, at pocket's depth 6, by torch's profiler."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from slm.model.gpt import GPT
from slm.recipe import pocket
from slm.train.optimizer import Optimizer

HEADERS = ("part", "milliseconds", "share %")
STEPS = 10
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
    """Part, milliseconds a step, and share of the step."""
    torch.set_num_threads(1)
    given = pocket(6)
    model = GPT(given)
    model.initialise(0)
    optimizer = Optimizer(model)
    ids = torch.randint(0, given.vocab_size, (given.batch_rows, given.sequence_length + 1))

    def step(number: int) -> None:
        with record_function("step"):
            optimizer.zero_grad()
            (model.loss(ids[:, :-1], ids[:, 1:]) / given.batch_tokens).backward()
            with record_function("optimiser"):
                optimizer.step(number)

    for number in range(3):
        step(number)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for number in range(STEPS):
            step(number)
    took = {entry.key: entry.cpu_time_total / 1e3 / STEPS for entry in profiler.key_averages()}
    for part, key in PARTS.items():
        yield part, took[key], 100 * took[key] / took["step"]
    other = took["step"] - sum(took[key] for key in PARTS.values())
    yield "the rest", other, 100 * other / took["step"]
