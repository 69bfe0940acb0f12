"""A plan gives the same run on any number of ranks and with any micro-batch: the same rows, losses
and weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given as for_any
from hypothesis import strategies as st
from safetensors.numpy import load_file

from slm.data import PreparedDataset
from slm.data.loader import Order, Rows
from slm.hardware.block_sizes import SHARED_ELEMENTS
from slm.model.gpt import GPT
from slm.model.ranks import Ranks
from slm.recipe import AdamW, Hyperparameters, pocket
from slm.train.optimizer import lr_multiplier
from tests.attempts import log, make_attempt, plan_of, train_until
from tests.forked import train

UNEVEN = replace(pocket, aspect_ratio=6, head_dim=6, vocab_size=600)
"""At depth 3: three matrices of 18 x 18 a stack, two value embeddings of 640 tokens, scalars by
ones and threes."""
WIDE = replace(pocket, aspect_ratio=32)
"""At depth 4 large enough for ranks to share the optimiser's work."""
OFF = AdamW(0.0, 0.8, 0.95, 0.0)
SCALARS = ("resid", "x0", "smear_gate", "smear", "backout")
WORLDS = [(2, 1), (3, 2)]
"""Ranks and micro-batch. Three ranks share eight rows as 3, 3 and 2, in micro-batches of 2, 1; 2,
1; and 2."""

Weights = Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Trained:
    """Results of a run."""

    losses: list[float]
    """Nats a token at each step."""
    evaluation: dict[str, Any]
    """The eval event."""
    weights: Weights
    """Final parameters by name."""


def hyperparameters() -> Hyperparameters:
    """Return ten steps of eight rows."""
    hp = UNEVEN(3, steps=10)
    return replace(hp, batch_tokens=8 * hp.sequence_length)


def steady() -> Hyperparameters:
    """Return hyperparameters that leave the scalars alone.

    Before the first update no block adds to the stream, so that the norm after it undoes what
    resid, x0 and backout do; their gradient is rounding error, which AdamW makes a full step in
    either direction.
    """
    return replace(hyperparameters(), resid=OFF, x0=OFF, smear=OFF)


