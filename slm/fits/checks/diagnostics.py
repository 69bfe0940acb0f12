"""What the numbers of a fit do not hold, one coded sentence for one cause.

Tests speak at the 1 % level, so that sound runs seldom hear one. Lack of fit: the pure-error F test, residuals of the
settings' means against the spread of replicate seeds, without the worst setting, as one wild run is no wrong form.
Structure: Rao's score test of the surface's psi = clip(residual, ±delta) on (n, d, n², d², nd), n = ln N and d = ln D
centred, with the span of the fitted parameters' Jacobian taken out of both, so that what they have absorbed counts for
neither side: F with (rank, runs - parameters - rank) degrees of freedom.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

from slm.fits.checks.sensitivity import (
    AS_FITTED,
    NOTED,
    TAIL,
    Influence,
    Row,
    half,
    influences,
    law_residuals,
    surface_residuals,
)
from slm.fits.intervals import Interval
from slm.fits.isoflop import IsoFlop, Valley
from slm.fits.ladder import Choice
from slm.fits.optimize import Array
from slm.fits.parametric import Parametric
from slm.fits.points import Point
from slm.fits.power_law import ADDITIVE, REACH, ROUNDING, Law, seed_noise
from slm.fits.surface import Surface
from slm.fits.warning import FitWarning

WIDER = 1.5
"""How many times wider one kind of interval may be than another without a word."""


@dataclass(frozen=True)
class Test:
    """An F test of what a fit leaves over."""

    F: float
    """The statistic."""
    chance: float
    """Of one at least as large, were there nothing but noise."""
    spread: float
    """Of what the test tells from noise, in log loss."""
    noise: float
    """Of what it holds for noise, in log loss."""
    pattern: Array
    """(runs,) what it tells from noise, run by run: log of predicted over measured loss."""


def cautions(
    points: Sequence[Point],
    choice: Choice,
    isoflop: IsoFlop | None,
    parametric: Parametric,
    rows: Sequence[Row],
) -> list[FitWarning]:
    """Everything the numbers do not hold; `rows` are those of `sensitivity`."""
    found = influences(points, choice.law, isoflop, parametric)
    return [
        *_law_cautions(choice, points),
        *_grid_cautions(isoflop, parametric),
        *_surface_cautions(parametric, isoflop, points),
        *_influence_cautions(found),
        *_sensitivity_cautions(rows, choice.law, isoflop, parametric, bool(found)),
    ]


def gains(law: Law) -> bool:
    """Whether compute lowers the loss at the largest run, by the whole interval (a share of 1e-9 is none)."""
    low = law.gain(law.largest).low
    return low is not None and low > 1e-9


def lack_of_fit(points: Sequence[Point], residuals: Array, parameters: int) -> Test | None:
    """Pure-error F test of log residuals (m,); None with fewer than two degrees of freedom on a side."""
    seeds, index = seed_noise(points), _settings(points)
    counts = np.bincount(index)
    free = len(counts) - parameters - 1
    if seeds is None or free < 2:
        return None
    means = np.bincount(index, residuals) / counts
    squares = np.sort(counts * means**2)[:-1].sum()
    spread, noise = float(np.sqrt(squares / free)), max(seeds.sigma, ROUNDING)
    ratio = (spread / noise) ** 2
    return Test(
        ratio,
        float(stats.f.sf(ratio, free, len(points) - len(counts))),
        spread,
        noise,
        means[index],
    )


def structure(points: Sequence[Point], surface: Surface) -> Test | None:
    """Score test of the surface's residuals, a setting once; None with fewer than two degrees of freedom left.

    What moves all seeds of a setting together is no structure, so they are one: their mean psi, weighted by their sum.
    """
    residuals, jacobian = surface_residuals(surface, points)
    index, weights = _settings(points), np.array([point.weight for point in points])
    first, roots = np.unique(index, return_index=True)[1], np.sqrt(np.bincount(index, weights))
    psi = np.bincount(index, weights * np.clip(residuals, -surface.delta, surface.delta)) / roots
    n, d = (
        axis - axis.mean() for axis in np.log([[point.params, point.tokens] for point in points]).T
    )
    known: Array = np.linalg.qr((jacobian[:, first] * roots).T)[0]
    asked = np.array([n, d, n * n, d * d, n * d])[:, first].T * roots[:, None]
    asked /= np.linalg.norm(asked, axis=0)
    left, sizes, _ = np.linalg.svd(asked - known @ (known.T @ asked), full_matrices=False)
    left = left[:, sizes > 1e-7]
    psi -= known @ (known.T @ psi)
    rank, pattern = left.shape[1], left @ (left.T @ psi)
    free = len(first) - len(jacobian) - rank
    if free < 2 or rank == 0:
        return None
    explained, rest = (
        float(pattern @ pattern),
        float((psi - pattern) @ (psi - pattern)) + len(first) * ROUNDING**2,
    )
    ratio = explained / rank / (rest / free)
    spread, noise = float(np.sqrt(explained / weights.sum())), float(np.sqrt(rest / free))
    return Test(
        ratio, float(stats.f.sf(ratio, rank, free)), spread, noise, (pattern / roots)[index]
    )


def _settings(points: Sequence[Point]) -> Array:
    """(m,) number of each run's setting: runs of one differ in nothing but the seed."""
    numbers = {key: k for k, key in enumerate(dict.fromkeys(point.setting for point in points))}
    return np.array([numbers[point.setting] for point in points])


