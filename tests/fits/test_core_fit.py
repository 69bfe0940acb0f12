"""Fits of CORE cover known truths, agree with published ones, and do not fit chance."""

from __future__ import annotations

import csv
import json
import re
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import special

from slm.fits import Point
from slm.fits.core_fit import GPT2, CoreFit, NoCoreFit, fit_core
from slm.fits.core_sigmoid import SEED_ERROR, TASKS, evaluation_error, run_error
from slm.fits.points import NotComparable
from slm.fits.power_law import ADDITIVE, PURE, Law, Noise, fit_law, noise_of

COMPUTE = np.geomspace(4e17, 1.1e19, 12)
"""A ladder of twelve depths."""


def loss_of(flops: np.ndarray) -> np.ndarray:
    return 0.49 + 0.44 * (flops / 3e18) ** -0.118


def core_of(loss: np.ndarray) -> np.ndarray:
    """Return about what nanochat's ladder gives: .08 at the smallest of COMPUTE, .165 at the
    largest."""
    return -0.01 + 0.81 * special.expit(5.2 * (0.62 - loss))


def ladder(
    flops: np.ndarray = COMPUTE,
    noise: float = 1.0,
    loss_noise: float = 0.001,
    seed: int = 0,
    form: str = ADDITIVE,
) -> tuple[list[Point], Law]:
    """Return runs of the truth above, with `noise` times a run's error in CORE, and their law."""
    draw = np.random.default_rng(seed)
    losses = loss_of(flops) * np.exp(loss_noise * draw.standard_normal(len(flops)))
    cores = core_of(loss_of(flops))
    cores = cores + noise * run_error(cores) * draw.standard_normal(len(flops))
    points = [
        Point(f"r{k}", "s", k + 1, 1e8, 1e9, c, loss, 0, None, "bpb=a", core=core)
        for k, (c, loss, core) in enumerate(zip(flops.tolist(), losses.tolist(), cores.tolist()))
    ]
    return points, fit_law(form, flops, losses, Noise(loss_noise, "known"))


def law_through(points: list[Point]) -> Law:
    flops, losses = (
        np.array([point.flops for point in points]),
        np.array([point.loss for point in points]),
    )
    return fit_law(ADDITIVE, flops, losses, noise_of(points, flops, losses, ADDITIVE))


def fitted(points: list[Point], law: Law | None) -> CoreFit:
    fit = fit_core(points, law)
    assert isinstance(fit, CoreFit), fit
    return fit


def code(points: list[Point], law: Law | None) -> str:
    refusal = fit_core(points, law)
    assert isinstance(refusal, NoCoreFit)
    return refusal.code


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_the_task_table_equals_the_bundle(reference: Path) -> None:
    with zipfile.ZipFile(reference / "core/core_bundle.zip") as bundle:
        config = bundle.read("eval_bundle/core.yaml").decode()
        files = dict(
            zip(re.findall(r"label: (\S+)", config), re.findall(r"dataset_uri: (\S+)", config))
        )
        table = csv.DictReader(bundle.read("eval_bundle/eval_meta_data.csv").decode().splitlines())
        base = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in table}
        counts = {
            name: bundle.read(f"eval_bundle/eval_data/{file}").count(b"\n")
            for name, file in files.items()
        }
    expected = [[counts[name], base[name]] for name in files]
    assert TASKS.tolist() == [pytest.approx(task) for task in expected]


def test_the_evaluation_error_is_close_to_the_published_one(reference: Path) -> None:
    """The published error uses GPT-2 1.5B's accuracy in each task, this one its CORE alone."""
    scores = json.loads((reference / "core/reference_scores.json").read_text())
    published = scores["sampling_se_of_core_at_gpt2xl_accuracies"]
    for name, cap in {"100/task": 100, "500/task": 500, "1000/task": 1000, "full": None}.items():
        error = float(evaluation_error(GPT2["GPT-2 1.5B"], cap))
        assert published[name] < error < 1.12 * published[name]


def test_the_seed_error_equals_that_of_published_replicates(reference: Path) -> None:
    runs = json.loads((reference / "core/reference_scores.json").read_text())["nanochat"]
    sets = [(run["core_sd"], run["n_seeds"] - 1) for run in runs if "core_sd" in run]
    free = sum(count for _, count in sets)
    assert (len(sets), free) == (4, 31)
    assert np.sqrt(sum(sd**2 * count for sd, count in sets) / free) == pytest.approx(
        SEED_ERROR, abs=5e-5
    )


