"""Code paths of GPUs on a CPU: 16 bits, deferred results, and the optimiser state of any number of
ranks.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from slm.data import PreparedDataset
from slm.model.gpt import GPT
from slm.model.logits import cross_entropy
from slm.model.ranks import ALONE, Ranks
from slm.recipe import pocket
from slm.train.attempt import Attempt
from slm.train.optimizer import Optimizer
from slm.train.trainer import train
from tests.attempts import log, make_attempt, plan_of

IDS = torch.randint(512, (2, 129), generator=torch.Generator().manual_seed(0))
TOKENS = 2 * 128


@cache
def losses(dtype: torch.dtype, steps: int = 10) -> list[float]:
    """Return the losses of a model that computes in a dtype, with gradients scaled as in the
    trainer.
    """
    hp = replace(pocket(3, steps=steps), warmup_steps=2)
    model = GPT(hp)
    result = []
    model.initialise(0)
    model.set_compute_dtype(dtype)
    optimizer = Optimizer(model)
    for step in range(steps):
        optimizer.zero_grad()
        loss = model.loss(IDS[:, :-1], IDS[:, 1:])
        narrow = dtype == torch.float16
        loss.backward(torch.full_like(loss, 1.0 if narrow else 1 / TOKENS))
        optimizer.step(step, 1 / TOKENS if narrow else 1.0)
        result.append(loss.item() / TOKENS)
    return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_train_as_thirty_two(dtype: torch.dtype) -> None:
    wide = losses(torch.float32)
    assert wide[-1] < 0.95 * wide[0]
    assert losses(dtype) == pytest.approx(wide, rel=0.01)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float16, 0.005)])
def test_gradients_of_large_vocabularies_stay_in_range(
    dtype: torch.dtype, tolerance: float
) -> None:
    """65,536 exponentials add up to more than float16 holds."""
    draw = torch.Generator().manual_seed(1)
    x, head = torch.randn(1, 8, 16, generator=draw), 0.5 * torch.randn(65536, 16, generator=draw)
    targets = torch.randint(65536, (1, 8), generator=draw)

    def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.to(dtype).requires_grad_(), head.clone().requires_grad_()]
        cross_entropy(*leaves, targets).backward()
        return [leaf.grad.float() for leaf in leaves if leaf.grad is not None]

    for result, expected in zip(gradients(dtype), gradients(torch.float32), strict=True):
        assert (result - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize(
    ("depth", "ranks"), [(1, 1), (1, 8), (2, 2), (2, 3), (9, 3), (9, 8), (10, 2)]
)
def test_every_rank_loads_its_share_of_the_state(depth: int, ranks: int) -> None:
    """Joined again, the shares are the state; the last ones may lie beyond it."""
    hp = replace(pocket, aspect_ratio=32)(depth, steps=2)
    model = GPT(hp)
    model.initialise(0)
    state = Optimizer(model).state()
    state = {name: torch.rand(tensor.shape) for name, tensor in state.items()}
    optimizers = []
    for rank in range(ranks):
        model.zero_grad()
        optimizer = Optimizer(model, Ranks(rank, ranks))
        optimizer.load(state)
        optimizers.append(optimizer._updates)
    for shares in zip(*optimizers, strict=True):
        buffer = shares[0].buffer
        for key in shares[0].state:
            parts = [share.state[key].flatten() for share in shares]
            full = torch.cat(parts if buffer.is_shared else parts[:1])
            for name, tensor in buffer.split_by_name(full).items():
                assert torch.equal(tensor, state[f"{name}.{key}"])


@pytest.mark.parametrize("checkpoint_seconds", [0, 1e9])
def test_deferred_results_change_neither_weights_nor_events(
    tmp_path: Path, prepared: PreparedDataset, checkpoint_seconds: float
) -> None:
    done, logged, written = [], [], []
    for deferred in (False, True):
        plan = plan_of(pocket(1, steps=7), prepared)
        folder = make_attempt(
            tmp_path / str(deferred), plan, prepared, checkpoint_seconds=checkpoint_seconds
        )
        train(Attempt(folder, ALONE), deferred)
        result = json.loads((folder.parent.parent / "done.json").read_text())
        done.append([result[key] for key in ("val_bpb", "train_loss", "weights_sha256", "step")])
        logged.append(
            [
                (event["step"], event["loss"], event["gradient_norm"])
                for event in log(folder, "train")
            ]
        )
        written.append([event["step"] for event in log(folder, "checkpoint")])
    assert done[0] == done[1]
    assert logged[0] == logged[1]
    assert len(logged[0]) == 7
    assert written == ([[1, 2, 3, 4, 5, 6], [2, 4, 6]] if checkpoint_seconds == 0 else [[], []])
