"""The recipe gives the published numbers, and one clear error for each invalid depth or horizon."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from slm.model.gpt import GPT
from slm.recipe import nanochat, pocket

PUBLISHED = {
    4: (256, 2, 36_700_242, 11_534_384, 8.0216e7),
    8: (512, 4, 125_829_354, 41_943_232, 2.9570e8),
    12: (768, 6, 286_261_730, 110_100_912, 7.5970e8),
    16: (1024, 8, 536_871_738, 234_881_792, 1.5855e9),
    20: (1280, 10, 896_533_746, 435_160_240, 2.8862e9),
    24: (1536, 12, 1_384_122_122, 729_810_624, 4.7752e9),
}


@pytest.mark.parametrize("depth", PUBLISHED)
def test_nanochat_has_the_published_counts(depth: int) -> None:
    hp = nanochat(depth)
    counts = (hp.width, hp.heads, hp.parameters.total, hp.parameters.scaling)
    assert counts == PUBLISHED[depth][:4]
    assert f"{hp.flops_per_token:.4e}" == f"{PUBLISHED[depth][4]:.4e}"


@pytest.mark.parametrize("recipe", [nanochat, pocket], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("depth", range(1, 33))
def test_closed_form_counts_equal_torch(recipe, depth: int) -> None:
    hp = recipe(depth)
    with torch.device("meta"):
        model = GPT(hp)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    counts = hp.parameters
    tables = {name: sizes.pop(name) for name in ("wte", "value_embeds", "lm_head")}
    assert tables == {name: getattr(counts, name) for name in tables}
    scalars = sum(sizes.pop(name) for name in ("resid", "x0", "smear_gate", "smear", "backout"))
    assert scalars == counts.scalars
    assert sum(sizes.values()) == counts.transformer_matrices


def test_windows_are_short_short_short_long_and_the_last_is_long() -> None:
    assert nanochat(6).windows == (512, 512, 512, 2048, 512, 2048)
    assert nanochat(1).windows == (2048,)


def test_reference_depth_has_the_reference_batch_rates_and_decay() -> None:
    hp = nanochat(12)
    assert hp.batch_tokens == 2**19
    assert hp.tokens_asked == 12 * hp.parameters.scaling
    assert hp.steps == hp.tokens_asked // 2**19
    assert (hp.matrix_lr, hp.matrix_decay) == (0.02, pytest.approx(0.28))
    assert (hp.lm_head.lr, hp.wte.lr, hp.value_embeds.lr) == (0.008, 0.3, 0.15)


def test_rates_and_decay_follow_batch_width_and_tokens() -> None:
    hp, reference = nanochat(24), nanochat(12)
    scale = math.sqrt(hp.batch_tokens / 2**19)
    assert hp.batch_tokens == 2**20
    assert hp.matrix_lr == pytest.approx(0.02 * scale)
    assert hp.wte.lr == pytest.approx(0.3 * scale * (hp.width / 768) ** -0.5)
    assert hp.resid.lr == pytest.approx(0.005 * scale)
    assert hp.smear.lr == 0.2
    assert hp.matrix_decay == pytest.approx(0.28 * scale * reference.tokens_asked / hp.tokens_asked)


def test_a_flops_budget_determines_tokens_first() -> None:
    hp = nanochat(12, flops=1e18)
    assert hp.tokens_asked == 1e18 / hp.flops_per_token
    assert hp.steps == round(hp.tokens_asked / hp.batch_tokens)
    assert hp.matrix_decay < nanochat(12, flops=5e17).matrix_decay


@pytest.mark.parametrize("steps", [1, 20, 500, 100_000])
def test_a_horizon_in_steps_keeps_the_batch_law(steps: int) -> None:
    hp = nanochat(12, steps=steps)
    assert hp.steps == steps
    assert hp.tokens_asked == hp.tokens
    law = 2**19 * (hp.tokens / nanochat(12).tokens_asked) ** 0.383
    assert hp.batch_tokens == max(2 ** round(math.log2(law)), nanochat.sequence_length)


def test_odd_and_huge_depths_have_an_integer_number_of_heads() -> None:
    assert (nanochat(13).width, nanochat(13).heads) == (896, 7)
    assert nanochat(2001).width % 128 == 0


@pytest.mark.parametrize(
    ("depth", "horizon", "text"),
    [
        (0, {}, "depth 0"),
        (-3, {}, "depth -3"),
        (4, {"steps": 0}, "steps 0"),
        (4, {"flops": 1.0}, "flops 1"),
        (4, {"flops": float("nan")}, "flops nan"),
        (4, {"ratio": 1e-9}, "ratio 1e-09"),
        (4, {"ratio": -1}, "ratio -1"),
        (4, {"flops": 1e18, "ratio": 8}, "flops and ratio"),
    ],
)
def test_an_invalid_depth_or_horizon_is_named_in_the_error(
    depth: int, horizon: dict[str, float], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        nanochat(depth, **horizon)


def test_a_variant_is_a_replaced_constant() -> None:
    assert replace(nanochat, aspect_ratio=96)(12).width == 1152