def trained(
    home: Path, prepared: PreparedDataset, hp: Hyperparameters, ranks: int, micro_batch: int
) -> Trained:
    folder = make_attempt(
        home, plan_of(hp, prepared), prepared, ranks=ranks, micro_batch=micro_batch
    )
    result = train(folder, ranks)
    assert result.returncode == 0, result.stderr
    [started], [evaluation] = log(folder, "started"), log(folder, "eval")
    assert (started["ranks"], started["micro_batch"]) == (ranks, micro_batch)
    losses = [event["loss"] for event in log(folder, "train")]
    return Trained(losses, evaluation, load_file(folder.parent.parent / "model.safetensors"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, prepared: PreparedDataset) -> Trained:
    """Train on one rank, the full batch at once."""
    return trained(tmp_path_factory.mktemp("alone"), prepared, steady(), 1, 8)


@pytest.fixture(
    scope="module", params=WORLDS, ids=lambda world: "{} ranks, micro-batch {}".format(*world)
)
def world(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    prepared: PreparedDataset,
) -> Trained:
    """Train the same plan on more ranks."""
    return trained(tmp_path_factory.mktemp("world"), prepared, steady(), *request.param)


def distances(weights: Weights, expected: Weights) -> dict[str, float]:
    """Return the relative distance of the tensors of each name."""
    assert weights.keys() == expected.keys()
    return {
        name: distance(weights[name], expected[name]) / (distance(expected[name]) or 1.0)
        for name in expected
    }


def distance(x: npt.ArrayLike, y: npt.ArrayLike = 0.0) -> float:
    return float(np.linalg.norm(np.asarray(x, np.float64) - np.asarray(y, np.float64)))


def start() -> Weights:
    """Return the parameters before the first step."""
    model = GPT(hyperparameters())
    model.initialise(seed=0)
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


def test_every_step_has_the_same_loss(alone: Trained, world: Trained) -> None:
    assert len(alone.losses) == 10
    assert alone.losses[-1] < alone.losses[0]
    assert world.losses == pytest.approx(alone.losses, rel=1e-5)


def test_the_final_weights_are_the_same(alone: Trained, world: Trained) -> None:
    errors = distances(world.weights, alone.weights)
    assert errors == pytest.approx(dict.fromkeys(errors, 0.0), abs=1e-5)


def test_the_same_validation_rows_are_read(alone: Trained, world: Trained) -> None:
    assert world.evaluation["rows"] == alone.evaluation["rows"] == hyperparameters().validation_rows
    assert world.evaluation["val_bpb"] == pytest.approx(alone.evaluation["val_bpb"], rel=1e-6)


def test_tokens_that_never_occur_only_decay(world: Trained, prepared: PreparedDataset) -> None:
    """The embeddings' gradient is zero: AdamW leaves the product of 1 - rate·decay of the initial
    values.
    """
    hp = steady()
    initial = start()
    rows = Rows.open(prepared, "train")
    order = Order([block.rows for block in prepared.blocks("train")], seed=0)
    ids, _ = rows.pair(
        np.concatenate([order.step(step, hp.batch_rows) for step in range(hp.steps)])
    )
    unseen = np.setdiff1d(np.arange(hp.vocab_size), ids)
    assert set(range(512, 640)) <= set(unseen.tolist()) < set(range(640))
    for name, group in (("wte", hp.wte), ("value_embeds", hp.value_embeds)):
        remaining = math.prod(
            1 - group.lr * lr_multiplier(hp, step) * group.decay for step in range(hp.steps)
        )
        assert remaining < 1 - 1e-4
        np.testing.assert_allclose(
            world.weights[name][..., unseen, :],
            remaining * initial[name][..., unseen, :],
            rtol=1e-6,
        )


@pytest.mark.soak
def test_a_run_of_three_ranks_resumes_on_one(tmp_path: Path, prepared: PreparedDataset) -> None:
    """16 and 8 matrices do not divide by three. Rounding errors grow: after ten steps another
    micro-batch on one rank differs as much.
    """
    hp = replace(
        WIDE(4, steps=15), batch_tokens=8 * WIDE.sequence_length, resid=OFF, x0=OFF, smear=OFF
    )
    shared = [hp.parameters.transformer_matrices // 3, 3 * hp.parameters.wte]
    assert min(shared) >= SHARED_ELEMENTS > hp.depth * hp.heads
    alone = trained(tmp_path / "alone", prepared, hp, 1, 8)
    plan, home = plan_of(hp, prepared), tmp_path / "ranks"
    first = make_attempt(home, plan, prepared, ranks=3, micro_batch=8, checkpoint_seconds=0)
    train_until(first, 3, "checkpoint")
    second = trained(home, prepared, hp, 1, 8)
    stopped = len(log(first, "train"))
    assert log(first, "failed")[0]["reason"] == "interrupted"
    assert 1 <= stopped < 15
    assert len(second.losses) == 15 - stopped
    losses = [*(event["loss"] for event in log(first, "train")), *second.losses]
    assert losses[:10] == pytest.approx(alone.losses[:10], rel=1e-5)
    assert losses == pytest.approx(alone.losses, rel=1e-3)


@pytest.mark.soak
def test_scalars_train_alike_on_one_rank_and_on_four(
    tmp_path: Path, prepared: PreparedDataset
) -> None:
    """Four ranks share tensors of one and three elements. The first step, 1/55 of the way in ten
    steps of the warm-up, may go in either direction: see `steady`.
    """
    one = trained(tmp_path / "one", prepared, hyperparameters(), 1, 8)
    four = trained(tmp_path / "four", prepared, hyperparameters(), 4, 1)
    initial = start()
    assert four.losses == pytest.approx(one.losses, rel=1e-5)
    for name in SCALARS:
        assert distance(four.weights[name], one.weights[name]) < 0.1 * distance(
            one.weights[name], initial[name]
        )


@for_any(st.integers(1, 96), st.integers(1, 96), st.integers(0, 50), st.integers(1, 9))
def test_ranks_and_micro_batches_partition_the_rows_of_a_step(
    batch_rows: int, ranks: int, step: int, micro_batch: int
) -> None:
    ranks = min(ranks, batch_rows)
    rows = Order([256, 256, 256, 232], 0).step(step, batch_rows)
    shares = [Ranks(rank, ranks).share(rows) for rank in range(ranks)]
    pieces = []
    for share in shares:
        pieces += [share[at : at + micro_batch] for at in range(0, len(share), micro_batch)]
    assert np.concatenate(pieces).tolist() == rows.tolist()
    assert {len(share) for share in shares} <= {batch_rows // ranks, -(-batch_rows // ranks)}


def test_steps_of_any_size_read_one_stream_of_rows() -> None:
    stream = Order([256, 256, 256, 232], 0).step(0, 960)
    for batch_rows in (1, 3, 8, 64):
        order = Order([256, 256, 256, 232], 0)
        read = [order.step(step, batch_rows) for step in range(960 // batch_rows)]
        assert np.concatenate(read).tolist() == stream.tolist()
