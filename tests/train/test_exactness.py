"""The trainer's model and optimiser compute what the recipe says, by a second implementation
(plain.py) in float64.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, mm_flop

from slm.data.loader import Rows
from slm.evaluate.bpb import validation_loss
from slm.model import attention
from slm.model.gpt import GPT
from slm.model.ranks import Ranks
from slm.recipe import AdamW, Hyperparameters, nanochat, pocket
from slm.train.optimizer import Optimizer, _AdamW, lr_multiplier, muon_decay, muon_momentum
from tests import plain

CASES = [(1, "SSSL"), (2, "SSSL"), (3, "L"), (3, "SL"), (5, "SSSL"), (5, "LS")]
TINY = replace(pocket, sequence_length=512, vocab_size=100, warmup_steps=3, momentum_warmup_steps=4)
"""Short windows of 128 in a context of 512; a vocabulary that needs padding; ten steps hold every
phase."""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute in float64 what the trainer computes in float32 whatever the model's dtype (logits,
    norms).
    """
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def hyperparameters(depth: int, pattern: str) -> Hyperparameters:
    hp = replace(TINY, window_pattern=pattern)(depth, steps=10)
    return replace(hp, matrix_decay=0.5)


def random_model(hp: Hyperparameters) -> GPT:
    """Return a float64 model with every parameter moved from its start, so that none is zero."""
    model = GPT(hp)
    model.initialise(seed=1)
    model.double()
    model.set_compute_dtype(torch.float64)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
    model.cos, model.sin = (x[:, None] for x in plain.rotation(hp.sequence_length, hp.head_dim))
    return model


def rows(hp: Hyperparameters, length: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(
        hp.vocab_size, (2, length + 1), generator=torch.Generator().manual_seed(3)
    )
    return tokens[:, :-1], tokens[:, 1:]


def unstack(hp: Hyperparameters, stacks: dict[str, Tensor]) -> plain.Parameters:
    """Return the trainer's stacks (parameters or gradients) as the single tensors of plain.py."""
    unstacked = ("wte", "lm_head", "resid", "x0", "smear_gate", "smear", "backout")
    single = {name: stacks[name] for name in unstacked}
    for layer in range(hp.depth):
        for index, name in enumerate(("query", "key", "value")):
            single[f"{name}.{layer}"] = stacks["attention_in"][layer, index]
        single[f"out.{layer}"] = stacks["attention_out"][layer]
        single[f"up.{layer}"] = stacks["mlp_up"][layer]
        single[f"down.{layer}"] = stacks["mlp_down"][layer].mT
    tables = [layer for layer in range(hp.depth) if plain.has_value_embedding(layer, hp.depth)]
    for table, layer in enumerate(tables):
        single[f"value_embeds.{layer}"] = stacks["value_embeds"][table]
        single[f"gate.{layer}"] = stacks["value_gates"][table]
    assert sum(x.numel() for x in single.values()) == sum(x.numel() for x in stacks.values())
    return {name: tensor.detach().clone() for name, tensor in single.items()}


def parameters_of(model: GPT) -> plain.Parameters:
    return unstack(model.hp, dict(model.named_parameters()))


def gradients_of(model: GPT) -> plain.Parameters:
    gradients = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return unstack(model.hp, gradients)


def plain_gradients(hp: Hyperparameters, pattern: str, parameters: plain.Parameters, ids, targets):
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in parameters.items()}
    loss = plain.losses(hp, pattern, leaves, ids, targets).mean()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def largest_error(
    hp: Hyperparameters, tensors: plain.Parameters, expected: plain.Parameters
) -> float:
    """Return the largest relative distance of two tensors of one name.

    Below depth 3 backout is left out: there it scales the stream just before a norm, which undoes
    it, so that its gradient is rounding error, which AdamW makes a full step.
    """
    assert tensors.keys() == expected.keys()
    names = expected.keys() - ({"backout"} if hp.depth < 3 else set())
    errors = [(tensors[name] - expected[name]).norm() / expected[name].norm() for name in names]
    return max(error.item() for error in errors)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("depth", "pattern"), CASES)
