"""What the fits claim: known truths come back, published optima are met, and what runs do not hold is not said."""

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
    PURE,
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
from slm.fits.ladder import choose, validated
from slm.fits.power_law import fit_law, noise_of
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
    """Runs of C = 6·N·D on the surface whose optimal N and D both grow as C^0.5; N* = (C/6)^0.5 / 4."""
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
            Point(f"g{budget:g}-{k}", "pocket", k + 2, n, d, budget, own, 0, budget, "bpb=a")
            for k, (n, d, own) in enumerate(zip(params.tolist(), tokens.tolist(), losses.tolist()))
        ]
    return points


@pytest.fixture
def published(reference: Path) -> list[Point]:
    """nanochat's 28 isoFLOP runs."""
    return reproduce.nanochat(reference)


def codes(fit: CurveFit) -> set[str]:
    return {warning["code"] for warning in fit.document()["warnings"]}


def test_a_noise_free_law_comes_back_exactly() -> None:
    found = fit_curves(ladder(law())).document()["power_law"]
    assert found["form"] == ADDITIVE
    for name, truth in (("E", E), ("K", K), ("p", P)):
        assert found[name]["estimate"] == pytest.approx(truth, rel=1e-6)
        assert found[name]["high"] - found[name]["low"] < 1e-5 * truth


def test_a_noisy_law_holds_the_truth_and_one_wild_run_does_not_move_it() -> None:
    noise = np.random.default_rng(3).standard_normal(16)
    points = ladder(law() * np.exp(0.002 * noise[:8])) + ladder(
        law() * np.exp(0.002 * noise[8:]), seed=1
    )
    points[2] = replace(points[2], loss=points[2].loss * 1.1)
    found = fit_curves(points).law
    assert found is not None
    assert found.noise.source == "replicate seeds"
    for interval, truth in ((found.E, E), (found.K, K), (found.p, P)):
        assert interval.low is not None
        assert interval.high is not None
        assert interval.low < truth < interval.high
    assert found.p.estimate == pytest.approx(P, rel=0.1)


def test_intervals_of_the_law_cover_the_truth_as_often_as_they_say() -> None:
    draw, hits = np.random.default_rng(0), np.zeros(4)
    top = FLOPS[-1:]
    for _ in range(200):
        losses = law() * np.exp(0.002 * draw.standard_normal(8))
        found = fit_law(ADDITIVE, FLOPS, losses, noise_of([], FLOPS, losses, ADDITIVE))
        slope = -P * K * float(top[0]) ** -P / float(law(top)[0])
        pairs = ((found.p, P), (found.E, E), (found.slope(float(top[0])), slope))
        low, high = found.band(top)
        hits += [(own.low or 0) <= truth <= (own.high or 0) for own, truth in pairs] + [
            bool(low <= law(top) <= high)
        ]
    assert (hits / 200 >= 0.90).all()
    assert (hits / 200 <= 0.99).all()


def test_the_profile_is_the_one_of_the_definition() -> None:
    """At the ends of p's interval the best law with that p is worse by the F quantile; solved another way."""
    from scipy import optimize, stats

    losses = law() * np.exp(0.002 * np.random.default_rng(5).standard_normal(8))
    found = fit_law(ADDITIVE, FLOPS, losses, noise_of([], FLOPS, losses, ADDITIVE))
    delta = found.noise.delta

    def best(p: float) -> float:
        def residuals(theta: np.ndarray) -> np.ndarray:
            model = np.exp(theta[0]) + np.exp(theta[1]) * (FLOPS / found.reference) ** -p
            return np.asarray(np.log(losses / model) / delta)

        return (
            float(optimize.least_squares(residuals, np.log(found.best[:2]), loss="huber").cost)
            * delta**2
        )

    limit = found.objective * (1 + stats.f.ppf(0.95, 1, 5) / 5)
    assert found.p.low is not None
    assert found.p.high is not None
    assert best(found.p.low) == pytest.approx(limit, rel=1e-4)
    assert best(found.p.high) == pytest.approx(limit, rel=1e-4)


def test_a_pure_power_law_holds_no_floor_and_says_so() -> None:
    losses = law(floor=0.0) * np.exp(0.003 * np.random.default_rng(1).standard_normal(8))
    fit = fit_curves(ladder(losses))
    assert fit.document()["selected"]["form"] == PURE
    assert "E_unidentified" in codes(fit)
    rival = fit.document()["rival"]
    assert rival["E"]["low"] == 0
    assert not rival["E"]["identifiable"]


