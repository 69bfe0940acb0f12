"""Which surface the runs hold: each form fitted, asked for larger compute than it has seen, and resampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slm.fits.intervals import Interval
from slm.fits.isoflop import Minimum
from slm.fits.ladder import TESTED, tops, validated
from slm.fits.optimize import Array, descend
from slm.fits.points import Point
from slm.fits.power_law import REACH, Noise, aicc
from slm.fits.surface import (
    FORMS,
    Surface,
    best_row,
    cloud_of,
    fit_surface,
    foretold,
    frontier,
    noise_around,
    obstacle,
    quantities,
)

ENOUGH = 30
"""Runs from which on they are resampled."""
RESAMPLES = 1000
RUNGS = 8
"""Rungs of a validation at most."""
HELD = 0.2
"""Share of the runs, those of the largest compute, whose error chooses the form."""


@dataclass(frozen=True)
class Rung:
    """Runs up to some compute kept, every form fitted to them and asked for the rest."""

    flops: float
    """Largest compute kept, FLOPs."""
    kept: int
    """Runs kept."""
    held: int
    """Runs held out, all of larger compute."""
    factor: float
    """How far the largest held out is beyond the largest kept."""
    errors: dict[str, float]
    """Root mean square log error of the prediction, by form."""
    biases: dict[str, float]
    """Mean log error, by form; positive predicts too high a loss."""
    covered: dict[str, float]
    """Share of the runs inside their 90 % interval, by form."""
    inside: dict[str, tuple[tuple[float, bool], ...]]
    """How far each run lay beyond the largest kept, and whether it was inside, by form."""

    def document(self, form: str) -> dict[str, Any]:
        """As JSON, as a hold-out of a form; and every form's error."""
        own = {
            "error": self.errors[form],
            "bias": self.biases[form],
            "covered": self.covered[form],
            "level": TESTED,
        }
        run = {"flops": self.flops, "kept": self.kept, "held": self.held, "factor": self.factor}
        return run | {"form": form} | own | {"errors": self.errors}


@dataclass(frozen=True)
class Bootstrap:
    """Runs drawn again with replacement, within their budget where they have one."""

    resamples: int
    """Draws."""
    strata: int
    """Budgets drawn within; 1 when the runs have none."""
    errors: dict[str, float | None]
    """Standard errors of E, A, B, alpha, beta, gamma, params_exponent; the tail of A and of B is long, or None."""
    ends: dict[str, tuple[float | None, float | None]]
    """2.5 and 97.5 % of the same; None is without bound."""


@dataclass(frozen=True)
class Parametric:
    """The surface chosen, or why there is none."""

    surface: Surface | None
    """None when the runs cannot hold one."""
    surfaces: tuple[Surface, ...]
    """Every form."""
    why: str
    """Why this form, or why none."""
    code: str | None
    """Stable name of why there is none."""
    rungs: tuple[Rung, ...]
    """By compute."""
    bootstrap: Bootstrap | None
    """Of the form chosen; None with fewer than ENOUGH runs."""
    frontier: tuple[tuple[Minimum, Interval], ...] = ()
    """What is compute-optimal on the surface chosen, and the interval of its N, to REACH times the largest run."""

    @property
    def tested(self) -> float:
        """How far beyond its runs the form chosen has been right."""
        form = self.surface.form if self.surface else "additive"
        return validated([own for rung in self.rungs for own in rung.inside[form]])

    @property
    def decisive(self) -> Rung | None:
        """The rung whose error chooses: HELD of the runs held out at least, as few as may be."""
        return _decisive(self.rungs)

    def document(self) -> dict[str, Any]:
        """As JSON: the form chosen, flat, and every form under `alternatives`; or why there is none."""
        if self.surface is None:
            return {
                "form": None,
                "identifiable": False,
                "code": self.code,
                "why": self.why,
                "alternatives": [],
            }
        return {
            **self.surface.document(),
            "why": self.why,
            "validation": [rung.document(self.surface.form) for rung in self.rungs],
            "bootstrap": _bootstrap_document(self.bootstrap),
            "frontier": [
                vars(best) | {"params_interval": own.document()} for best, own in self.frontier
            ],
            "alternatives": [surface.document() for surface in self.surfaces],
        }


NOT_ASKED = Parametric(None, (), "no surface asked for", None, (), None)


def fit_parametric(
    points: Sequence[Point],
    delta: float | None = None,
    form: str | None = None,
    resamples: int = RESAMPLES,
) -> Parametric:
    """Every form through the runs: the one asked for, else that of the least error at the largest compute.

    Too few runs are no error.
    """
    problem = obstacle(points)
    if problem:
        return Parametric(None, (), problem[1], problem[0], (), None)
    noise = noise_around(points)
    surfaces = tuple(fit_surface(points, name, delta, noise=noise) for name in FORMS)
    rungs = validate(points, surfaces[0].delta)
    asked = next((surface for surface in surfaces if surface.form == form), None)
    chosen, why = (asked, "asked for") if asked else _preferred(surfaces, rungs, noise)
    drawn = bootstrap(points, chosen, resamples) if len(points) >= ENOUGH else None
    flops = [point.flops for point in points]
    optima = frontier(points, chosen, np.geomspace(min(flops), REACH * max(flops), 5))
    return Parametric(chosen, surfaces, why, None, rungs, drawn, tuple(optima))