def test_logits_and_losses_are_those_of_the_recipe(depth: int, pattern: str) -> None:
    hp = hyperparameters(depth, pattern)
    model, (ids, targets) = random_model(hp), rows(hp, 512)
    parameters = parameters_of(model)
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids), plain.logits(hp, pattern, parameters, ids), rtol=1e-12, atol=1e-11
        )
        losses = plain.losses(hp, pattern, parameters, ids, targets)
        torch.testing.assert_close(model.losses(ids, targets), losses, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(model.loss(ids, targets), losses.sum(), rtol=1e-12, atol=0)


def test_float32_logits_are_those_of_the_recipe_rounded() -> None:
    hp = hyperparameters(5, "SSSL")
    exact, (ids, _) = random_model(hp), rows(hp, 512)
    model = GPT(hp)
    model.load_state_dict(exact.state_dict())
    expected = plain.logits(hp, "SSSL", parameters_of(exact), ids).float()
    torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("depth", "pattern"), CASES)
def test_gradients_are_those_of_the_recipe(depth: int, pattern: str) -> None:
    hp = hyperparameters(depth, pattern)
    model, (ids, targets) = random_model(hp), rows(hp, 512)
    (model.loss(ids, targets) / ids.numel()).backward()
    expected = plain_gradients(hp, pattern, parameters_of(model), ids, targets)
    assert largest_error(hp, gradients_of(model), expected) < 1e-12


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("depth", [1, 2])
def test_backout_has_no_gradient_below_depth_3(depth: int) -> None:
    hp = hyperparameters(depth, "SSSL")
    model = random_model(hp)
    model.loss(*rows(hp, 128)).backward()
    assert model.backout.grad is not None
    assert abs(model.backout.grad.item()) < 1e-12


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("depth", "pattern"), CASES)
def test_ten_steps_are_those_of_the_recipe(depth: int, pattern: str) -> None:
    """Neither optimiser depends on the gradient's scale, but for guards against zero, which 1e8
    makes negligible.
    """
    hp = hyperparameters(depth, pattern)
    model, (ids, targets) = random_model(hp), rows(hp, 160)
    optimizer = Optimizer(model)
    parameters = parameters_of(model)
    optimiser = plain.Optimiser(hp, parameters)
    for step in range(hp.steps):
        optimizer.zero_grad()
        (1e8 / ids.numel() * model.loss(ids, targets)).backward()
        optimizer.step(step)
        gradients = plain_gradients(hp, pattern, parameters, ids, targets)
        optimiser.step(step, {name: 1e8 * gradient for name, gradient in gradients.items()})
    assert largest_error(hp, parameters_of(model), parameters) < 1e-9


@pytest.mark.usefixtures("float64")
def test_a_window_sees_the_token_itself_and_the_window_before_it() -> None:
    """Depth 2 has a short and a long layer; the long one and smear are disabled."""
    hp = hyperparameters(2, "S")
    model, (ids, _) = random_model(hp), rows(hp, 512)
    with torch.no_grad():
        model.smear.zero_()
        model.attention_out[1] = 0
        changed = ids.clone()
        changed[:, 100] = (ids[:, 100] + 1) % hp.vocab_size
        differs = (model.features(ids) != model.features(changed)).any(-1)
    assert hp.windows == (128, 512)
    assert [row.nonzero().flatten().tolist() for row in differs] == [
        list(range(100, 100 + 128 + 1))
    ] * 2


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("depth", "pattern"), CASES)
def test_a_later_token_changes_nothing_before_it(depth: int, pattern: str) -> None:
    hp = hyperparameters(depth, pattern)
    model, (ids, _) = random_model(hp), rows(hp, 256)
    changed = ids.clone()
    changed[:, 200] = (ids[:, 200] + 1) % hp.vocab_size
    with torch.no_grad():
        before, after = model(ids), model(changed)
    assert torch.equal(before[:, :200], after[:, :200])
    assert (before[:, 200:] != after[:, 200:]).any(-1).all()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.soak