def test_a_noise_free_curve_is_recovered() -> None:
    points, law = ladder(noise=0.0, loss_noise=1e-6)
    fit = fitted(points, law)
    inside = np.array([point.loss for point in points])
    assert fit.core(inside) == pytest.approx(core_of(inside), abs=0.002)
    assert fit.at(1e20).estimate == pytest.approx(float(core_of(loss_of(np.array(1e20)))), rel=0.05)
    assert fit.scale < 1
    assert not fit.at_chance


def test_intervals_have_their_nominal_coverage() -> None:
    """Cover the family and a further run at 1, 10 and 100 times the largest compute."""
    largest, draw = float(COMPUTE.max()), np.random.default_rng(9)
    hits, further, widths = np.zeros(3), np.zeros(3), np.zeros((40, 3))
    for seed in range(40):
        fit = fitted(*ladder(COMPUTE[::2], seed=seed))
        for k, factor in enumerate((1, 10, 100)):
            truth = float(core_of(loss_of(np.array(factor * largest))))
            run = truth + float(run_error(truth)) * draw.standard_normal()
            family, next_run = fit.at(factor * largest), fit.prediction(factor * largest)
            hits[k] += family.low <= truth <= family.high
            further[k] += next_run.low <= run <= next_run.high
            widths[seed, k] = family.high - family.low
    assert (hits / 40 >= 0.87).all()
    assert (further / 40 >= 0.87).all()
    assert (np.median(widths, 0) < (0.045, 0.12, 0.2)).all()


def test_intervals_widen_with_the_noise_of_either_step() -> None:
    """A worse law and a noisier CORE both widen the interval."""
    (quiet, sharp), (noisy, _), (_, blunt) = (
        ladder(noise=0.5),
        ladder(noise=2.0),
        ladder(loss_noise=0.005),
    )
    both, worse_core, worse_law = (
        fitted(*ladder_and_law).at(1e20)
        for ladder_and_law in ((quiet, sharp), (noisy, sharp), (quiet, blunt))
    )
    for worse in (worse_core, worse_law):
        assert worse.high - worse.low > 1.3 * (both.high - both.low)


def test_a_prediction_adds_the_noise_of_one_run() -> None:
    fit = fitted(*ladder(np.tile(COMPUTE, 8)))
    family, run = fit.at(3e18), fit.prediction(3e18)
    noise = ((run.high - run.low) ** 2 - (family.high - family.low) ** 2) ** 0.5
    assert noise == pytest.approx(
        2 * 1.96 * fit.scale * float(run_error(family.estimate)), rel=0.05
    )


def test_the_reach_is_the_band_read_sideways() -> None:
    fit = fitted(*ladder())
    reach = fit.reach(0.2)
    assert reach.extrapolated
    assert not fit.reach(0.12).extrapolated
    assert reach.flops.low < reach.flops.estimate < reach.flops.high
    for end, name in (("low", "high"), ("estimate", "estimate"), ("high", "low")):
        assert getattr(fit.at(getattr(reach.flops, end)), name) == pytest.approx(0.2, abs=1e-6)
    low, high = fit.band(np.array([1e19, 1e20]))
    assert [low[1], high[1]] == pytest.approx([fit.at(1e20).low, fit.at(1e20).high])
    assert fit.curve(np.array([1e20])) == pytest.approx(fit.at(1e20).estimate)


def test_a_floor_of_the_loss_may_put_a_core_out_of_reach() -> None:
    """The floor E = .49 is a CORE of .53: .2 is certain, .45 likely, .75 out of reach."""
    points, law = ladder(np.geomspace(1e17, 1e20, 24), noise=0.2, loss_noise=1e-4)
    fit = fitted(points, law)
    low, middle, high = (fit.reach(core) for core in (0.2, 0.45, 0.75))
    assert low.probability_never == 0
    assert low.flops.identifiable
    assert middle.probability_never < 0.5 < high.probability_never
    assert high.flops.estimate is None
    assert high.flops.high is None
    assert not high.flops.identifiable


def test_a_law_without_a_floor_gives_no_probability_of_never() -> None:
    fit = fitted(*ladder(loss_noise=0.01, form=PURE))
    assert fit.reach(0.2).probability_never is None


