"""Each warning is given where it should be, and clean runs give none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from slm.fits import Point
from slm.fits.checks.diagnostics import fit_warnings
from slm.fits.checks.influence import influences
from slm.fits.checks.misfit import centring_bias, lack_of_fit, structure
from slm.fits.checks.sensitivity import AS_FITTED, sensitivity
from slm.fits.intervals import Interval
from slm.fits.isoflop import IsoFlopFit, fit_isoflop
from slm.fits.ladder import Selection
from slm.fits.optimize import levenberg_marquardt
from slm.fits.parametric import ParametricFit
from slm.fits.power_law import ADDITIVE, PURE, Law, Noise, fit_law, noise_of
from slm.fits.select import HeldOutRun, HoldOut
from slm.fits.surface import Surface, fit_surface, loss_data
from slm.fits.types import to_json
from tests import reproduce
from tests.fits.test_laws import ladder, law
from tests.fits.test_surface import grid

Parts = tuple[list[Point], Law | None, IsoFlopFit | None, ParametricFit]
SIGMA = 0.002


def selected(fitted: Law | None) -> Selection:
    """Return a law that is validated ten times beyond its runs."""
    right = HeldOutRun(10.0, 1.0, Interval(1.0, 0.9, 1.1, True))
    return Selection(fitted, None, "", None, None, (HoldOut(1.0, 3, PURE, (right,)),))


def noisy(points: list[Point], seed: int = 0, sigma: float = SIGMA) -> list[Point]:
    draw = np.random.default_rng(seed)
    return [
        replace(point, loss=point.loss * float(np.exp(sigma * draw.standard_normal())))
        for point in points
    ]


def twice(points: list[Point]) -> list[Point]:
    return [
        replace(point, run_id=f"{point.run_id}-{seed}", seed=seed)
        for seed in (0, 1)
        for point in points
    ]


def parts(points: list[Point], form: str | None = "additive") -> Parts:
    """Return the parts of a fit; without a surface if `form` is None."""
    runs = [point for point in points if point.budget is None]
    fitted = None
    if runs:
        flops, losses = np.array([[run.flops, run.loss] for run in runs]).T
        fitted = fit_law(ADDITIVE, flops, losses, noise_of(runs, flops, losses, ADDITIVE))
    surface = fit_surface(points, form) if form else None
    return (
        points,
        fitted,
        fit_isoflop(points),
        ParametricFit(surface, code="one_dial_no_exponents"),
    )


def messages(fit: Parts) -> dict[str, str]:
    """Return the messages of a fit's warnings by code."""
    points, fitted, isoflop, parametric = fit
    rows = sensitivity(points, fitted, isoflop, parametric)
    warnings = fit_warnings(points, selected(fitted), isoflop, parametric, rows)
    assert len({warning.message for warning in warnings}) == len(warnings)
    return {warning.code: warning.message for warning in warnings}


@pytest.fixture(scope="module")
def clean() -> Parts:
    return parts(noisy(grid((1e17, 1e18, 1e19))))


@pytest.fixture(scope="module")
def wild() -> Parts:
    """Return a fit with one run of the largest budget 3 % too high."""
    points = noisy(grid((1e17, 1e18, 1e19)), sigma=1e-3)
    return parts([*points[:12], replace(points[12], loss=points[12].loss * 1.03), *points[13:]])


CHECKED = {
    "law_lack_of_fit",
    "surface_lack_of_fit",
    "surface_structure",
    "centring_drift",
    "influential_run",
    "estimator_matters",
    "convention_matters",
}


@pytest.mark.parametrize(
    ("points", "form"),
    [
        (twice(grid((1e17, 1e18, 1e19))), "additive"),
        (ladder(law()), None),
        (twice(ladder(law())), None),
    ],
)
def test_clean_runs_give_no_warnings(points: list[Point], form: str | None) -> None:
    assert not CHECKED & set(messages(parts(noisy(points), form)))


def test_a_law_that_misses_the_means_of_replicates_lacks_fit() -> None:
    wave = 1 + 0.02 * np.cos(np.arange(8) * 2.0)
    warnings = messages(parts(noisy(twice(ladder(law() * wave))), None))
    assert "where seeds scatter 0.2" in warnings["law_lack_of_fit"]


def test_lack_of_fit_equals_the_definition_of_the_f_test_without_the_worst_setting() -> None:
    points, draw = twice(ladder(law())), np.random.default_rng(0)
    points = [replace(point, loss=float(np.exp(0.01 * draw.standard_normal()))) for point in points]
    losses = np.log([point.loss for point in points]).reshape(2, 8)
    test = lack_of_fit(points, losses.ravel(), 3)
    between = np.sort(2 * losses.mean(0) ** 2)[:-1].sum() / (8 - 1 - 3)
    within = ((losses - losses.mean(0)) ** 2).sum() / 8
    assert test is not None
    assert pytest.approx(between / within) == test.F
    assert pytest.approx(stats.f.sf(between / within, 4, 8)) == test.p


