"""A plan gives the same run on any number of ranks and with any micro-batch: the same rows, losses and weights."""

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

from slm.data import Prepared
from slm.data.loader import Order, Rows, share
from slm.model.gpt import GPT
from slm.recipe import AdamW, Hyperparameters, pocket
from slm.train.optimizer import SHARED, lr_multiplier
from tests.attempts import log, make_attempt, plan_of, train, train_until

UNEVEN = replace(pocket, aspect_ratio=6, head_dim=6, vocab_size=600)
"""At depth 3: three matrices of 18 x 18 a stack, two value embeddings of 640 tokens, scalars by ones and threes."""
WIDE = replace(pocket, aspect_ratio=32)
"""At depth 4 large enough for ranks to share the optimiser's work."""
OFF = AdamW(0.0, 0.8, 0.95, 0.0)
SCALARS = ("resid", "x0", "smear_gate", "smear", "backout")
WORLDS = [(2, 1), (3, 2)]
"""Ranks and micro-batch. Of eight rows, three ranks take 3, 3 and 2, in micro-batches of 2, 1; 2, 1; and 2."""

Weights = Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Trained:
    """What a run leaves."""

    losses: list[float]
    """Nats a token, of each step."""
    evaluation: dict[str, Any]
    """The eval event."""
    weights: Weights
    """Final parameters by name."""


def hyperparameters() -> Hyperparameters:
    """Ten steps of eight rows."""
    given = UNEVEN(3, steps=10)
    return replace(given, batch_tokens=8 * given.sequence_length)


def steady() -> Hyperparameters:
    """Scalars that stay: before the first update no block adds to the stream, so that the norm after it undoes what
    resid, x0 and backout do; their gradient is rounding error, which AdamW makes a full step either way.
    """
    return replace(hyperparameters(), resid=OFF, x0=OFF, smear=OFF)