@pytest.mark.parametrize("core", [0.0, 0.03, 1.0, float("nan")])
def test_a_core_outside_the_range_is_an_error(core: float) -> None:
    with pytest.raises(ValueError, match=f"core is {core}"):
        fitted(*ladder()).reach(core)


@pytest.mark.parametrize("level", [-0.03, -0.01, 0.015])
def test_runs_at_chance_give_no_curve(level: float) -> None:
    """A pocket ladder: the loss falls while CORE stays at chance."""
    for seed in range(5):
        points, law = ladder(np.geomspace(1e13, 1e16, 8), seed=seed)
        noise = 0.011 * np.random.default_rng(seed).standard_normal(8)
        assert (
            code([replace(point, core=level + e) for point, e in zip(points, noise.tolist())], law)
            == "chance_level"
        )


def test_runs_without_a_curve_give_the_reason() -> None:
    points, law = ladder()
    assert code(points, None) == "too_few_runs"
    assert code([replace(point, core=None) for point in points], law) == "too_few_core_runs"
    assert (
        code([*points[:2], *(replace(point, core=None) for point in points[2:])], law)
        == "too_few_core_runs"
    )
    assert code([replace(point, core=0.15) for point in points], law) == "core_flat"
    assert (
        code(
            [replace(point, core=opposite.core) for point, opposite in zip(points, points[::-1])],
            law,
        )
        == "core_flat"
    )
    with pytest.raises(NotComparable):
        fit_core([*points[1:], replace(points[0], comparison_key="bpb=b")], law)


def test_runs_at_chance_weigh_as_one_run() -> None:
    points, law = ladder(np.geomspace(1e15, 1.1e19, 14))
    few = fitted(points, law)
    again = [
        replace(point, run_id=f"{point.run_id}-{k}") for point in few.at_chance for k in range(20)
    ]
    many = fitted(points + again, law)
    assert len(many.at_chance) == 21 * len(few.at_chance) > 21
    for one, other in ((few.at(1e20), many.at(1e20)), (few.floor, many.floor)):
        assert other.high - other.low == pytest.approx(one.high - one.low, rel=0.15)
        assert other.estimate == pytest.approx(one.estimate, abs=0.005)
    assert "chance_level" in {warning.code for warning in few.warnings}


def test_a_run_drawn_low_is_not_at_chance() -> None:
    points, law = ladder()
    fit = fitted([*points[:6], replace(points[6], core=0.02), *points[7:]], law)
    assert not fit.at_chance


def test_one_outlier_hardly_moves_the_curve() -> None:
    """Seven errors away; squares would move it by .019."""
    points, law = ladder(noise=0.3)
    wild = [replace(points[0], core=points[0].core - 0.06), *points[1:]]
    assert fitted(wild, law).at(1e20).estimate == pytest.approx(
        fitted(points, law).at(1e20).estimate, abs=0.01
    )


def test_replicates_narrow_the_curve_and_determine_its_noise() -> None:
    flops = np.tile(COMPUTE, 8)
    once, eight = fitted(*ladder()), fitted(*ladder(flops))
    single, narrow = once.at(1e19), eight.at(1e19)
    assert narrow.high - narrow.low < 0.5 * (single.high - single.low)
    assert eight.scale == pytest.approx(1, abs=0.15)
    loud = fitted(*ladder(flops, noise=2.0))
    assert loud.scale == pytest.approx(2, abs=0.4)
    assert "core_misfit" in {warning.code for warning in loud.warnings}
    assert "core_misfit" not in {warning.code for warning in eight.warnings}


@pytest.fixture
def gadre(reference: Path) -> dict[str, list[Point]]:
    """Runs of Gadre et al. 2024 by their data; loss in nats, CORE with DCLM's corrected
    baselines."""
    table = rows(reference / "data/scaling/gadre_overtraining/c4_rpj_small.csv")
    points: dict[str, list[Point]] = {"c4_original": [], "rpj": []}
    for k, row in enumerate(table):
        params, tokens, flops, loss, core = (
            float(row[name]) for name in ("params", "tokens", "flops_6nd", "loss_c4_val", "core")
        )
        points[row["dataset"]].append(
            Point(f"g{k}", "g", k + 1, params, tokens, flops, loss, 0, None, "c4", core=core)
        )
    return points