def test_runs_that_compute_does_not_help_are_not_a_gain() -> None:
    losses = 2 * np.exp(0.01 * np.random.default_rng(0).standard_normal(8))
    fit = fit_curves(ladder(losses))
    assert "no_gain" in codes(fit)
    assert summary(fit).startswith("The runs do not show that compute helps")
    rising = fit_curves(ladder(1.5 * (FLOPS / 1e12) ** 0.05)).document()
    assert rising["power_law"]["p"]["estimate"] == pytest.approx(-0.05)


def test_the_law_is_chosen_by_the_largest_compute_held_out() -> None:
    found = fit_curves(
        ladder(law() * np.exp(0.001 * np.random.default_rng(2).standard_normal(8)))
    ).document()
    errors = found["selected"]["errors"]
    assert found["selected"]["form"] == min(errors, key=errors.get) == ADDITIVE


def test_every_hold_out_keeps_the_smaller_runs_and_is_asked_for_the_larger() -> None:
    found = fit_curves(
        ladder(law() * np.exp(0.001 * np.random.default_rng(2).standard_normal(8)))
    ).document()
    held = found["validation"]
    assert [own["flops"] for own in held] == FLOPS[3:-1].tolist()
    assert [own["held"] for own in held] == [4, 3, 2, 1]
    assert held[0]["factor"] == pytest.approx(FLOPS[-1] / FLOPS[3])
    assert all(own["predicted"][0]["low"] < own["predicted"][0]["estimate"] for own in held)


def test_intervals_of_runs_held_out_cover_them_as_often_as_they_say() -> None:
    draw, covered = np.random.default_rng(4), []
    for _ in range(15):
        fit = choose(ladder(law(floor=0.0) * np.exp(0.003 * draw.standard_normal(8))), "runs")
        covered += [run.covered for own in fit.hold_outs[1:] for run in own.predicted]
    assert 0.75 <= np.mean(covered) < 1


def test_what_is_validated_is_where_most_intervals_held() -> None:
    assert validated([]) == 1
    assert validated([(2.0, True), (4.0, True), (8.0, False)]) == 4
    assert validated([(2.0, True), (3.0, False), (4.0, False), (50.0, True)]) == 2
    assert validated([(2.0, False), (4.0, True)]) == 1


def test_a_prediction_beyond_what_was_validated_says_so() -> None:
    losses = law() * np.exp(0.001 * np.random.default_rng(2).standard_normal(8))
    fit = fit_curves(ladder(losses))
    near, far = fit.predict(Target(FLOPS[-1] * 2)), fit.predict(Target(FLOPS[-1] * 1e9))
    assert not near.beyond
    assert far.beyond
    assert near.loss.low is not None
    assert near.loss.high is not None
    assert near.loss.low < law(FLOPS[-1:] * 2)[0] < near.loss.high
    with pytest.raises(ValueError, match="no curve"):
        fit_curves(ladder(losses[:2], FLOPS[:2])).predict(Target(1e15))


def test_a_ladder_gives_a_law_and_no_exponents() -> None:
    fit = fit_curves(ladder(law()[:4], FLOPS[:4]))
    assert fit.document()["isoflop"] is None
    assert "one_dial_no_exponents" in codes(fit)
    assert "extrapolation" in codes(fit)


def test_gains_flatten_where_the_floor_is_near() -> None:
    here, far = fit_curves(ladder(law())).document()["power_law"]["flattening"]
    reducible = K * 1e15**-P
    assert here["slope"]["estimate"] == pytest.approx(-P * reducible / (E + reducible))
    assert here["doubling"]["estimate"] == pytest.approx(1 - 2 ** here["slope"]["estimate"])
    assert far["doubling"]["estimate"] < here["doubling"]["estimate"]
    assert (here["extrapolated"], far["extrapolated"]) == (False, True)


def test_two_runs_are_no_law() -> None:
    fit = fit_curves(ladder(law())[:2])
    assert fit.document()["power_law"] is None
    assert "too_few_runs" in codes(fit)
    assert summary(fit).startswith("No law L(C): 2 different computes")


def test_seeds_are_runs_and_no_further_computes() -> None:
    points = ladder(law())[:2] + ladder(law() * 1.001, seed=1)[:2]
    assert fit_curves(points).law is None


def test_nanochat_optima_are_the_published_ones(published: list[Point]) -> None:
    found = fit_curves(published).document()["isoflop"]
    optima = found["optima"]
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
    assert found["params_exponent"]["estimate"] == pytest.approx(0.538, abs=0.001)
    assert found["tokens_exponent"]["estimate"] == pytest.approx(0.487, abs=0.001)
    assert found["params_exponent"]["low"] < 0.54 < found["params_exponent"]["high"]


