"""What the headline numbers rest on: the same runs under other losses, without some of them, under other counts of N.

Every refit starts from the fitted row. Without one run: a number that moves is no news, the largest run has most
leverage; news is a run that the others do not predict, by the t test of its deleted residual, and that moves a number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from slm.fits.intervals import Interval
from slm.fits.isoflop import IsoFlop, Minimum, Valley, fit_valleys, minima_of
from slm.fits.ladder import columns_of, computes, law_runs
from slm.fits.optimize import Array, descend
from slm.fits.parametric import Parametric
from slm.fits.points import Point
from slm.fits.power_law import LEAST_SQUARES, PARAMETERS, Law, Noise, least
from slm.fits.surface import FORMS, PAPER, Surface, best_row, cloud_of, quantities

AS_FITTED = "as fitted"
TAIL = 0.01
"""Chance of a statistic of sound runs beyond which it is news."""
NOTED = 0.02
"""Share of a number below which nobody minds what becomes of it."""


@dataclass(frozen=True)
class Row:
    """The headline numbers under one change. None: not held by the runs as fitted, or not to be had after it."""

    changed: str
    """What differs; AS_FITTED in the first."""
    convention: bool
    """Whether the change is of what N counts, so that N's exponents are of something else."""
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

    def document(self) -> dict[str, str | bool | float | None]:
        """As JSON."""
        return dict(vars(self))


@dataclass(frozen=True)
class Influence:
    """A run that the others do not predict and that moves what is said."""

    run: str
    """The run, or the budget of the minimum, in words."""
    largest: bool
    """Whether no other run has more compute."""
    miss: float
    """Log of the loss that the others predict over the one measured."""
    chance: float
    """Chance of a miss at least this large of one sound run."""
    moved: dict[str, tuple[float, float]]
    """The number with the run and without it, by name."""


def sensitivity(
    points: Sequence[Point],
    law: Law | None,
    isoflop: IsoFlop | None,
    parametric: Parametric,
    others: Mapping[str, Sequence[float]] | None = None,
) -> tuple[Row, ...]:
    """The fit, then under other deltas of the Huber loss, without its worst one and two runs, under other counts of N.

    `others` gives N of every point, by the name of the convention; ValueError for another number of them. Worst is the
    residual of the surface, else of the law.
    """
    for name, counts in (others or {}).items():
        if len(counts) != len(points):
            raise ValueError(
                f"convention {name!r} gives {len(counts)} counts of {len(points)} runs"
            )
    surface, valleys = parametric.surface, isoflop.valleys if isoflop else ()
    row, p = surface.row if surface else None, law.p.estimate if law else None
    rows = [_row(AS_FITTED, points, surface, row, valleys, p)]
    rows += [
        _at_delta(name, delta, points, law, valleys, surface)
        for name, delta in _deltas(law, surface).items()
    ]
    rows += [_without(runs, points, law, surface) for runs in _worst(points, law, surface)]
    rows += [
        _counted(name, counts, points, law, surface) for name, counts in (others or {}).items()
    ]
    return tuple(rows)


def influences(
    points: Sequence[Point], law: Law | None, isoflop: IsoFlop | None, parametric: Parametric
) -> list[Influence]:
    """Runs whose loss the others miss, at the 1 % level of all runs together (the largest of a law or surface is asked
    alone), and that move a headline number by more than a quarter of its interval: p and the gain of the law at its
    largest run, the exponent of N*. What such a run adds to the noise, and so to the width, does not count.
    """
    found = [
        *(_of_law(law, law_runs(points, isoflop.valleys if isoflop else ())) if law else ()),
        *(_of_surface(points, parametric.surface) if parametric.surface else ()),
        *(_of_minima(isoflop) if isoflop and isoflop.params_exponent else ()),
    ]
    merged: dict[str, Influence] = {}
    for own in found:
        first = merged.get(own.run, own)
        merged[own.run] = replace(first, moved=first.moved | own.moved)
    return list(merged.values())


def half(interval: Interval | None) -> float:
    """Half the width; infinite where an end is open."""
    if (
        interval is None
        or interval.low is None
        or interval.high is None
        or not interval.identifiable
    ):
        return np.inf
    return (interval.high - interval.low) / 2


