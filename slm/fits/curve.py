"""Curves of one family: L(C), the isoFLOP minima, the surface L(N, D), CORE, and their limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

from slm.fits.checks.diagnostics import fit_warnings
from slm.fits.checks.sensitivity import SensitivityRow, sensitivity
from slm.fits.core_fit import CoreFit, NoCoreFit, fit_core
from slm.fits.isoflop import IsoFlopFit, fit_isoflop
from slm.fits.ladder import Selection, law_runs, select_law
from slm.fits.parametric import ParametricFit, fit_parametric
from slm.fits.points import Axes, Point, check
from slm.fits.power_law import Law
from slm.fits.prediction import Prediction, Target
from slm.fits.surface import FORMS, PAPER, Surface, obstacle
from slm.fits.types import FitWarning, to_json

OPTIMAL = "compute-optimal runs"
MINIMA = "isoflop minima"
"""Runs that a law is fitted to: OPTIMAL or MINIMA."""
POWER = "power"
"""Form of a fit of L(C) alone."""
NO_ONE_CURVE = (
    "the runs without a budget vary N and D apart, so they are no one curve of compute; "
    "the surface gives the optimum"
)


@dataclass(frozen=True)
class CurveFit:
    """Result of `fit_curves`."""

    points: tuple[Point, ...]
    """Fitted runs."""
    unsized: tuple[Point, ...]
    """Runs left out because their N or D is unknown, which surfaces and isoFLOP curves need."""
    metric: str
    """val_bpb, loss in nats per token, or core, whose loss is val_bpb."""
    convention: str
    """Parameters that N counts."""
    through: str
    """Runs of the law: OPTIMAL or, without any, MINIMA."""
    selection: Selection
    """Law L(C)."""
    isoflop: IsoFlopFit | None
    """None without runs at a budget."""
    parametric: ParametricFit
    """Surface L(N, D) of all runs."""
    core: CoreFit | NoCoreFit | None
    """CORE over the loss, or why there is no curve; None if no run has a CORE."""
    sensitivity: tuple[SensitivityRow, ...]
    """Headline numbers under other objectives, without the worst runs, under other counts of N."""
    warnings: tuple[FitWarning, ...]

    @property
    def mixed(self) -> list[str]:
        """Axes of the runs if they are on several; empty if on one."""
        return Axes.of_points(self.points).mixed

    @property
    def loss(self) -> str:
        """Name of the loss."""
        return "val_bpb" if self.metric == "core" else self.metric

    @property
    def law(self) -> Law | None:
        """The selected law."""
        return self.selection.law

    @property
    def predicting_surface(self) -> Surface | None:
        """The surface, if it predicts instead of the law."""
        return self.parametric.surface if self.law is None or self.through == MINIMA else None

    def predict(self, target: Target) -> Prediction:
        """Predict a further run.

        A law of compute-optimal runs predicts, else the surface at the model or at its optimum,
        else the law of the minima. Raises ValueError if there is neither.
        """
        surface = self.predicting_surface
        if surface:
            model = surface.form
            params, tokens = target.params, target.tokens
            if params is None or tokens is None:
                best = surface.optimum(target.flops)
                params, tokens = best.params, best.tokens
            loss = surface.prediction(params, tokens)
            validated_factor = self.parametric.validated_factor
            largest = max(point.flops for point in self.points)
        elif self.law:
            model = self.law.form
            loss = self.law.prediction(target.flops)
            validated_factor = self.selection.validated_factor
            largest = self.law.largest
        else:
            raise ValueError(
                f"no curve to predict {target.flops:.3g} FLOPs from: {self.selection.why}"
            )
        core = self.core.prediction(target.flops) if isinstance(self.core, CoreFit) else None
        return Prediction(target, model, loss, core, target.flops / largest, validated_factor)

    def document(self) -> dict[str, Any]:
        """Return the JSON document; null is unknown, compute in FLOPs, loss in its own unit."""
        first = self.points[0]
        selection = self.selection
        surface = self.parametric.surface
        mixed = self.mixed
        validation = []
        for hold_out in selection.hold_outs:
            validation.append(hold_out.document() | {"predicted": hold_out.run_documents()})
        return to_json(
            {
                "points": {
                    "n": len(self.points),
                    "run_ids": sorted(point.run_id for point in self.points),
                    "excluded": self._excluded(),
                    "metric": self.metric,
                    "convention": self.convention,
                    "recipe": None if mixed else first.recipe,
                    "comparison_key": None if mixed else first.comparison_key,
                },
                "mixed": mixed,
                "isoflop": self.isoflop,
                "power_law": self._law_document(selection.law),
                "rival": self._law_document(selection.rival),
                "parametric": self.parametric,
                "selected": {
                    "form": selection.law.form if selection.law else None,
                    "why": selection.why,
                    "errors": selection.errors,
                    "surface": surface.form if surface else None,
                    "surface_why": self.parametric.why,
                },
                "validation": validation + self.parametric.validation,
                "core": self.core,
                "sensitivity": self.sensitivity,
                "warnings": self.warnings,
            }
        )

    def _law_document(self, law: Law | None) -> dict[str, Any] | None:
        return law.document() | {"through": self.through} if law else None

    def _excluded(self) -> list[dict[str, str]]:
        """Return the runs that no number stands on, with reasons."""
        curves = self.isoflop.curves if self.isoflop else ()
        reasons = [(curve.left_out, "far from the lowest loss of its budget") for curve in curves]
        for curve in curves:
            if curve.parabola is None:
                reasons.append((curve.points, curve.reason or ""))
        reasons.append((self.unsized, "no params"))
        return [
            {"run_id": point.run_id, "reason": reason}
            for points, reason in reasons
            for point in points
        ]


def fit_curves(
    points: Sequence[Point],
    convention: str = "matrices+head",
    metric: str = "val_bpb",
    form: str = "auto",
    paper: bool = False,
    other_counts: Mapping[str, Sequence[float]] | None = None,
    allow_mixed: bool = False,
) -> CurveFit:
    """Fit L(C), the isoFLOP minima, the surface L(N, D) and CORE of one family's finished runs.

    `convention` names what `params` counts, `metric` what `loss` is; `other_counts` gives N of
    every run by other conventions, to show what would change. L(C) is fitted to the runs without a
    budget, if they are one curve of compute; without any, to the resolved minima. `form` is the
    form of the surface: `auto` selects the better predictor, `power` fits none; `paper` takes the
    delta and, for `auto`, the additive form of Hoffmann et al. 2022. If the runs hold a surface or
    isoFLOP curves, those of unknown params or tokens are left out; L(C) alone takes all.
    `allow_mixed` fits several comparison keys and recipes as one curve, with a warning.

    Raises NotComparable (a ValueError) for several comparison keys or recipes otherwise, ValueError
    for no run, a run given twice, an unknown form, and runs that cannot hold the requested form.
    Too few runs are no error otherwise: the fit says what is missing.
    """
    # 1) check the runs and the form
    check(points, allow_mixed)
    if form not in ("auto", POWER, *FORMS):
        raise ValueError(f"form is {form!r}; known are auto, {POWER}, {', '.join(FORMS)}")
    if paper and form == "auto":
        form = "additive"
    # 2) fit what needs N and D, and leave out the runs without them if anything was found
    sized = [point for point in points if point.sized]
    isoflop = fit_isoflop(sized)
    parametric = _fit_parametric(sized, form, paper)
    unsized = _unsized(points, needed=bool(isoflop or parametric.surface))
    if unsized:
        used = [point not in unsized for point in points]
        points = list(compress(points, used))
        other_counts = {
            name: list(compress(counts, used)) for name, counts in (other_counts or {}).items()
        }
    # 3) fit L(C) and CORE
    runs = law_runs(points, isoflop.curves if isoflop else ())
    ladder = [run for run in runs if isinstance(run, Point)]
    through = OPTIMAL if ladder or not runs else MINIMA
    if ladder and all(point.sized for point in ladder) and obstacle(ladder) is None:
        selection = Selection(None, None, NO_ONE_CURVE, "no_one_curve")
    else:
        selection = select_law(runs, through)
    core = None
    if any(point.core is not None for point in points):
        core = fit_core(points, selection.law, allow_mixed)
    # 4) check what the numbers rest on
    rows = sensitivity(points, selection.law, isoflop, parametric, other_counts)
    warnings = Axes.of_points(points).warnings
    if unsized:
        message = (
            f"{len(unsized)} run{'s' * (len(unsized) > 1)} without params or tokens left out: "
            "a surface or an isoFLOP curve needs both"
        )
        warnings.append(FitWarning("no_params", message))
    warnings += fit_warnings(points, selection, isoflop, parametric, rows)
    warnings += core.warnings if core else []
    return CurveFit(
        points=tuple(points),
        unsized=unsized,
        metric=metric,
        convention=convention,
        through=through,
        selection=selection,
        isoflop=isoflop,
        parametric=parametric,
        core=core,
        sensitivity=rows,
        warnings=tuple(warnings),
    )


def _fit_parametric(sized: Sequence[Point], form: str, paper: bool) -> ParametricFit:
    """Fit L(N, D) to the runs of known size. Raises ValueError if they cannot hold `form`."""
    if form == POWER:
        return ParametricFit(why="no surface requested")
    if sized:
        parametric = fit_parametric(sized, PAPER if paper else None, form)
    else:
        why = "no run has both params and tokens: only L(C) is known"
        parametric = ParametricFit(why=why, code="no_params")
    if form in FORMS and parametric.surface is None:
        raise ValueError(f"no {form} surface: {parametric.why}")
    return parametric


def _unsized(points: Sequence[Point], needed: bool) -> tuple[Point, ...]:
    """Return the runs of unknown size to leave out: those at a budget, all if sizes are `needed`.

    Raises ValueError if no run would be left.
    """
    unsized = tuple(
        point for point in points if not point.sized and (needed or point.budget is not None)
    )
    if len(unsized) == len(points):
        raise ValueError(
            f"{len(points)} runs at FLOPs budgets have no params or no tokens: none can be fitted"
        )
    return unsized
