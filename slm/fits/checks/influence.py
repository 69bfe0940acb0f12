"""Influential runs: runs that the others do not predict, and that move a headline number.

A number that moves without a run is not remarkable, since the largest run has most leverage. The t
test of the deleted residual decides whether the others predict the run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from slm.fits.checks.residuals import (
    NEGLIGIBLE,
    SIGNIFICANCE,
    deleted_p_value,
    half_width,
    huber_scale,
    law_residuals,
    leverages,
    refit_law,
    surface_residuals,
)
from slm.fits.intervals import Interval
from slm.fits.isoflop import IsoFlopFit, Parabola
from slm.fits.ladder import Run, columns_of, law_runs
from slm.fits.parametric import ParametricFit
from slm.fits.points import Point
from slm.fits.power_law import Law
from slm.fits.surface import FORMS, Surface, loss_data, quantities, refit_rows
from slm.fits.types import Array

Moved = dict[str, tuple[float, float]]
"""Number -> its value with the run and without it."""


@dataclass(frozen=True)
class Influence:
    """A run that the others do not predict and that moves a headline number."""

    run: str
    """Label of the run, or of the budget of a minimum."""
    largest: bool
    """Whether no other run has more compute."""
    deleted: float
    """Deleted residual: log of the loss that the others predict over the measured one."""
    p_value: float
    moved: Moved


def influences(
    points: Sequence[Point], law: Law | None, isoflop: IsoFlopFit | None, parametric: ParametricFit
) -> list[Influence]:
    """Return the runs that the others miss and that move a number by a quarter of its interval.

    The test is at the 1 % level of all runs together; the largest run of a law or surface is tested
    alone. Numbers are p and the gain of the law at its largest run, and the exponent of N*. The
    width that a run adds by adding to the noise does not count.
    """
    curves = isoflop.curves if isoflop else ()
    results: list[Influence] = []
    if law:
        runs = law_runs(points, curves)
        results += _significant(_on_law(law, runs), len(runs))
    if parametric.surface:
        results += _significant(_on_surface(points, parametric.surface), len(points))
    if isoflop and isoflop.params_exponent:
        tests = sum(len(curve.points) for curve in curves if curve.parabola)
        results += _significant(_on_minima(isoflop, isoflop.params_exponent), tests)
    merged: dict[str, Influence] = {}
    for influence in results:
        first = merged.get(influence.run, influence)
        merged[influence.run] = replace(first, moved=first.moved | influence.moved)
    return list(merged.values())


def _significant(candidates: Iterable[Influence], tests: int) -> Iterator[Influence]:
    for influence in candidates:
        level = SIGNIFICANCE if influence.largest else SIGNIFICANCE / tests
        if influence.moved and influence.p_value < level:
            yield influence


def _moved(name: str, interval: Interval, without: float, shrinkage: Array | float) -> Moved:
    """Return the number if it moves by more than NEGLIGIBLE and a quarter of its interval.

    `shrinkage` is how much narrower the noise without the run would make the interval.
    """
    if interval.estimate is None:
        return {}
    quarter = half_width(interval) / 2 * min(float(shrinkage), 1.0)
    least = max(quarter, NEGLIGIBLE * abs(interval.estimate))
    if abs(without - interval.estimate) <= least:
        return {}
    return {name: (interval.estimate, without)}


def _on_law(law: Law, runs: Sequence[Run]) -> Iterator[Influence]:
    """Leave out the largest run, and the one that fits worst for its leverage."""
    flops, losses = columns_of(runs)
    ones = np.ones_like(flops)
    delta = law.noise.delta
    residuals, jacobian = law_residuals(law, flops, losses)
    leverage = leverages(jacobian, ones)
    scale_of_all = huber_scale(residuals, ones, delta, law.free)
    free = law.free - 1
    largest = int(flops.argmax())
    worst = int((np.abs(residuals) / np.sqrt(1 - leverage)).argmax())
    for k in {largest, worst}:
        rest = np.arange(len(runs)) != k
        refit = refit_law(law, flops[rest], losses[rest], law.noise)
        if refit is None:
            continue
        residuals, _ = law_residuals(refit, flops[rest], losses[rest])
        scale = huber_scale(residuals, ones[rest], delta, free)
        shrinkage = scale / scale_of_all
        deleted = float(np.log(refit.loss(flops[k]) / losses[k]))
        gain = refit.gain(law.largest).estimate or 0.0
        moved = _moved("p", law.p, float(refit.best[2]), shrinkage)
        moved |= _moved("gain", law.gain(law.largest), gain, shrinkage)
        p_value = float(deleted_p_value(deleted, leverage[k], scale, free))
        yield Influence(_label(runs[k]), k == largest, deleted, p_value, moved)


def _label(run: Run) -> str:
    if isinstance(run, Point):
        return f"run {run.run_id}"
    return f"the minimum at {run.flops:.3g} FLOPs"


def _on_surface(points: Sequence[Point], surface: Surface) -> Iterator[Influence]:
    """Leave out every run, all refits in one batch."""
    data = loss_data(points, surface.delta)
    weights = data.weights
    free = len(points) - 1 - FORMS[surface.form]
    if free < 1:
        return
    without = weights * (1 - np.eye(len(points)))
    rows = refit_rows(surface, data, without)
    refit_residuals, _ = data.residuals(rows)
    residuals, jacobian = surface_residuals(surface, points)
    scale = huber_scale(refit_residuals, without, surface.delta, free)
    shrinkage = scale / huber_scale(residuals, weights, surface.delta, free + 1)
    deleted = refit_residuals.diagonal()
    leverage = leverages(jacobian, weights)
    p_values = deleted_p_value(deleted * np.sqrt(weights), leverage, scale, free)
    name = "params_exponent"
    exponents = quantities(rows, surface.centre)[name]
    largest = np.argmax([point.flops for point in points])
    for k, point in enumerate(points):
        moved = _moved(name, surface.intervals[name], exponents[k], shrinkage[k])
        yield Influence(_label(point), k == largest, deleted[k], p_values[k], moved)


def _on_minima(isoflop: IsoFlopFit, interval: Interval) -> Iterator[Influence]:
    """Leave every run out of its parabola, whose minimum moves the exponent by its leverage."""
    resolved = [curve for curve in isoflop.curves if curve.minimum]
    compute = np.log([curve.flops for curve in resolved])
    compute -= compute.mean()
    noise = (isoflop.noise or 0.0) + 1e-300
    free = isoflop.free - 1
    if free < 1 or interval.estimate is None:
        return
    for curve, lever in zip(resolved, compute / (compute @ compute)):
        assert curve.parabola is not None
        shifts, deleted, remainder = _without_each(curve.points, curve.parabola)
        exponents = interval.estimate + lever * shifts
        shares = deleted / curve.parabola.level
        squares = noise**2 * isoflop.free - shares**2 * remainder
        scale = np.sqrt(np.maximum(squares, 0.0) / free) + 1e-300
        p_values = deleted_p_value(shares, 1 - remainder, scale, free)
        for k, point in enumerate(curve.points):
            name = "params_exponent by the minima"
            moved = _moved(name, interval, exponents[k], scale[k] / noise)
            miss = -deleted[k] / point.loss
            yield Influence(_label(point), False, miss, p_values[k], moved)


def _without_each(points: Sequence[Point], parabola: Parabola) -> tuple[Array, Array, Array]:
    """Return, per run left out, the shift of ln N*, the deleted residual, and 1 - h.

    Closed form, exact for least squares: the coefficients become c - G⁻¹x·r/(1 - h).
    """
    sizes = np.log([point.params for point in points])
    losses = np.array([point.loss for point in points])
    design = np.vander(sizes - parabola.centre, 3, increasing=True)
    pull = design @ parabola.covariance
    remainder = np.maximum(1 - (pull * design).sum(1), 1e-9)
    deleted = (losses - parabola.at(sizes)) / remainder
    _, b, c = (parabola.coefficients - pull * deleted[:, None]).T
    shifts = parabola.centre - b / (2 * c) - parabola.vertex
    return shifts, deleted, remainder
