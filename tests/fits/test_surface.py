"""Surfaces recover known truths and published fits, and one dial gives no exponents."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize, stats

from slm.fits import Point, Target, fit_curves, tables
from slm.fits.isoflop import fit_isoflop
from slm.fits.optimize import levenberg_marquardt
from slm.fits.parametric import bootstrap, fit_parametric
from slm.fits.power_law import Noise
from slm.fits.surface import FORMS, PAPER, fit_surface, frontier, loss_data
from tests import reproduce
from tests.calibrate.truths import ENDS, FOUR_BUDGETS, LARGE, POCKET, SMALL, TINY, gauss, noisy
from tests.calibrate.truths import grid as pocket_grid

TRUTH = {
    "E": 1.7,
    "A": 400.0,
    "B": 500.0,
    "alpha": 0.34,
    "beta": 0.3,
    "params_exponent": 0.3 / 0.64,
}
BUDGETS = (1e17, 1e18, 1e19, 1e20)


def point(
    number: int, params: float, tokens: float, loss: float, budget: float | None = None
) -> Point:
    return Point(
        f"r{number}", "s", number + 1, params, tokens, 6 * params * tokens, loss, 0, budget, "bpb=a"
    )


def surface(
    params: np.ndarray, tokens: np.ndarray, gamma: float = 1.0, law: dict[str, float] | None = None
) -> np.ndarray:
    law = law or TRUTH
    size_term = law["A"] * params ** -law["alpha"]
    token_term = law["B"] * tokens ** -law["beta"]
    return law["E"] + (size_term + token_term) ** gamma


def grid(
    budgets: tuple[float, ...] = BUDGETS,
    gamma: float = 1.0,
    noise: float = 0.0,
    seed: int = 0,
    sizes: int = 6,
) -> list[Point]:
    """Runs of C = 6·N·D, sizes 36 times apart at each budget."""
    draw, points = np.random.default_rng(seed), []
    for budget in budgets:
        params = np.sqrt(budget / 6) / 4 * np.geomspace(1 / 6, 6, sizes)
        tokens = budget / 6 / params
        losses = surface(params, tokens, gamma) * np.exp(noise * draw.standard_normal(sizes))
        points += [
            point(len(points) + k, n, d, loss, budget)
            for k, (n, d, loss) in enumerate(zip(params.tolist(), tokens.tolist(), losses.tolist()))
        ]
    return points


def ladder(count: int = 10) -> list[Point]:
    """Compute-optimal runs at 20 tokens per parameter, tokens rounded to whole steps."""
    params = np.geomspace(1e7, 1e9, count)
    tokens = np.round(20 * params / 524288) * 524288
    losses = surface(params, tokens) * np.exp(
        0.002 * np.random.default_rng(0).standard_normal(count)
    )
    return [point(k, n, d, loss) for k, (n, d, loss) in enumerate(zip(params, tokens, losses))]


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.fixture
def chinchilla(reference: Path) -> list[Point]:
    """Epoch's 240 points."""
    return reproduce.chinchilla(reference)


@pytest.fixture
def nanochat(reference: Path) -> list[Point]:
    """The 28 isoFLOP runs."""
    return reproduce.nanochat(reference)


@pytest.mark.parametrize(("form", "gamma"), [("additive", 1.0), ("coupled", 0.6), ("coupled", 1.4)])
def test_a_noise_free_surface_comes_back_exactly(form: str, gamma: float) -> None:
    fit = fit_surface(grid(gamma=gamma), form)
    for name, truth in (TRUTH | {"gamma": gamma}).items():
        interval = fit.intervals[name]
        assert interval.estimate == pytest.approx(truth, rel=1e-5)
        assert interval.low == pytest.approx(truth, rel=1e-5)
        assert interval.high == pytest.approx(truth, rel=1e-5)
    assert fit.status == "converged"
    assert fit.starts_agreeing > 0.5


def test_the_floor_of_a_surface_without_one_is_unidentified() -> None:
    bare = [replace(run, loss=run.loss - TRUTH["E"]) for run in grid()]
    draw = np.random.default_rng(1)
    fit = fit_surface(
        [replace(run, loss=run.loss * np.exp(0.002 * draw.standard_normal())) for run in bare]
    )
    assert fit.intervals["E"].low == 0
    assert not fit.intervals["E"].identifiable
    assert fit.starts_agreeing > 0.5
    for name in ("alpha", "beta"):
        assert fit.intervals[name].estimate == pytest.approx(TRUTH[name], rel=0.05)


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_the_optimum_is_the_lowest_loss_at_its_compute(gamma: float) -> None:
    fit = fit_surface(grid(gamma=gamma), "coupled")
    best = fit.optimum(1e21)
    assert 6 * best.params * best.tokens == pytest.approx(1e21)
    lowest = optimize.minimize_scalar(
        lambda n: float(surface(np.exp(n), 1e21 / 6 / np.exp(n), gamma)),
        bounds=(15, 30),
        method="bounded",
    )
    assert best.loss == pytest.approx(lowest.fun, rel=1e-6)
    assert best.params == pytest.approx(np.exp(lowest.x), rel=1e-3)


