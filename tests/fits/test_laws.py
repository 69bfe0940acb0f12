"""Laws and isoFLOP curves recover known truths and published optima, and report their limits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from slm.fits import (
    ADDITIVE,
    CurveFit,
    Interval,
    NotComparable,
    Point,
    Target,
    fit_curves,
    summary,
    tables,
)
from slm.fits.isoflop import fit_isoflop
from slm.fits.ladder import select_law
from slm.fits.power_law import PURE, fit_law, noise_of
from slm.fits.select import HeldOutRun, HoldOut, validated_factor
from tests import reproduce

FLOPS = np.geomspace(1e12, 1e15, 8)
E, K, P = 0.7, 50.0, 0.15


def ladder(losses: np.ndarray, flops: np.ndarray = FLOPS, seed: int = 0) -> list[Point]:
    """Compute-optimal runs, one depth each."""
    return [
        Point(
            f"l{depth}-{seed}",
            "pocket",
            depth + 2,
            1e4 * 2**depth,
            2e5 * 2**depth,
            c,
            loss,
            seed,
            None,
            "bpb=a",
        )
        for depth, (c, loss) in enumerate(zip(flops.tolist(), losses.tolist()))
    ]


def law(flops: np.ndarray = FLOPS, floor: float = E) -> np.ndarray:
    return floor + K * flops**-P


def grid(
    budgets: tuple[float, ...] = (1e14, 1e15, 1e16),
    sizes: np.ndarray | None = None,
    loss: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> list[Point]:
    """Runs of C = 6·N·D on a surface with N* = (C/6)^0.5 / 4, N* and D* growing as C^0.5."""
    points = []
    for budget in budgets:
        optimum = np.sqrt(budget / 6) / 4
        params = optimum * np.geomspace(1 / 3, 3, 7) if sizes is None else sizes
        tokens = budget / 6 / params
        losses = (
            1 + (params**-0.3 + 16**-0.3 * 16**0.6 * tokens**-0.3)
            if loss is None
            else loss(params, tokens)
        )
        points += [
            Point(f"g{budget:g}-{k}", "pocket", k + 2, n, d, budget, measured, 0, budget, "bpb=a")
            for k, (n, d, measured) in enumerate(
                zip(params.tolist(), tokens.tolist(), losses.tolist())
            )
        ]
    return points


@pytest.fixture
def published(reference: Path) -> list[Point]:
    """nanochat's 28 isoFLOP runs."""
    return reproduce.nanochat(reference)


def codes(fit: CurveFit) -> set[str]:
    return {warning["code"] for warning in fit.document()["warnings"]}


def test_a_noise_free_law_comes_back_exactly() -> None:
    fit = fit_curves(ladder(law())).document()["power_law"]
    assert fit["form"] == ADDITIVE
    for name, truth in (("E", E), ("K", K), ("p", P)):
        assert fit[name]["estimate"] == pytest.approx(truth, rel=1e-6)
        assert fit[name]["high"] - fit[name]["low"] < 1e-5 * truth


def test_a_noisy_law_holds_the_truth_and_one_wild_run_does_not_move_it() -> None:
    noise = np.random.default_rng(3).standard_normal(16)
    points = ladder(law() * np.exp(0.002 * noise[:8])) + ladder(
        law() * np.exp(0.002 * noise[8:]), seed=1
    )
    points[2] = replace(points[2], loss=points[2].loss * 1.1)
    fit = fit_curves(points).law
    assert fit is not None
    assert fit.noise.source == "replicate seeds"
    for interval, truth in ((fit.E, E), (fit.K, K), (fit.p, P)):
        assert interval.low is not None
        assert interval.high is not None
        assert interval.low < truth < interval.high
    assert fit.p.estimate == pytest.approx(P, rel=0.1)


@pytest.mark.soak
def test_intervals_of_the_law_have_nominal_coverage() -> None:
    draw, hits = np.random.default_rng(0), np.zeros(4)
    top = FLOPS[-1:]
    for _ in range(200):
        losses = law() * np.exp(0.002 * draw.standard_normal(8))
        fit = fit_law(ADDITIVE, FLOPS, losses, noise_of([], FLOPS, losses, ADDITIVE))
        slope = -P * K * float(top[0]) ** -P / float(law(top)[0])
        pairs = ((fit.p, P), (fit.E, E), (fit.slope(float(top[0])), slope))
        low, high = fit.band(top)
        hits[:3] += [(end.low or 0) <= truth <= (end.high or 0) for end, truth in pairs]
        hits[3] += bool(low <= law(top) <= high)
    assert (hits / 200 >= 0.90).all()
    assert (hits / 200 <= 0.99).all()


