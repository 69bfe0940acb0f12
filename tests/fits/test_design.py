"""What the next runs claim: they beat evenly spaced ones, keep the budget, and say what rests on the prior alone."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from slm.fits import Point, fit_surface
from slm.fits.design import Board, Design, Goal, evenly, next_runs
from slm.fits.posterior import EXPONENTS, SHARES, SIGMA, SPREADS, TAU, weight
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
    """Runs on an additive surface, each with a seed of its own."""
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
    return {caution.code: caution.message for caution in design.cautions}


def test_the_choice_beats_evenly_spaced_runs_of_equal_flops_at_the_true_surface() -> None:
    wins = []
    for kind, off_dial in SCENARIOS.values():
        draw = np.random.default_rng(1)
        for _ in range(12):
            own = sweep(draw, kind, off_dial)
            chosen, even = own.chosen(draw), own.rivals()["all"]
            after, rival = (
                own.truth.variance(own.made + runs, own.target) for runs in (chosen, even)
            )
            wins.append(after < rival)
    assert np.mean(wins) >= 0.8


def test_refits_to_the_chosen_runs_err_less() -> None:
    draw, ratios = np.random.default_rng(2), []
    for _ in range(3):
        own = sweep(draw, "params_exponent", True)
        ratios.append(squared_errors(own, own.chosen(draw), own.rivals()["all"], draw))
    assert np.median(ratios) < 0.5


def test_a_run_removes_what_it_is_said_to_and_seeds_of_it_less_and_less() -> None:
    draw = np.random.default_rng(0)
    board = Board(draw.standard_normal((1, 7, 6)), np.ones(7), draw.standard_normal((1, 6)), 0.01)
    counts = np.array([1.0, 2, 0, 0, 1, 0, 3])
    for k, share in enumerate(board.removed(counts)):
        more = counts + (np.arange(7) == k)
        assert share == pytest.approx(
            1 - board.variance(more) / board.variance(counts), rel=1e-6, abs=1e-10
        )
    gains = np.diff(weight(np.arange(8.0), SIGMA))
    assert (np.diff(gains) < 0).all()
    assert weight(np.array([1e9]), SIGMA) == pytest.approx(TAU**-2)


@pytest.mark.parametrize("times", [0.05, 0.5, 4, 40])
def test_the_budget_is_kept_and_every_pick_helps(times: float) -> None:
    budget = times * BUDGET
    found = next_runs(points(MADE), ladder(2, 11) + GRID, DEEP, budget)
    assert 0 < found.flops <= budget * (1 + 1e-9)
    assert [pick.before for pick in found.picks] == [
        found.before,
        *(pick.after for pick in found.picks[:-1]),
    ]
    assert all(pick.after < pick.before for pick in found.picks)
    assert found.picks[-1].after == found.after < found.evenly


def test_a_ladder_asked_for_the_exponent_is_sent_off_its_dial() -> None:
    found = next_runs(points(MADE), ladder(2, 8) + GRID, Goal("params_exponent"), BUDGET)
    off = [
        abs(np.log(run.tokens / run.params / 16))
        for run in (pick.candidate for pick in found.picks)
    ]
    assert np.mean(np.array(off) > 0.5) > 0.5
    assert found.after < 0.5 * min(found.before, found.evenly)
    assert "these runs would end" in codes(found)["one_dial_no_exponents"]
    assert "prior_rules" in codes(found)


def test_candidates_on_the_dial_do_not_tell_the_exponent_and_that_is_said() -> None:
    found = next_runs(points(MADE), ladder(2, 11), Goal("params_exponent"), BUDGET)
    assert found.after > 0.3 * found.prior
    assert "candidates at FLOPs budgets would tell" in codes(found)["one_dial_no_exponents"]


def test_seeds_of_runs_there_are_count_as_candidates() -> None:
    found = next_runs(points(MADE), MADE, DEEP, BUDGET)
    assert found.picks
    assert all(pick.repeat for pick in found.picks)
    first = next_runs(points(MADE), ladder(9, 9), DEEP, BUDGET).picks
    assert [pick.repeat for pick in first[:2]] == [False, True][: len(first)]


def test_what_hardly_helps_is_not_proposed() -> None:
    cheap = ladder(3, 3)
    found = next_runs(points(MADE * 4), cheap, DEEP, 100 * cheap[0].flops)
    assert len(found.picks) < 24
    assert "budget_left" in codes(found)


def test_a_floor_is_not_ruled_out_because_the_runs_show_none() -> None:
    runs = points(MADE, floor=0.0, noise=0.0)
    found = next_runs(runs, ladder(2, 11), DEEP, BUDGET)
    assert DEEP.at is not None
    truth = points([DEEP.at], floor=0.0, noise=0.0)[0].loss
    assert abs(found.estimate - truth) < 2 * found.before
    assert found.before > 5 * SIGMA * truth / np.sqrt(len(runs))


def test_the_standard_deviation_is_the_size_of_the_error() -> None:
    draw, scores = np.random.default_rng(4), []
    for _ in range(15):
        own = sweep(draw, "loss", True)
        found = next_runs(own.points(draw), own.candidates, own.target, own.budget)
        scores.append(
            (found.estimate - own.truth.value(own.target, own.truth.theta)) / found.before
        )
    assert np.mean(np.abs(scores) < 2) >= 0.85
    assert np.mean(np.abs(scores) < 0.2) <= 0.5


def test_the_prior_holds_published_surfaces(reference: Path) -> None:
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
            Point(f"{k}", "s", 1, n, d, n * d, own, 0, None, "a")
            for k, (n, d, own) in enumerate(sizes)
        ]
        row = fit_surface(runs, "coupled").row
        mean = np.log([*SHARES, *EXPONENTS]) + np.mean(np.log([run.loss for run in runs])) * (
            np.arange(6) < 3
        )
        assert (np.abs(np.concatenate([row[:3], np.log(row[3:])]) - mean) < 2 * SPREADS).all()


def test_even_runs_are_spread_in_compute_and_spend_the_budget() -> None:
    runs = ladder(2, 11)
    found = evenly(runs, BUDGET)
    steps = np.diff(np.log(sorted({run.flops for run in found})))
    assert len(steps) == 4
    assert steps.max() / steps.min() < 3
    assert BUDGET - runs[0].flops <= sum(run.flops for run in found) <= BUDGET
    assert evenly(runs, runs[0].flops) == runs[:1]


def test_refusals_name_the_value_and_the_way_out() -> None:
    could = ladder(2, 11)
    with pytest.raises(
        ValueError, match=r"2 different runs; a design stands on 3: first run d2 compute-optimal"
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
    with pytest.raises(ValueError, match="target loss takes"):
        Goal("loss")


@pytest.mark.parametrize("target", [DEEP, Goal("E"), Goal("params_exponent")])
def test_the_document_is_json_and_the_order_of_runs_changes_nothing(target: Goal) -> None:
    made, could = points(MADE + GRID[:6]), ladder(2, 11) + GRID
    document = next_runs(made, could, target, BUDGET).document()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    again = next_runs(
        [replace(run, run_id=f"x{run.run_id}") for run in made], could[::-1], target, BUDGET
    )
    assert again.after == pytest.approx(document["sd"]["after"], rel=1e-9)