def test_compiling_breaks_no_graph_and_changes_no_gradient() -> None:
    """The trainer's compilation without the code generator, which takes half a minute."""
    hp = hyperparameters(5, "SSSL")
    model, (ids, targets) = random_model(hp), rows(hp, 512)
    loss = model.loss(ids, targets)
    loss.backward()
    expected = gradients_of(model)
    model.zero_grad()
    compiled = torch.compile(model.loss, fullgraph=True, dynamic=False, backend="aot_eager")(
        ids, targets
    )
    compiled.backward()
    assert compiled.item() == pytest.approx(loss.item(), rel=1e-12)
    assert largest_error(hp, gradients_of(model), expected) < 1e-10


NORMAL, UNIFORM = (3.0, 24.0), (1.8, 2.2)
"""Kurtosis of a distribution, and the variance of a sample's kurtosis times its size (rounded
up)."""


@pytest.mark.parametrize("depth", [1, 4, 5])
def test_every_parameter_starts_as_the_recipe_says(depth: int) -> None:
    """Mean, deviation and kurtosis within five standard errors; a uniform draw within its bounds
    and close to them.
    """
    hp = pocket(depth)
    model = GPT(hp)
    model.initialise(seed=7)
    std = hp.width**-0.5
    drawn = {
        "wte": (0, 0.8, NORMAL),
        "lm_head": (0, 0.001, NORMAL),
        "query": (0, std, UNIFORM),
        "key": (0, std, UNIFORM),
        "value": (0, std, UNIFORM),
        "up": (0, 0.4 * std, UNIFORM),
        "value_embeds": (0, std, UNIFORM),
        "gate": (0.01, 0.01 / 3**0.5, UNIFORM),
        "smear_gate": (0.01, 0.01 / 3**0.5, UNIFORM),
    }
    for name, tensor in parameters_of(model).items():
        if name.split(".")[0] in drawn:
            assert_drawn(tensor.double(), *drawn[name.split(".")[0]])
    assert not model.attention_out.any()
    assert not model.mlp_down.any()
    assert not model.smear.any()
    assert model.backout.tolist() == pytest.approx([0.2])
    share = [layer / max(depth - 1, 1) for layer in range(depth)]
    assert model.resid.tolist() == pytest.approx([1.15 - 0.10 * x for x in share])
    assert model.x0.tolist() == pytest.approx([0.20 - 0.15 * x for x in share])


def assert_drawn(sample: Tensor, mean: float, deviation: float, shape: tuple[float, float]) -> None:
    size, (kurtosis, spread) = sample.numel(), shape
    standard = (sample - mean) / deviation
    assert abs(standard.mean()) < 5 / size**0.5
    assert abs((standard**2).mean() - 1) < 5 * ((kurtosis - 1) / size) ** 0.5
    if size > 1000:
        assert (
            abs((standard**4).mean() / (standard**2).mean() ** 2 - kurtosis)
            < 5 * (spread / size) ** 0.5
        )
    if shape is UNIFORM:
        assert 3**0.5 * (1 - 20 / size) < standard.abs().max() < 3**0.5 * (1 + 1e-6)


def test_the_learning_rate_warms_up_stays_and_falls_to_a_twentieth() -> None:
    hp = nanochat(12, steps=2000)
    shares = {
        0: 1 / 40,
        19: 0.5,
        39: 1,
        40: 1,
        700: 1,
        1350: 0.525,
        1999: 0.05 + 0.95 / 1300,
        2000: 0.05,
    }
    assert {step: lr_multiplier(hp, step) for step in shares} == pytest.approx(shares)


def test_momentum_rises_over_400_steps_and_falls_over_the_warm_down() -> None:
    hp = nanochat(12, steps=2000)
    momenta = {0: 0.85, 200: 0.91, 400: 0.97, 700: 0.97, 1350: 0.935, 2000: 0.90}
    assert {step: muon_momentum(hp, step) for step in momenta} == pytest.approx(momenta)


def test_momentum_rises_over_400_steps_when_the_warm_down_starts_before() -> None:
    hp = nanochat(12, steps=1000)
    momenta = {349: 0.9547, 351: 0.9553, 380: 0.964, 400: 0.97 - 0.07 * 50 / 650, 1000: 0.90}
    assert {step: muon_momentum(hp, step) for step in momenta} == pytest.approx(momenta)


