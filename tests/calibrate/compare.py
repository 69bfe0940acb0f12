"""Calibrate comparisons: coverage, width, false claims at one look and at ten, power.

The base is L = 0.7 + 50·C^-0.15 from 1e12 to 1e15 FLOPs, the candidate the same with m times the
compute; ln loss has a noise of .0012 by seed and, where said, .003 by depth, common to both
recipes. A look adds a seed to every depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from slm.fits.compare.comparison import compare
from slm.fits.compare.result import Comparison
from slm.fits.compare.trials import Trial
from slm.fits.intervals import Interval
from tests.calibrate.workers import parallel_map

Array = NDArray[np.float64]

HEADERS = (
    "depths",
    "seeds",
    "ladder",
    "cover m=1",
    "cover m=1.25",
    "one depth",
    "half width",
    "at any look",
)
HEADERS += (
    "claims, 1 look",
    "claims, 10 looks",
    "power 1.02",
    "1.05",
    "1.25",
    "t test 1.02",
    "1.05",
    "1.25",
)
NOISE = 0.0012
LADDERS: dict[str, tuple[float, Callable[[int], Array | float], float]] = {
    "even": (0.0, lambda count: 1.0, 0.0),
    "misfit": (0.003, lambda count: 1.0, 0.0),
    "uneven": (0.0, lambda count: np.geomspace(2.0, 0.5, count), 0.0),
    "paired": (0.0, lambda count: 1.0, 0.5),
}
"""Misfit of a depth, noise by depth as a multiple of NOISE, correlation of equal seeds."""
LOOKS = 10


def report(
    repetitions: int, seed: int = 0, count: int | None = None
) -> tuple[Sequence[str], list[list[str]]]:
    """Return headers and one row for each of the first `count` designs.

    Coverage and claims are percentages. Half-widths are for m = 1. Claims are decisions of better
    or worse for equal recipes; the last three columns are a t test of a single look.
    """
    designs = [(depths, seeds) for depths in (3, 5, 8) for seeds in (1, 2, 3, 5)]
    tasks = [(*design, ladder, repetitions, seed) for ladder in LADDERS for design in designs]
    return HEADERS, parallel_map(_row, tasks[:count], "comparisons", 1)


def _row(task: tuple[int, int, str, int, int]) -> list[str]:
    count, seeds, ladder, repetitions, seed = task
    draw = np.random.default_rng([seed, count, seeds, list(LADDERS).index(ladder)])
    results = {
        m: [_compare(*_draw(count, seeds, ladder, m, draw)) for _ in range(repetitions)]
        for m in (1, 1.02, 1.05)
    }
    results[1.25] = [_compare(*_draw(count, seeds, ladder, 1.25, draw)) for _ in range(repetitions)]
    single = [
        _covers(effect.multiplier, 1.25)
        for comparison in results[1.25]
        for effect in comparison.per_depth
    ]
    looked = _claims_ever(count, ladder, repetitions, draw) if seeds == 1 else None
    half = np.median([_width(fit.multiplier) for fit in results[1]]) / 2
    sequence = np.median([_width(fit.evidence.confidence_sequence) for fit in results[1]]) / 2
    return [
        str(count),
        str(seeds),
        ladder,
        *(_share(_covers(fit.multiplier, m) for fit in results[m]) for m in (1, 1.25)),
        _share(single) if seeds > 1 else "",
        f"±{half:.4f}",
        f"±{sequence:.4f}",
        _share(_claims(fit) for fit in results[1]),
        _share(looked) if looked else "",
        *(
            _share(fit.decision.code.startswith(("better", "gain")) for fit in results[m])
            for m in (1.02, 1.05, 1.25)
        ),
        *(_share((fit.multiplier.low or 0) > 1 for fit in results[m]) for m in (1.02, 1.05, 1.25)),
    ]


def _claims_ever(
    count: int, ladder: str, repetitions: int, draw: np.random.Generator
) -> list[bool]:
    """Return whether any of ten looks at equal recipes, each with a seed more, claims."""
    ever = []
    for _ in range(repetitions):
        flops, base, candidate = _draw(count, LOOKS, ladder, 1.0, draw)
        ever.append(
            any(
                _claims(_compare(flops, base[:, :n], candidate[:, :n])) for n in range(1, LOOKS + 1)
            )
        )
    return ever


def _draw(
    count: int, seeds: int, ladder: str, m: float, draw: np.random.Generator
) -> tuple[Array, Array, Array]:
    """Return FLOPs (K,) and the losses (K, seeds) of base and candidate."""
    misfit, noise, correlation = LADDERS[ladder]
    flops = np.geomspace(1e12, 1e15, count)
    common = misfit * draw.standard_normal((count, 1))
    shared = draw.standard_normal((count, seeds))
    sides = []
    for times in (1.0, m):
        independent = draw.standard_normal((count, seeds))
        deviation = np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * independent
        spread = NOISE * np.reshape(noise(count) * np.ones(count), (-1, 1))
        sides.append(
            (0.7 + 50 * (times * flops[:, None]) ** -0.15) * np.exp(common + spread * deviation)
        )
    return flops, sides[0], sides[1]


def _compare(flops: Array, base: Array, candidate: Array) -> Comparison:
    return compare(_trials("b", flops, base), _trials("c", flops, candidate), ("base", "candidate"))


def _trials(name: str, flops: Array, losses: Array) -> Sequence[Trial]:
    return [
        Trial(f"{name}{k}-{seed}", 4 + 2 * k, seed, float(flops[k]), loss)
        for k, row in enumerate(losses.tolist())
        for seed, loss in enumerate(row)
    ]


def _claims(fit: Comparison) -> bool:
    return fit.decision.code not in ("equal", "cannot_tell")


def _covers(interval: Interval, truth: float) -> bool:
    return (interval.low or 0.0) <= truth <= (interval.high or np.inf)


def _width(interval: Interval) -> float:
    return (interval.high or np.inf) - (interval.low or 0.0)


def _share(hits: Iterable[bool]) -> str:
    return f"{100 * np.mean(list(hits)):.1f}"
