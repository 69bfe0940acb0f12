"""Sensitivity of headline numbers: refits with other losses, fewer runs, other counts of N.

Every refit starts from the fitted parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from slm.fits.checks.residuals import law_residuals, surface_residuals
from slm.fits.isoflop import IsoFlopCurve, IsoFlopFit, fit_isoflop_curves, minima_of
from slm.fits.ladder import columns_of, law_runs
from slm.fits.optimize import LossData, levenberg_marquardt
from slm.fits.parametric import ParametricFit
from slm.fits.points import Point
from slm.fits.power_law import LEAST_SQUARES, PARAMETERS, Law, Noise, best_parameters
from slm.fits.select import count_computes
from slm.fits.surface import (
    FORMS,
    PAPER,
    Surface,
    fit_row,
    loss_data,
    quantities,
    weights_of,
)
from slm.fits.types import Array

AS_FITTED = "as fitted"
DELTAS = {
    "delta 0.001": PAPER,
    "delta 0.01": 1e-2,
    "delta 1.345 sigma": None,
    "squared log error": LEAST_SQUARES.delta,
}
"""Thresholds of the Huber loss; None is 1.345 sigma of each fit."""


@dataclass(frozen=True)
class SensitivityRow:
    """The headline numbers under one change; None if not determined before or after it."""

    changed: str
    """Description of the change; AS_FITTED in the first row."""
    convention: bool
    """Whether the change is of what N counts, so that N's exponents mean something else."""
    n: int
    """Runs."""
    alpha: float | None
    """Exponent of parameters on the surface."""
    beta: float | None
    """Exponent of tokens on the surface."""
    params_exponent: float | None
    """a of N*(C) ∝ C^a on the surface."""
    E: float | None
    """Irreducible loss on the surface, in the loss's unit."""
    minima_exponent: float | None
    """a by the isoFLOP minima."""
    p: float | None
    """Exponent of compute of the law L(C)."""


def sensitivity(
    points: Sequence[Point],
    law: Law | None,
    isoflop: IsoFlopFit | None,
    parametric: ParametricFit,
    conventions: Mapping[str, Sequence[float]] | None = None,
) -> tuple[SensitivityRow, ...]:
    """Return the headline numbers as fitted and refitted.

    Refits are with other deltas of the Huber loss, without the worst run and the worst two by the
    residual of the surface, else of the law, and with other counts of N. `conventions` gives N of
    every point by name of the convention; ValueError for another number of counts.
    """
    for name, counts in (conventions or {}).items():
        if len(counts) != len(points):
            raise ValueError(
                f"convention {name!r} gives {len(counts)} counts of {len(points)} runs"
            )
    fit = _Fit(points, law, parametric.surface, isoflop.curves if isoflop else ())
    rows = [fit.as_fitted()]
    rows += [fit.with_delta(name, delta) for name, delta in fit.other_deltas().items()]
    rows += [fit.without(runs) for runs in fit.worst()]
    rows += [fit.recounted(name, counts) for name, counts in (conventions or {}).items()]
    return tuple(rows)