def test_one_outlier_is_neither_lack_of_fit_nor_structure() -> None:
    points = noisy(twice(grid((1e17, 1e18, 1e19))))
    points = [point for point in points if point.run_id != "r7-1"]
    wild = [
        replace(point, loss=point.loss * 1.1) if point.run_id == "r7-0" else point
        for point in points
    ]
    assert not {"surface_lack_of_fit", "surface_structure"} & set(messages(parts(wild)))


def test_random_scatter_of_settings_is_lack_of_fit_without_structure() -> None:
    moved = noisy(grid((1e17, 1e18, 1e19), sizes=7), sigma=0.01, seed=2)
    warnings = messages(parts(noisy(twice(moved), sigma=0.001)))
    assert "surface_lack_of_fit" in warnings
    assert "surface_structure" not in warnings


def test_an_additive_surface_through_coupled_runs_leaves_structure() -> None:
    points = noisy(grid(gamma=0.4, sizes=8), sigma=3e-4)
    warnings = messages(parts(points))
    assert "ln N and ln D" in warnings["surface_structure"]
    assert "surface_structure" not in messages(parts(points, "coupled"))


def test_p_values_of_the_score_test_are_uniform_under_noise() -> None:
    """p-values of clean runs are uniform, with some outliers too."""
    p_values = []
    for seed in range(100):
        points = noisy(grid(sizes=7), seed)
        points[seed % 28] = replace(
            points[seed % 28], loss=points[seed % 28].loss * (1.05 if seed % 4 == 0 else 1)
        )
        surface = _unprofiled(points)
        test = structure(points, surface)
        assert test is not None
        p_values.append(test.p)
    assert stats.kstest(p_values, "uniform").pvalue > 0.01
    assert np.mean(np.array(p_values) < 0.1) < 0.2


FITTED = fit_surface(grid((1e17, 1e18, 1e19)), noise=Noise(SIGMA, "known"))


def _unprofiled(points: list[Point]) -> Surface:
    """The surface without intervals: what the score test reads."""
    noise = Noise(SIGMA, "known")
    data = loss_data(points, noise.delta)
    rows, _ = levenberg_marquardt(data, FITTED.row[None], range(5))
    return replace(FITTED, row=rows[0], delta=noise.delta)


def test_sizes_that_do_not_follow_the_minimum_bias_the_minima() -> None:
    """Noise-free, so the bias by the surface is the whole difference from the truth, 0.3 / 0.64."""
    points = _skewed(0.0)
    fit = parts(points)
    assert fit[2] is not None
    assert fit[3].surface is not None
    assert fit[2].params_exponent is not None
    result = centring_bias(fit[2], fit[3].surface)
    assert result is not None
    offsets, bias = result
    assert offsets == sorted(offsets)
    assert offsets[-1] - offsets[0] > 1
    truth = SKEWED["beta"] / (SKEWED["alpha"] + SKEWED["beta"])
    assert fit[2].params_exponent.estimate == pytest.approx(truth + bias, abs=1e-3)
    assert abs(bias) > 0.02
    assert "centre the sizes of the budgets on" in messages(parts(_skewed(1e-4)))["centring_drift"]


SKEWED = {"E": 1.7, "A": 4000.0, "B": 100.0, "alpha": 0.5, "beta": 0.2}


def _skewed(sigma: float) -> list[Point]:
    """Three budgets of the same sizes, those around the lowest budget's minimum."""
    scale = (SKEWED["alpha"] * SKEWED["A"] / (SKEWED["beta"] * SKEWED["B"])) ** (1 / 0.7)
    middle, points = scale * (1e17 / 6) ** (0.2 / 0.7), []
    for budget in (1e17, 1e18, 1e19):
        for size in middle * np.geomspace(1 / 3, 5, 8):
            tokens = budget / 6 / size
            loss = 1.7 + SKEWED["A"] * size**-0.5 + SKEWED["B"] * tokens**-0.2
            points.append(
                Point(
                    f"k{len(points)}",
                    "s",
                    1,
                    float(size),
                    float(tokens),
                    budget,
                    float(loss),
                    0,
                    budget,
                    "bpb=a",
                )
            )
    return noisy(points, sigma=sigma)


