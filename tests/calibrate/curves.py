"""Calibrate curves: coverage and width of each interval, and how often each warning fires."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from slm.fits import ADDITIVE, CurveFit, Interval, Target, fit_curves
from slm.fits.power_law import REACH
from tests.calibrate.truths import DESIGNS, Design, Truth
from tests.calibrate.workers import parallel_map

HEADERS = (
    "design",
    "interval",
    "reported %",
    "open %",
    "cover %",
    "cover of closed %",
    "width %",
    "verdict",
)
WARNINGS = (
    "warning",
    "should: designs",
    "fired %",
    "least",
    "should not: designs",
    "fired % ",
    "most",
)
NOMINAL = (90.0, 98.0)
"""Least and greatest coverage, per cent, of a 95 % interval whose assumptions hold."""


@dataclass(frozen=True)
class Claim:
    """An interval and the truth it should cover."""

    group: str
    """Fit that gives the interval."""
    name: str
    """Quantity."""
    interval: Interval
    truth: float

    @property
    def covers(self) -> bool:
        """Whether the truth lies inside; an open side contains everything."""
        low, high = self.interval.low, self.interval.high
        return (low is None or low <= self.truth) and (high is None or self.truth <= high)

    @property
    def width(self) -> float:
        """Width as a share of the truth, absolute if that is 0; infinite if open."""
        low, high = self.interval.low, self.interval.high
        if low is None or high is None or not self.interval.identifiable:
            return np.inf
        return (high - low) / (abs(self.truth) or 1.0)


@dataclass(frozen=True)
class Outcome:
    """Result of one repetition of one design."""

    claims: tuple[Claim, ...]
    codes: frozenset[str]
    """Codes of the warnings."""


def intervals(
    repetitions: int, seed: int = 0, count: int | None = None
) -> tuple[Sequence[str], list[Sequence[object]]]:
    """Return headers, and one row for each interval of each design.

    Coverage counts an open side as containing everything; `cover of closed` leaves open intervals
    out. Widths are medians of the closed ones, in per cent of the truth. There is a verdict only
    where the assumptions hold.
    """
    rows: list[Sequence[object]] = []
    for design, outcomes in _simulated(repetitions, seed, count):
        groups: dict[tuple[str, str], list[Claim]] = defaultdict(list)
        for outcome in outcomes:
            for claim in outcome.claims:
                groups[claim.group, claim.name].append(claim)
        for claims in groups.values():
            rows.append(_row(design, claims, repetitions))
    return HEADERS, rows


def warnings(
    repetitions: int, seed: int = 0, count: int | None = None
) -> tuple[Sequence[str], list[Sequence[object]]]:
    """Return headers, and one row per warning: how often it fires where it should or should not."""
    simulated = _simulated(repetitions, seed, count)
    designs = [design for design, _ in simulated]
    fired = {code for _, outcomes in simulated for outcome in outcomes for code in outcome.codes}
    rows: list[Sequence[object]] = []
    for code in sorted(fired.union(*(design.must for design in designs))):
        shares = {
            design.name: 100 * float(np.mean([code in outcome.codes for outcome in outcomes]))
            for design, outcomes in simulated
        }
        should = {design.name: shares[design.name] for design in designs if code in design.must}
        should_not = {
            design.name: shares[design.name]
            for design in designs
            if code not in design.must | design.may
        }
        rows.append([code, *_summed(should, -1), *_summed(should_not, 1)])
    return WARNINGS, rows


def _summed(shares: dict[str, float], sign: int) -> list[object]:
    """Return the number of designs, their mean share, and the largest, or with -1 the least."""
    if not shares:
        return [0, "", ""]
    name = max(shares, key=lambda name: sign * shares[name])
    return [len(shares), float(np.mean(list(shares.values()))), f"{shares[name]:.0f}: {name}"]


def _row(design: Design, claims: Sequence[Claim], repetitions: int) -> Sequence[object]:
    group = claims[0].group
    closed = [claim for claim in claims if np.isfinite(claim.width)]
    cover = 100 * float(np.mean([claim.covers for claim in claims]))
    return (
        design.name,
        f"{group}: {claims[0].name}",
        100 * len({id(claim) for claim in claims}) / repetitions,
        100 * (1 - len(closed) / len(claims)),
        cover,
        100 * float(np.mean([claim.covers for claim in closed])) if closed else None,
        100 * float(np.median([claim.width for claim in closed])) if closed else None,
        _verdict(cover, claims) if group in design.sound else "",
    )


def _verdict(cover: float, claims: Sequence[Claim]) -> str:
    """Return ok, LOW or HIGH; `open` or `fixed` if the median interval is open or has no width."""
    low, high = NOMINAL
    width = float(np.median([claim.width for claim in claims]))
    if cover < low:
        return "LOW"
    if cover <= high:
        return "ok"
    if np.isinf(width):
        return "open"
    return "fixed" if width == 0 else "HIGH"


@cache
def _simulated(
    repetitions: int, seed: int, count: int | None
) -> list[tuple[Design, list[Outcome]]]:
    """Return the first `count` designs, each with its outcomes by repetition."""
    designs = DESIGNS[:count]
    tasks = [(number, k, seed) for k in range(repetitions) for number in range(len(designs))]
    outcomes = parallel_map(_outcome, tasks, "curves")
    return [(design, outcomes[n :: len(designs)]) for n, design in enumerate(designs)]


def _outcome(task: tuple[int, int, int]) -> Outcome:
    number, repetition, seed = task
    design = DESIGNS[number]
    generator = np.random.default_rng([seed, number, repetition])
    fit = fit_curves(design.draw(generator))
    claims = (
        *_law_claims(fit, design.truth),
        *_minima_claims(fit, design.truth),
        *_surface_claims(fit, design.truth),
    )
    further = tuple(_further_runs(fit, design, generator))
    return Outcome((*claims, *further), frozenset(warning.code for warning in fit.warnings))


def _further_runs(fit: CurveFit, design: Design, generator: np.random.Generator) -> Iterator[Claim]:
    """Yield the predictions of compute-optimal runs made after the fit, with further noise."""
    made = np.array([point.flops for point in fit.points])
    for times in (2.0, REACH):
        flops = times * made.max()
        noise = design.noise(generator, np.append(made, flops))[-1]
        loss = float(design.truth.best(flops) * np.exp(noise))
        prediction = fit.predict(Target(flops)).loss
        yield Claim("predictions", f"a run at {times:g} times", prediction, loss)


def _law_claims(fit: CurveFit, truth: Truth) -> Iterator[Claim]:
    for law in (fit.law, fit.selection.rival):
        if law and law.form == ADDITIVE:
            known = {"E": truth.E, "K": truth.scale(law.largest), "p": truth.p}
            for name, value in known.items():
                yield Claim("law with a floor", name, getattr(law, name), value)
    if fit.law:
        largest = fit.law.largest
        for name, flops in (
            ("loss at the largest", largest),
            (f"loss at {REACH:g} times", REACH * largest),
        ):
            yield Claim("law chosen", name, fit.law.at(flops), float(truth.best(flops)))
        yield Claim("law chosen", "gain", fit.law.gain(largest), truth.gain(largest))


def _minima_claims(fit: CurveFit, truth: Truth) -> Iterator[Claim]:
    if fit.isoflop is None:
        return
    for number, curve in enumerate(fit.isoflop.curves, 1):
        if curve.minimum:
            interval = fit.isoflop.intervals(curve)["params"]
            size = float(truth.optimum(curve.flops))
            yield Claim("minima", f"N at budget {number}", interval, size)
    exponents = {
        "params_exponent": truth.params_exponent,
        "tokens_exponent": 1 - truth.params_exponent,
    }
    for name, exponent in exponents.items():
        interval = getattr(fit.isoflop, name)
        if interval:
            yield Claim("exponents of the minima", name, interval, exponent)


def _surface_claims(fit: CurveFit, truth: Truth) -> Iterator[Claim]:
    """Yield the claims of both forms (gamma if free), of the selected one, and of its bootstrap."""
    fits = fit.parametric
    if fits.surface is None:
        return
    known = {name: getattr(truth, name) for name in fits.surface.intervals}
    groups = [(f"{surface.form} surface", surface) for surface in fits.surfaces]
    for group, surface in [*groups, ("surface chosen", fits.surface)]:
        for name, interval in surface.intervals.items():
            if name != "gamma" or group != "additive surface":
                yield Claim(group, name, interval, known[name])
    for k, label in ((0, "least"), (2, "middle"), (4, f"{REACH:g} times the largest")):
        best, interval = fits.frontier[k]
        yield Claim("surface chosen", f"N* at {label}", interval, float(truth.optimum(best.flops)))
    for name, (low, high) in fits.bootstrap.ends.items() if fits.bootstrap else ():
        yield Claim("bootstrap", name, Interval(None, low, high, True), known[name])