def test_chinchilla_is_the_optimum_of_its_objective(chinchilla: list[Point]) -> None:
    fit = fit_surface(chinchilla, delta=PAPER)
    assert fit.objective == pytest.approx(0.00101827402, rel=1e-6)
    assert (fit.n, fit.delta, fit.status) == (240, 1e-3, "converged")
    published = {"A": 477.826, "B": 2143.417, "E": 1.817218, "alpha": 0.347310, "beta": 0.367172}
    for name, value in (published | {"params_exponent": 0.513900}).items():
        assert fit.intervals[name].estimate == pytest.approx(value, rel=1e-5)


def test_the_published_chinchilla_fit_minimises_absolute_deviations(
    chinchilla: list[Point],
) -> None:
    fit = fit_surface(chinchilla, delta=1e-8)
    published = {"A": 482.00572, "B": 2085.4342, "E": 1.81686, "alpha": 0.34781, "beta": 0.36585}
    for name, value in published.items():
        assert fit.intervals[name].estimate == pytest.approx(value, rel=1e-4)


@pytest.mark.soak
def test_chinchilla_standard_errors_are_the_published_ones(chinchilla: list[Point]) -> None:
    drawn = bootstrap(chinchilla, fit_surface(chinchilla, delta=PAPER), resamples=12_000)
    assert drawn.strata == 1
    for name, value in {
        "A": 124.5,
        "B": 1293,
        "E": 0.0257,
        "alpha": 0.0154,
        "beta": 0.0206,
    }.items():
        assert drawn.errors[name] == pytest.approx(value, rel=0.1)


def test_nanochat_selects_the_coupled_form(nanochat: list[Point]) -> None:
    fit = fit_parametric(nanochat)
    additive, coupled = fit.surfaces
    assert fit.surface is coupled
    assert additive.residual_rms == pytest.approx(0.0029, abs=2e-4)
    assert coupled.residual_rms == pytest.approx(0.0007, abs=5e-5)
    assert coupled.intervals["gamma"].estimate == pytest.approx(0.46, abs=0.005)
    assert fit.decisive is not None
    assert len(fit.decisive["additive"].predicted) == 7
    assert fit.decisive["additive"].error == pytest.approx(0.0067, abs=7e-4)
    assert fit.decisive["coupled"].error == pytest.approx(0.0014, abs=1e-4)


def test_llama_3_by_squared_raw_loss(reference: Path) -> None:
    points = reproduce.llama(reference)
    fit = fit_surface(points, delta=np.inf, raw=True)
    for name, value in reproduce.LLAMA_SQUARED.items():
        assert fit.intervals[name].estimate == pytest.approx(value, rel=5e-4)


