"""The curves of one family: what compute buys, where the minima lie, and what the runs cannot say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slm.fits.intervals import Interval
from slm.fits.isoflop import IsoFlop, fit_isoflop
from slm.fits.ladder import Choice, choose
from slm.fits.parametric import NOT_ASKED, Parametric, fit_parametric
from slm.fits.points import Point, check
from slm.fits.power_law import ADDITIVE, REACH, Law
from slm.fits.prediction import Prediction, Target
from slm.fits.surface import FORMS, PAPER

OPTIMAL, MINIMA = "compute-optimal runs", "isoflop minima"
"""What a law goes through."""
POWER = "power"
"""The form that is L(C) alone."""
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
class CurveFit:
    """The answer of `fit_curves`."""

    points: tuple[Point, ...]
    """Runs given."""
    metric: str
    """What the loss is: val_bpb, or loss in nats a token."""
    convention: str
    """What N counts."""
    through: str
    """What the law goes through: OPTIMAL or, without any, MINIMA."""
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

    def predict(self, target: Target) -> Prediction:
        """What a further run would come to, with its interval.

        By the law where it goes through compute-optimal runs, else by the surface, at the model named or at its
        optimum, else by the law of the minima. Raises ValueError where there is neither.
        """
        surface = self.parametric.surface
        if surface and (self.law is None or self.through == MINIMA):
            params, tokens = target.params, target.tokens
            if params is None or tokens is None:
                best = surface.optimum(target.flops)
                params, tokens = best.params, best.tokens
            loss, tested = surface.prediction(params, tokens), self.parametric.tested
            model, largest = surface.form, max(point.flops for point in self.points)
        elif self.law:
            loss, tested = self.law.prediction(target.flops), self.choice.tested
            model, largest = self.law.form, self.law.largest
        else:
            raise ValueError(f"no curve to predict {target.flops:.3g} FLOPs from: {self.choice.why}")
        return Prediction(target, model, loss, None, target.flops / largest, tested)

    @property
    def cautions(self) -> list[Caution]:
        """Everything the numbers do not hold, `warnings` of the document."""
        return [
            *_law_cautions(self.choice),
            *_grid_cautions(self.isoflop, self.parametric),
            *_surface_cautions(self.parametric, self.isoflop),
        ]

    def document(self) -> dict[str, Any]:
        """As JSON, without NaN: null is what is not known. Compute in FLOPs, loss in the unit of the metric."""
        first, choice, surface = self.points[0], self.choice, self.parametric.surface
        return {
            "points": {
                "n": len(self.points),
                "run_ids": sorted(point.run_id for point in self.points),
                "excluded": _excluded(self.isoflop),
                "metric": self.metric,
                "convention": self.convention,
                "recipe": first.recipe,
                "comparison_key": first.comparison_key,
            },
            "isoflop": self.isoflop.document() if self.isoflop else None,
            "power_law": choice.law.document() | {"through": self.through} if choice.law else None,
            "rival": choice.rival.document() | {"through": self.through} if choice.rival else None,
            "parametric": self.parametric.document(),
            "selected": {
                "form": choice.law.form if choice.law else None,
                "why": choice.why,
                "errors": choice.errors,
                "surface": surface.form if surface else None,
                "surface_why": self.parametric.why,
            },
            "validation": [own.document() for own in choice.hold_outs],
            "warnings": [vars(caution) for caution in self.cautions],
        }


def fit_curves(
    points: Sequence[Point],
    convention: str = "matrices+head",
    metric: str = "val_bpb",
    form: str = "auto",
    paper: bool = False,
) -> CurveFit:
    """Fit L(C), the isoFLOP minima and the surface L(N, D) of one family's finished runs.

    `convention` names what `params` counts, `metric` what `loss` is. L(C) goes through the runs without a budget;
    without any, through the resolved minima. `form` is that of the surface: `auto` takes the better predictor, `power`
    none at all; `paper` gives it the delta of Hoffmann et al. 2022. Raises NotComparable (a ValueError) for several
    comparison keys or recipes, ValueError for no run, a run given twice, an unknown form, and runs that cannot hold the
    form asked for. Too few runs are no error otherwise: the answer says so.
    """
    check(points)
    if form not in ("auto", POWER, *FORMS):
        raise ValueError(f"form is {form!r}; known are auto, {POWER}, {', '.join(FORMS)}")
    isoflop = fit_isoflop(points)
    ladder = [point for point in points if point.budget is None]
    minima = [valley.minimum for valley in isoflop.valleys if valley.minimum] if isoflop else []
    through = MINIMA if minima and not ladder else OPTIMAL
    parametric = fit_parametric(points, PAPER if paper else None, form) if form != POWER else NOT_ASKED
    if form in FORMS and parametric.surface is None:
        raise ValueError(f"no {form} surface: {parametric.why}")
    return CurveFit(tuple(points), metric, convention, through, choose(ladder or minima, through), isoflop, parametric)


def gains(law: Law) -> bool:
    """Whether compute lowers the loss at the largest run, by the whole interval (a share of 1e-9 is none)."""
    low = law.gain(law.largest).low
    return low is not None and low > 1e-9


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
    if choice.tested < REACH:
        right = f"right to {choice.tested:.3g} times beyond" if choice.tested > 1 else "not right beyond any"
        message = f"values to {REACH:g} times the largest run are extrapolated; held-out runs show prediction {right}"
        found.append(Caution("extrapolation", message))
    return found


def _grid_cautions(isoflop: IsoFlop | None, parametric: Parametric) -> list[Caution]:
    found = [
        Caution(valley.code, f"budget {valley.budget:.3g} is unresolved: {valley.reason}")
        for valley in (isoflop.valleys if isoflop else ())
        if valley.code
    ]
    if parametric.surface is None and parametric.why != NOT_ASKED.why and (isoflop is None or len(isoflop.valleys) < 2):
        message = (
            "parameters and tokens grow together along compute-optimal runs, so their exponents cannot be told apart: "
            "only L(C) is known; several sizes at each of two or more FLOPs budgets would tell"
        )
        found.append(Caution("one_dial_no_exponents", message))
    return found


def _surface_cautions(parametric: Parametric, isoflop: IsoFlop | None) -> list[Caution]:
    surface, drawn = parametric.surface, parametric.bootstrap
    if surface is None:
        told = parametric.code in (None, "one_dial_no_exponents")
        return [] if told else [Caution(parametric.code or "", parametric.why)]
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