@dataclass(frozen=True)
class _Fit:
    """A fit to vary."""

    points: Sequence[Point]
    law: Law | None
    surface: Surface | None
    curves: Sequence[IsoFlopCurve]

    def as_fitted(self) -> SensitivityRow:
        row = self.surface.row if self.surface else None
        return self._row(AS_FITTED, row, self.law.p.estimate if self.law else None)

    def other_deltas(self) -> dict[str, float | None]:
        """Return DELTAS without those equal to the fit's own."""
        if self.surface:
            fitted, usual = self.surface.delta, self.surface.noise.delta
        elif self.law:
            fitted = usual = self.law.noise.delta
        else:
            return {}
        return {
            name: delta
            for name, delta in DELTAS.items()
            if (usual if delta is None else delta) != fitted
        }

    def with_delta(self, name: str, delta: float | None) -> SensitivityRow:
        row, p = None, None
        if self.surface:
            threshold = self.surface.noise.delta if delta is None else delta
            row = self._refit_row(self.surface, loss_data(self.points, threshold))
        if self.law:
            noise = self.law.noise if delta is None else Noise(delta / 1.345, "given")
            p = self._exponent(noise)
        return self._row(name, row, p)

    def worst(self) -> list[list[Point]]:
        """Return the worst run, and the worst two; empty if too few runs would remain."""
        if self.surface:
            runs = list(self.points)
            residuals = surface_residuals(self.surface, runs)[0]
            least = FORMS[self.surface.form] + 3
        else:
            runs = [point for point in self.points if point.budget is None]
            if not self.law or not runs:
                return []
            residuals = law_residuals(self.law, *columns_of(runs))[0]
            least = PARAMETERS[self.law.form] + 2
        if len(runs) <= least:
            return []
        order = sorted(range(len(runs)), key=lambda k: (-abs(residuals[k]), runs[k].run_id))
        return [[runs[k] for k in order[:count]] for count in (1, 2)]

    def without(self, dropped: Sequence[Point]) -> SensitivityRow:
        ids = [point.run_id for point in dropped]
        used = [point.run_id not in ids for point in self.points]
        rest = [point for point, use in zip(self.points, used) if use]
        fit = replace(self, points=rest, curves=fit_isoflop_curves(rest))
        row = None
        if self.surface:
            data = loss_data(self.points, self.surface.delta, self.surface.raw)
            row = self._refit_row(self.surface, data, np.array(used))
        name = f"without {'runs' if len(ids) > 1 else 'run'} {', '.join(ids)}"
        return fit._row(name, row, fit._exponent())

    def recounted(self, name: str, counts: Sequence[float]) -> SensitivityRow:
        """Refit from the start with other counts of N, whose exponents are others."""
        points = [replace(point, params=float(count)) for point, count in zip(self.points, counts)]
        surface, row = self.surface, None
        if surface:
            data = loss_data(points, surface.delta, surface.raw)
            row = fit_row(data, weights_of(points), surface.form)[0]
            surface = replace(surface, centre=data.centre)
        fit = _Fit(points, self.law, surface, fit_isoflop_curves(points))
        return fit._row(f"N is {name}", row, fit._exponent(), convention=True)

    def _refit_row(self, surface: Surface, data: LossData, used: Array | float = 1.0) -> Array:
        weights = weights_of(self.points) * used
        columns = range(FORMS[surface.form])
        return levenberg_marquardt(data, surface.row[None], weights[None], columns)[0][0]

    def _exponent(self, noise: Noise | None = None) -> float | None:
        """Return p of the law's form through these runs; None if they are too few."""
        if not self.law:
            return None
        flops, losses = columns_of(law_runs(self.points, self.curves))
        if count_computes(flops) <= PARAMETERS[self.law.form]:
            return None
        _, best, _ = best_parameters(self.law.form, flops, losses, noise or self.law.noise)
        return float(best[2])

    def _row(
        self, changed: str, row: Array | None, p: float | None, convention: bool = False
    ) -> SensitivityRow:
        values: dict[str, float | None] = dict.fromkeys(("alpha", "beta", "params_exponent", "E"))
        if self.surface and row is not None:
            refitted = quantities(row[None], self.surface.centre)
            for name in values:
                if self.surface.intervals[name].identifiable:
                    values[name] = float(refitted[name][0])
        return SensitivityRow(
            changed=changed,
            convention=convention,
            n=len(self.points),
            minima_exponent=_minima_exponent(self.curves),
            p=p,
            **values,
        )


def _minima_exponent(curves: Sequence[IsoFlopCurve]) -> float | None:
    """Return the slope of the line through the minima."""
    minima = minima_of(curves)
    if len(minima) < 2:
        return None
    flops, params = np.log([[minimum.flops, minimum.params] for minimum in minima]).T
    return float(np.polyfit(flops, params, 1)[0])