def test_interval_ends_of_p_are_worse_by_the_f_quantile() -> None:
    """The best law at each end, found by another optimiser, meets the definition."""
    from scipy import optimize, stats

    losses = law() * np.exp(0.002 * np.random.default_rng(5).standard_normal(8))
    fit = fit_law(ADDITIVE, FLOPS, losses, noise_of([], FLOPS, losses, ADDITIVE))
    delta = fit.noise.delta

    def best(p: float) -> float:
        def residuals(theta: np.ndarray) -> np.ndarray:
            model = np.exp(theta[0]) + np.exp(theta[1]) * (FLOPS / fit.reference) ** -p
            return np.asarray(np.log(losses / model) / delta)

        return (
            float(optimize.least_squares(residuals, np.log(fit.best[:2]), loss="huber").cost)
            * delta**2
        )

    limit = fit.objective * (1 + stats.f.ppf(0.95, 1, 5) / 5)
    assert fit.p.low is not None
    assert fit.p.high is not None
    assert best(fit.p.low) == pytest.approx(limit, rel=1e-4)
    assert best(fit.p.high) == pytest.approx(limit, rel=1e-4)


def test_a_pure_power_law_warns_that_it_holds_no_floor() -> None:
    losses = law(floor=0.0) * np.exp(0.003 * np.random.default_rng(1).standard_normal(8))
    fit = fit_curves(ladder(losses))
    assert fit.document()["selected"]["form"] == PURE
    assert "E_unidentified" in codes(fit)
    rival = fit.document()["rival"]
    assert rival["E"]["low"] == 0
    assert not rival["E"]["identifiable"]


def test_a_loss_that_does_not_fall_with_compute_is_reported_as_no_gain() -> None:
    losses = 2 * np.exp(0.01 * np.random.default_rng(0).standard_normal(8))
    fit = fit_curves(ladder(losses))
    assert "no_gain" in codes(fit)
    assert summary(fit).startswith("The runs do not show that compute helps")
    rising = fit_curves(ladder(1.5 * (FLOPS / 1e12) ** 0.05)).document()
    assert rising["power_law"]["p"]["estimate"] == pytest.approx(-0.05)


def test_the_selected_law_predicts_the_held_out_largest_compute_best() -> None:
    fit = fit_curves(
        ladder(law() * np.exp(0.001 * np.random.default_rng(2).standard_normal(8)))
    ).document()
    errors = fit["selected"]["errors"]
    assert fit["selected"]["form"] == min(errors, key=errors.get) == ADDITIVE


def test_each_hold_out_fits_the_smaller_runs_and_predicts_the_larger() -> None:
    fit = fit_curves(
        ladder(law() * np.exp(0.001 * np.random.default_rng(2).standard_normal(8)))
    ).document()
    hold_outs = fit["validation"]
    assert [hold_out["flops"] for hold_out in hold_outs] == FLOPS[3:-1].tolist()
    assert [hold_out["held"] for hold_out in hold_outs] == [4, 3, 2, 1]
    assert hold_outs[0]["factor"] == pytest.approx(FLOPS[-1] / FLOPS[3])
    for hold_out in hold_outs:
        assert hold_out["predicted"][0]["low"] < hold_out["predicted"][0]["estimate"]


@pytest.mark.soak
def test_intervals_of_held_out_runs_have_nominal_coverage() -> None:
    draw, covered = np.random.default_rng(4), []
    for _ in range(15):
        losses = law(floor=0.0) * np.exp(0.003 * draw.standard_normal(8))
        for hold_out in select_law(ladder(losses), "runs").hold_outs[1:]:
            covered += [run.covered for run in hold_out.predicted]
    assert 0.75 <= np.mean(covered) < 1


def test_the_validated_factor_reaches_as_far_as_four_fifths_of_the_intervals_hold() -> None:
    def validated(*runs: tuple[float, bool]) -> float:
        loss = {True: 1.0, False: 2.0}
        interval = Interval(1.0, 0.9, 1.1, True)
        predicted = tuple(HeldOutRun(factor, loss[inside], interval) for factor, inside in runs)
        return validated_factor([HoldOut(1.0, 3, PURE, predicted)])

    assert validated() == 1
    assert validated((2.0, True), (4.0, True), (8.0, False)) == 4
    assert validated((2.0, True), (3.0, False), (4.0, False), (50.0, True)) == 2
    assert validated((2.0, False), (4.0, True)) == 1


def test_a_prediction_beyond_the_validated_factor_is_marked() -> None:
    losses = law() * np.exp(0.001 * np.random.default_rng(2).standard_normal(8))
    fit = fit_curves(ladder(losses))
    double = fit.predict(Target(FLOPS[-1] * 2))
    billionfold = fit.predict(Target(FLOPS[-1] * 1e9))
    assert not double.beyond_validated
    assert billionfold.beyond_validated
    assert double.loss.low is not None
    assert double.loss.high is not None
    assert double.loss.low < law(FLOPS[-1:] * 2)[0] < double.loss.high
    with pytest.raises(ValueError, match="no curve"):
        fit_curves(ladder(losses[:2], FLOPS[:2])).predict(Target(1e15))