def validate(points: Sequence[Point], delta: float) -> tuple[Rung, ...]:
    """Leave-largest-compute-out at every compute (a budget is one) that keeps a surface, RUNGS of them at most."""
    levels = np.array([point.budget or point.flops for point in points])
    able = [
        top
        for top in tops(levels)
        if _holds([point for point, own in zip(points, levels) if own <= top * 1.001])
    ]
    if len(able) > RUNGS:
        decisive = [top for top in able if (levels > top * 1.001).mean() >= HELD][-1:]
        able = sorted(
            {
                *decisive,
                *(able[k] for k in np.linspace(0, len(able) - 1, RUNGS - 1).round().astype(int)),
            }
        )
    return tuple(_rung(points, levels <= top * 1.001, delta) for top in able)


def _holds(points: Sequence[Point]) -> bool:
    return obstacle(points) is None and len(points) > FORMS["coupled"]


def _rung(points: Sequence[Point], kept: np.ndarray[Any, np.dtype[np.bool_]], delta: float) -> Rung:
    cloud, top = (
        cloud_of(points, delta),
        max(point.flops for point, own in zip(points, kept) if own),
    )
    weights = np.where(kept, [point.weight for point in points], 0.0)
    factors = np.array([point.flops / top for point in points])[~kept]
    errors, inside = {}, {}
    for form, count in FORMS.items():
        row, objective, *_ = best_row(cloud, weights, form)
        bend = cloud.hessian(row, weights, range(count))
        losses, low, high = foretold(cloud, row, bend, objective, int(kept.sum()) - count, TESTED)
        errors[form] = np.log(losses / cloud.losses)[~kept]
        inside[form] = ((low <= cloud.losses) & (cloud.losses <= high))[~kept]
    return Rung(
        flops=top,
        kept=int(kept.sum()),
        held=int((~kept).sum()),
        factor=float(factors.max()),
        errors={form: float(np.sqrt(np.mean(own**2))) for form, own in errors.items()},
        biases={form: float(own.mean()) for form, own in errors.items()},
        covered={form: float(own.mean()) for form, own in inside.items()},
        inside={form: tuple(zip(factors.tolist(), own.tolist())) for form, own in inside.items()},
    )


def _preferred(
    surfaces: Sequence[Surface], rungs: Sequence[Rung], noise: Noise
) -> tuple[Surface, str]:
    named = {surface.form: surface for surface in surfaces}
    decisive = _decisive(rungs)
    tie = "no part of the runs holds a surface, so none could be tested at larger compute"
    if decisive:
        errors = decisive.errors
        held = ", ".join(f"{form} {100 * error:.2g} %" for form, error in errors.items())
        what = f"error on the {decisive.held} runs of the largest compute, held out: {held}"
        if max(errors.values()) - min(errors.values()) > noise.sigma:
            return named[min(errors, key=errors.__getitem__)], what
        tie = f"{what}; they differ by less than the noise"
    criteria = {
        surface.form: aicc(surface.objective, surface.n, FORMS[surface.form])
        for surface in surfaces
    }
    if None in criteria.values():
        return named[
            "additive"
        ], f"{tie}; {surfaces[0].n} runs are too few for AICc: the simpler form"
    return named[min(criteria, key=lambda form: criteria[form] or 0.0)], f"{tie}; the lower AICc"


def _decisive(rungs: Sequence[Rung]) -> Rung | None:
    return next(
        (rung for rung in reversed(rungs) if rung.held >= HELD * (rung.held + rung.kept)), None
    )


def bootstrap(
    points: Sequence[Point], surface: Surface, resamples: int = RESAMPLES, seed: int = 0
) -> Bootstrap:
    """Resample runs, not checkpoints, all draws in one array of weights; every draw descends from the surface."""
    budgets = [point.budget for point in points]
    strata = (
        np.unique([own or 0.0 for own in budgets], return_inverse=True)[1]
        if all(budgets)
        else np.zeros(len(points))
    )
    draw, counts = np.random.default_rng(seed), np.zeros((resamples, len(points)))
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        counts[:, members] = draw.multinomial(
            len(members), np.full(len(members), 1 / len(members)), resamples
        )
    weights = counts * [point.weight for point in points]
    cloud = cloud_of(points, surface.delta, surface.raw)
    rows, _ = descend(
        cloud, np.tile(surface.row, (resamples, 1)), weights, range(FORMS[surface.form])
    )
    values = quantities(rows, surface.centre)
    with np.errstate(over="ignore", invalid="ignore"):
        spreads: dict[str, Array] = {
            name: np.exp(own) if name in "EAB" else own for name, own in values.items()
        }
        errors = {name: _finite(own.std()) for name, own in spreads.items()}
        ends = {
            name: [_finite(end) for end in np.quantile(own, (0.025, 0.975))]
            for name, own in spreads.items()
        }
    return Bootstrap(
        resamples,
        len(np.unique(strata)),
        errors,
        {name: (own[0], own[1]) for name, own in ends.items()},
    )


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _bootstrap_document(drawn: Bootstrap | None) -> dict[str, Any] | None:
    if drawn is None:
        return None
    return {**vars(drawn), "ends": {name: list(own) for name, own in drawn.ends.items()}}
