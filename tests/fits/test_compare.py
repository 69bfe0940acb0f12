"""Comparisons recover known multipliers, and equal recipes stay equal however often one looks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy import integrate, stats

from slm.exchange.point_files import read_trials
from slm.fits.compare.comparison import compare
from slm.fits.compare.decision import decide
from slm.fits.compare.e_values import (
    CLAIM_THRESHOLD,
    EFFECT_SCALES,
    closed_test,
    combined_e_value,
    e_value,
    sequence_radius,
)
from slm.fits.compare.paired_core import paired_core
from slm.fits.compare.result import Comparison
from slm.fits.compare.trials import Trial
from slm.fits.points import NotComparable
from slm.fits.types import to_json

FLOPS = np.geomspace(1e12, 1e15, 8)
NOISE = 0.0012


def law(flops: np.ndarray | float) -> np.ndarray:
    return 0.7 + 50 * np.asarray(flops) ** -0.15


def ladder(
    name: str,
    m: float | np.ndarray = 1.0,
    seeds: int = 1,
    noise: float = 0.0,
    draw: np.random.Generator | None = None,
    flops: np.ndarray = FLOPS,
    misfit: np.ndarray | float = 0.0,
) -> list[Trial]:
    """Runs of depths 4, 6, … whose loss is that of m times the compute."""
    depths = len(flops)
    normal = (
        (draw or np.random.default_rng(0)).standard_normal((depths, seeds))
        if noise
        else np.zeros((depths, seeds))
    )
    losses = (law(flops * m) * np.exp(misfit * np.ones(depths)))[:, None] * np.exp(noise * normal)
    return [
        Trial(
            f"{name}{k}-{seed}",
            4 + 2 * k,
            seed,
            float(flops[k]),
            float(losses[k, seed]),
            comparison_key="bpb=a",
        )
        for k in range(depths)
        for seed in range(seeds)
    ]


def compared(
    m: float | np.ndarray,
    seeds: int,
    seed: int,
    depths: int = 8,
    noise: float = NOISE,
    axis: str = "flops",
) -> Comparison:
    draw, flops = np.random.default_rng(seed), np.geomspace(1e12, 1e15, depths)
    sides = ladder("b", 1.0, seeds, noise, draw, flops), ladder("c", m, seeds, noise, draw, flops)
    return compare(*sides, ("base", "change"), axis)


def codes(fit: Comparison) -> set[str]:
    return {warning.code for warning in fit.warnings}


@pytest.mark.parametrize("m", [0.5, 0.9, 1.0, 1.25, 2.0])
def test_a_known_multiplier_comes_back(m: float) -> None:
    """Exact up to the bend of the law that a quadratic misses, at every depth too."""
    fit = compare(ladder("b"), ladder("c", m), ("base", "change"))
    assert fit.multiplier.estimate == pytest.approx(m, rel=0.01 * abs(np.log(m)) + 1e-9)
    for effect in fit.per_depth:
        assert effect.multiplier.estimate == pytest.approx(m, rel=0.03 * abs(np.log(m)) + 1e-9)


def test_the_scatter_over_eight_depths_is_that_of_the_reference() -> None:
    """Reference: 1.252 ± .015 for a truth of 1.25, and 1.000 ± .015 for two equal recipes."""
    for m in (1.25, 1.0):
        estimates = [compared(m, 1, seed).multiplier.estimate or np.nan for seed in range(100)]
        assert np.mean(estimates) == pytest.approx(m, abs=0.004)
        assert np.std(estimates) < 0.015


def test_a_misfit_common_to_both_recipes_cancels() -> None:
    misfit = 0.004 * np.array([1, -1, 1, 1, -1, -1, 1, -1])
    fit = compare(ladder("b", misfit=misfit), ladder("c", 1.1, misfit=misfit), ("base", "change"))
    assert fit.multiplier.estimate == pytest.approx(1.1, rel=0.01)
    assert fit.pooled.error < 1e-3


def test_a_difference_in_compute_is_accounted_for() -> None:
    """Both recipes have the same curve, sampled at different compute."""
    fit = compare(ladder("b"), ladder("c", flops=1.3 * FLOPS), ("base", "change"))
    assert fit.multiplier.estimate == pytest.approx(1, abs=0.005)
    assert "compute_differs" in codes(fit)


def test_the_multiplier_may_be_of_training_time() -> None:
    """Half the FLOPs per second at equal loss is a multiplier of 0.5 in time."""
    base = [replace(trial, seconds=trial.flops / 1e9) for trial in ladder("b")]
    slow = [replace(trial, seconds=trial.flops / 5e8) for trial in ladder("c")]
    fit = compare(base, slow, ("base", "change"), "seconds")
    assert fit.multiplier.estimate == pytest.approx(0.5, rel=0.02)
    with pytest.raises(ValueError, match="run c0-0: seconds is not known"):
        compare(base, ladder("c"), ("base", "change"), "seconds")


@pytest.mark.parametrize(
    ("depths", "seeds", "m"), [(3, 2, 1.25), (5, 1, 1.0), (8, 1, 1.25), (5, 3, 1.05)]
)
def test_intervals_have_their_nominal_coverage(depths: int, seeds: int, m: float) -> None:
    fits = [compared(m, seeds, seed, depths) for seed in range(150)]
    assert (
        0.90
        <= np.mean(
            [(fit.multiplier.low or 0) <= m <= (fit.multiplier.high or np.inf) for fit in fits]
        )
        <= 0.985
    )
    if seeds > 1:
        ends = [
            (effect.multiplier.low or 0, effect.multiplier.high or np.inf)
            for fit in fits
            for effect in fit.per_depth
        ]
        assert 0.92 <= np.mean([low <= m <= high for low, high in ends]) <= 0.98


@pytest.mark.parametrize("depths", [3, 8])
def test_repeated_looks_do_not_raise_the_rate_of_false_claims(depths: int) -> None:
    """Six looks with more seeds each; a t test at each look is wrong more often than its level."""
    claims, significant, out, repetitions = 0, 0, 0, 80
    for seed in range(repetitions):
        draw, flops = np.random.default_rng(seed), np.geomspace(1e12, 1e15, depths)
        base, change = (ladder(name, 1.0, 10, NOISE, draw, flops) for name in "bc")
        looks = [
            compare(
                *([trial for trial in side if trial.seed < n] for side in (base, change)),
                ("base", "change"),
            )
            for n in (1, 2, 3, 5, 7, 10)
        ]
        claims += any(fit.decision.code not in ("equal", "cannot_tell") for fit in looks)
        significant += any((fit.evidence.p or 1) < 0.05 for fit in looks)
        out += any(
            not (fit.evidence.confidence_sequence.low or 0)
            <= 1
            <= (fit.evidence.confidence_sequence.high or np.inf)
            for fit in looks
        )
    assert max(claims, out) / repetitions <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / repetitions)
    assert significant / repetitions > 0.1


def test_the_e_value_is_the_bayes_factor_of_the_t_statistic() -> None:
    """Check against the density of t, mixed over effects, over that without an effect."""
    for t, free, information in ((2.5, 7, 4.0), (-4.0, 3, 1.5)):

        def density(
            effect: float, tau: float, t: float = t, free: int = free, scale: float = information
        ) -> float:
            return float(
                stats.nct.pdf(t, free, effect * np.sqrt(scale)) * stats.norm.pdf(effect, scale=tau)
            )

        mixed = [
            integrate.quad(density, -8 * tau, 8 * tau, args=(tau,), limit=400)[0]
            for tau in EFFECT_SCALES
        ]
        expected = np.mean(mixed) / stats.t.pdf(t, free)
        assert e_value(t, free, information) == pytest.approx(expected, rel=1e-4)


def test_the_confidence_sequence_ends_where_the_e_value_reaches_the_threshold() -> None:
    reach = sequence_radius(14, 5.0)
    assert reach is not None
    assert e_value(reach, 14, 5.0) == pytest.approx(CLAIM_THRESHOLD)
    assert sequence_radius(1, 1.0) is None
    assert e_value(1e6, 0, 1.0) == 1


def test_closed_testing_equals_its_definition_over_all_sets() -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        e_values = np.exp(draw.normal(2.5, 2, 5))
        combined = combined_e_value(float(draw.choice([1.0, 200.0])), e_values)
        sets = [members for size in range(1, 5) for members in combinations(range(5), size)]
        expected = [
            combined >= CLAIM_THRESHOLD
            and all(
                e_values[list(members)].mean() >= CLAIM_THRESHOLD
                for members in sets
                if k in members
            )
            for k in range(5)
        ]
        assert closed_test(e_values, combined).tolist() == expected


def test_a_large_gain_is_better_at_every_depth() -> None:
    fit = compared(1.25, 3, 0)
    assert fit.decision.code == "better_every_depth"
    assert fit.decision.sentence.startswith(
        "change is better than base at every depth: base would need 1.2"
    )
    assert compared(0.8, 3, 0).decision.code == "worse_every_depth"


def test_a_gain_at_one_depth_is_claimed_there_only() -> None:
    fit = compared(np.array([1, 1, 1, 1, 1.5, 1, 1, 1]), 4, 1)
    assert fit.decision.code in ("better_some_depths", "better_overall")
    assert [effect.depth for effect in fit.per_depth if effect.claim] == [12]
    assert "d12" in fit.decision.sentence
    assert "depths_differ" in codes(fit)


def test_a_gain_that_shrinks_with_depth_is_detected() -> None:
    fit = compared(np.geomspace(1.8, 1.02, 8), 2, 0)
    assert fit.decision.code == "gain_shrinks"
    assert "trend" in codes(fit)
    assert fit.trend is not None
    truth = np.log(1.02 / 1.8) / np.log(1e3)
    assert fit.trend.slope.low is not None
    assert fit.trend.slope.high is not None
    assert fit.trend.slope.low < truth < fit.trend.slope.high < 0


def test_a_gain_at_small_and_a_loss_at_large_depths_is_mixed() -> None:
    fit = compared(np.array([1.3, 1.3, 1, 1, 1, 1, 0.7, 0.7]), 4, 0)
    assert fit.decision.code == "mixed"


def test_equal_recipes_with_five_seeds_are_equal() -> None:
    fit = compared(1.0, 5, 0)
    assert fit.decision.code == "equal"
    assert "equal within" in fit.decision.sentence


def test_without_replicate_seeds_no_single_depth_is_claimed() -> None:
    fit = compared(1.25, 1, 0)
    assert fit.decision.code == "better_overall"
    assert "no_replicates" in codes(fit)
    assert fit.heterogeneity is None
    assert all(effect.claim is None and effect.multiplier.low is None for effect in fit.per_depth)
    assert all(effect.multiplier.estimate for effect in fit.per_depth)


def test_advised_seeds_often_decide() -> None:
    """Many undecided comparisons are decided with the advised seeds."""
    decided, advised = 0, 0
    for seed in range(60):
        draw, flops = np.random.default_rng(seed), np.geomspace(1e12, 1e15, 4)
        base, change = (
            ladder(name, m, 20, 0.002, draw, flops) for name, m in (("b", 1.0), ("c", 1.05))
        )
        first = [[trial for trial in side if trial.seed < 2] for side in (base, change)]
        decision = compare(*first, ("base", "change")).decision
        if decision.code != "cannot_tell" or decision.advice is None:
            continue
        advice = decision.advice
        assert (
            f"{'d' + str(advice.depth) if advice.depth else 'every depth'} should decide"
            in decision.sentence
        )
        more = [
            [
                trial
                for trial in side
                if trial.seed < 2 + advice.seeds * (advice.depth in (None, trial.depth))
            ]
            for side in (base, change)
        ]
        advised += 1
        decided += compare(*more, ("base", "change")).decision.code.startswith("better")
    assert advised > 10
    assert decided / advised > 0.3


def test_no_seeds_are_advised_without_an_effect() -> None:
    sentence = compared(1.0, 2, 1, depths=3, noise=0.004).decision.sentence
    assert "no affordable number of seeds" in sentence
    assert "the effect, if any, is below" in sentence


def test_pairing_equal_seeds_removes_their_shared_noise() -> None:
    """Noise that both recipes share by seed cancels, and its correlation is reported."""
    draw = np.random.default_rng(0)
    shared = NOISE * draw.standard_normal((8, 3))
    sides = [
        [
            replace(
                trial, loss=trial.loss * float(np.exp(shared[(trial.depth - 4) // 2, trial.seed]))
            )
            for trial in ladder(name, 1.0, 3, NOISE / 5, draw)
        ]
        for name in "bc"
    ]
    paired = compare(*sides, ("base", "change"))
    apart = compare(
        sides[0], [replace(trial, seed=trial.seed + 9) for trial in sides[1]], ("base", "change")
    )
    assert paired.differences.correlation == pytest.approx(25 / 26, abs=0.05)
    assert apart.differences.correlation is None
    assert paired.pooled.error < apart.pooled.error / 2


def test_missing_depths_are_named_and_only_shape_the_curve() -> None:
    base, change = ladder("b"), ladder("c", 1.25)
    fit = compare(base[1:], change[:-1], ("base", "change"))
    assert fit.missing == {"base": [4], "candidate": [18]}
    assert [effect.depth for effect in fit.per_depth] == [6, 8, 10, 12, 14, 16]
    assert {"missing_depths"} <= codes(fit)
    assert fit.multiplier.estimate == pytest.approx(1.25, rel=0.005)


def test_a_flat_base_has_no_multiplier() -> None:
    flat = [
        replace(trial, loss=2.0 * np.exp(0.001 * (-1) ** trial.depth + 1e-4 * k))
        for k, trial in enumerate(ladder("b"))
    ]
    lower = [replace(trial, run_id=f"c{trial.run_id}", loss=trial.loss * 0.98) for trial in flat]
    fit = compare(flat, lower, ("base", "change"))
    assert fit.multiplier.estimate is None
    assert "no_slope" in codes(fit)
    assert fit.difference.estimate == pytest.approx(np.log(0.98))
    with pytest.raises(NotComparable, match=r"at d4 the recipes differ 1[.]5 times in FLOPs"):
        compare(
            flat, [replace(trial, flops=1.5 * trial.flops) for trial in lower], ("base", "change")
        )


def test_a_single_depth_gives_a_decision_without_a_multiplier() -> None:
    fit = compared(1.25, 4, 0, depths=1)
    assert fit.decision.code == "better_some_depths"
    assert "the only depth compared" in fit.decision.sentence
    assert fit.multiplier.estimate is None
    assert "gives no noise estimate" in compared(1.25, 1, 0, depths=1).decision.sentence


def test_an_unreachable_loss_has_no_multiplier() -> None:
    unreachable = [replace(trial, loss=trial.loss * 0.4) for trial in ladder("c")]
    fit = compare(ladder("b"), unreachable, ("base", "change"))
    assert fit.multiplier.estimate is None
    assert "out_of_reach" in codes(fit)
    assert fit.decision.code == "better_overall"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda runs: [replace(trial, comparison_key="bpb=b") for trial in runs],
            NotComparable,
            "bpb: a .* against b",
        ),
        (
            lambda runs: [replace(trial, depth=trial.depth + 1) for trial in runs],
            NotComparable,
            "share no depth",
        ),
        (lambda runs: runs[:1] + runs, ValueError, "run c0-0 is given twice"),
        (lambda runs: ladder("b"), ValueError, "run b0-0 is given twice"),
        (lambda runs: [], ValueError, "change has no finished run"),
        (
            lambda runs: [replace(trial, depth=4) for trial in runs],
            ValueError,
            "at d4: compare one ladder",
        ),
    ],
)
def test_incomparable_runs_are_refused(
    change: Callable[[list[Trial]], list[Trial]], error: type[ValueError], message: str
) -> None:
    with pytest.raises(error, match=message):
        compare(ladder("b"), change(ladder("c")), ("base", "change"))


def test_bad_numbers_and_axes_are_named() -> None:
    with pytest.raises(ValueError, match="run x: loss is nan"):
        Trial("x", 4, 0, 1e12, float("nan"))
    with pytest.raises(ValueError, match="axis is 'dollars'; known are flops, seconds"):
        compared(1.0, 1, 0, axis="dollars")


@pytest.mark.parametrize("depths", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize("noise", [0.0, NOISE, 0.3])
def test_the_document_is_json_for_any_result(depths: int, seeds: int, noise: float) -> None:
    for m in (1.0, 1.25, 30.0):
        document = compared(m, seeds, 0, depths, noise).document()
        assert json.loads(json.dumps(document, allow_nan=False)) == document
        assert [effect["depth"] for effect in document["per_depth"]] == [
            4 + 2 * k for k in range(depths)
        ]


def test_the_order_of_the_runs_changes_nothing() -> None:
    draw = np.random.default_rng(0)
    sides = [ladder(name, 1.1, 2, NOISE, draw) for name in "bc"]
    first, second = (
        compare(*[side[::step] for side in sides], ("base", "change")) for step in (1, -1)
    )
    assert to_json(first.multiplier) == pytest.approx(to_json(second.multiplier))


def test_a_pooled_claim_against_a_claim_at_one_depth_is_mixed() -> None:
    fit = compared(1.25, 3, 0, depths=2)
    first, second = fit.per_depth
    opposed = replace(fit, per_depth=(replace(first, claim=None), replace(second, claim="worse")))
    decision = decide(opposed)
    assert decision.code == "mixed"
    assert decision.sentence.startswith(
        "change is better over all depths and worse at d6 than base: base would need 1.2"
    )


def test_recipes_of_a_csv_file_keep_their_order(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(
        "recipe,depth,flops,val_bpb,seed\nwide,4,1e12,1.5,0\nwide,8,1e13,1.3,1\nnarrow,4,1e12,1.6,0\n"
    )
    trials = read_trials(path, {"loss": "val_bpb"})
    assert list(trials) == ["wide", "narrow"]
    assert trials["wide"][1] == Trial("line 3", 8, 1, 1e13, 1.3, None, "runs")
    path.write_text("recipe,depth,flops,loss\na,4,1e12,1.5\n")
    with pytest.raises(ValueError, match="takes two recipes; the file has a"):
        read_trials(path)
    path.write_text("recipe,depth,flops,loss\na,4,1e12,-1\n")
    with pytest.raises(ValueError, match=r"line 2: run line 2: loss is -1[.]0"):
        read_trials(path)


def test_core_is_compared_on_paired_examples() -> None:
    """Examples that both answer alike add no noise; coverage is nominal."""
    draw, baselines, hits = np.random.default_rng(0), {"a": 0.25, "b": 0.5}, 0
    truth = (0.04 / 0.75 + 0.06 / 0.5) / 2
    for _ in range(200):
        base, change = {}, {}
        for task, gain in (("a", 0.04), ("b", 0.06)):
            base[task] = draw.random(400) < 0.6
            change[task] = base[task] | (draw.random(400) < gain / 0.4)
        interval = paired_core(base, change, baselines)
        assert interval.low is not None
        assert interval.high is not None
        hits += interval.low <= truth <= interval.high
    assert 0.9 <= hits / 200 <= 0.985
    assert to_json(paired_core(base, base, baselines)) == {
        "estimate": 0,
        "low": 0,
        "high": 0,
        "identifiable": True,
    }
    with pytest.raises(ValueError, match="a: 400 and 399 examples"):
        paired_core(base, change | {"a": change["a"][1:]}, baselines)
