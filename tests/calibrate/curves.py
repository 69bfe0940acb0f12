"""Curves: how often each interval of a fit holds the truth, how wide it is, and when each warning fires."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from slm.fits import ADDITIVE, CurveFit, Interval, Target, fit_curves
from slm.fits.power_law import REACH
from tests.calibrate.truths import DESIGNS, Design, Truth
from tests.calibrate.workers import spread

HEADERS = (
    "design",
    "interval",
    "given %",
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
"""Cover, per cent, that a 95 % interval whose assumptions hold must show."""


@dataclass(frozen=True)
class Claim:
    """One interval and what it should hold."""

    group: str
    """Which fit it is of."""
    name: str
    """Which quantity."""
    interval: Interval
    """As the code gives it."""
    truth: float
    """The quantity's value."""

    @property
    def covers(self) -> bool:
        """Whether the truth lies inside; an open side holds everything."""
        low, high = self.interval.low, self.interval.high
        return (low is None or low <= self.truth) and (high is None or self.truth <= high)

    @property
    def width(self) -> float:
        """Of the interval as a share of the truth, or as it is where that is 0; infinite when open."""
        low, high = self.interval.low, self.interval.high
        if low is None or high is None or not self.interval.identifiable:
            return np.inf
        return (high - low) / (abs(self.truth) or 1.0)


@dataclass(frozen=True)
class Outcome:
    """One repetition of one design."""

    claims: tuple[Claim, ...]
    """Every interval."""
    codes: frozenset[str]
    """Warnings."""


def intervals(repetitions: int, seed: int = 0) -> tuple[Sequence[str], list[Sequence[object]]]:
    """Headers and rows: one row for each interval of each design.

    Cover counts an open side as holding everything; `cover of closed` leaves intervals with an open side out. Widths
    are medians of the closed ones, in per cent of the truth. Only where the assumptions hold is there a verdict.
    """
    rows: list[Sequence[object]] = []
    for design, outcomes in zip(DESIGNS, _simulated(repetitions, seed)):
        found: dict[tuple[str, str], list[Claim]] = defaultdict(list)
        for outcome in outcomes:
            for claim in outcome.claims:
                found[claim.group, claim.name].append(claim)
        rows += [
            _row(design, group, name, own, repetitions) for (group, name), own in found.items()
        ]
    return HEADERS, rows


def warnings(repetitions: int, seed: int = 0) -> tuple[Sequence[str], list[Sequence[object]]]:
    """Headers and rows: how often each code fires where it should and where it should not, and the worst design."""
    simulated = _simulated(repetitions, seed)
    fired = {code for outcomes in simulated for outcome in outcomes for code in outcome.codes}
    rows: list[Sequence[object]] = []
    for code in sorted(fired.union(*(design.must for design in DESIGNS))):
        shares = {
            design.name: 100 * float(np.mean([code in outcome.codes for outcome in outcomes]))
            for design, outcomes in zip(DESIGNS, simulated)
        }
        should = {design.name: shares[design.name] for design in DESIGNS if code in design.must}
        should_not = {
            design.name: shares[design.name]
            for design in DESIGNS
            if code not in design.must | design.may
        }
        rows.append([code, *_summed(should, -1), *_summed(should_not, 1)])
    return WARNINGS, rows


def _summed(shares: dict[str, float], sign: int) -> list[object]:
    """How many designs, the mean share, and the design of the largest, or with -1 of the least."""
    if not shares:
        return [0, "", ""]
    name = max(shares, key=lambda name: sign * shares[name])
    return [len(shares), float(np.mean(list(shares.values()))), f"{shares[name]:.0f}: {name}"]


def _row(
    design: Design, group: str, name: str, claims: Sequence[Claim], repetitions: int
) -> Sequence[object]:
    closed = [claim for claim in claims if np.isfinite(claim.width)]
    cover = 100 * float(np.mean([claim.covers for claim in claims]))
    return (
        design.name,
        f"{group}: {name}",
        100 * len({id(claim) for claim in claims}) / repetitions,
        100 * (1 - len(closed) / len(claims)),
        cover,
        100 * float(np.mean([claim.covers for claim in closed])) if closed else None,
        100 * float(np.median([claim.width for claim in closed])) if closed else None,
        _verdict(cover, claims) if group in design.sound else "",
    )


