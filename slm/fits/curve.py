"""The curves of one family: what compute buys, where the minima lie, and what the runs cannot say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slm.fits.checks.diagnostics import cautions
from slm.fits.checks.sensitivity import Row, sensitivity
from slm.fits.core_fit import CoreFit, NoCoreFit, fit_core
from slm.fits.isoflop import IsoFlop, fit_isoflop
from slm.fits.ladder import Choice, choose, law_runs
from slm.fits.parametric import NOT_ASKED, Parametric, fit_parametric
from slm.fits.points import Point, axes_of, check, mixture
from slm.fits.power_law import Law
from slm.fits.prediction import Prediction, Target
from slm.fits.surface import FORMS, PAPER, Surface, obstacle
from slm.fits.warning import FitWarning

OPTIMAL, MINIMA = "compute-optimal runs", "isoflop minima"
"""What a law goes through."""
POWER = "power"
"""The form that is L(C) alone."""
SCATTERED = Choice(
    None,
    None,
    "the runs without a budget vary N and D apart, so they are no one curve of compute: the optimum is the surface's",
    "no_one_curve",
    None,
    (),
)
"""No law goes through runs that are not compute-optimal alike."""
UNSIZED = Parametric(
    None, (), "no run has both params and tokens: only L(C) is known", "no_params", (), None
)
"""No surface without sizes."""


@dataclass(frozen=True)
class CurveFit:
    """The answer of `fit_curves`."""

    points: tuple[Point, ...]
    """Runs fitted."""
    unsized: tuple[Point, ...]
    """Runs left out: their params or tokens are not known, which those of a surface or a valley must be."""
    metric: str
    """What was asked for: val_bpb, loss in nats a token, or core, of which the loss is val_bpb."""
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
    core: CoreFit | NoCoreFit | None
    """CORE through the loss, or why not; None where no run has a CORE."""
    sensitivity: tuple[Row, ...]
    """The headline numbers under other objectives, without the worst runs, under other counts of N."""
    cautions: tuple[FitWarning, ...]
    """Everything the numbers do not hold, `warnings` of the document."""

    @property
    def mixed(self) -> list[str]:
        """Axes of the runs, where they are on several; none on one."""
        return axes_of([point.parts for point in self.points])

    @property
    def loss(self) -> str:
        """Name of the loss."""
        return "val_bpb" if self.metric == "core" else self.metric

    @property
    def law(self) -> Law | None:
        """The law chosen."""
        return self.choice.law

    @property
    def answering(self) -> Surface | None:
        """The surface, where it and not the law answers what a run would come to."""
        return self.parametric.surface if self.law is None or self.through == MINIMA else None

    def predict(self, target: Target) -> Prediction:
        """What a further run would come to, with its interval.

        By the law where it goes through compute-optimal runs, else by the surface, at the model named or at its
        optimum, else by the law of the minima. Raises ValueError where there is neither.
        """
        surface = self.answering
        if surface:
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
            raise ValueError(
                f"no curve to predict {target.flops:.3g} FLOPs from: {self.choice.why}"
            )
        core = self.core.prediction(target.flops) if isinstance(self.core, CoreFit) else None
        return Prediction(target, model, loss, core, target.flops / largest, tested)

    def document(self) -> dict[str, Any]:
        """As JSON, without NaN: null is what is not known. Compute in FLOPs, loss in the unit of the metric."""
        first, choice, surface = self.points[0], self.choice, self.parametric.surface
        return {
            "points": {
                "n": len(self.points),
                "run_ids": sorted(point.run_id for point in self.points),
                "excluded": [*_excluded(self.isoflop), *_named(self.unsized, "no params")],
                "metric": self.metric,
                "convention": self.convention,
                "recipe": None if self.mixed else first.recipe,
                "comparison_key": None if self.mixed else first.comparison_key,
            },
            "mixed": self.mixed,
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
            "validation": [
                *(own.document() for own in choice.hold_outs),
                *(rung.document(surface.form) for rung in self.parametric.rungs if surface),
            ],
            "core": self.core.document() if self.core else None,
            "sensitivity": [row.document() for row in self.sensitivity],
            "warnings": [vars(caution) for caution in self.cautions],
        }


def fit_curves(
    points: Sequence[Point],
    convention: str = "matrices+head",
    metric: str = "val_bpb",
    form: str = "auto",
    paper: bool = False,
    others: Mapping[str, Sequence[float]] | None = None,
    mixed: bool = False,
) -> CurveFit:
    """Fit L(C), the isoFLOP minima, the surface L(N, D) and CORE of one family's finished runs.

    `convention` names what `params` counts, `metric` what `loss` is; `others` gives N of every run by other
    conventions, to see what would change. L(C) goes through the runs without a budget, if they are one curve of
    compute; without any, through the resolved minima. `form` is that of the surface: `auto` takes the better predictor,
    `power` none at all; `paper` gives it the delta and, for `auto`, the form of Hoffmann et al. 2022, additive. Where
    runs hold a surface or valleys, those whose params or tokens are not known are left out; L(C) alone takes all.
    `mixed` takes several comparison keys and recipes as one curve, on the caller's word, and the answer says so.

    Raises NotComparable (a ValueError) for several comparison keys or recipes otherwise, ValueError for no run, a run
    given twice, an unknown form, and runs that cannot hold the form asked for. Too few runs are no error otherwise: the
    answer says so.
    """
    check(points, mixed)
    if form not in ("auto", POWER, *FORMS):
        raise ValueError(f"form is {form!r}; known are auto, {POWER}, {', '.join(FORMS)}")
    form = "additive" if paper and form == "auto" else form
    sized = [point for point in points if point.sized]
    isoflop, parametric = fit_isoflop(sized), _surface_of(sized, form, paper)
    unsized = _unplaced(points, held=bool(isoflop or parametric.surface))
    if unsized:
        kept = [k for k, point in enumerate(points) if point not in unsized]
        points = [points[k] for k in kept]
        others = {name: [own[k] for k in kept] for name, own in (others or {}).items()}
    runs = law_runs(points, isoflop.valleys if isoflop else ())
    ladder = [point for point in runs if isinstance(point, Point)]
    through = OPTIMAL if ladder or not runs else MINIMA
    scattered = ladder and all(point.sized for point in ladder) and obstacle(ladder) is None
    choice = SCATTERED if scattered else choose(runs, through)
    core = (
        fit_core(points, choice.law, mixed)
        if any(point.core is not None for point in points)
        else None
    )
    rows = sensitivity(points, choice.law, isoflop, parametric, others)
    found = mixture([point.parts for point in points]) + _unsized_cautions(unsized)
    found += cautions(points, choice, isoflop, parametric, rows)
    found += core.cautions if core else []
    return CurveFit(
        tuple(points),
        unsized,
        metric,
        convention,
        through,
        choice,
        isoflop,
        parametric,
        core,
        rows,
        tuple(found),
    )


def _surface_of(sized: Sequence[Point], form: str, paper: bool) -> Parametric:
    """L(N, D) through the runs of known size. Raises ValueError where they cannot hold the form asked for."""
    if form == POWER:
        return NOT_ASKED
    parametric = fit_parametric(sized, PAPER if paper else None, form) if sized else UNSIZED
    if form in FORMS and parametric.surface is None:
        raise ValueError(f"no {form} surface: {parametric.why}")
    return parametric


def _unplaced(points: Sequence[Point], held: bool) -> tuple[Point, ...]:
    """Runs of unknown size at a budget, and all of them where a surface or valleys are `held` by the others.

    Raises ValueError where none is left.
    """
    found = tuple(
        point for point in points if not point.sized and (held or point.budget is not None)
    )
    if len(found) == len(points):
        raise ValueError(
            f"{len(points)} runs at FLOPs budgets have no params or no tokens: nothing is known of them"
        )
    return found


def _unsized_cautions(unsized: Sequence[Point]) -> list[FitWarning]:
    if not unsized:
        return []
    runs = f"{len(unsized)} run{'s' * (len(unsized) > 1)}"
    return [
        FitWarning(
            "no_params",
            f"{runs} without params or tokens have no place on a surface or a valley: left out",
        )
    ]


def _named(points: Sequence[Point], reason: str) -> list[dict[str, str]]:
    return [{"run_id": point.run_id, "reason": reason} for point in points]


def _excluded(isoflop: IsoFlop | None) -> list[dict[str, str]]:
    valleys = isoflop.valleys if isoflop else ()
    far = [
        (point, "far from the lowest loss of its budget")
        for valley in valleys
        for point in valley.left_out
    ]
    few = [
        (point, valley.reason or "")
        for valley in valleys
        if valley.parabola is None
        for point in valley.points
    ]
    return [{"run_id": point.run_id, "reason": reason} for point, reason in far + few]
