"""What the diagnostics claim: each warning is heard where it should be, and clean runs are left in peace."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from slm.fits import Point
from slm.fits.checks.diagnostics import FitWarning, cautions, drift, lack_of_fit, structure
from slm.fits.checks.sensitivity import AS_FITTED, influences, sensitivity
from slm.fits.intervals import Interval
from slm.fits.isoflop import IsoFlop, fit_isoflop
from slm.fits.ladder import Choice, HoldOut, Predicted
from slm.fits.optimize import descend
from slm.fits.parametric import Parametric
from slm.fits.power_law import ADDITIVE, PURE, Law, Noise, fit_law, noise_of
from slm.fits.surface import Surface, cloud_of, fit_surface
from tests import reproduce
from tests.fits.test_laws import ladder, law
from tests.fits.test_surface import grid

Parts = tuple[list[Point], Law | None, IsoFlop | None, Parametric]
SIGMA = 0.002


def chosen(own: Law | None) -> Choice:
    """A law that was right ten times beyond its runs."""
    right = Predicted(10.0, 1.0, Interval(1.0, 0.9, 1.1, True))
    return Choice(own, None, "", None, None, (HoldOut(1.0, 3, PURE, (right,)),))


def noisy(points: list[Point], seed: int = 0, sigma: float = SIGMA) -> list[Point]:
    draw = np.random.default_rng(seed)
    return [
        replace(own, loss=own.loss * float(np.exp(sigma * draw.standard_normal())))
        for own in points
    ]


def twice(points: list[Point]) -> list[Point]:
    return [
        replace(own, run_id=f"{own.run_id}-{seed}", seed=seed) for seed in (0, 1) for own in points
    ]


def parts(points: list[Point], form: str | None = "additive") -> Parts:
    """The pieces of a fit; without a surface where `form` is None."""
    runs, found = [own for own in points if own.budget is None], None
    if runs:
        flops, losses = np.array([[own.flops, own.loss] for own in runs]).T
        found = fit_law(ADDITIVE, flops, losses, noise_of(runs, flops, losses, ADDITIVE))
    surface = fit_surface(points, form) if form else None
    return (
        points,
        found,
        fit_isoflop(points),
        Parametric(surface, (), "", "one_dial_no_exponents", (), None),
    )


def told(own: Parts) -> dict[str, str]:
    """Messages by code."""
    points, found, isoflop, parametric = own
    rows = sensitivity(points, found, isoflop, parametric)
    every = cautions(points, chosen(found), isoflop, parametric, rows)
    assert len({caution.message for caution in every}) == len(every)
    return {caution.code: caution.message for caution in every}


@pytest.fixture(scope="module")
def clean() -> Parts:
    return parts(noisy(grid((1e17, 1e18, 1e19))))


@pytest.fixture(scope="module")
def wild() -> Parts:
    """One run of the largest budget 3 % above."""
    points = noisy(grid((1e17, 1e18, 1e19)), sigma=1e-3)
    return parts([*points[:12], replace(points[12], loss=points[12].loss * 1.03), *points[13:]])


NEW = {
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
def test_clean_runs_are_left_in_peace(points: list[Point], form: str | None) -> None:
    assert not NEW & set(told(parts(noisy(points), form)))


def test_a_law_that_misses_the_means_of_seeds_lacks_fit() -> None:
    wave = 1 + 0.02 * np.cos(np.arange(8) * 2.0)
    found = told(parts(noisy(twice(ladder(law() * wave))), None))
    assert "where seeds lie 0.2" in found["law_lack_of_fit"]


def test_lack_of_fit_is_the_f_test_of_the_definition_without_the_worst_setting() -> None:
    points, draw = twice(ladder(law())), np.random.default_rng(0)
    points = [replace(own, loss=float(np.exp(0.01 * draw.standard_normal()))) for own in points]
    losses = np.log([own.loss for own in points]).reshape(2, 8)
    test = lack_of_fit(points, losses.ravel(), 3)
    between = np.sort(2 * losses.mean(0) ** 2)[:-1].sum() / (8 - 1 - 3)
    within = ((losses - losses.mean(0)) ** 2).sum() / 8
    assert test is not None
    assert pytest.approx(between / within) == test.F
    assert pytest.approx(stats.f.sf(between / within, 4, 8)) == test.chance


def test_one_wild_run_is_no_lack_of_fit_and_no_structure() -> None:
    points = noisy(twice(grid((1e17, 1e18, 1e19))))
    points = [own for own in points if own.run_id != "r7-1"]
    wild = [replace(own, loss=own.loss * 1.1) if own.run_id == "r7-0" else own for own in points]
    assert not {"surface_lack_of_fit", "surface_structure"} & set(told(parts(wild)))


def test_settings_at_random_around_a_surface_lack_fit_and_have_no_structure() -> None:
    moved = noisy(grid((1e17, 1e18, 1e19), sizes=7), sigma=0.01, seed=2)
    found = told(parts(noisy(twice(moved), sigma=0.001)))
    assert "surface_lack_of_fit" in found
    assert "surface_structure" not in found


def test_an_additive_surface_through_coupled_runs_leaves_structure() -> None:
    points = noisy(grid(gamma=0.4, sizes=8), sigma=3e-4)
    found = told(parts(points))
    assert "ln N and ln D" in found["surface_structure"]
    assert "surface_structure" not in told(parts(points, "coupled"))


def test_the_score_test_of_noise_has_its_size() -> None:
    """Chances of clean runs are uniform, with wild runs among them too."""
    chances = []
    for seed in range(100):
        points = noisy(grid(sizes=7), seed)
        points[seed % 28] = replace(
            points[seed % 28], loss=points[seed % 28].loss * (1.05 if seed % 4 == 0 else 1)
        )
        surface = _unprofiled(points)
        test = structure(points, surface)
        assert test is not None
        chances.append(test.chance)
    assert stats.kstest(chances, "uniform").pvalue > 0.01
    assert np.mean(np.array(chances) < 0.1) < 0.2


FITTED = fit_surface(grid((1e17, 1e18, 1e19)), noise=Noise(SIGMA, "known"))


def _unprofiled(points: list[Point]) -> Surface:
    """The surface without intervals: what the score test reads."""
    noise = Noise(SIGMA, "known")
    cloud = cloud_of(points, noise.delta)
    found, _ = descend(cloud, FITTED.row[None], np.ones((1, len(points))), range(5))
    return replace(FITTED, row=found[0], delta=noise.delta)


def test_sizes_that_stay_while_the_minimum_moves_bias_the_minima() -> None:
    """Noise-free, so the bias by the surface is the whole difference from the truth, 0.3 / 0.64."""
    points = _skewed(0.0)
    own = parts(points)
    assert own[2] is not None
    assert own[3].surface is not None
    assert own[2].params_exponent is not None
    found = drift(own[2], own[3].surface)
    assert found is not None
    off, bias = found
    assert off == sorted(off)
    assert off[-1] - off[0] > 1
    truth = SKEWED["beta"] / (SKEWED["alpha"] + SKEWED["beta"])
    assert own[2].params_exponent.estimate == pytest.approx(truth + bias, abs=1e-3)
    assert abs(bias) > 0.02
    assert "centre the sizes of the budgets on" in told(parts(_skewed(1e-4)))["centring_drift"]


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


@pytest.mark.parametrize("where", [-1, 3])
def test_a_ladder_that_one_run_bends_names_it(where: int) -> None:
    flops = np.geomspace(1e12, 1e15, 12)
    points = noisy(ladder(law(flops), flops), sigma=1e-4)
    name, bent = points[where].run_id, replace(points[where], loss=points[where].loss * 1.01)
    points[where] = bent
    found = influences(*parts(points, None))
    if where == -1:
        assert [own.run for own in found] == [f"run {name}"]
        assert found[0].largest
        assert found[0].miss < -0.01
        assert "the largest" in told(parts(points, None))["influential_run"]
    else:  # the Huber loss has taken its weight away
        assert found == []


def test_a_wild_run_of_a_valley_is_named_once_and_left_out_is_a_refit(wild: Parts) -> None:
    points = wild[0]
    (found,) = [own for own in influences(*wild) if own.run == f"run {points[12].run_id}"]
    again = fit_isoflop([*points[:12], *points[13:]])
    assert again is not None
    assert again.params_exponent is not None
    assert found.moved["params_exponent by the minima"][1] == pytest.approx(
        again.params_exponent.estimate, rel=1e-9
    )


def test_the_table_has_a_row_for_each_change_and_is_json(clean: Parts) -> None:
    points, found, isoflop, parametric = clean
    doubled = {"doubled": [2 * own.params for own in points]}
    table = sensitivity(points, found, isoflop, parametric, doubled)
    names = [row.changed for row in table]
    assert names[:4] == [AS_FITTED, "delta 0.001", "delta 0.01", "squared log error"]
    assert names[4].startswith("without run ")
    assert names[5].startswith("without runs ")
    assert names[6] == "N is doubled"
    assert [row.n for row in table] == [18, 18, 18, 18, 17, 16, 18]
    assert table[6].params_exponent == pytest.approx(table[0].params_exponent, abs=1e-4)
    assert (
        json.loads(json.dumps([row.document() for row in table], allow_nan=False))[0]["p"] is None
    )
    with pytest.raises(ValueError, match="'few' gives 2 counts of 18 runs"):
        sensitivity(points, found, isoflop, parametric, {"few": [1.0, 2.0]})


def test_a_refit_from_the_fitted_row_is_the_fit(reference: Path) -> None:
    """Epoch's 240 points: the exponent of delta 0.001, from a fit of 1.345 sigma."""
    points = reproduce.chinchilla(reference)
    table = sensitivity(points, None, None, parts(points)[3])
    assert table[1].params_exponent == pytest.approx(0.513900, abs=1e-5)
    assert table[3].alpha == pytest.approx(0.360, abs=1e-3)
    assert table[3].beta == pytest.approx(0.406, abs=1e-3)