@pytest.mark.soak
def test_parabolas_are_as_biased_as_published_and_the_surface_is_not(
    reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slm.fits.isoflop.WINDOW", np.inf)
    for row in rows(reference / "data/scaling/approach2_bias/published_parabola_bias.csv"):
        alpha, beta = float(row["alpha"]), float(row["beta"])
        points = reproduce.centred(alpha, beta, float(row["log_range"]))
        isoflop = fit_isoflop(points)
        assert isoflop is not None
        truth = float(row["true_D"])
        tokens = reproduce.extrapolated_tokens(isoflop)
        assert 100 * (tokens / truth - 1) == pytest.approx(float(row["rel_error_pct"]), abs=2e-6)
        assert fit_surface(points).optimum(1e24).tokens == pytest.approx(truth, rel=1e-4)


def test_interval_ends_of_alpha_are_worse_by_the_f_quantile() -> None:
    """The best surface at each end, fit by another optimiser, meets the definition."""
    points = grid(noise=0.002, gamma=0.6)
    fit = fit_surface(points, "coupled")
    limit = fit.objective * (1 + stats.f.ppf(0.95, 1, len(points) - 6) / (len(points) - 6))
    data = loss_data(points, fit.delta)
    for end in (fit.intervals["alpha"].low, fit.intervals["alpha"].high):
        assert end is not None

        def residuals(theta: np.ndarray, alpha: float = end) -> np.ndarray:
            row = np.array([theta[0], theta[1], theta[2], alpha * theta[4], theta[3], theta[4]])
            return np.asarray(data.residuals(row[None])[0][0] / fit.delta)

        cost = optimize.least_squares(
            residuals, fit.row[[0, 1, 2, 4, 5]], loss="huber", xtol=1e-14, ftol=1e-14
        ).cost
        assert cost * fit.delta**2 == pytest.approx(limit, rel=1e-5)


def test_interval_ends_of_the_optimal_size_are_worse_by_the_f_quantile() -> None:
    """The best surface with its optimum at each end, found another way, meets the definition."""
    points, flops = grid(noise=0.002, gamma=0.6), 1e21
    fit = fit_surface(points, "coupled")
    limit = fit.objective * (1 + stats.f.ppf(0.95, 1, len(points) - 6) / (len(points) - 6))
    data = loss_data(points, fit.delta)
    ((best, interval),) = frontier(points, fit, np.array([flops]))
    assert interval.estimate == best.params == fit.optimum(flops).params
    for end in (interval.low, interval.high):
        assert end is not None
        tokens = flops / fit.kappa / end

        def residuals(theta: np.ndarray, size: float = end, tokens: float = tokens) -> np.ndarray:
            e, b, gamma = theta[:3]
            p, q = np.exp(theta[3:])
            second = (
                b - q * (np.log(tokens) - data.centre[1])
            ) / gamma  # alpha·A·N^-alpha = beta·B·D^-beta
            a = gamma * (second + np.log(q / p)) + p * (np.log(size) - data.centre[0])
            return np.asarray(data.residuals(np.array([[e, a, b, p, q, gamma]]))[0][0] / fit.delta)

        start = np.array([*fit.row[[0, 2, 5]], *np.log(fit.row[3:5])])
        cost = optimize.least_squares(residuals, start, loss="huber", xtol=1e-14, ftol=1e-14).cost
        assert cost * fit.delta**2 == pytest.approx(limit, rel=1e-4)


@pytest.mark.soak
def test_prediction_intervals_have_nominal_coverage() -> None:
    draw, hits = np.random.default_rng(1), 0
    params, tokens = 3e9, 6e10
    for seed in range(60):
        fit = fit_surface(grid(BUDGETS[1:3], noise=0.002, seed=seed), noise=Noise(0.002, "known"))
        measured = float(surface(np.array(params), np.array(tokens))) * np.exp(
            0.002 * draw.standard_normal()
        )
        prediction = fit.prediction(params, tokens)
        assert prediction.low is not None
        assert prediction.high is not None
        hits += prediction.low <= measured <= prediction.high
    assert 0.88 <= hits / 60 <= 0.99 + 1 / 60


def test_a_floor_that_may_be_zero_has_an_upper_bound() -> None:
    """On two budgets of pocket the best floor is a third of the true one, and 0 is inside."""
    points = noisy(
        pocket_grid(POCKET, TINY[:2], 5, 2), gauss(SMALL), np.random.default_rng([1, 13, 37])
    )
    fit = fit_surface(points, "coupled")
    data = loss_data(points, fit.delta)
    limit = fit.objective * (1 + stats.f.ppf(0.95, 1, len(points) - 6) / (len(points) - 6))

    def least(floor: float) -> float:
        start = fit.row.copy()
        start[0] = np.log(floor)
        fixed = np.eye(6)[:1]
        return float(levenberg_marquardt(data, start[None], range(6), fixed)[1][0])

    interval = fit.intervals["E"]
    assert interval.high is not None
    assert (interval.low, interval.identifiable) == (0, False)
    assert least(1e-5) < limit
    assert least(interval.high) == pytest.approx(limit, rel=1e-5)


@pytest.mark.soak
def test_intervals_of_the_surface_have_nominal_coverage() -> None:
    hits = np.zeros(4)
    for seed in range(60):
        fit = fit_surface(grid(BUDGETS[1:3], noise=0.002, seed=seed), noise=Noise(0.002, "known"))
        intervals = [
            (fit.intervals[name], TRUTH[name]) for name in ("E", "alpha", "beta", "params_exponent")
        ]
        hits += [(end.low or 0) <= truth <= (end.high or np.inf) for end, truth in intervals]
    assert (hits / 60 >= 0.88).all()
    assert hits.mean() / 60 <= 0.99


def test_one_dial_gives_no_exponents() -> None:
    for points in (ladder(), grid((1e18,), sizes=10, noise=0.002)):
        fit = fit_curves(points)
        assert fit.document()["parametric"]["form"] is None
        assert "one_dial_no_exponents" in {warning.code for warning in fit.warnings}
        assert not any("surface" in headers for headers, _ in tables(fit))
        with pytest.raises(ValueError, match="one dial"):
            fit_surface(points)


def test_a_ladder_and_one_isoflop_curve_are_two_dials() -> None:
    curve = [replace(run, run_id=f"v{k}") for k, run in enumerate(grid((1e19,), noise=0.002))]
    fit = fit_curves(ladder() + curve)
    assert fit.parametric.surface is not None
    assert "one_dial_no_exponents" not in {warning.code for warning in fit.warnings}


def test_runs_that_vary_n_and_d_independently_have_no_law_of_compute() -> None:
    fit = fit_curves([replace(run, budget=None) for run in grid(noise=0.002)])
    assert fit.law is None
    assert "no_one_curve" in {warning.code for warning in fit.warnings}
    assert fit.parametric.surface is not None
    best = fit.parametric.surface.optimum(1e21)
    prediction = fit.predict(Target(1e21))
    assert prediction.model in FORMS
    low, high = prediction.loss.low, prediction.loss.high
    assert low is not None
    assert high is not None
    assert low < surface(np.array(best.params), np.array(best.tokens)) < high


def test_two_budgets_warn_about_forms_that_disagree() -> None:
    codes = {
        warning.code
        for warning in fit_curves(noisy(ENDS, gauss(LARGE), np.random.default_rng(0))).warnings
    }
    assert "forms_disagree" in codes
    more = noisy(FOUR_BUDGETS, gauss(LARGE), np.random.default_rng(0))
    assert "forms_disagree" not in {warning.code for warning in fit_curves(more).warnings}


def test_unidentified_exponents_have_no_estimate() -> None:
    """Fit two close budgets with five percent of noise."""
    fit = fit_curves(grid((1e18, 1.5e18), noise=0.05, sizes=5))
    document = fit.document()["parametric"]
    assert not document["identifiability"]["identified"]
    assert "surface_unidentified" in {warning.code for warning in fit.warnings}
    for name in document["identifiability"]["not_held"]:
        assert document[name]["estimate"] is None
        assert not document[name]["identifiable"]


def test_too_few_runs_give_no_surface_and_no_error() -> None:
    fit = fit_curves(grid((1e18, 1e19), sizes=3))
    assert fit.document()["parametric"]["form"] is None
    assert "too_few_runs_for_surface" in {warning.code for warning in fit.warnings}
    with pytest.raises(ValueError, match="form is 'cubic'"):
        fit_surface(grid(), "cubic")


def test_one_wild_run_does_not_move_the_exponents() -> None:
    """Test a corner, where leverage is greatest; least squares would move 15 times as much."""
    points, noise = grid(noise=0.001), Noise(0.001, "known")
    wild = [replace(points[0], loss=points[0].loss * 1.2), *points[1:]]
    before, after = (
        fit_surface(runs, noise=noise).intervals["params_exponent"].estimate
        for runs in (points, wild)
    )
    assert after == pytest.approx(before, abs=0.005)


def test_a_weight_of_two_counts_as_two_runs() -> None:
    points = grid(noise=0.002)
    heavy = fit_surface([replace(points[3], weight=2.0), *points[:3], *points[4:]], delta=PAPER)
    twice = fit_surface([*points, replace(points[3], run_id="again")], delta=PAPER)
    assert heavy.objective == pytest.approx(twice.objective, rel=1e-7)
    assert heavy.loss(1e9, 1e10) == pytest.approx(float(twice.loss(1e9, 1e10)), rel=1e-5)


@pytest.mark.soak
def test_the_selected_form_predicts_larger_compute_best() -> None:
    for form, gamma in (("additive", 1.0), ("coupled", 0.5)):
        fit = fit_parametric(grid((1e16, *BUDGETS), gamma=gamma, noise=1e-4), resamples=200)
        assert fit.surface is not None
        assert fit.surface.form == form
        assert [by_form[form].fitted for by_form in fit.hold_outs] == [12, 18, 24]
        assert fit.bootstrap is not None
        assert fit.bootstrap.strata == 5
        profile, drawn = fit.surface.intervals["alpha"], fit.bootstrap.ends["alpha"]
        assert profile.low is not None
        assert profile.high is not None
        assert 1 / 3 < (drawn[1] - drawn[0]) / (profile.high - profile.low) < 3


def test_the_document_is_json_with_every_form() -> None:
    fit = fit_curves(grid(noise=0.002))
    document = fit.document()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert [surface["form"] for surface in document["parametric"]["alternatives"]] == list(FORMS)
    assert document["parametric"]["form"] in FORMS
    ((headers, lines),) = (table for table in tables(fit) if table[0][0] == "surface")
    assert all(len(line) == len(headers) for line in lines)
