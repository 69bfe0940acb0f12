"""The curves of one family: what compute buys, where the minima lie, and what the runs cannot say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slm.fits.intervals import Interval
from slm.fits.isoflop import IsoFlop, Minimum, Valley, fit_isoflop
from slm.fits.parametric import Parametric, fit_parametric
from slm.fits.points import Point, check
from slm.fits.power_law import ADDITIVE, PARAMETERS, PURE, Array, Law, Noise, aicc, fit_law, noise_of, predict

REACH = 10.0
"""How many times beyond the largest run a law is read at most."""
WIDER = 1.5
"""How many times wider one kind of interval may be than another without a word."""


@dataclass(frozen=True)
class Caution:
    """What a reader must know before using a number."""

    code: str
    """Stable name."""
    message: str
    """One sentence."""


@dataclass(frozen=True)
class Validation:
    """The largest compute held out, each law fitted to the rest and asked for it."""

    flops: float
    """Compute held out, FLOPs."""
    runs: int
    """Runs held out."""
    factor: float
    """How far beyond the largest run that was kept."""
    errors: dict[str, float]
    """Root mean square log error of the prediction, by form of law."""


@dataclass(frozen=True)
class Choice:
    """One form of L(C), and how it was chosen."""

    law: Law | None
    """The law chosen; None with too few computes."""
    rival: Law | None
    """The other form; None where the runs could not hold it."""
    why: str
    """Why this form, or why none."""
    validation: Validation | None
    """None when holding the largest compute out leaves too few."""


@dataclass(frozen=True)
class CurveFit:
    """The answer of `fit_curves`."""

    points: tuple[Point, ...]
    """Runs given."""
    convention: str
    """What N counts."""
    through: str
    """What the law goes through: `compute-optimal runs` or, without any, `isoflop minima`."""
    choice: Choice
    """L(C)."""
    isoflop: IsoFlop | None
    """None without runs at a budget."""
    parametric: Parametric
    """L(N, D) through all runs."""

    @property
    def law(self) -> Law | None:
        """The law chosen."""
        return self.choice.law

    @property
    def cautions(self) -> list[Caution]:
        """Everything the numbers do not hold, `warnings` of the document."""
        return [
            *_law_cautions(self.choice),
            *_grid_cautions(self.isoflop, self.parametric),
            *_surface_cautions(self.parametric, self.isoflop),
        ]

    def document(self) -> dict[str, Any]:
        """As JSON, without NaN: null is what is not known. Compute in FLOPs, loss in bits per byte."""
        first, choice = self.points[0], self.choice
        return {
            "points": {
                "n": len(self.points),
                "run_ids": sorted(point.run_id for point in self.points),
                "excluded": _excluded(self.isoflop),
                "convention": self.convention,
                "recipe": first.recipe,
                "comparison_key": first.comparison_key,
            },
            "isoflop": _isoflop_document(self.isoflop),
            "power_law": _law_document(choice.law, self.through),
            "rival": _law_document(choice.rival, self.through),
            "parametric": self.parametric.document(),
            "selected": {"form": choice.law.form if choice.law else None, "why": choice.why},
            "validation": vars(choice.validation) if choice.validation else None,
            "warnings": [vars(caution) for caution in self.cautions],
        }


def fit_curves(points: Sequence[Point], convention: str = "matrices+head") -> CurveFit:
    """Fit L(C), the isoFLOP minima and the surface L(N, D) of one family's finished runs.

    `convention` names what `params` counts. L(C) goes through the runs without a budget; without any, through the
    resolved minima. Raises NotComparable (a ValueError) for several comparison keys or recipes, ValueError for no run
    or a run given twice. Too few runs are no error: the answer says so.
    """
    check(points)
    isoflop = fit_isoflop(points)
    ladder = [point for point in points if point.budget is None]
    minima = [valley.minimum for valley in isoflop.valleys if valley.minimum] if isoflop else []
    through = "isoflop minima" if minima and not ladder else "compute-optimal runs"
    choice = _choose(ladder or minima, through)
    return CurveFit(tuple(points), convention, through, choice, isoflop, fit_parametric(points))


def _choose(runs: Sequence[Point | Minimum], through: str) -> Choice:
    """Fit both forms and take the one that predicts the largest compute better."""
    flops, losses = np.array([run.flops for run in runs]), np.array([run.loss for run in runs])
    steps = _steps(flops)
    if steps <= PARAMETERS[PURE]:
        count = f"{steps} different compute{'s' * (steps != 1)} among the {through}"
        return Choice(None, None, f"{count}; a law takes 3, one with a floor 4: run more depths or budgets", None)
    form = ADDITIVE if steps > PARAMETERS[ADDITIVE] else PURE
    noise = noise_of([run for run in runs if isinstance(run, Point)], flops, losses, form)
    pure = fit_law(PURE, flops, losses, noise)
    if form == PURE:
        return Choice(pure, None, "3 computes do not hold a floor: that takes 4", None)
    additive, validation = fit_law(ADDITIVE, flops, losses, noise), _validate(flops, losses, noise)
    form, why = _preferred(additive, pure, validation.errors)
    law, rival = (additive, pure) if form == ADDITIVE else (pure, additive)
    return Choice(law, rival, why, validation)


def gains(law: Law) -> bool:
    """Whether compute lowers the loss at the largest run, by the whole interval (a share of 1e-9 is none)."""
    low = law.gain(law.largest).low
    return low is not None and low > 1e-9


def _steps(flops: Array) -> int:
    """Different computes; replicates and the rounding of steps aside, one within a percent."""
    return len(flops) and int(1 + (np.diff(np.sort(np.log(flops))) > 0.01).sum())


def _validate(flops: Array, losses: Array, noise: Noise) -> Validation:
    largest = float(flops.max())
    held = np.log(largest / flops) <= 0.01
    errors = {}
    for form in PARAMETERS:
        predicted = predict(form, flops[~held], losses[~held], noise, flops[held])
        errors[form] = float(np.sqrt(np.mean(np.log(predicted / losses[held]) ** 2)))
    return Validation(largest, int(held.sum()), largest / float(flops[~held].max()), errors)


def _preferred(additive: Law, pure: Law, errors: dict[str, float]) -> tuple[str, str]:
    if additive.best[:2].min() == 0:
        return PURE, "the best floor is 0" if additive.best[0] == 0 else "the loss does not fall with compute"
    held = ", ".join(f"{form} {100 * error:.2g} %" for form, error in errors.items())
    if abs(errors[ADDITIVE] - errors[PURE]) > additive.noise.sigma:
        return min(errors, key=errors.__getitem__), f"error at the largest compute, held out: {held}"
    criteria = {law.form: aicc(law.objective, law.n, PARAMETERS[law.form]) for law in (additive, pure)}
    tie = f"held out, the largest compute tells them apart by less than the noise ({held})"
    if None in criteria.values():
        return PURE, f"{tie} and {additive.n} runs are too few for AICc: the simpler law"
    return min(criteria, key=lambda form: criteria[form] or 0.0), f"{tie}; the lower AICc"


def _law_cautions(choice: Choice) -> list[Caution]:
    if choice.law is None:
        return [Caution("too_few_runs", choice.why)]
    found = []
    additive = next((law for law in (choice.law, choice.rival) if law and law.form == ADDITIVE), None)
    if additive is None or not additive.E.identifiable:
        message = "the runs do not hold the irreducible loss E: its interval reaches 0" if additive else choice.why
        found.append(Caution("E_unidentified", f"{message}; how far the gains go on is open"))
    if not gains(choice.law):
        gain = choice.law.gain(choice.law.largest)
        message = f"the runs do not show that compute lowers the loss: a doubling gives {gain.text('.2g', 100)} %"
        found.append(Caution("no_gain", message))
    factor = choice.validation.factor if choice.validation else None
    if factor is None or factor < REACH:
        tested = f"tested {factor:.3g} times beyond" if factor else "not tested beyond any run"
        message = f"values to {REACH:g} times the largest run are extrapolated; prediction was {tested}"
        found.append(Caution("extrapolation", message))
    return found


def _grid_cautions(isoflop: IsoFlop | None, parametric: Parametric) -> list[Caution]:
    found = [
        Caution(valley.code, f"budget {valley.budget:.3g} is unresolved: {valley.reason}")
        for valley in (isoflop.valleys if isoflop else ())
        if valley.code
    ]
    if parametric.surface is None and (isoflop is None or len(isoflop.valleys) < 2):
        message = (
            "parameters and tokens grow together along compute-optimal runs, so their exponents cannot be told apart: "
            "only L(C) is known; several sizes at each of two or more FLOPs budgets would tell"
        )
        found.append(Caution("one_dial_no_exponents", message))
    return found


def _surface_cautions(parametric: Parametric, isoflop: IsoFlop | None) -> list[Caution]:
    surface, drawn = parametric.surface, parametric.bootstrap
    if surface is None:
        return [Caution(parametric.code or "", parametric.why)] if parametric.code != "one_dial_no_exponents" else []
    found = []
    if surface.unheld:
        message = f"the runs do not bound {', '.join(surface.unheld)} of the {surface.form} surface on both sides"
        found.append(Caution("surface_unidentified", message))
    if surface.status != "converged" or surface.starts_agreeing < 0.1:
        message = f"{surface.status}; {surface.starts_agreeing:.0%} of the starts end at the surface chosen"
        found.append(Caution("surface_not_converged", message))
    own, minima = surface.intervals["params_exponent"], isoflop.params_exponent if isoflop else None
    if minima and not _overlap(own, minima):
        message = f"N* grows as C^{own.text('.2f')} on the surface and as C^{minima.text('.2f')} by the isoFLOP minima"
        found.append(Caution("approaches_disagree", message))
    wide = [name for name in ("E", "alpha", "beta") if drawn and _differ(surface.intervals[name], drawn.ends[name])]
    if wide:
        message = f"profile and bootstrap intervals of {', '.join(wide)} differ by more than {WIDER:g} times"
        found.append(Caution("intervals_differ", message))
    return found


def _overlap(one: Interval, other: Interval) -> bool:
    ends = [(-np.inf if own.low is None else own.low, np.inf if own.high is None else own.high) for own in (one, other)]
    return max(low for low, _ in ends) <= min(high for _, high in ends)


def _differ(profile: Interval, drawn: tuple[float, float]) -> bool:
    if profile.low is None or profile.high is None:
        return False
    widths = sorted((profile.high - profile.low, drawn[1] - drawn[0]))
    return widths[1] > WIDER * widths[0]


def _excluded(isoflop: IsoFlop | None) -> list[dict[str, str]]:
    valleys = isoflop.valleys if isoflop else ()
    far = [(point, "far from the lowest loss of its budget") for valley in valleys for point in valley.left_out]
    few = [(point, valley.reason or "") for valley in valleys if valley.parabola is None for point in valley.points]
    return [{"run_id": point.run_id, "reason": reason} for point, reason in far + few]


def _law_document(law: Law | None, through: str) -> dict[str, Any] | None:
    if law is None:
        return None
    return {
        "form": law.form,
        "through": through,
        "n": law.n,
        "E": law.E.document(),
        "K": law.K.document(),
        "p": law.p.document(),
        "objective": law.objective,
        "delta": law.noise.delta if np.isfinite(law.noise.delta) else None,
        "sigma": law.noise.sigma,
        "sigma_from": law.noise.source,
        "residual_rms": law.residual_rms,
        "band": _band(law),
        "flattening": [_flattening(law, times) for times in (1.0, REACH)],
    }


def _band(law: Law) -> dict[str, Any]:
    flops = np.geomspace(law.smallest, REACH * law.largest, 41)
    low, high = law.band(flops)
    columns = {"flops": flops, "loss": law.loss(flops), "low": low, "high": high}
    return {name: column.tolist() for name, column in columns.items()} | {"extrapolated_from": law.largest}


def _flattening(law: Law, times: float) -> dict[str, Any]:
    flops = times * law.largest
    return {
        "flops": flops,
        "times_largest": times,
        "slope": law.slope(flops).document(),
        "doubling": law.gain(flops).document(),
        "extrapolated": times > 1,
    }


def _isoflop_document(grid: IsoFlop | None) -> dict[str, Any] | None:
    if grid is None:
        return None
    exponents = {"params_exponent": grid.params_exponent, "tokens_exponent": grid.tokens_exponent}
    return {
        **{name: own.document() if own else None for name, own in exponents.items()},
        "noise": grid.noise,
        "optima": [_optimum(grid, valley) for valley in grid.valleys],
    }


def _optimum(grid: IsoFlop, valley: Valley) -> dict[str, Any]:
    best = valley.minimum
    values = {name: getattr(best, name) if best else None for name in ("params", "tokens", "ratio", "loss")}
    return {
        "budget": valley.budget,
        **values,
        "status": "ok" if best else "unresolved",
        "reason": valley.reason,
        "interval": grid.interval(valley).document() if best else None,
    }