def test_exponents_of_a_known_surface_come_back() -> None:
    found = fit_isoflop(grid())
    assert found is not None
    assert found.params_exponent is not None
    assert found.tokens_exponent is not None
    assert found.params_exponent.estimate == pytest.approx(0.5, abs=1e-6)
    assert found.tokens_exponent.estimate == pytest.approx(0.5, abs=1e-3)
    for valley in found.valleys:
        assert valley.minimum is not None
        assert valley.minimum.params == pytest.approx(np.sqrt(valley.budget / 6) / 4, rel=1e-6)


def test_intervals_of_minima_cover_the_truth_as_often_as_they_say() -> None:
    draw, hits = np.random.default_rng(0), np.zeros(4)
    clean = grid((1e14,), loss=lambda n, d: 2 + 0.05 * np.log(n / np.sqrt(6 * n * d / 6) * 4) ** 2)
    size = np.sqrt(1e14 / 6) / 4
    truths = {"params": size, "tokens": 16 * size, "ratio": 16.0, "loss": 2.0}
    for _ in range(200):
        found = fit_isoflop(
            [replace(point, loss=point.loss + 0.004 * draw.standard_normal()) for point in clean]
        )
        assert found is not None
        intervals = found.intervals(found.valleys[0])
        ends = {name: (own.low or 0, own.high or np.inf) for name, own in intervals.items()}
        hits += [ends[name][0] <= truth <= ends[name][1] for name, truth in truths.items()]
    assert (hits / 200 >= 0.90).all()
    assert (hits / 200 <= 0.99).all()


def test_noise_is_a_share_of_the_loss_so_its_unit_at_a_budget_changes_nothing() -> None:
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
        (before.interval(old), after.interval(new))
        for old, new in zip(before.valleys, after.valleys)
    ]
    pairs.append(
        (before.params_exponent or Interval(None), after.params_exponent or Interval(None))
    )
    for old, new in pairs:
        assert (new.low, new.high) == pytest.approx((old.low, old.high), rel=1e-6)


def test_a_flat_valley_has_an_open_interval() -> None:
    zigzag = 0.01 * np.array([1, -1, 1, -1, 1, -1, 1])
    points = grid((1e14,), loss=lambda n, d: 2 + 1e-2 * np.log(n / n[3]) ** 2 + zigzag)
    found = fit_isoflop(points)
    assert found is not None
    assert found.valleys[0].minimum is not None
    assert not found.interval(found.valleys[0]).identifiable


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


def test_a_valley_upside_down_is_unresolved() -> None:
    fit = fit_curves(grid((1e14,), loss=lambda n, d: 2 - 0.1 * np.log(n / n.mean()) ** 2))
    assert fit.document()["isoflop"]["optima"][0]["status"] == "unresolved"
    assert "wrong_curvature" in codes(fit)


def test_three_sizes_are_no_parabola() -> None:
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
    far = {row["run_id"] for row in fit.document()["points"]["excluded"]}
    assert far == {
        point.run_id for point in fit.points if abs(np.log(point.params / sizes[5])) > np.log(12)
    }


def test_runs_on_different_axes_are_refused_by_what_differs() -> None:
    points = [replace(point, comparison_key="data=x rows=64") for point in ladder(law())]
    points[3] = replace(points[3], comparison_key="data=x rows=32")
    with pytest.raises(
        NotComparable, match=r"curve: rows: 64 \(7 runs\) against 32 \(1 run\); name"
    ):
        fit_curves(points)
    with pytest.raises(NotComparable, match=r"recipe: pocket \(8 runs\) against nanochat"):
        fit_curves([*ladder(law()), replace(ladder(law(), seed=1)[0], recipe="nanochat")])


def test_bad_points_are_named() -> None:
    with pytest.raises(ValueError, match="run l0-0: loss is nan"):
        ladder(np.array([np.nan]))
    with pytest.raises(ValueError, match="run l0-0 is given twice"):
        fit_curves(ladder(law()) + ladder(law())[:1])
    with pytest.raises(ValueError, match="no finished run"):
        fit_curves([])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_the_document_is_json_whatever_is_known(count: int) -> None:
    for points in (
        ladder(law())[:count],
        ladder(law())[:count] + grid((1e13, 1e14)),
        grid((1e13, 1e14, 1e15))[:-count],
    ):
        fit = fit_curves(points)
        assert json.loads(json.dumps(fit.document(), allow_nan=False)) == fit.document()
        assert all(len(row) == len(headers) for headers, rows in tables(fit) for row in rows)


def test_the_order_of_the_runs_changes_nothing(published: list[Point]) -> None:
    first, second = (
        fit_curves(points).document()["isoflop"] for points in (published, published[::-1])
    )
    assert first["params_exponent"]["low"] == pytest.approx(
        second["params_exponent"]["low"], rel=1e-9
    )


def test_fits_import_neither_torch_nor_matplotlib() -> None:
    code = "import sys, slm.fits, slm.figures; print({'torch', 'matplotlib', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