def trained(
    home: Path, prepared: Prepared, given: Hyperparameters, ranks: int, micro_batch: int
) -> Trained:
    folder = make_attempt(
        home, plan_of(given, prepared), prepared, ranks=ranks, micro_batch=micro_batch
    )
    result = train(folder, ranks)
    assert result.returncode == 0, result.stderr
    [started], [evaluation] = log(folder, "started"), log(folder, "eval")
    assert (started["ranks"], started["micro_batch"]) == (ranks, micro_batch)
    losses = [event["loss"] for event in log(folder, "train")]
    return Trained(losses, evaluation, load_file(folder.parent.parent / "model.safetensors"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, prepared: Prepared) -> Trained:
    """One rank, the whole batch at once."""
    return trained(tmp_path_factory.mktemp("alone"), prepared, steady(), 1, 8)


@pytest.fixture(
    scope="module", params=WORLDS, ids=lambda world: "{} ranks, micro-batch {}".format(*world)
)
def world(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, prepared: Prepared
) -> Trained:
    """The same plan in another world."""
    return trained(tmp_path_factory.mktemp("world"), prepared, steady(), *request.param)


def apart(ours: Weights, theirs: Weights) -> dict[str, float]:
    """Relative distance of the tensors of each name; the distance from zero itself."""
    assert ours.keys() == theirs.keys()
    return {
        name: distance(ours[name], theirs[name]) / (distance(theirs[name]) or 1.0)
        for name in theirs
    }


def distance(x: npt.ArrayLike, y: npt.ArrayLike = 0.0) -> float:
    return float(np.linalg.norm(np.asarray(x, np.float64) - np.asarray(y, np.float64)))


def start() -> Weights:
    """The parameters before the first step."""
    model = GPT(hyperparameters())
    model.initialise(seed=0)
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


def test_every_step_has_the_same_loss(alone: Trained, world: Trained) -> None:
    assert len(alone.losses) == 10
    assert alone.losses[-1] < alone.losses[0]
    assert world.losses == pytest.approx(alone.losses, rel=1e-5)


def test_the_final_weights_are_the_same(alone: Trained, world: Trained) -> None:
    far = apart(world.weights, alone.weights)
    assert far == pytest.approx(dict.fromkeys(far, 0.0), abs=1e-5)


def test_the_same_validation_rows_are_read(alone: Trained, world: Trained) -> None:
    assert world.evaluation["rows"] == alone.evaluation["rows"] == hyperparameters().validation_rows
    assert world.evaluation["val_bpb"] == pytest.approx(alone.evaluation["val_bpb"], rel=1e-6)


def test_tokens_that_never_occur_only_decay(world: Trained, prepared: Prepared) -> None:
    """Their embeddings' gradient is zero: AdamW leaves the product of 1 - rate·decay of the initial values."""
    given, begun = steady(), start()
    rows = Rows.of(prepared, "train")
    order = Order([block.rows for block in prepared.blocks("train")], seed=0)
    ids, _ = rows.pair(
        np.concatenate([order.step(step, given.batch_rows) for step in range(given.steps)])
    )
    unseen = np.setdiff1d(np.arange(given.vocab_size), ids)
    assert set(range(512, 640)) <= set(unseen.tolist()) < set(range(640))
    for name, group in (("wte", given.wte), ("value_embeds", given.value_embeds)):
        kept = math.prod(
            1 - group.lr * lr_multiplier(given, step) * group.decay for step in range(given.steps)
        )
        assert kept < 1 - 1e-4
        np.testing.assert_allclose(
            world.weights[name][..., unseen, :], kept * begun[name][..., unseen, :], rtol=1e-6
        )


def test_ranks_share_out_a_large_model_and_one_goes_on_with_it(
    tmp_path: Path, prepared: Prepared
) -> None:
    """Three ranks begin, one goes on from their checkpoint; 16 and 8 matrices do not divide by three. Rounding grows:
    after ten steps another micro-batch on one rank is as far off.
    """
    given = replace(
        WIDE(4, steps=15), batch_tokens=8 * WIDE.sequence_length, resid=OFF, x0=OFF, smear=OFF
    )
    shared = [given.parameters.transformer_matrices // 3, 3 * given.parameters.wte]
    assert min(shared) >= SHARED > given.depth * given.heads
    alone = trained(tmp_path / "alone", prepared, given, 1, 8)
    plan, home = plan_of(given, prepared), tmp_path / "others"
    first = make_attempt(home, plan, prepared, ranks=3, micro_batch=8, checkpoint_seconds=0)
    train_until(first, 3, "checkpoint")
    second = trained(home, prepared, given, 1, 8)
    stopped = len(log(first, "train"))
    assert log(first, "failed")[0]["reason"] == "interrupted"
    assert 1 <= stopped < 15
    assert len(second.losses) == 15 - stopped
    losses = [*(event["loss"] for event in log(first, "train")), *second.losses]
    assert losses[:10] == pytest.approx(alone.losses[:10], rel=1e-5)
    assert losses == pytest.approx(alone.losses, rel=1e-3)


@pytest.mark.soak
def test_scalars_train_alike_on_one_rank_and_on_four(tmp_path: Path, prepared: Prepared) -> None:
    """Four ranks for tensors of one and three elements. The first step, 1/55 of the way in ten steps of the warm-up,
    may go either way: see `steady`.
    """
    one = trained(tmp_path / "one", prepared, hyperparameters(), 1, 8)
    four = trained(tmp_path / "four", prepared, hyperparameters(), 4, 1)
    begun = start()
    assert four.losses == pytest.approx(one.losses, rel=1e-5)
    for name in SCALARS:
        assert distance(four.weights[name], one.weights[name]) < 0.1 * distance(
            one.weights[name], begun[name]
        )


@for_any(st.integers(1, 96), st.integers(1, 96), st.integers(0, 50), st.integers(1, 9))
def test_ranks_and_micro_batches_part_a_step_s_rows(
    batch_rows: int, ranks: int, step: int, micro_batch: int
) -> None:
    ranks = min(ranks, batch_rows)
    rows = Order([256, 256, 256, 232], 0).step(step, batch_rows)
    shares = [share(rows, rank, ranks) for rank in range(ranks)]
    pieces = [
        own[at : at + micro_batch] for own in shares for at in range(0, len(own), micro_batch)
    ]
    assert np.concatenate(pieces).tolist() == rows.tolist()
    assert {len(own) for own in shares} <= {batch_rows // ranks, -(-batch_rows // ranks)}


def test_steps_of_any_size_read_one_stream_of_rows() -> None:
    stream = Order([256, 256, 256, 232], 0).step(0, 960)
    for batch_rows in (1, 3, 8, 64):
        order = Order([256, 256, 256, 232], 0)
        read = [order.step(step, batch_rows) for step in range(960 // batch_rows)]
        assert np.concatenate(read).tolist() == stream.tolist()
