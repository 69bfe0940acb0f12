"""What the surface claims: known ones come back, published fits are met, and one dial gives no exponents."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize, stats

from slm.fits import (
    PAPER,
    Point,
    Target,
    bootstrap,
    fit_curves,
    fit_parametric,
    fit_surface,
    read_points,
    tables,
)
from slm.fits.isoflop import fit_isoflop
from slm.fits.optimize import descend
from slm.fits.power_law import Noise
from slm.fits.surface import FORMS, cloud_of, frontier
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
    own = law or TRUTH
    return (
        own["E"] + (own["A"] * params ** -own["alpha"] + own["B"] * tokens ** -own["beta"]) ** gamma
    )


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
            point(len(points) + k, n, d, own, budget)
            for k, (n, d, own) in enumerate(zip(params.tolist(), tokens.tolist(), losses.tolist()))
        ]
    return points


def ladder(count: int = 10) -> list[Point]:
    """Compute-optimal runs at 20 tokens to a parameter, tokens rounded to steps as a trainer does."""
    params = np.geomspace(1e7, 1e9, count)
    tokens = np.round(20 * params / 524288) * 524288
    losses = surface(params, tokens) * np.exp(
        0.002 * np.random.default_rng(0).standard_normal(count)
    )
    return [point(k, n, d, own) for k, (n, d, own) in enumerate(zip(params, tokens, losses))]


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
    found = fit_surface(grid(gamma=gamma), form)
    for name, truth in (TRUTH | {"gamma": gamma}).items():
        own = found.intervals[name]
        assert own.estimate == pytest.approx(truth, rel=1e-5)
        assert own.low == pytest.approx(truth, rel=1e-5)
        assert own.high == pytest.approx(truth, rel=1e-5)
    assert found.status == "converged"
    assert found.starts_agreeing > 0.5


def test_a_surface_without_a_floor_has_none() -> None:
    bare = [replace(own, loss=own.loss - TRUTH["E"]) for own in grid()]
    draw = np.random.default_rng(1)
    found = fit_surface(
        [replace(own, loss=own.loss * np.exp(0.002 * draw.standard_normal())) for own in bare]
    )
    assert found.intervals["E"].low == 0
    assert not found.intervals["E"].identifiable
    assert found.starts_agreeing > 0.5
    for name in ("alpha", "beta"):
        assert found.intervals[name].estimate == pytest.approx(TRUTH[name], rel=0.05)


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_the_optimum_is_the_lowest_loss_at_its_compute(gamma: float) -> None:
    found = fit_surface(grid(gamma=gamma), "coupled")
    best = found.optimum(1e21)
    assert 6 * best.params * best.tokens == pytest.approx(1e21)
    lowest = optimize.minimize_scalar(
        lambda n: float(surface(np.exp(n), 1e21 / 6 / np.exp(n), gamma)),
        bounds=(15, 30),
        method="bounded",
    )
    assert best.loss == pytest.approx(lowest.fun, rel=1e-6)
    assert best.params == pytest.approx(np.exp(lowest.x), rel=1e-3)


def test_chinchilla_is_the_optimum_of_its_objective(chinchilla: list[Point]) -> None:
    found = fit_surface(chinchilla, delta=PAPER)
    assert found.objective == pytest.approx(0.00101827402, rel=1e-6)
    assert (found.n, found.delta, found.status) == (240, 1e-3, "converged")
    published = {"A": 477.826, "B": 2143.417, "E": 1.817218, "alpha": 0.347310, "beta": 0.367172}
    for name, value in (published | {"params_exponent": 0.513900}).items():
        assert found.intervals[name].estimate == pytest.approx(value, rel=1e-5)


def test_the_published_chinchilla_fit_is_that_of_absolute_deviations(
    chinchilla: list[Point],
) -> None:
    found = fit_surface(chinchilla, delta=1e-8)
    published = {"A": 482.00572, "B": 2085.4342, "E": 1.81686, "alpha": 0.34781, "beta": 0.36585}
    for name, value in published.items():
        assert found.intervals[name].estimate == pytest.approx(value, rel=1e-4)


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


def test_nanochat_is_coupled(nanochat: list[Point]) -> None:
    found = fit_parametric(nanochat)
    additive, coupled = found.surfaces
    assert found.surface is coupled
    assert additive.residual_rms == pytest.approx(0.0029, abs=2e-4)
    assert coupled.residual_rms == pytest.approx(0.0007, abs=5e-5)
    assert coupled.intervals["gamma"].estimate == pytest.approx(0.46, abs=0.005)
    assert found.decisive is not None
    assert found.decisive.held == 7
    assert found.decisive.errors["additive"] == pytest.approx(0.0067, abs=7e-4)
    assert found.decisive.errors["coupled"] == pytest.approx(0.0014, abs=1e-4)


def test_sparse_runs_far_apart_are_not_coupled(reference: Path) -> None:
    """C4 of Gadre et al. 2024: the wider form is better inside and worse beyond."""
    points = reproduce.gadre(reference)
    found = fit_parametric(points)
    assert found.surface is found.surfaces[0]
    assert found.surfaces[1].objective < found.surfaces[0].objective


def test_llama_3_by_squared_raw_loss(reference: Path) -> None:
    points = reproduce.llama(reference)
    found = fit_surface(points, delta=np.inf, raw=True)
    published = {
        "E": 0.6047,
        "A": 59.14,
        "B": 155.1,
        "alpha": 0.3100,
        "beta": 0.3136,
        "params_exponent": 0.5029,
    }
    for name, value in published.items():
        assert found.intervals[name].estimate == pytest.approx(value, rel=5e-4)


def test_parabolas_are_as_biased_as_published_and_the_surface_is_not(
    reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slm.fits.isoflop.WINDOW", np.inf)
    for row in rows(reference / "data/scaling/approach2_bias/published_parabola_bias.csv"):
        alpha, beta = float(row["alpha"]), float(row["beta"])
        law = {
            "E": 1.69,
            "A": 400.0 if alpha == beta else 406.4,
            "B": 400.0 if alpha == beta else 410.7,
        }
        points = _centred(law | {"alpha": alpha, "beta": beta}, float(row["log_range"]))
        valleys = fit_isoflop(points)
        assert valleys is not None
        # Not the tokens of the minimum, which are read between the runs: D = C/(6·N) is exact here.
        minima = [
            (own.flops, own.flops / 6 / own.minimum.params)
            for own in valleys.valleys
            if own.minimum
        ]
        inferred = np.exp(np.polyval(np.polyfit(*np.log(minima).T, 1), np.log(1e24)))
        truth = float(row["true_D"])
        assert 100 * (inferred / truth - 1) == pytest.approx(float(row["rel_error_pct"]), abs=2e-6)
        assert fit_surface(points).optimum(1e24).tokens == pytest.approx(truth, rel=1e-4)


def _centred(law: dict[str, float], reach: float) -> list[Point]:
    """5 budgets of 15 sizes, 10^±reach around the true optimum."""
    total = law["alpha"] + law["beta"]
    scale, points = (law["alpha"] * law["A"] / (law["beta"] * law["B"])) ** (1 / total), []
    for budget in np.geomspace(1e17, 1e21, 5):
        params = scale * (budget / 6) ** (law["beta"] / total) * np.logspace(-reach, reach, 15)
        losses = surface(params, budget / 6 / params, law=law)
        points += [
            point(len(points) + k, n, budget / 6 / n, own, budget)
            for k, (n, own) in enumerate(zip(params, losses))
        ]
    return points


def test_the_profile_is_the_one_of_the_definition() -> None:
    """At the ends of an interval the best surface with that value is worse by the F quantile; solved another way."""
    points = grid(noise=0.002, gamma=0.6)
    found = fit_surface(points, "coupled")
    limit = found.objective * (1 + stats.f.ppf(0.95, 1, len(points) - 6) / (len(points) - 6))
    cloud = cloud_of(points, found.delta)
    for end in (found.intervals["alpha"].low, found.intervals["alpha"].high):
        assert end is not None

        def residuals(theta: np.ndarray, alpha: float = end) -> np.ndarray:
            row = np.array([theta[0], theta[1], theta[2], alpha * theta[4], theta[3], theta[4]])
            return np.asarray(cloud.residuals(row[None])[0][0] / found.delta)

        cost = optimize.least_squares(
            residuals, found.row[[0, 1, 2, 4, 5]], loss="huber", xtol=1e-14, ftol=1e-14
        ).cost
        assert cost * found.delta**2 == pytest.approx(limit, rel=1e-5)


def test_the_profile_of_the_optimal_size_is_the_one_of_the_definition() -> None:
    """At its ends the best surface with that optimum is worse by the F quantile; its size is eliminated another way."""
    points, flops = grid(noise=0.002, gamma=0.6), 1e21
    found = fit_surface(points, "coupled")
    limit = found.objective * (1 + stats.f.ppf(0.95, 1, len(points) - 6) / (len(points) - 6))
    cloud, ((best, own),) = (
        cloud_of(points, found.delta),
        frontier(points, found, np.array([flops])),
    )
    assert own.estimate == best.params == found.optimum(flops).params
    for end in (own.low, own.high):
        assert end is not None
        tokens = flops / found.kappa / end

        def residuals(theta: np.ndarray, size: float = end, tokens: float = tokens) -> np.ndarray:
            e, b, gamma = theta[:3]
            p, q = np.exp(theta[3:])
            second = (
                b - q * (np.log(tokens) - cloud.centre[1])
            ) / gamma  # alpha·A·N^-alpha = beta·B·D^-beta
            a = gamma * (second + np.log(q / p)) + p * (np.log(size) - cloud.centre[0])
            return np.asarray(
                cloud.residuals(np.array([[e, a, b, p, q, gamma]]))[0][0] / found.delta
            )

        start = np.array([*found.row[[0, 2, 5]], *np.log(found.row[3:5])])
        cost = optimize.least_squares(residuals, start, loss="huber", xtol=1e-14, ftol=1e-14).cost
        assert cost * found.delta**2 == pytest.approx(limit, rel=1e-4)


def test_a_further_run_lies_in_its_interval_as_often_as_it_says() -> None:
    draw, hits = np.random.default_rng(1), 0
    params, tokens = 3e9, 6e10
    for seed in range(60):
        found = fit_surface(grid(BUDGETS[1:3], noise=0.002, seed=seed), noise=Noise(0.002, "known"))
        came = float(surface(np.array(params), np.array(tokens))) * np.exp(
            0.002 * draw.standard_normal()
        )
        said = found.prediction(params, tokens)
        assert said.low is not None
        assert said.high is not None
        hits += said.low <= came <= said.high
    assert 0.88 <= hits / 60 <= 0.99 + 1 / 60


def test_a_floor_that_may_be_none_is_bounded_above_where_its_profile_ends() -> None:
    """Two budgets of pocket: the best floor is a third of the true one, and none is inside the interval."""
    points = noisy(
        pocket_grid(POCKET, TINY[:2], 5, 2), gauss(SMALL), np.random.default_rng([1, 13, 37])
    )
    found = fit_surface(points, "coupled")
    cloud, weights = cloud_of(points, found.delta), np.ones((1, len(points)))
    limit = found.objective * (1 + stats.f.ppf(0.95, 1, len(points) - 6) / (len(points) - 6))

    def least(floor: float) -> float:
        start, held = found.row.copy(), np.eye(6)[:1]
        start[0] = np.log(floor)
        return float(descend(cloud, start[None], weights, range(6), held)[1][0])

    own = found.intervals["E"]
    assert own.high is not None
    assert (own.low, own.identifiable) == (0, False)
    assert least(1e-5) < limit
    assert least(own.high) == pytest.approx(limit, rel=1e-5)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    hits = np.zeros(4)
    for seed in range(60):
        found = fit_surface(grid(BUDGETS[1:3], noise=0.002, seed=seed), noise=Noise(0.002, "known"))
        intervals = [
            (found.intervals[name], TRUTH[name])
            for name in ("E", "alpha", "beta", "params_exponent")
        ]
        hits += [(own.low or 0) <= truth <= (own.high or np.inf) for own, truth in intervals]
    assert (hits / 60 >= 0.88).all()
    assert hits.mean() / 60 <= 0.99


def test_one_dial_gives_no_exponents() -> None:
    for points in (ladder(), grid((1e18,), sizes=10, noise=0.002)):
        fit = fit_curves(points)
        assert fit.document()["parametric"]["form"] is None
        assert "one_dial_no_exponents" in {caution.code for caution in fit.cautions}
        assert not any("surface" in headers for headers, _ in tables(fit))
        with pytest.raises(ValueError, match="one dial"):
            fit_surface(points)


def test_a_ladder_and_one_valley_are_two_dials() -> None:
    valley = [replace(own, run_id=f"v{k}") for k, own in enumerate(grid((1e19,), noise=0.002))]
    fit = fit_curves(ladder() + valley)
    assert fit.parametric.surface is not None
    assert "one_dial_no_exponents" not in {caution.code for caution in fit.cautions}


def test_runs_that_vary_n_and_d_apart_are_no_one_curve_of_compute() -> None:
    fit = fit_curves([replace(own, budget=None) for own in grid(noise=0.002)])
    assert fit.law is None
    assert "no_one_curve" in {caution.code for caution in fit.cautions}
    assert fit.parametric.surface is not None
    best, said = fit.parametric.surface.optimum(1e21), fit.predict(Target(1e21))
    assert said.model in FORMS
    assert said.loss.low is not None
    assert said.loss.high is not None
    assert said.loss.low < surface(np.array(best.params), np.array(best.tokens)) < said.loss.high


def test_two_budgets_do_not_choose_between_forms_that_disagree() -> None:
    codes = {
        caution.code
        for caution in fit_curves(noisy(ENDS, gauss(LARGE), np.random.default_rng(0))).cautions
    }
    assert "forms_disagree" in codes
    more = noisy(FOUR_BUDGETS, gauss(LARGE), np.random.default_rng(0))
    assert "forms_disagree" not in {caution.code for caution in fit_curves(more).cautions}


def test_exponents_that_the_runs_do_not_hold_have_no_value() -> None:
    """Two close budgets and five percent of noise."""
    fit = fit_curves(grid((1e18, 1.5e18), noise=0.05, sizes=5))
    document = fit.document()["parametric"]
    assert not document["identifiability"]["identified"]
    assert "surface_unidentified" in {caution.code for caution in fit.cautions}
    for name in document["identifiability"]["not_held"]:
        assert document[name]["estimate"] is None
        assert not document[name]["identifiable"]


def test_too_few_runs_are_no_surface_and_no_error() -> None:
    fit = fit_curves(grid((1e18, 1e19), sizes=3))
    assert fit.document()["parametric"]["form"] is None
    assert "too_few_runs_for_surface" in {caution.code for caution in fit.cautions}
    with pytest.raises(ValueError, match="form is 'cubic'"):
        fit_surface(grid(), "cubic")


def test_one_wild_run_does_not_move_the_exponents() -> None:
    """Not even at a corner, where it has most leverage; squares would move by 15 times as much."""
    points, noise = grid(noise=0.001), Noise(0.001, "known")
    wild = [replace(points[0], loss=points[0].loss * 1.2), *points[1:]]
    before, after = (
        fit_surface(own, noise=noise).intervals["params_exponent"].estimate
        for own in (points, wild)
    )
    assert after == pytest.approx(before, abs=0.005)


def test_a_weight_of_two_is_a_run_twice() -> None:
    points = grid(noise=0.002)
    heavy = fit_surface([replace(points[3], weight=2.0), *points[:3], *points[4:]], delta=PAPER)
    twice = fit_surface([*points, replace(points[3], run_id="again")], delta=PAPER)
    assert heavy.objective == pytest.approx(twice.objective, rel=1e-7)
    assert heavy.loss(1e9, 1e10) == pytest.approx(float(twice.loss(1e9, 1e10)), rel=1e-5)


def test_the_form_is_chosen_by_larger_compute() -> None:
    for form, gamma in (("additive", 1.0), ("coupled", 0.5)):
        found = fit_parametric(grid((1e16, *BUDGETS), gamma=gamma, noise=1e-4), resamples=200)
        assert found.surface is not None
        assert found.surface.form == form
        assert [rung.kept for rung in found.rungs] == [12, 18, 24]
        assert found.bootstrap is not None
        assert found.bootstrap.strata == 5
        profile, drawn = found.surface.intervals["alpha"], found.bootstrap.ends["alpha"]
        assert profile.low is not None
        assert profile.high is not None
        assert 1 / 3 < (drawn[1] - drawn[0]) / (profile.high - profile.low) < 3


def test_the_document_is_json_with_every_form() -> None:
    fit = fit_curves(grid(noise=0.002))
    document = fit.document()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert [own["form"] for own in document["parametric"]["alternatives"]] == list(FORMS)
    assert document["parametric"]["form"] in FORMS
    ((headers, found),) = (table for table in tables(fit) if table[0][0] == "surface")
    assert all(len(row) == len(headers) for row in found)


HEADER = "name,n,tokens,flops,val_bpb,outlier\n"
NAMES = {"run": "name", "params": "n", "loss": "val_bpb"}


def test_a_file_of_outliers_alone_has_no_run(tmp_path: Path) -> None:
    path = table(tmp_path, "a,1e6,1e8,6e14,1.2,1")
    with pytest.raises(ValueError, match="every run is marked"):
        read_points(path, NAMES)


def table(tmp_path: Path, *lines: str, header: str = HEADER) -> Path:
    path = tmp_path / "runs.csv"
    path.write_text(header + "\n".join(lines))
    return path


def test_a_table_becomes_points_and_budgets(tmp_path: Path) -> None:
    path = table(
        tmp_path,
        "a,1e6,1e8,6.00e14,1.2,",
        "b,2e6,5e7,6.12e14,1.1,0",
        "c,3e6,1e9,2e16,1.0,no",
        "d,4e6,1e9,1e17,9,1",
    )
    found = read_points(path, NAMES)
    assert [point.run_id for point in found.points] == ["a", "b", "c"]
    assert [point.run_id for point in found.outliers] == ["d"]
    assert found.points[0].budget == found.points[1].budget == pytest.approx(6.06e14, rel=1e-3)
    assert found.points[2].budget is None
    assert {point.budget for point in read_points(path, NAMES, budgets=False).points} == {None}


def test_a_table_says_what_it_says(tmp_path: Path) -> None:
    header = "params,tokens,flops,loss,budget,core,depth,seed,recipe,weight\n"
    path = table(
        tmp_path,
        "1e6,1e8,6e14,1.2,6e14,0.1,4,7,own,2.5",
        "",
        "1e7,1e8,6e15,1.1,,,5.0,,,",
        header=header,
    )
    first, second = read_points(path).points
    assert (first.budget, first.depth, first.seed, first.recipe, first.weight) == (
        6e14,
        4,
        7,
        "own",
        2.5,
    )
    assert (second.budget, second.depth, second.seed, second.recipe, second.weight) == (
        None,
        5,
        0,
        "runs",
        1.0,
    )
    assert (first.core, second.core) == (0.1, None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a,1e6,1e8,6e14,low,", "line 2: loss is 'low', not a number"),
        ("a,1e6,1e8,6e14,,", "line 2: loss is empty"),
        ("a,1e6,-1,6e14,1.2,", "line 2: run a: tokens is -1.0"),
        ("a,1e6,1e8,6e14,nan,", "line 2: run a: loss is nan"),
        ("a,1e6,1e8,6e14,1.2,perhaps", "line 2: outlier is 'perhaps'"),
        ("a,1e6,1e8,6e14,1.2", "line 2: 5 cells where the header has 6"),
        ("", "no run below the header"),
        ("a,1e6,1e8,1e14,1,\nb,2e6,1e8,1.02e14,1,\nc,3e6,1e8,1.04e14,1,", "budgets are not clear"),
    ],
)
def test_a_defect_of_a_table_is_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_points(table(tmp_path, line), NAMES)


def test_a_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = table(tmp_path, "a,1e6,1e8,6e14,1.2,")
    with pytest.raises(ValueError, match="no column 'params'; there are name, n,"):
        read_points(path)
    with pytest.raises(ValueError, match="no column 'bpb', asked for as loss"):
        read_points(path, NAMES | {"loss": "bpb"})
    with pytest.raises(ValueError, match="no column is called 'bits'"):
        read_points(path, {"bits": "val_bpb"})
    with pytest.raises(ValueError, match="column 'loss' is there twice"):
        read_points(table(tmp_path, "1,1,1,1,1", header="params,tokens,flops,loss,loss\n"))
