"""What a comparison claims: known multipliers come back, equal recipes stay equal however often one looks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy import integrate, stats

from slm.fits.compare.comparison import Comparison, Trial, compare
from slm.fits.compare.decision import decide
from slm.fits.compare.e_values import ENOUGH, SCALES, e_value, joint, radius, shown
from slm.fits.compare.paired_core import paired_core
from slm.fits.csv_points import read_trials
from slm.fits.points import NotComparable

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


def found(
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
    return {caution.code for caution in fit.cautions}


@pytest.mark.parametrize("m", [0.5, 0.9, 1.0, 1.25, 2.0])
def test_a_known_multiplier_comes_back(m: float) -> None:
    """To the bend of the law that a quadratic misses, and at every depth."""
    fit = compare(ladder("b"), ladder("c", m), ("base", "change"))
    assert fit.multiplier.estimate == pytest.approx(m, rel=0.01 * abs(np.log(m)) + 1e-9)
    for own in fit.per_depth:
        assert own.multiplier.estimate == pytest.approx(m, rel=0.03 * abs(np.log(m)) + 1e-9)


def test_eight_depths_meet_the_reference() -> None:
    """1.252 ± .015 where the truth is 1.25, and 1.000 ± .015 for two equal recipes."""
    for m in (1.25, 1.0):
        estimates = [found(m, 1, seed).multiplier.estimate or np.nan for seed in range(100)]
        assert np.mean(estimates) == pytest.approx(m, abs=0.004)
        assert np.std(estimates) < 0.015


def test_what_a_depth_adds_to_both_recipes_cancels() -> None:
    misfit = 0.004 * np.array([1, -1, 1, 1, -1, -1, 1, -1])
    fit = compare(ladder("b", misfit=misfit), ladder("c", 1.1, misfit=misfit), ("base", "change"))
    assert fit.multiplier.estimate == pytest.approx(1.1, rel=0.01)
    assert fit.test.error < 1e-3


def test_compute_that_differs_between_the_recipes_is_accounted_for() -> None:
    """The same curve, met at other points of it."""
    fit = compare(ladder("b"), ladder("c", flops=1.3 * FLOPS), ("base", "change"))
    assert fit.multiplier.estimate == pytest.approx(1, abs=0.005)
    assert "compute_differs" in codes(fit)


def test_time_is_an_axis_like_compute() -> None:
    """Half the FLOPs per second and the same loss: 0.5 of the base's time for each of the candidate's."""
    base = [replace(own, seconds=own.flops / 1e9) for own in ladder("b")]
    slow = [replace(own, seconds=own.flops / 5e8) for own in ladder("c")]
    fit = compare(base, slow, ("base", "change"), "seconds")
    assert fit.multiplier.estimate == pytest.approx(0.5, rel=0.02)
    with pytest.raises(ValueError, match="run c0-0: seconds is not known"):
        compare(base, ladder("c"), ("base", "change"), "seconds")


@pytest.mark.parametrize(
    ("depths", "seeds", "m"), [(3, 2, 1.25), (5, 1, 1.0), (8, 1, 1.25), (5, 3, 1.05)]
)
def test_intervals_cover_the_truth_as_often_as_they_say(depths: int, seeds: int, m: float) -> None:
    fits = [found(m, seeds, seed, depths) for seed in range(150)]
    assert (
        0.90
        <= np.mean(
            [(fit.multiplier.low or 0) <= m <= (fit.multiplier.high or np.inf) for fit in fits]
        )
        <= 0.985
    )
    if seeds > 1:
        ends = [
            (own.multiplier.low or 0, own.multiplier.high or np.inf)
            for fit in fits
            for own in fit.per_depth
        ]
        assert 0.92 <= np.mean([low <= m <= high for low, high in ends]) <= 0.98


@pytest.mark.parametrize("depths", [3, 8])
def test_equal_recipes_stay_equal_however_often_one_looks(depths: int) -> None:
    """Six looks, with ever more seeds; a t test at each look is wrong far more often."""
    claims, significant, out, repetitions = 0, 0, 0, 80
    for seed in range(repetitions):
        draw, flops = np.random.default_rng(seed), np.geomspace(1e12, 1e15, depths)
        base, change = (ladder(name, 1.0, 10, NOISE, draw, flops) for name in "bc")
        looks = [
            compare(
                *([own for own in side if own.seed < n] for side in (base, change)),
                ("base", "change"),
            )
            for n in (1, 2, 3, 5, 7, 10)
        ]
        claims += any(fit.verdict.code not in ("equal", "cannot_tell") for fit in looks)
        significant += any((fit.evidence.p or 1) < 0.05 for fit in looks)
        out += any(
            not (fit.evidence.always.low or 0) <= 1 <= (fit.evidence.always.high or np.inf)
            for fit in looks
        )
    assert max(claims, out) / repetitions <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / repetitions)
    assert significant / repetitions > 0.1


def test_the_e_value_is_the_bayes_factor_of_the_t_statistic() -> None:
    """By another road: the density of t, mixed over effects, against that without one."""
    for t, free, information in ((2.5, 7, 4.0), (-4.0, 3, 1.5)):

        def density(
            effect: float, tau: float, t: float = t, free: int = free, own: float = information
        ) -> float:
            return float(
                stats.nct.pdf(t, free, effect * np.sqrt(own)) * stats.norm.pdf(effect, scale=tau)
            )

        mixed = [
            integrate.quad(density, -8 * tau, 8 * tau, args=(tau,), limit=400)[0] for tau in SCALES
        ]
        expected = np.mean(mixed) / stats.t.pdf(t, free)
        assert e_value(t, free, information) == pytest.approx(expected, rel=1e-4)


def test_the_interval_of_all_looks_ends_where_the_evidence_does() -> None:
    reach = radius(14, 5.0)
    assert reach is not None
    assert e_value(reach, 14, 5.0) == pytest.approx(ENOUGH)
    assert radius(1, 1.0) is None
    assert e_value(1e6, 0, 1.0) == 1


def test_depths_are_claimed_by_closed_testing() -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        parts = np.exp(draw.normal(2.5, 2, 5))
        together = joint(float(draw.choice([1.0, 200.0])), parts)
        sets = [own for size in range(1, 5) for own in combinations(range(5), size)]
        expected = [
            together >= ENOUGH
            and all(parts[list(own)].mean() >= ENOUGH for own in sets if k in own)
            for k in range(5)
        ]
        assert shown(parts, together).tolist() == expected


def test_better_at_every_depth() -> None:
    fit = found(1.25, 3, 0)
    assert fit.verdict.code == "better_every_depth"
    assert fit.verdict.sentence.startswith(
        "change is better than base at every depth: base would need 1.2"
    )
    assert found(0.8, 3, 0).verdict.code == "worse_every_depth"


def test_better_at_one_depth_only() -> None:
    fit = found(np.array([1, 1, 1, 1, 1.5, 1, 1, 1]), 4, 1)
    assert fit.verdict.code in ("better_some_depths", "better_overall")
    assert [own.depth for own in fit.per_depth if own.claim] == [12]
    assert "d12" in fit.verdict.sentence
    assert "depths_differ" in codes(fit)


def test_a_gain_that_shrinks_with_depth_is_said_to() -> None:
    fit = found(np.geomspace(1.8, 1.02, 8), 2, 0)
    assert fit.verdict.code == "gain_shrinks"
    assert "trend" in codes(fit)
    assert fit.trend is not None
    truth = np.log(1.02 / 1.8) / np.log(1e3)
    assert fit.trend.slope.low is not None
    assert fit.trend.slope.high is not None
    assert fit.trend.slope.low < truth < fit.trend.slope.high < 0


def test_a_gain_here_and_a_loss_there_is_mixed() -> None:
    fit = found(np.array([1.3, 1.3, 1, 1, 1, 1, 0.7, 0.7]), 4, 0)
    assert fit.verdict.code == "mixed"


def test_equal_recipes_with_seeds_enough_are_equal() -> None:
    fit = found(1.0, 5, 0)
    assert fit.verdict.code == "equal"
    assert "equal within" in fit.verdict.sentence


def test_without_repeated_seeds_no_depth_is_judged_alone() -> None:
    fit = found(1.25, 1, 0)
    assert fit.verdict.code == "better_overall"
    assert "no_replicates" in codes(fit)
    assert fit.homogeneity is None
    assert all(own.claim is None and own.multiplier.low is None for own in fit.per_depth)
    assert all(own.multiplier.estimate for own in fit.per_depth)


def test_seeds_that_would_decide_are_named_and_do() -> None:
    """Of comparisons that cannot tell, most can with the seeds that were asked for."""
    decided, asked = 0, 0
    for seed in range(60):
        draw, flops = np.random.default_rng(seed), np.geomspace(1e12, 1e15, 4)
        base, change = (
            ladder(name, m, 20, 0.002, draw, flops) for name, m in (("b", 1.0), ("c", 1.05))
        )
        first = [[own for own in side if own.seed < 2] for side in (base, change)]
        verdict = compare(*first, ("base", "change")).verdict
        if verdict.code != "cannot_tell" or verdict.advice is None:
            continue
        advice = verdict.advice
        assert (
            f"{'d' + str(advice.depth) if advice.depth else 'every depth'} would"
            in verdict.sentence
        )
        more = [
            [
                own
                for own in side
                if own.seed < 2 + advice.seeds * (advice.depth in (None, own.depth))
            ]
            for side in (base, change)
        ]
        asked += 1
        decided += compare(*more, ("base", "change")).verdict.code.startswith("better")
    assert asked > 10
    assert decided / asked > 0.3


def test_no_effect_takes_no_affordable_number_of_seeds() -> None:
    sentence = found(1.0, 2, 1, depths=3, noise=0.004).verdict.sentence
    assert "no affordable number of seeds" in sentence
    assert "the effect, if any, is below" in sentence


def test_runs_of_equal_seeds_are_compared_in_pairs() -> None:
    """Noise that both share by seed cancels, and the correlation is told."""
    draw = np.random.default_rng(0)
    shared = NOISE * draw.standard_normal((8, 3))
    sides = [
        [
            replace(own, loss=own.loss * float(np.exp(shared[(own.depth - 4) // 2, own.seed])))
            for own in ladder(name, 1.0, 3, NOISE / 5, draw)
        ]
        for name in "bc"
    ]
    paired = compare(*sides, ("base", "change"))
    apart = compare(
        sides[0], [replace(own, seed=own.seed + 9) for own in sides[1]], ("base", "change")
    )
    assert paired.gaps.correlation == pytest.approx(25 / 26, abs=0.05)
    assert apart.gaps.correlation is None
    assert paired.test.error < apart.test.error / 2


def test_missing_depths_are_named_and_shape_the_curve_alone() -> None:
    base, change = ladder("b"), ladder("c", 1.25)
    fit = compare(base[1:], change[:-1], ("base", "change"))
    assert fit.missing == {"base": [4], "candidate": [18]}
    assert [own.depth for own in fit.per_depth] == [6, 8, 10, 12, 14, 16]
    assert {"missing_depths"} <= codes(fit)
    assert fit.multiplier.estimate == pytest.approx(1.25, rel=0.005)


def test_a_base_that_compute_does_not_help_has_no_multiplier() -> None:
    flat = [
        replace(own, loss=2.0 * np.exp(0.001 * (-1) ** own.depth + 1e-4 * k))
        for k, own in enumerate(ladder("b"))
    ]
    lower = [replace(own, run_id=f"c{own.run_id}", loss=own.loss * 0.98) for own in flat]
    fit = compare(flat, lower, ("base", "change"))
    assert fit.multiplier.estimate is None
    assert "no_slope" in codes(fit)
    assert fit.difference.estimate == pytest.approx(np.log(0.98))
    with pytest.raises(NotComparable, match=r"at d4 the recipes differ 1[.]5 times in FLOPs"):
        compare(flat, [replace(own, flops=1.5 * own.flops) for own in lower], ("base", "change"))


def test_one_depth_says_which_loss_is_lower_and_no_multiplier() -> None:
    fit = found(1.25, 4, 0, depths=1)
    assert fit.verdict.code == "better_some_depths"
    assert "the only depth compared" in fit.verdict.sentence
    assert fit.multiplier.estimate is None
    assert "holds no noise" in found(1.25, 1, 0, depths=1).verdict.sentence


def test_a_loss_that_the_base_never_reaches_has_no_multiplier() -> None:
    far = [replace(own, loss=own.loss * 0.4) for own in ladder("c")]
    fit = compare(ladder("b"), far, ("base", "change"))
    assert fit.multiplier.estimate is None
    assert "out_of_reach" in codes(fit)
    assert fit.verdict.code == "better_overall"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda runs: [replace(own, comparison_key="bpb=b") for own in runs],
            NotComparable,
            "bpb: a .* against b",
        ),
        (
            lambda runs: [replace(own, depth=own.depth + 1) for own in runs],
            NotComparable,
            "no depth is shared",
        ),
        (lambda runs: runs[:1] + runs, ValueError, "run c0-0 is given twice"),
        (lambda runs: ladder("b"), ValueError, "run b0-0 is given twice"),
        (lambda runs: [], ValueError, "change has no finished run"),
        (
            lambda runs: [replace(own, depth=4) for own in runs],
            ValueError,
            "at d4: compare one ladder",
        ),
    ],
)
def test_what_is_not_comparable_is_refused(
    change: Callable[[list[Trial]], list[Trial]], error: type[ValueError], message: str
) -> None:
    with pytest.raises(error, match=message):
        compare(ladder("b"), change(ladder("c")), ("base", "change"))


def test_bad_numbers_and_axes_are_named() -> None:
    with pytest.raises(ValueError, match="run x: loss is nan"):
        Trial("x", 4, 0, 1e12, float("nan"))
    with pytest.raises(ValueError, match="axis is 'dollars'; known are flops, seconds"):
        found(1.0, 1, 0, axis="dollars")


@pytest.mark.parametrize("depths", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize("noise", [0.0, NOISE, 0.3])
def test_the_document_is_json_whatever_is_known(depths: int, seeds: int, noise: float) -> None:
    for m in (1.0, 1.25, 30.0):
        document = found(m, seeds, 0, depths, noise).document()
        assert json.loads(json.dumps(document, allow_nan=False)) == document
        assert [own["depth"] for own in document["per_depth"]] == [4 + 2 * k for k in range(depths)]


def test_the_order_of_the_runs_changes_nothing() -> None:
    draw = np.random.default_rng(0)
    sides = [ladder(name, 1.1, 2, NOISE, draw) for name in "bc"]
    first, second = (
        compare(*[side[::step] for side in sides], ("base", "change")) for step in (1, -1)
    )
    assert first.multiplier.document() == pytest.approx(second.multiplier.document())


def test_a_shown_whole_against_a_shown_depth_is_mixed() -> None:
    verdict = decide(("a", "b"), "so much", {4: None, 8: "worse"}, "better", None, None, True, None)
    assert verdict.code == "mixed"
    assert verdict.sentence == "b is better over all depths and worse at d8 than a: so much"


def test_trials_of_a_file_keep_its_order(tmp_path: Path) -> None:
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


def test_core_is_compared_example_by_example() -> None:
    """What both answer alike adds no noise; the cover is that of the standard error."""
    draw, baselines, hits = np.random.default_rng(0), {"a": 0.25, "b": 0.5}, 0
    truth = (0.04 / 0.75 + 0.06 / 0.5) / 2
    for _ in range(200):
        base, change = {}, {}
        for task, gain in (("a", 0.04), ("b", 0.06)):
            base[task] = draw.random(400) < 0.6
            change[task] = base[task] | (draw.random(400) < gain / 0.4)
        own = paired_core(base, change, baselines)
        assert own.low is not None
        assert own.high is not None
        hits += own.low <= truth <= own.high
    assert 0.9 <= hits / 200 <= 0.985
    assert paired_core(base, base, baselines).document() == {
        "estimate": 0,
        "low": 0,
        "high": 0,
        "identifiable": True,
    }
    with pytest.raises(ValueError, match="a: 400 and 399 examples"):
        paired_core(base, change | {"a": change["a"][1:]}, baselines)