def test_a_ladder_gives_a_law_and_no_exponents() -> None:
    fit = fit_curves(ladder(law()[:4], FLOPS[:4]))
    assert fit.document()["isoflop"] is None
    assert "one_dial_no_exponents" in codes(fit)
    assert "extrapolation" in codes(fit)


def test_gains_shrink_towards_the_floor() -> None:
    largest, beyond = fit_curves(ladder(law())).document()["power_law"]["flattening"]
    reducible = K * 1e15**-P
    assert largest["slope"]["estimate"] == pytest.approx(-P * reducible / (E + reducible))
    assert largest["doubling"]["estimate"] == pytest.approx(1 - 2 ** largest["slope"]["estimate"])
    assert beyond["doubling"]["estimate"] < largest["doubling"]["estimate"]
    assert (largest["extrapolated"], beyond["extrapolated"]) == (False, True)


def test_two_runs_are_no_law() -> None:
    fit = fit_curves(ladder(law())[:2])
    assert fit.document()["power_law"] is None
    assert "too_few_runs" in codes(fit)
    assert summary(fit).startswith("No law L(C): 2 different computes")


def test_replicates_are_not_further_computes() -> None:
    points = ladder(law())[:2] + ladder(law() * 1.001, seed=1)[:2]
    assert fit_curves(points).law is None


def test_nanochat_optima_match_the_published_ones(published: list[Point]) -> None:
    fit = fit_curves(published, form="power").document()["isoflop"]
    optima = fit["optima"]
    assert [best["params"] for best in optima] == pytest.approx(
        [110.7e6, 167.8e6, 250.7e6, 381.8e6], rel=0.01
    )
    assert [best["ratio"] for best in optima] == pytest.approx([11.2, 10.7, 10.8, 10.3], rel=0.01)
    assert [best["tokens"] for best in optima] == pytest.approx(
        [1.2415e9, 1.7853e9, 2.6422e9, 3.8069e9], rel=0.01
    )
    assert [best["loss"] for best in optima] == pytest.approx(
        [0.8972, 0.8616, 0.8293, 0.7999], abs=2e-4
    )
    assert fit["params_exponent"]["estimate"] == pytest.approx(0.538, abs=0.001)
    assert fit["tokens_exponent"]["estimate"] == pytest.approx(0.487, abs=0.001)
    assert fit["params_exponent"]["low"] < 0.54 < fit["params_exponent"]["high"]


def test_exponents_of_a_known_surface_come_back() -> None:
    fit = fit_isoflop(grid())
    assert fit is not None
    assert fit.params_exponent is not None
    assert fit.tokens_exponent is not None
    assert fit.params_exponent.estimate == pytest.approx(0.5, abs=1e-6)
    assert fit.tokens_exponent.estimate == pytest.approx(0.5, abs=1e-3)
    for curve in fit.curves:
        assert curve.minimum is not None
        assert curve.minimum.params == pytest.approx(np.sqrt(curve.budget / 6) / 4, rel=1e-6)


def test_intervals_of_minima_have_nominal_coverage() -> None:
    draw, hits = np.random.default_rng(0), np.zeros(4)
    clean = grid((1e14,), loss=lambda n, d: 2 + 0.05 * np.log(n / np.sqrt(6 * n * d / 6) * 4) ** 2)
    size = np.sqrt(1e14 / 6) / 4
    truths = {"params": size, "tokens": 16 * size, "ratio": 16.0, "loss": 2.0}
    for _ in range(200):
        fit = fit_isoflop(
            [replace(point, loss=point.loss + 0.004 * draw.standard_normal()) for point in clean]
        )
        assert fit is not None
        intervals = fit.intervals(fit.curves[0])
        for k, (name, truth) in enumerate(truths.items()):
            low, high = intervals[name].low, intervals[name].high
            hits[k] += (low or 0) <= truth <= (high or np.inf)
    assert (hits / 200 >= 0.90).all()
    assert (hits / 200 <= 0.99).all()


def test_scaling_the_losses_of_one_budget_changes_no_interval() -> None:
    draw = np.random.default_rng(0)
    points = [
        replace(point, loss=point.loss * np.exp(1e-4 * draw.standard_normal())) for point in grid()
    ]
    twice = [
        replace(point, loss=point.loss * (2 if point.budget == 1e14 else 1)) for point in points
    ]
    before, after = fit_isoflop(points), fit_isoflop(twice)
    assert before is not None
    assert after is not None
    pairs = [
        (before.intervals(old)["params"], after.intervals(new)["params"])
        for old, new in zip(before.curves, after.curves)
    ]
    pairs.append(
        (before.params_exponent or Interval(None), after.params_exponent or Interval(None))
    )
    for old, new in pairs:
        assert (new.low, new.high) == pytest.approx((old.low, old.high), rel=1e-6)