def test_the_decay_of_matrices_falls_to_zero_as_a_cosine() -> None:
    hp = nanochat(12)
    shares = {0: 1, hp.steps // 4: 0.5 + 0.5**1.5, hp.steps // 2: 0.5, hp.steps: 0}
    assert {step: muon_decay(hp, step) / 0.28 for step in shares} == pytest.approx(shares)


def test_every_parameter_is_in_one_group_with_the_recipe_s_settings() -> None:
    hp = nanochat(12)
    adamw = {
        "lm_head": AdamW(0.008, 0.8, 0.96, 0.01),
        "wte": AdamW(0.3, 0.8, 0.995, 0.001),
        "value_embeds": AdamW(0.15, 0.8, 0.995, 0.01),
        "resid": AdamW(0.005, 0.8, 0.95, 0.05),
        "x0": AdamW(0.5, 0.96, 0.95, 0),
        "smear_gate": AdamW(0.2, 0.8, 0.95, 0),
        "smear": AdamW(0.2, 0.8, 0.95, 0),
        "backout": AdamW(0.2, 0.8, 0.95, 0),
    }
    model = GPT(replace(hp, depth=1, width=128, heads=1, vocab_size=64, windows=(2048,)))
    muon: list[str] = []
    settings: dict[str, AdamW] = {}
    for update in Optimizer(model)._updates:
        if isinstance(update, _AdamW):
            settings |= update.settings
        else:
            muon += update.buffer.spans
    assert sorted([*muon, *settings]) == sorted(name for name, _ in model.named_parameters())
    assert settings == adamw
    assert (hp.matrix_lr, hp.matrix_beta2, hp.matrix_decay) == (
        0.02,
        0.9,
        pytest.approx(0.28),
    )


@pytest.mark.parametrize(("depth", "pattern"), CASES)
def test_flops_are_those_torch_counts(
    depth: int, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward. torch counts the whole (T, T) square of attention in every layer, the
    recipe counts `window` keys a token (and halves nothing for causality); torch leaves out the
    smear gate, a product with a vector.
    """
    hp = hyperparameters(depth, pattern)
    model, (ids, targets) = GPT(hp), rows(hp, 512)
    model.initialise(seed=1)
    monkeypatch.setitem(
        attention._kernels, ("cpu", torch.float32), "sdpa"
    )  # the band is no operator that torch counts
    counted = {torch.ops.aten.addmm_: lambda total, *product, **_: mm_flop(*product)}
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping=counted) as counter,
    ):
        model.loss(ids, targets).backward()
    unseen = sum(12 * hp.width * (512 - window) for window in hp.windows)
    smear_gate = 6 * min(24, hp.width)
    assert counter.get_total_flops() == ids.numel() * (hp.flops_per_token + unseen - smear_gate)


@pytest.mark.usefixtures("float64")
def test_val_bpb_is_nats_over_bytes_of_targets_that_have_bytes(tmp_path: Path) -> None:
    hp = hyperparameters(3, "SL")
    model = random_model(hp)
    tokens = np.random.default_rng(5).integers(
        hp.vocab_size, size=(5, hp.sequence_length + 1), dtype=np.uint16
    )
    tokens.tofile(tmp_path / "rows.bin")
    sizes = torch.arange(hp.vocab_size) % 7  # 0, as of special tokens, for one in seven
    val_bpb, val_loss = validation_loss(
        model,
        Rows([tmp_path / "rows.bin"], tokens.shape[1], "uint16"),
        sizes,
        Ranks(),
        2 * hp.sequence_length,
    )
    nats = size = total = 0.0
    parameters = parameters_of(model)
    for row in torch.from_numpy(tokens.astype(np.int64)):
        scores = plain.logits(hp, "SL", parameters, row[None, :-1])[0].tolist()
        for logits, target in zip(scores, row[1:].tolist(), strict=True):
            loss = math.log(sum(map(math.exp, logits))) - logits[target]
            total += loss
            if sizes[target]:
                nats += loss
                size += int(sizes[target])
    assert val_bpb == pytest.approx(nats / size / math.log(2), rel=1e-12)
    assert val_loss == pytest.approx(total / (5 * hp.sequence_length), rel=1e-12)