def law_residuals(law: Law, flops: Array, losses: Array) -> tuple[Array, Array]:
    """Log residuals (m,) of the law and their Jacobian (parameters, m); without the floor's row where that is 0."""
    _, scale, exponent = law.best
    x, predicted = (flops / law.reference) ** -exponent, law.loss(flops)
    rows = np.array([np.ones_like(x), x, -scale * x * np.log(flops / law.reference)]) / predicted
    return np.log(predicted / losses), rows[int(law.best[0] == 0) :]


def surface_residuals(surface: Surface, points: Sequence[Point]) -> tuple[Array, Array]:
    """Log residuals (m,) of the surface and their Jacobian (parameters, m); without the row of a floor that is none."""
    cloud = cloud_of(points, surface.delta)
    residuals, jacobian = cloud.residuals(surface.row[None])
    return residuals[0], jacobian[0, int(surface.row[0] <= cloud.lowest) : FORMS[surface.form]]


def _row(
    changed: str,
    points: Sequence[Point],
    surface: Surface | None,
    row: Array | None,
    valleys: Sequence[Valley],
    p: float | None,
    convention: bool = False,
) -> Row:
    values: dict[str, float | None] = {}
    if surface is not None and row is not None:
        found = quantities(row[None], surface.centre)
        for name in ("alpha", "beta", "params_exponent", "E"):
            if surface.intervals[name].identifiable:
                values[name] = float(np.exp(found[name][0]) if name == "E" else found[name][0])
    return Row(
        changed=changed,
        convention=convention,
        n=len(points),
        alpha=values.get("alpha"),
        beta=values.get("beta"),
        params_exponent=values.get("params_exponent"),
        E=values.get("E"),
        minima_exponent=_minima_exponent(valleys),
        p=p,
    )


def _deltas(law: Law | None, surface: Surface | None) -> dict[str, float | None]:
    """By name; None is 1.345 sigma of each fit, left out where it is the fit's own."""
    known: dict[str, float | None] = {
        "delta 0.001": PAPER,
        "delta 0.01": 1e-2,
        "delta 1.345 sigma": None,
    }
    known["squared log error"] = LEAST_SQUARES.delta
    own = surface.delta if surface else law.noise.delta if law else None
    usual = surface.noise.delta if surface else own
    return {
        name: delta
        for name, delta in known.items()
        if own and (usual if delta is None else delta) != own
    }


def _at_delta(
    name: str,
    delta: float | None,
    points: Sequence[Point],
    law: Law | None,
    valleys: Sequence[Valley],
    surface: Surface | None,
) -> Row:
    row, p = None, None
    if surface:
        cloud = cloud_of(points, surface.noise.delta if delta is None else delta)
        row = descend(cloud, surface.row[None], _weights(points)[None], range(FORMS[surface.form]))[
            0
        ][0]
    if law:
        noise = law.noise if delta is None else Noise(delta / 1.345, "given")
        p = _exponent(law, law_runs(points, valleys), noise)
    return _row(name, points, surface, row, valleys, p)


def _worst(points: Sequence[Point], law: Law | None, surface: Surface | None) -> list[list[Point]]:
    """The worst run, and the worst two."""
    runs = list(points) if surface else [point for point in points if point.budget is None]
    if surface:
        residuals = np.abs(surface_residuals(surface, runs)[0])
        enough = len(runs) > FORMS[surface.form] + 3
    elif law and runs:
        residuals = np.abs(law_residuals(law, *columns_of(runs))[0])
        enough = len(runs) > PARAMETERS[law.form] + 2
    else:
        return []
    order = sorted(range(len(runs)), key=lambda k: (-residuals[k], runs[k].run_id))
    return [[runs[k] for k in order[:count]] for count in (1, 2)] if enough else []


def _without(
    dropped: Sequence[Point], points: Sequence[Point], law: Law | None, surface: Surface | None
) -> Row:
    gone = {point.run_id for point in dropped}
    rest = [point for point in points if point.run_id not in gone]
    row, valleys = None, fit_valleys(rest)
    if surface:
        weights = _weights(points) * [point.run_id not in gone for point in points]
        row = descend(
            cloud_of(points, surface.delta, surface.raw),
            surface.row[None],
            weights[None],
            range(FORMS[surface.form]),
        )[0][0]
    p = _exponent(law, law_runs(rest, valleys), law.noise) if law else None
    name = f"without run{'s' * (len(dropped) > 1)} {', '.join(point.run_id for point in dropped)}"
    return _row(name, rest, surface, row, valleys, p)


