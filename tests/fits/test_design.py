"""Chosen runs beat evenly spaced ones, stay in budget, and warn where they rest on the prior."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from slm.fits import Point
from slm.fits.design import Design, DesignProblem, Goal, evenly_spaced, next_runs
from slm.fits.posterior import EXPONENTS, SHARES, SIGMA, SPREADS, TAU, information
from slm.fits.surface import fit_surface
from slm.recipe import pocket
from tests.calibrate.design import (
    SCENARIOS,
    Runs,
    candidate,
    isoflop,
    ladder,
    squared_errors,
    sweep,
)

MADE = ladder(2, 8)
DEEP = Goal("loss", candidate(pocket(12)))
BUDGET = 4 * sum(run.flops for run in MADE)
GRID = isoflop([run.flops for run in MADE[1::2]], range(2, 10))


def points(runs: Runs, floor: float = 1.0, noise: float = 0.002) -> list[Point]:
    """Runs on an additive surface, each with a seed of its problem."""
    draw = np.random.default_rng(0)
    return [
        Point(
            f"r{k}",
            "pocket",
            run.depth,
            run.params,
            run.tokens,
            run.flops,
            float(
                (floor + 30 * run.params**-0.35 + 50 * run.tokens**-0.3)
                * np.exp(noise * draw.standard_normal())
            ),
            k,
            None,
            "bpb=a",
        )
        for k, run in enumerate(runs)
    ]


def codes(design: Design) -> dict[str, str]:
    return {warning.code: warning.message for warning in design.warnings}


@pytest.mark.soak
def test_chosen_runs_beat_evenly_spaced_ones_at_the_true_surface() -> None:
    wins = []
    for kind, off_dial in SCENARIOS.values():
        draw = np.random.default_rng(1)
        for _ in range(12):
            problem = sweep(draw, kind, off_dial)
            chosen, even = problem.chosen(draw), problem.rivals()["all"]
            after, rival = (
                problem.truth.variance(problem.made + runs, problem.target)
                for runs in (chosen, even)
            )
            wins.append(after < rival)
    assert np.mean(wins) >= 0.8


def test_refits_with_the_chosen_runs_have_smaller_errors() -> None:
    draw, ratios = np.random.default_rng(2), []
    for _ in range(3):
        problem = sweep(draw, "params_exponent", True)
        ratios.append(squared_errors(problem, problem.chosen(draw), problem.rivals()["all"], draw))
    assert np.median(ratios) < 0.5


def test_a_run_removes_the_predicted_variance_and_further_seeds_remove_less() -> None:
    draw = np.random.default_rng(0)
    slopes = draw.standard_normal((1, 7, 6))
    gradients = draw.standard_normal((1, 6))
    problem = DesignProblem(slopes, gradients, np.ones(7), np.zeros(7), 1.0, 0.01)
    counts = np.array([1.0, 2, 0, 0, 1, 0, 3])
    for k, share in enumerate(problem.removed(counts)):
        more = counts + (np.arange(7) == k)
        assert share == pytest.approx(
            1 - problem.variance(more) / problem.variance(counts), rel=1e-6, abs=1e-10
        )
    gains = np.diff(information(np.arange(8.0), SIGMA))
    assert (np.diff(gains) < 0).all()
    assert information(np.array([1e9]), SIGMA) == pytest.approx(TAU**-2)


@pytest.mark.parametrize("times", [0.05, 0.5, 4, 40])
def test_designs_stay_in_budget_and_every_run_helps(times: float) -> None:
    budget = times * BUDGET
    design = next_runs(points(MADE), ladder(2, 11) + GRID, DEEP, budget)
    assert 0 < design.flops <= budget * (1 + 1e-9)
    assert [run.before for run in design.runs] == [
        design.before,
        *(run.after for run in design.runs[:-1]),
    ]
    assert all(run.after < run.before for run in design.runs)
    assert design.runs[-1].after == design.after < design.evenly_spaced


def test_runs_for_the_exponent_leave_the_dial_of_a_ladder() -> None:
    design = next_runs(points(MADE), ladder(2, 8) + GRID, Goal("params_exponent"), BUDGET)
    off = [
        abs(np.log(run.tokens / run.params / 16)) for run in (run.candidate for run in design.runs)
    ]
    assert np.mean(np.array(off) > 0.5) > 0.5
    assert design.after < 0.5 * min(design.before, design.evenly_spaced)
    assert "these runs would change" in codes(design)["one_dial_no_exponents"]
    assert "prior_rules" in codes(design)


def test_candidates_on_one_dial_give_a_warning_for_the_exponent() -> None:
    design = next_runs(points(MADE), ladder(2, 11), Goal("params_exponent"), BUDGET)
    assert design.after > 0.3 * design.prior
    assert "candidates at FLOPs budgets would help" in codes(design)["one_dial_no_exponents"]


def test_further_seeds_of_existing_runs_are_candidates() -> None:
    design = next_runs(points(MADE), MADE, DEEP, BUDGET)
    assert design.runs
    assert all(run.repeat for run in design.runs)
    first = next_runs(points(MADE), ladder(9, 9), DEEP, BUDGET).runs
    assert [run.repeat for run in first[:2]] == [False, True][: len(first)]


def test_runs_that_hardly_help_are_not_chosen() -> None:
    cheap = ladder(3, 3)
    design = next_runs(points(MADE * 4), cheap, DEEP, 100 * cheap[0].flops)
    assert len(design.runs) < 24
    assert "budget_left" in codes(design)


def test_runs_without_a_floor_do_not_rule_one_out() -> None:
    runs = points(MADE, floor=0.0, noise=0.0)
    design = next_runs(runs, ladder(2, 11), DEEP, BUDGET)
    assert DEEP.at is not None
    truth = points([DEEP.at], floor=0.0, noise=0.0)[0].loss
    assert abs(design.estimate - truth) < 2 * design.before
    assert design.before > 5 * SIGMA * truth / np.sqrt(len(runs))


def test_the_standard_deviation_matches_the_error() -> None:
    draw, scores = np.random.default_rng(4), []
    for _ in range(15):
        problem = sweep(draw, "loss", True)
        design = next_runs(problem.points(draw), problem.candidates, problem.target, problem.budget)
        scores.append(
            (design.estimate - problem.truth.value(problem.target, problem.truth.theta))
            / design.before
        )
    assert np.mean(np.abs(scores) < 2) >= 0.85
    assert np.mean(np.abs(scores) < 0.2) <= 0.5


def test_the_prior_covers_published_surfaces(reference: Path) -> None:
    folder = reference / "data/scaling"
    for path, params, loss in (
        ("chinchilla_epoch/points.csv", "params", "loss"),
        ("nanochat_isoflop/points_2026-01-26.csv", "params_effective", "val_bpb"),
        ("llama3_isoflop/points.csv", "params", "loss"),
    ):
        rows = [
            row
            for row in csv.DictReader((folder / path).read_text().splitlines())
            if row.get("excluded_by_epoch") != "1" and row.get("outlier") != "True"
        ]
        sizes = [(float(row[params]), float(row["tokens"]), float(row[loss])) for row in rows]
        runs = [
            Point(f"{k}", "s", 1, n, d, n * d, value, 0, None, "a")
            for k, (n, d, value) in enumerate(sizes)
        ]
        row = fit_surface(runs, "coupled").row
        mean = np.log([*SHARES, *EXPONENTS]) + np.mean(np.log([run.loss for run in runs])) * (
            np.arange(6) < 3
        )
        assert (np.abs(np.concatenate([row[:3], np.log(row[3:])]) - mean) < 2 * SPREADS).all()


def test_evenly_spaced_runs_spread_in_compute_and_spend_the_budget() -> None:
    runs = ladder(2, 11)
    even = evenly_spaced(runs, BUDGET)
    steps = np.diff(np.log(sorted({run.flops for run in even})))
    assert len(steps) == 4
    assert steps.max() / steps.min() < 3
    assert BUDGET - runs[0].flops <= sum(run.flops for run in even) <= BUDGET
    assert evenly_spaced(runs, runs[0].flops) == runs[:1]


def test_errors_name_the_value_and_the_remedy() -> None:
    could = ladder(2, 11)
    with pytest.raises(
        ValueError, match=r"2 distinct runs; a design needs 3: first run d2 compute-optimal"
    ):
        next_runs(points(MADE[:2] + MADE[:2]), could, DEEP, BUDGET)
    with pytest.raises(
        ValueError, match=r"budget of 10 FLOPs; the cheapest candidate is d2 compute-optimal \("
    ):
        next_runs(points(MADE), could, DEEP, 10)
    with pytest.raises(ValueError, match="no candidate"):
        next_runs(points(MADE), [], DEEP, BUDGET)
    with pytest.raises(ValueError, match="target is 'core'; known are loss, E"):
        Goal("core")
    with pytest.raises(ValueError, match="target loss needs a run"):
        Goal("loss")


@pytest.mark.parametrize("target", [DEEP, Goal("E"), Goal("params_exponent")])
def test_the_document_is_json_and_independent_of_the_order_of_runs(target: Goal) -> None:
    made, could = points(MADE + GRID[:6]), ladder(2, 11) + GRID
    document = next_runs(made, could, target, BUDGET).document()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    again = next_runs(
        [replace(run, run_id=f"x{run.run_id}") for run in made], could[::-1], target, BUDGET
    )
    assert again.after == pytest.approx(document["sd"]["after"], rel=1e-9)