@pytest.mark.parametrize("position", [-1, 3])
def test_the_largest_run_that_bends_a_ladder_is_influential(position: int) -> None:
    flops = np.geomspace(1e12, 1e15, 12)
    points = noisy(ladder(law(flops), flops), sigma=1e-4)
    name = points[position].run_id
    points[position] = replace(points[position], loss=points[position].loss * 1.01)
    influential = influences(*parts(points, None))
    if position == -1:
        assert [influence.run for influence in influential] == [f"run {name}"]
        assert influential[0].largest
        assert influential[0].deleted < -0.01
        assert "the largest" in messages(parts(points, None))["influential_run"]
    else:  # the Huber loss has taken its weight away
        assert influential == []


def test_an_outlier_of_an_isoflop_curve_is_named_once_and_leaving_it_out_equals_a_refit(
    wild: Parts,
) -> None:
    points = wild[0]
    (influence,) = [item for item in influences(*wild) if item.run == f"run {points[12].run_id}"]
    refit = fit_isoflop([*points[:12], *points[13:]])
    assert refit is not None
    assert refit.params_exponent is not None
    assert influence.moved["params_exponent by the minima"][1] == pytest.approx(
        refit.params_exponent.estimate, rel=1e-9
    )


def test_sensitivity_has_a_row_for_each_change_and_is_json(clean: Parts) -> None:
    points, fitted, isoflop, parametric = clean
    doubled = {"doubled": [2 * point.params for point in points]}
    table = sensitivity(points, fitted, isoflop, parametric, doubled)
    names = [row.changed for row in table]
    assert names[:4] == [AS_FITTED, "delta 0.001", "delta 0.01", "squared log error"]
    assert names[4].startswith("without run ")
    assert names[5].startswith("without runs ")
    assert names[6] == "N is doubled"
    assert [row.n for row in table] == [18, 18, 18, 18, 17, 16, 18]
    assert table[6].params_exponent == pytest.approx(table[0].params_exponent, abs=1e-4)
    assert json.loads(json.dumps([to_json(row) for row in table], allow_nan=False))[0]["p"] is None
    with pytest.raises(ValueError, match="'few' gives 2 counts of 18 runs"):
        sensitivity(points, fitted, isoflop, parametric, {"few": [1.0, 2.0]})


def test_refits_from_the_fitted_row_reach_the_published_fit(reference: Path) -> None:
    """Epoch's 240 points: the exponent of delta 0.001, from a fit of 1.345 sigma."""
    points = reproduce.chinchilla(reference)
    table = sensitivity(points, None, None, parts(points)[3])
    assert table[1].params_exponent == pytest.approx(0.513900, abs=1e-5)
    assert table[3].alpha == pytest.approx(0.360, abs=1e-3)
    assert table[3].beta == pytest.approx(0.406, abs=1e-3)


def test_a_number_outside_its_interval_gives_a_warning(clean: Parts) -> None:
    points, fitted, isoflop, parametric = clean
    rows = sensitivity(points, fitted, isoflop, parametric)
    moved = [
        *rows[:3],
        replace(rows[3], params_exponent=0.9),
        replace(rows[4], changed="N is total", convention=True),
    ]
    moved[4] = replace(moved[4], params_exponent=0.1)
    warnings = fit_warnings(points, selected(fitted), isoflop, parametric, moved)
    texts = {warning.code: warning.message for warning in warnings}
    assert "params_exponent is 0.9 against" in texts["estimator_matters"]
    assert "with squared log error" in texts["estimator_matters"]
    assert "params_exponent is 0.1 against" in texts["convention_matters"]


def test_one_outlier_moves_least_squares_out_of_the_interval() -> None:
    points, noise = noisy(grid(), sigma=5e-4), Noise(5e-4, "known")
    points[18] = replace(points[18], loss=points[18].loss * 1.05)
    fit = (
        points,
        None,
        None,
        ParametricFit(fit_surface(points, noise=noise)),
    )
    assert "with squared log error" in messages(fit)["estimator_matters"]


def test_approaches_disagree_when_their_intervals_do_not_meet(clean: Parts) -> None:
    points, fitted, isoflop, parametric = clean
    assert isoflop is not None
    distant = replace(isoflop, params_exponent=Interval(0.8, 0.79, 0.81, True))
    distant_codes = {
        warning.code for warning in fit_warnings(points, selected(fitted), distant, parametric, ())
    }
    codes = {
        warning.code for warning in fit_warnings(points, selected(fitted), isoflop, parametric, ())
    }
    assert "approaches_disagree" in distant_codes - codes


def test_nanochat_s_sizes_drift_and_chinchilla_is_not_additive(reference: Path) -> None:
    points = reproduce.nanochat(reference)
    assert {"centring_drift"} == CHECKED & set(messages(parts(points, "coupled")))
    assert "surface_structure" in messages(parts(points))
    chinchilla = reproduce.chinchilla(reference)
    test = structure(chinchilla, fit_surface(chinchilla))
    assert test is not None
    assert test.p < 1e-9
