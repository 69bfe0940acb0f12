"""Sensitivity of headline numbers: refits with other losses, fewer runs, other counts of N.

Every refit starts from the fitted parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from slm.fits.checks.residuals import law_residuals, refit_law, surface_residuals
from slm.fits.isoflop import IsoFlopCurve, IsoFlopFit, fit_isoflop_curves, minima_of
from slm.fits.ladder import columns_of, law_runs
from slm.fits.parametric import ParametricFit
from slm.fits.points import Point
from slm.fits.power_law import LEAST_SQUARES, PARAMETERS, Law, Noise
from slm.fits.surface import FORMS, PAPER, Surface, fit_row, loss_data, quantities, refit_rows

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
    fit = _Fit(points, law, parametric.surface, isoflop.curves if isoflop else ())
    rows = [fit.row(AS_FITTED)]
    rows += [fit.with_delta(delta).row(name) for name, delta in fit.other_deltas()]
    for runs in fit.worst():
        noun = "run" if len(runs) == 1 else "runs"
        rows.append(fit.without(runs).row(f"without {noun} {', '.join(runs)}"))
    for name, counts in (conventions or {}).items():
        if len(counts) != len(points):
            raise ValueError(
                f"convention {name!r} gives {len(counts)} counts of {len(points)} runs"
            )
        rows.append(fit.recounted(counts).row(f"N is {name}", convention=True))
    return tuple(rows)


@dataclass(frozen=True)
class _Fit:
    """A fit to vary, and what a variation refits: a law and a surface without intervals."""

    points: Sequence[Point]
    law: Law | None
    surface: Surface | None
    """Surface with the intervals of the original fit."""
    curves: Sequence[IsoFlopCurve]

    def row(self, changed: str, convention: bool = False) -> SensitivityRow:
        """Return the headline numbers; of the surface, those that the original fit determines."""
        names = ("alpha", "beta", "params_exponent", "E")
        values: dict[str, float | None] = dict.fromkeys(names)
        if self.surface:
            fitted = quantities(self.surface.row[None], self.surface.centre)
            for name in names:
                if self.surface.intervals[name].identifiable:
                    values[name] = float(fitted[name][0])
        return SensitivityRow(
            changed=changed,
            convention=convention,
            n=len(self.points),
            minima_exponent=_minima_exponent(self.curves),
            p=float(self.law.best[2]) if self.law else None,
            **values,
        )

    def other_deltas(self) -> Iterator[tuple[str, float | None]]:
        """Yield those of DELTAS that are not the fit's own."""
        fitted = self.surface or self.law
        if not fitted:
            return
        usual = fitted.noise.delta
        used = self.surface.delta if self.surface else usual
        for name, delta in DELTAS.items():
            if (usual if delta is None else delta) != used:
                yield name, delta

    def with_delta(self, delta: float | None) -> _Fit:
        """Refit with another delta; None is that of the noise."""
        surface = self.surface
        if surface:
            data = loss_data(self.points, surface.noise.delta if delta is None else delta)
            rows = refit_rows(surface, data, data.weights[None])
            surface = replace(surface, row=rows[0])
        noise = None if delta is None else Noise(delta / 1.345, "given")
        return replace(self, law=self._refitted_law(noise), surface=surface)

    def worst(self) -> list[list[str]]:
        """Return the worst run, and the worst two; empty if too few runs would remain."""
        runs = list(self.points)
        if self.surface:
            residuals, _ = surface_residuals(self.surface, runs)
            least = FORMS[self.surface.form] + 3
        else:
            runs = [point for point in runs if point.budget is None]
            if not self.law or not runs:
                return []
            residuals, _ = law_residuals(self.law, *columns_of(runs))
            least = PARAMETERS[self.law.form] + 2
        if len(runs) <= least:
            return []
        by_size = sorted(zip(-np.abs(residuals), (run.run_id for run in runs)))
        names = [name for _, name in by_size]
        return [names[:1], names[:2]]

    def without(self, dropped: Sequence[str]) -> _Fit:
        """Refit without some runs."""
        used = np.array([point.run_id not in dropped for point in self.points])
        points = [point for point in self.points if point.run_id not in dropped]
        surface = self.surface
        if surface:
            data = loss_data(self.points, surface.delta, surface.raw)
            weights = data.weights * used
            surface = replace(surface, row=refit_rows(surface, data, weights[None])[0])
        fit = _Fit(points, self.law, surface, fit_isoflop_curves(points))
        return replace(fit, law=fit._refitted_law())

    def recounted(self, counts: Sequence[float]) -> _Fit:
        """Refit from the start with other counts of N, whose exponents are others."""
        points = [replace(point, params=float(count)) for point, count in zip(self.points, counts)]
        surface = self.surface
        if surface:
            data = loss_data(points, surface.delta, surface.raw)
            row, *_ = fit_row(data, surface.form)
            surface = replace(surface, row=row, centre=data.centre)
        fit = _Fit(points, self.law, surface, fit_isoflop_curves(points))
        return replace(fit, law=fit._refitted_law())

    def _refitted_law(self, noise: Noise | None = None) -> Law | None:
        """Return the law's form through these runs; None if they are too few."""
        if not self.law:
            return None
        flops, losses = columns_of(law_runs(self.points, self.curves))
        return refit_law(self.law, flops, losses, noise or self.law.noise)


def _minima_exponent(curves: Sequence[IsoFlopCurve]) -> float | None:
    """Return the slope of the line through the minima."""
    minima = minima_of(curves)
    if len(minima) < 2:
        return None
    flops, params = np.log([[minimum.flops, minimum.params] for minimum in minima]).T
    return float(np.polyfit(flops, params, 1)[0])