def drift(isoflop: IsoFlop, surface: Surface) -> tuple[list[float], float] | None:
    """ln of each minimum over the centre of its sizes, and how much too large the exponent of the minima then is.

    The bias is that of parabolas through the surface itself at these very runs against its own minima; with skewed
    valleys it grows with the square of the distance from the centre (arXiv 2603.22339). None below two minima.
    """
    resolved = [valley for valley in isoflop.valleys if valley.code is None]
    if len(resolved) < 2:
        return None
    off, biases = zip(*(_off_centre(valley, surface) for valley in resolved))
    return list(off), float(np.polyfit(np.log([valley.flops for valley in resolved]), biases, 1)[0])


def _off_centre(valley: Valley, surface: Surface) -> tuple[float, float]:
    sizes, tokens = np.log([[point.params, point.tokens] for point in valley.points]).T
    centre, own = (sizes.min() + sizes.max()) / 2, valley.parabola
    assert own is not None
    path = np.polyfit(sizes - centre, tokens, 2)
    losses = surface.loss(np.exp(sizes), np.exp(np.polyval(path, sizes - centre)))
    c, b, _ = np.polyfit(sizes - centre, losses, 2)
    lowest = optimize.minimize_scalar(
        lambda v: float(surface.loss(np.exp(centre + v), np.exp(np.polyval(path, v)))),
        bounds=(sizes.min() - centre - 1, sizes.max() - centre + 1),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(own.vertex - centre), float(-b / (2 * c) - lowest.x)


def _law_cautions(choice: Choice, points: Sequence[Point]) -> list[FitWarning]:
    law, tested = choice.law, choice.tested
    if law is None:
        return [FitWarning(choice.code or "", choice.why)]
    found = []
    additive = next((own for own in (law, choice.rival) if own and own.form == ADDITIVE), None)
    if additive is None or not additive.E.identifiable:
        message = (
            "the runs do not hold the irreducible loss E: its interval reaches 0"
            if additive
            else choice.why
        )
        found.append(FitWarning("E_unidentified", f"{message}; how far the gains go on is open"))
    if not gains(law) and law.free < 2:
        message = f"the law has {law.n} computes and {law.n - law.free} parameters: further depths or budgets narrow it"
        found.append(FitWarning("law_loose", message))
    elif not gains(law):
        gain = law.gain(law.largest)
        message = f"the runs do not show that compute lowers the loss: a doubling gives {gain.text('.2g', 100)} %"
        found.append(FitWarning("no_gain", message))
    if tested < 0.99 * REACH:
        right = f"right to {tested:.3g} times beyond" if tested > 1 else "not right beyond any"
        message = f"values to {REACH:g} times the largest run are extrapolated; held-out runs show prediction {right}"
        found.append(FitWarning("extrapolation", message))
    return [*found, *_law_misfit(law, [point for point in points if point.budget is None])]


def _law_misfit(law: Law, ladder: Sequence[Point]) -> list[FitWarning]:
    if len(ladder) != law.n:
        return []
    flops, losses = np.array([[point.flops, point.loss] for point in ladder]).T
    residuals, jacobian = law_residuals(law, flops, losses)
    test = lack_of_fit(ladder, residuals, len(jacobian))
    if test is None or test.chance > TAIL:
        return []
    message = (
        f"depths lie {100 * test.spread:.2g} % around the law {law.form} where seeds lie {100 * test.noise:.2g} % "
        f"around their mean ({_significance(test)}): {_most(ladder, test, 'the law')}; its intervals take a "
        "wrong form for noise, so fit a narrower range of compute or look for what changed between the depths"
    )
    return [FitWarning("law_lack_of_fit", message)]


def _grid_cautions(isoflop: IsoFlop | None, parametric: Parametric) -> list[FitWarning]:
    valleys = isoflop.valleys if isoflop else ()
    found = [
        FitWarning(valley.code, f"budget {valley.budget:.3g} is unresolved: {valley.reason}")
        for valley in valleys
        if valley.code
    ]
    if parametric.code == "one_dial_no_exponents":
        way = "several sizes at each of two or more FLOPs budgets would tell"
        found.append(
            FitWarning("one_dial_no_exponents", f"{parametric.why}: only L(C) is known; {way}")
        )
    return [*found, *_drift_cautions(isoflop, parametric.surface)]


def _drift_cautions(isoflop: IsoFlop | None, surface: Surface | None) -> list[FitWarning]:
    """Where the bias is more than a quarter of the interval."""
    minima = isoflop.params_exponent if isoflop else None
    found = drift(isoflop, surface) if isoflop and surface else None
    if not (isoflop and minima and minima.estimate and found):
        return []
    off, bias = found
    if abs(bias) <= max(half(minima) / 2, NOTED * minima.estimate):
        return []
    resolved = [valley for valley in isoflop.valleys if valley.minimum]
    where = ", ".join(
        f"{np.exp(own):.2g} at {valley.budget:.3g}" for own, valley in zip(off, resolved)
    )
    centres = ", ".join(f"{valley.minimum.params:.3g}" for valley in resolved if valley.minimum)
    message = (
        f"the minima lie at these multiples of the centres of their sizes: {where} FLOPs; by the surface that alone "
        f"makes the exponent of the minima, {minima.text('.2f')}, {abs(bias):.2g} too "
        f"{'large' if bias > 0 else 'small'}: read the surface's, or centre the sizes of the "
        f"budgets on {centres} parameters"
    )
    return [FitWarning("centring_drift", message)]


def _surface_cautions(
    parametric: Parametric, isoflop: IsoFlop | None, points: Sequence[Point]
) -> list[FitWarning]:
    surface, drawn = parametric.surface, parametric.bootstrap
    if surface is None:
        told = parametric.code in (None, "one_dial_no_exponents")
        return [] if told else [FitWarning(parametric.code or "", parametric.why)]
    found = []
    if surface.unheld:
        message = f"the runs do not bound {', '.join(surface.unheld)} of the {surface.form} surface on both sides"
        found.append(FitWarning("surface_unidentified", message))
    if surface.status != "converged" or surface.starts_agreeing < 0.1:
        state = "" if surface.status == "converged" else f"{surface.status}; "
        message = f"{state}{surface.starts_agreeing:.0%} of the starts end at the surface chosen: look at its residuals"
        found.append(FitWarning("surface_not_converged", message))
    if parametric.decisive is None:
        found += _forms_disagree(parametric, surface)
    own, minima = surface.intervals["params_exponent"], isoflop.params_exponent if isoflop else None
    if minima and not _overlap(own, minima):
        message = f"N* grows as C^{own.text('.2f')} on the surface and as C^{minima.text('.2f')} by the isoFLOP minima"
        found.append(FitWarning("approaches_disagree", message))
    wide = [
        name
        for name in ("E", "alpha", "beta")
        if drawn and _differ(surface.intervals[name], drawn.ends[name])
    ]
    if wide:
        message = f"profile and bootstrap intervals of {', '.join(wide)} differ by more than {WIDER:g} times"
        found.append(FitWarning("intervals_differ", message))
    return [*found, *_surface_misfit(surface, points)]


def _forms_disagree(parametric: Parametric, surface: Surface) -> list[FitWarning]:
    """Where no held-out run has chosen the form, what another form says beyond both intervals."""
    found = []
    for other in parametric.surfaces:
        parts = [
            f"{name} {surface.intervals[name].text()} and {other.intervals[name].text()}"
            for name in ("E", "alpha", "beta", "params_exponent")
            if not _overlap(surface.intervals[name], other.intervals[name])
        ]
        if parts:
            message = (
                f"no run held out chose between the {surface.form} and the {other.form} surface, which say "
                f"{'; '.join(parts)}: runs at a third, larger budget would"
            )
            found.append(FitWarning("forms_disagree", message))
    return found


def _surface_misfit(surface: Surface, points: Sequence[Point]) -> list[FitWarning]:
    """Structure, which says where; lack of fit against seeds only where no structure of second order is seen."""
    shape = structure(points, surface)
    if shape and shape.chance < TAIL:
        message = (
            f"what the {surface.form} surface leaves over is structure in ln N and ln D, {100 * shape.spread:.2g} % of "
            f"the loss over noise of {100 * shape.noise:.2g} % ({_significance(shape)}): {_most(points, shape, 'it')}; "
            "its intervals take a wrong form for noise, so fit a narrower range of N and D before reading exponents"
        )
        return [FitWarning("surface_structure", message)]
    residuals, jacobian = surface_residuals(surface, points)
    test = lack_of_fit(points, residuals, len(jacobian))
    if test is None or test.chance > TAIL:
        return []
    message = (
        f"settings lie {100 * test.spread:.2g} % around the {surface.form} surface where seeds lie "
        f"{100 * test.noise:.2g} % around their mean ({_significance(test)}): {_most(points, test, 'it')}; look for "
        "what else changed between the runs, or fit a narrower range of N and D"
    )
    return [FitWarning("surface_lack_of_fit", message)]


def _significance(test: Test) -> str:
    return f"F = {test.F:.3g}, chance {test.chance:.1g}"


def _most(points: Sequence[Point], test: Test, what: str) -> str:
    """Where the pattern is largest."""
    k = int(np.abs(test.pattern).argmax())
    point, side = points[k], "above" if test.pattern[k] > 0 else "below"
    size = f" (N {point.params:.3g}, D {point.tokens:.3g})" if point.sized else ""
    return f"{what} is {100 * abs(test.pattern[k]):.2g} % {side} run {point.run_id}{size}"


def _influence_cautions(found: Sequence[Influence]) -> list[FitWarning]:
    return [
        FitWarning(
            "influential_run",
            f"{own.run}{', the largest,' if own.largest else ''} is not what the others predict, "
            f"{100 * abs(own.miss):.2g} % {'above' if own.miss < 0 else 'below'} (chance {own.chance:.1g}), and moves "
            + ", ".join(
                f"{name} from {without:.3g} to {there:.3g}"
                for name, (there, without) in own.moved.items()
            )
            + ": repeat it with another seed, or mark it as an outlier if its log says why",
        )
        for own in found
    ]


def _sensitivity_cautions(
    rows: Sequence[Row],
    law: Law | None,
    isoflop: IsoFlop | None,
    parametric: Parametric,
    told: bool,
) -> list[FitWarning]:
    """What leaves its interval. Without its worst runs only where no influential run was told; counts of N apart."""
    surface = parametric.surface
    intervals = {
        "params_exponent": surface.intervals["params_exponent"] if surface else None,
        "minima_exponent": isoflop.params_exponent if isoflop else None,
        "p": law.p if law else None,
    }
    left = {row.changed: _left(row, intervals) for row in rows if row.changed != AS_FITTED}
    found = []
    for code, convention, way in (
        ("estimator_matters", False, "look at the worst runs and quote the range, not one value"),
        ("convention_matters", True, "name the count of N beside every exponent"),
    ):
        parts = [
            f"{', '.join(left[row.changed])} with {row.changed}"
            for row in rows
            if row.convention == convention
            and left.get(row.changed)
            and not (told and row.changed.startswith("without"))
        ]
        if parts:
            found.append(
                FitWarning(
                    code, f"headline exponents leave their intervals: {'; '.join(parts)}; {way}"
                )
            )
    return found


def _left(row: Row, intervals: dict[str, Interval | None]) -> list[str]:
    found = []
    for name, interval in intervals.items():
        value = getattr(row, name)
        if (
            value is None
            or interval is None
            or interval.estimate is None
            or not interval.identifiable
        ):
            continue
        beyond = not (interval.low or 0) <= value <= (interval.high or 0)
        if beyond and abs(value - interval.estimate) > NOTED * abs(interval.estimate):
            found.append(f"{name} is {value:.3g} against {interval.text('.3g')}")
    return found


def _overlap(one: Interval, other: Interval) -> bool:
    ends = [
        (-np.inf if own.low is None else own.low, np.inf if own.high is None else own.high)
        for own in (one, other)
    ]
    return max(low for low, _ in ends) <= min(high for _, high in ends)


def _differ(profile: Interval, drawn: tuple[float | None, float | None]) -> bool:
    low, high = drawn
    if profile.low is None or profile.high is None or low is None or high is None:
        return False
    widths = sorted((profile.high - profile.low, high - low))
    return widths[1] > WIDER * widths[0]