def test_a_flat_isoflop_curve_has_an_open_interval() -> None:
    zigzag = 0.01 * np.array([1, -1, 1, -1, 1, -1, 1])
    points = grid((1e14,), loss=lambda n, d: 2 + 1e-2 * np.log(n / n[3]) ** 2 + zigzag)
    fit = fit_isoflop(points)
    assert fit is not None
    assert fit.curves[0].minimum is not None
    assert not fit.intervals(fit.curves[0])["params"].identifiable


@pytest.mark.parametrize(("shift", "side"), [(8.0, "larger"), (1 / 8, "smaller")])
def test_a_minimum_outside_the_sizes_is_unresolved(shift: float, side: str) -> None:
    sizes = np.sqrt(1e14 / 6) / 4 / shift * np.geomspace(1 / 2, 2, 6)
    fit = fit_curves(grid((1e14,), sizes))
    (best,) = fit.document()["isoflop"]["optima"]
    assert best["status"] == "unresolved"
    assert best["params"] is None
    assert best["intervals"] is None
    assert f"run {side} ones" in best["reason"]
    assert "vertex_outside" in codes(fit)


def test_a_concave_isoflop_curve_is_unresolved() -> None:
    fit = fit_curves(grid((1e14,), loss=lambda n, d: 2 - 0.1 * np.log(n / n.mean()) ** 2))
    assert fit.document()["isoflop"]["optima"][0]["status"] == "unresolved"
    assert "wrong_curvature" in codes(fit)


def test_three_sizes_are_too_few_for_a_parabola() -> None:
    points = grid((1e14,))[2:5]
    fit = fit_curves(
        points + [replace(point, run_id=point.run_id + "b", seed=1) for point in points]
    )
    (best,) = fit.document()["isoflop"]["optima"]
    assert best["status"] == "unresolved"
    assert "3 different sizes" in best["reason"]
    assert len(fit.document()["points"]["excluded"]) == 6


def test_a_wide_grid_is_fitted_around_its_minimum() -> None:
    sizes = np.sqrt(1e14 / 6) / 4 * np.geomspace(1 / 40, 40, 11)
    fit = fit_curves(grid((1e14,), sizes))
    excluded = {row["run_id"] for row in fit.document()["points"]["excluded"]}
    assert excluded == {
        point.run_id for point in fit.points if abs(np.log(point.params / sizes[5])) > np.log(12)
    }


def test_runs_on_different_axes_are_refused_with_the_difference() -> None:
    points = [replace(point, comparison_key="data=x rows=64") for point in ladder(law())]
    points[3] = replace(points[3], comparison_key="data=x rows=32")
    with pytest.raises(
        NotComparable, match=r"comparable: rows: 64 \(7 runs\) against 32 \(1 run\); name"
    ):
        fit_curves(points)
    with pytest.raises(NotComparable, match=r"recipe: pocket \(8 runs\) against nanochat"):
        fit_curves([*ladder(law()), replace(ladder(law(), seed=1)[0], recipe="nanochat")])


def test_invalid_points_raise_with_their_run() -> None:
    with pytest.raises(ValueError, match="run l0-0: loss is nan"):
        ladder(np.array([np.nan]))
    with pytest.raises(ValueError, match="run l0-0 is given twice"):
        fit_curves(ladder(law()) + ladder(law())[:1])
    with pytest.raises(ValueError, match="no finished run"):
        fit_curves([])


@pytest.mark.parametrize(
    "points",
    [
        ladder(law())[:1],
        ladder(law()),
        ladder(law())[:2] + grid((1e13, 1e14)),
        grid((1e13, 1e14, 1e15))[:-1],
        grid((1e13, 1e14, 1e15))[:-8],
    ],
    ids=["run", "ladder", "ladder-and-grid", "incomplete-budget", "two-budgets"],
)
def test_the_document_is_json_for_any_runs(points: list[Point]) -> None:
    fit = fit_curves(points)
    document = fit.document()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert all(len(row) == len(headers) for headers, rows in tables(fit) for row in rows)


def test_the_order_of_the_runs_does_not_matter(published: list[Point]) -> None:
    first, second = (fit_isoflop(points) for points in (published, published[::-1]))
    assert first is not None
    assert second is not None
    assert first.params_exponent is not None
    assert second.params_exponent is not None
    assert first.params_exponent.low == pytest.approx(second.params_exponent.low, rel=1e-9)


def test_fits_import_neither_torch_nor_matplotlib() -> None:
    heavy = "{'torch', 'matplotlib', 'pandas'}"
    code = f"import sys, slm.fits, slm.figures; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