def _verdict(cover: float, claims: Sequence[Claim]) -> str:
    """`open` and `fixed` are the intervals of which the median has an open side or no width."""
    low, high = NOMINAL
    width = float(np.median([claim.width for claim in claims]))
    if cover < low:
        return "LOW"
    if cover > high:
        return "open" if np.isinf(width) else "fixed" if width == 0 else "HIGH"
    return "ok"


@cache
def _simulated(repetitions: int, seed: int) -> list[list[Outcome]]:
    """By design, then by repetition."""
    tasks = [(number, k, seed) for k in range(repetitions) for number in range(len(DESIGNS))]
    found = spread(_outcome, tasks, "curves")
    return [found[number :: len(DESIGNS)] for number in range(len(DESIGNS))]


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
    return Outcome((*claims, *further), frozenset(caution.code for caution in fit.cautions))


def _further_runs(fit: CurveFit, design: Design, generator: np.random.Generator) -> Iterator[Claim]:
    """Compute-optimal runs that are made after the fit, with noise of their own."""
    made = np.array([point.flops for point in fit.points])
    for times in (2.0, REACH):
        flops = times * made.max()
        luck = design.noise(generator, np.append(made, flops))[-1]
        came = float(design.truth.best(flops) * np.exp(luck))
        yield Claim(
            "predictions", f"a run at {times:g} times", fit.predict(Target(flops)).loss, came
        )


def _law_claims(fit: CurveFit, truth: Truth) -> Iterator[Claim]:
    for law in (fit.law, fit.choice.rival):
        if law and law.form == ADDITIVE:
            known = {"E": truth.E, "K": truth.scale(law.largest), "p": truth.p}
            yield from (
                Claim("law with a floor", name, getattr(law, name), own)
                for name, own in known.items()
            )
    if fit.law:
        top, far = fit.law.largest, REACH * fit.law.largest
        yield Claim("law chosen", "loss at the largest", fit.law.at(top), float(truth.best(top)))
        yield Claim(
            "law chosen", f"loss at {REACH:g} times", fit.law.at(far), float(truth.best(far))
        )
        yield Claim("law chosen", "gain", fit.law.gain(top), truth.gain(top))


def _minima_claims(fit: CurveFit, truth: Truth) -> Iterator[Claim]:
    if fit.isoflop is None:
        return
    for number, valley in enumerate(fit.isoflop.valleys, 1):
        if valley.minimum:
            interval = fit.isoflop.interval(valley)
            yield Claim(
                "minima", f"N at budget {number}", interval, float(truth.optimum(valley.flops))
            )
    exponents = {
        "params_exponent": truth.params_exponent,
        "tokens_exponent": 1 - truth.params_exponent,
    }
    for name, own in exponents.items():
        interval = getattr(fit.isoflop, name)
        if interval:
            yield Claim("exponents of the minima", name, interval, own)


def _surface_claims(fit: CurveFit, truth: Truth) -> Iterator[Claim]:
    """Of both forms (gamma where it is free), of the one chosen, and of its bootstrap."""
    found = fit.parametric
    if found.surface is None:
        return
    known = {name: getattr(truth, name) for name in found.surface.intervals}
    for group, surface in [(f"{own.form} surface", own) for own in found.surfaces] + [
        ("surface chosen", found.surface)
    ]:
        for name, interval in surface.intervals.items():
            if name != "gamma" or group != "additive surface":
                yield Claim(group, name, interval, known[name])
    for (best, interval), where in zip(
        found.frontier, ("least", "", "middle", "", f"{REACH:g} times the largest")
    ):
        if where:
            yield Claim(
                "surface chosen", f"N* at {where}", interval, float(truth.optimum(best.flops))
            )
    for name, (low, high) in found.bootstrap.ends.items() if found.bootstrap else ():
        yield Claim("bootstrap", name, Interval(None, low, high, True), known[name])