def test_a_value_beyond_its_interval_is_told(clean: Parts) -> None:
    points, found, isoflop, parametric = clean
    rows = sensitivity(points, found, isoflop, parametric)
    moved = [
        *rows[:3],
        replace(rows[3], params_exponent=0.9),
        replace(rows[4], changed="N is total", convention=True),
    ]
    moved[4] = replace(moved[4], params_exponent=0.1)
    every: list[FitWarning] = cautions(points, chosen(found), isoflop, parametric, moved)
    texts = {caution.code: caution.message for caution in every}
    assert "params_exponent is 0.9 against" in texts["estimator_matters"]
    assert "with squared log error" in texts["estimator_matters"]
    assert "params_exponent is 0.1 against" in texts["convention_matters"]


def test_one_wild_run_makes_squares_leave_the_interval() -> None:
    points, noise = noisy(grid(), sigma=5e-4), Noise(5e-4, "known")
    points[18] = replace(points[18], loss=points[18].loss * 1.05)
    own = points, None, None, Parametric(fit_surface(points, noise=noise), (), "", None, (), None)
    assert "with squared log error" in told(own)["estimator_matters"]


def test_approaches_disagree_when_their_intervals_do_not_meet(clean: Parts) -> None:
    points, found, isoflop, parametric = clean
    assert isoflop is not None
    far = replace(isoflop, params_exponent=Interval(0.8, 0.79, 0.81, True))
    texts = {own.code for own in cautions(points, chosen(found), far, parametric, ())}
    near = {own.code for own in cautions(points, chosen(found), isoflop, parametric, ())}
    assert "approaches_disagree" in texts - near


def test_nanochat_s_sizes_drift_and_chinchilla_is_not_additive(reference: Path) -> None:
    points = reproduce.nanochat(reference)
    assert {"centring_drift"} == NEW & set(told(parts(points, "coupled")))
    assert "surface_structure" in told(parts(points))
    chinchilla = reproduce.chinchilla(reference)
    test = structure(chinchilla, fit_surface(chinchilla))
    assert test is not None
    assert test.chance < 1e-9