@pytest.mark.parametrize(("data", "error"), [("c4_original", 0.21), ("rpj", 0.17)])
def test_small_runs_predict_the_core_of_a_large_one(
    gadre: dict[str, list[Point]], data: str, error: float
) -> None:
    """Predict 1.4B at 2.5e20 FLOPs from runs below 3e19 FLOPs."""
    cheap = [point for point in gadre[data] if point.flops < 3e19]
    (large,) = (point for point in gadre[data] if point.params > 1e9)
    fit = fitted(
        cheap, law_through([point for point in cheap if 9 < point.tokens / point.params < 41])
    )
    interval = fit.prediction(large.flops)
    assert interval.low <= large.core <= interval.high
    assert interval.high - interval.low < 0.13
    assert abs(fit.at(large.flops).estimate / large.core - 1) < error


@pytest.mark.parametrize("data", ["c4_original", "rpj"])
def test_the_sigmoid_of_all_smaller_runs_predicts_the_large_one(
    gadre: dict[str, list[Point]], data: str
) -> None:
    (large,) = (point for point in gadre[data] if point.params > 1e9)
    small = [point for point in gadre[data] if point is not large]
    fit = fitted(
        small, law_through([point for point in small if 9 < point.tokens / point.params < 41])
    )
    assert float(fit.core(large.loss)) == pytest.approx(large.core, rel=0.02)
    assert fit.floor.high < 0, "a floor of 0 is not the chance of these models"
    assert fit.misfit > 0.01


@pytest.fixture
def nanochat(reference: Path) -> list[Point]:
    """The miniseries of January 2026, d10 to d20; C = 6·N·D of the published N and D."""
    table = rows(reference / "data/nanochat/karpathy/miniseries_v1_2026-01-07.csv")
    points = []
    for row in table:
        depth, params, tokens = (
            int(row["depth"]),
            float(row["params_M"]) * 1e6,
            float(row["tokens_B"]) * 1e9,
        )
        loss, core = float(row["val_bpb"]), float(row["core"])
        points.append(
            Point(
                f"d{depth}",
                "nanochat",
                depth,
                params,
                tokens,
                6 * params * tokens,
                loss,
                0,
                None,
                "fe",
                core=core,
            )
        )
    return points


def test_nanochat_reaches_gpt2_at_the_published_compute(
    reference: Path, nanochat: list[Point]
) -> None:
    """Compare with nanochat's own extrapolation, and with the d24 that was trained afterwards."""
    fit = fitted(nanochat, law_through(nanochat))
    published = {
        row["target"]: float(row["flops"])
        for row in rows(reference / "data/nanochat/karpathy/miniseries_v1_extrapolation.csv")
    }
    for name, label in (
        ("GPT-2 355M", "GPT-2 Medium (355M)"),
        ("GPT-2 774M", "GPT-2 Large (774M)"),
    ):
        flops = fit.reach(GPT2[name]).flops
        assert flops.low < published[label] < flops.high
    reach = fit.reach(GPT2["GPT-2 1.5B"])
    assert reach.extrapolated
    assert reach.flops.estimate == pytest.approx(1.7e20, rel=0.1)
    assert reach.flops.low < published["GPT-2 XL (1.6B)"] == 2.9e20 < reach.flops.high
    (first,) = (
        row
        for row in rows(reference / "data/nanochat/karpathy/leaderboard_2026-07-03.csv")
        if row["run"] == "1"
    )
    assert float(fit.core(float(first["val_bpb"]))) == pytest.approx(
        float(first["core"]), abs=0.008
    )


def test_the_smaller_half_of_nanochat_predicts_the_larger(nanochat: list[Point]) -> None:
    small = [point for point in nanochat if point.depth <= 15]
    fit = fitted(small, law_through(small))
    for point in nanochat[len(small) :]:
        interval = fit.prediction(point.flops)
        assert interval.low <= point.core <= interval.high


def test_the_document_is_json() -> None:
    for points, law in (
        ladder(),
        ladder(np.geomspace(1e15, 1.1e19, 14)),
        ladder(COMPUTE[::3], form=PURE),
    ):
        fit = fitted(points, law)
        document = fit.document()
        assert json.loads(json.dumps(document, allow_nan=False)) == document
        assert set(document["reach"]) == set(GPT2)
        assert not document["top"]["identifiable"]
        codes = {warning.code for warning in fit.warnings}
        assert {"core_unidentified", "core_extrapolation"} <= codes
