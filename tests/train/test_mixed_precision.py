"""What GPUs run, as far as a CPU can run it: 16 bits, results read a step late, and any number of ranks' shares."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slm.data import Prepared
from slm.model import layers
from slm.model.gpt import GPT
from slm.recipe import pocket
from slm.train.optimizer import Optimizer
from slm.train.trainer import Trainer
from tests.attempts import log, make_attempt, plan_of

IDS = torch.randint(512, (4, 129), generator=torch.Generator().manual_seed(0))


def losses(dtype: torch.dtype, steps: int = 20) -> list[float]:
    """Of a model that computes in a type, as the trainer scales its gradients."""
    given = replace(pocket(3, steps=steps), warmup_steps=2)
    model, found = GPT(given), []
    model.initialise(0)
    model.set_compute_dtype(dtype)
    optimizer = Optimizer(model)
    for step in range(steps):
        optimizer.zero_grad()
        loss = model.loss(IDS[:, :-1], IDS[:, 1:])
        narrow = dtype == torch.float16
        loss.backward(torch.full_like(loss, 1.0 if narrow else 1 / 512))
        optimizer.step(step, 1 / 512 if narrow else 1.0)
        found.append(loss.item() / 512)
    return found


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
        layers.cross_entropy(*leaves, targets).backward()
        return [leaf.grad.float() for leaf in leaves if leaf.grad is not None]

    for found, expected in zip(gradients(dtype), gradients(torch.float32), strict=True):
        assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("depth", [1, 2, 9, 10])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_rank_takes_its_share_of_a_state(depth: int, ranks: int) -> None:
    """Put together again, the shares are the state; the last ones may be beyond it."""
    given = replace(pocket, aspect_ratio=32)(depth, steps=2)
    model = GPT(given)
    model.initialise(0)
    state = Optimizer(model).state()
    state = {name: torch.rand(tensor.shape) for name, tensor in state.items()}
    parts = []
    for rank in range(ranks):
        model.zero_grad()
        parts.append(Optimizer(model, rank, ranks)._parts)
        for part in parts[-1]:
            for key, own in part.state.items():
                part.buffer.take(own, [state[f"{name}.{key}"] for name in part.buffer.spans])
    for shares in zip(*parts, strict=True):
        for key in shares[0].state:
            held = [share.state[key].flatten() for share in shares]
            whole = torch.cat(held if shares[0].buffer.shared else held[:1])
            for name, tensor in shares[0].buffer.named(whole).items():
                assert torch.equal(tensor, state[f"{name}.{key}"])


@pytest.mark.parametrize("checkpoint_seconds", [0, 1e9])
def test_steps_read_late_leave_what_steps_read_at_once_leave(
    tmp_path: Path, prepared: Prepared, monkeypatch: pytest.MonkeyPatch, checkpoint_seconds: float
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    done, logged, written = [], [], []
    for lags in (False, True):
        plan = plan_of(pocket(1, steps=7), prepared)
        folder = make_attempt(
            tmp_path / str(lags), plan, prepared, checkpoint_seconds=checkpoint_seconds
        )
        trainer = Trainer(folder)
        trainer.lags = lags
        trainer.run()
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