def _counted(
    name: str,
    counts: Sequence[float],
    points: Sequence[Point],
    law: Law | None,
    surface: Surface | None,
) -> Row:
    """N counted another way: the exponents are of another N, so the surface is sought from the start."""
    recounted = [replace(point, params=float(count)) for point, count in zip(points, counts)]
    valleys, row = fit_valleys(recounted), None
    if surface:
        cloud = cloud_of(recounted, surface.delta, surface.raw)
        row = best_row(cloud, _weights(points), surface.form)[0]
        surface = replace(surface, centre=cloud.centre)
    p = _exponent(law, law_runs(recounted, valleys), law.noise) if law else None
    return _row(f"N is {name}", recounted, surface, row, valleys, p, convention=True)


def _minima_exponent(valleys: Sequence[Valley]) -> float | None:
    """Slope of the line through the minima."""
    minima = minima_of(valleys)
    if len(minima) < 2:
        return None
    flops, params = np.log([[own.flops, own.params] for own in minima]).T
    return float(np.polyfit(flops, params, 1)[0])


def _exponent(law: Law, runs: Sequence[Point | Minimum], noise: Noise) -> float | None:
    """p of the law's form through these runs, None where they are too few."""
    flops, losses = columns_of(runs)
    if computes(flops) <= PARAMETERS[law.form]:
        return None
    return float(least(law.form, flops, losses, noise)[1][2])


def _weights(points: Sequence[Point]) -> Array:
    return np.array([point.weight for point in points])


def _leverage(jacobian: Array, weights: Array) -> Array:
    """(parameters, m) -> (m,): the share of each residual that its own run takes away."""
    basis: Array = np.linalg.qr((jacobian * np.sqrt(weights)).T)[0]
    return np.minimum((basis**2).sum(1), 1 - 1e-9)


def _scale(residuals: Array, weights: Array, delta: float, free: int) -> Array:
    """(…, m) residuals -> spread of a sound one, by Huber's proposal: that of psi over the share inside delta."""
    used = weights > 0
    squares = (weights * np.minimum(np.abs(residuals), delta) ** 2).sum(-1) / free
    inside = ((np.abs(residuals) <= delta) & used).sum(-1) / used.sum(-1)
    return np.asarray(np.sqrt(squares) / np.maximum(inside, 1e-3)) + 1e-300


def _chance(miss: Array | float, leverage: Array | float, scale: Array | float, free: int) -> Array:
    """Two-sided, by Student's t: a deleted residual has variance scale²/(1 - leverage)."""
    return np.asarray(2 * stats.t.sf(np.abs(miss) * np.sqrt(1 - leverage) / scale, free))


def _moved(
    name: str, interval: Interval, without: float, shrunk: Array | float
) -> dict[str, tuple[float, float]]:
    """Nothing when by less than NOTED, or a quarter of the interval that the noise without the run would leave."""
    if interval.estimate is None:
        return {}
    least = max(half(interval) / 2 * min(float(shrunk), 1.0), NOTED * abs(interval.estimate))
    return {name: (interval.estimate, without)} if abs(without - interval.estimate) > least else {}


def _of_law(law: Law, runs: Sequence[Point | Minimum]) -> list[Influence]:
    """The largest run, and the one that fits worst for its leverage."""
    flops, losses = columns_of(runs)
    free, found = len(runs) - 1 - PARAMETERS[law.form], []
    residuals, jacobian = law_residuals(law, flops, losses)
    leverage = _leverage(jacobian, np.ones_like(flops))
    whole = _scale(residuals, np.ones_like(flops), law.noise.delta, free + 1)
    top, worst = int(flops.argmax()), int((np.abs(residuals) / np.sqrt(1 - leverage)).argmax())
    for k in {top, worst}:
        kept = np.arange(len(runs)) != k
        if computes(flops[kept]) <= PARAMETERS[law.form]:
            continue
        reference, best, _ = least(law.form, flops[kept], losses[kept], law.noise)
        rest = replace(law, reference=reference, best=best, region=best[None])
        scale = _scale(
            law_residuals(rest, flops[kept], losses[kept])[0],
            np.ones(kept.sum()),
            law.noise.delta,
            free,
        )
        miss = float(np.log(rest.loss(flops[k]) / losses[k]))
        chance = float(_chance(miss, leverage[k], scale, free))
        after = rest.gain(law.largest).estimate or 0.0
        shrunk = scale / whole
        moved = _moved("p", law.p, float(best[2]), shrunk) | _moved(
            "gain", law.gain(law.largest), after, shrunk
        )
        if moved and chance < (TAIL if k == top else TAIL / len(runs)):
            run = runs[k]
            name = (
                f"run {run.run_id}"
                if isinstance(run, Point)
                else f"the minimum at {run.flops:.3g} FLOPs"
            )
            found.append(Influence(name, k == top, miss, chance, moved))
    return found


def _of_surface(points: Sequence[Point], surface: Surface) -> list[Influence]:
    """Every run left out, all fits in one batch."""
    cloud, weights, columns = (
        cloud_of(points, surface.delta),
        _weights(points),
        range(FORMS[surface.form]),
    )
    free = len(points) - 1 - FORMS[surface.form]
    if free < 1:
        return []
    without = weights * (1 - np.eye(len(points)))
    rows, _ = descend(cloud, np.tile(surface.row, (len(points), 1)), without, columns)
    residuals, (whole, jacobian) = cloud.residuals(rows)[0], surface_residuals(surface, points)
    leverage = _leverage(jacobian, weights)
    misses = residuals.diagonal()
    scale = _scale(residuals, without, surface.delta, free)
    shrunk = scale / _scale(whole, weights, surface.delta, free + 1)
    chances = _chance(misses * np.sqrt(weights), leverage, scale, free)
    exponents = quantities(rows, surface.centre)["params_exponent"]
    top, found = int(np.argmax([point.flops for point in points])), []
    for k, point in enumerate(points):
        moved = _moved(
            "params_exponent", surface.intervals["params_exponent"], float(exponents[k]), shrunk[k]
        )
        if moved and chances[k] < (TAIL if k == top else TAIL / len(points)):
            found.append(
                Influence(
                    f"run {point.run_id}", k == top, float(misses[k]), float(chances[k]), moved
                )
            )
    return found


def _of_minima(isoflop: IsoFlop) -> list[Influence]:
    """Every run left out of its parabola, in closed form: c - G⁻¹x·r/(1 - h), exact for least squares."""
    resolved = [valley for valley in isoflop.valleys if valley.minimum]
    compute = np.log([valley.flops for valley in resolved])
    compute -= compute.mean()
    total = sum(len(valley.points) for valley in isoflop.valleys if valley.parabola)
    whole, free, found = (isoflop.noise or 0.0) + 1e-300, isoflop.free - 1, []
    interval = isoflop.params_exponent
    if free < 1 or interval is None or interval.estimate is None:
        return []
    for valley, lean in zip(resolved, compute / (compute @ compute)):
        own = valley.parabola
        assert own is not None
        sizes = np.log([point.params for point in valley.points])
        design = np.vander(sizes - own.centre, 3, increasing=True)
        pull = design @ own.covariance
        left = np.maximum(1 - (pull * design).sum(1), 1e-9)
        misses = (np.array([point.loss for point in valley.points]) - own.at(sizes)) / left
        _, b, c = (own.coefficients - pull * misses[:, None]).T
        exponents = interval.estimate + lean * (own.centre - b / (2 * c) - own.vertex)
        shares = misses / own.level
        scale = np.sqrt(np.maximum(whole**2 * isoflop.free - shares**2 * left, 0.0) / free) + 1e-300
        chances = _chance(shares, 1 - left, scale, free)
        for k, point in enumerate(valley.points):
            moved = _moved(
                "params_exponent by the minima", interval, float(exponents[k]), scale[k] / whole
            )
            if moved and chances[k] < TAIL / total:
                miss = float(-misses[k] / point.loss)
                found.append(
                    Influence(f"run {point.run_id}", False, miss, float(chances[k]), moved)
                )
    return found
