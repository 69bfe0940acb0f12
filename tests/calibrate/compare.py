"""Comparison of two recipes: cover and width of the multiplier, false alarms at one look and at ten, power.

The base is L = 0.7 + 50·C^-0.15 from 1e12 to 1e15 FLOPs, the candidate the same with m times the compute; ln loss has a
noise of .0012 by seed and, where said, .003 by depth, common to both recipes. A look adds a seed to every depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from slm.fits.compare.comparison import Comparison, Trial, compare
from tests.calibrate.workers import spread

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


def report(repetitions: int, seed: int = 0) -> tuple[Sequence[str], list[list[str]]]:
    """Headers and one row for each design; cover and claims in percent, half-widths of the interval of m = 1.

    Claims are verdicts of better or worse for equal recipes; the last three columns are a t test of one planned look.
    """
    designs = [(count, seeds) for count in (3, 5, 8) for seeds in (1, 2, 3, 5)]
    tasks = [(*design, ladder, repetitions, seed) for ladder in LADDERS for design in designs]
    return HEADERS, spread(_row, tasks, "comparisons", 1)


def _row(task: tuple[int, int, str, int, int]) -> list[str]:
    count, seeds, ladder, repetitions, seed = task
    draw = np.random.default_rng([seed, count, seeds, list(LADDERS).index(ladder)])
    found = {
        m: [_compare(*_draw(count, seeds, ladder, m, draw)) for _ in range(repetitions)]
        for m in (1, 1.02, 1.05)
    }
    found[1.25] = [_compare(*_draw(count, seeds, ladder, 1.25, draw)) for _ in range(repetitions)]
    single = [
        _covers(at.multiplier.low, at.multiplier.high, 1.25)
        for own in found[1.25]
        for at in own.per_depth
    ]
    looked = _claims_ever(count, ladder, repetitions, draw) if seeds == 1 else None
    half = (
        np.median([(own.multiplier.high or np.inf) - (own.multiplier.low or 0) for own in found[1]])
        / 2
    )
    always = (
        np.median(
            [
                (own.evidence.always.high or np.inf) - (own.evidence.always.low or 0)
                for own in found[1]
            ]
        )
        / 2
    )
    return [
        str(count),
        str(seeds),
        ladder,
        *(
            _share(_covers(own.multiplier.low, own.multiplier.high, m) for own in found[m])
            for m in (1, 1.25)
        ),
        _share(single) if seeds > 1 else "",
        f"±{half:.4f}",
        f"±{always:.4f}",
        _share(_claims(own) for own in found[1]),
        _share(looked) if looked else "",
        *(
            _share(own.verdict.code.startswith(("better", "gain")) for own in found[m])
            for m in (1.02, 1.05, 1.25)
        ),
        *(_share((own.multiplier.low or 0) > 1 for own in found[m]) for m in (1.02, 1.05, 1.25)),
    ]


def _claims_ever(
    count: int, ladder: str, repetitions: int, draw: np.random.Generator
) -> list[bool]:
    """Whether one of ten looks at equal recipes makes a claim, a seed a depth more at each."""
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
    """FLOPs (K,) and the losses (K, seeds) of base and candidate."""
    misfit, noise, correlation = LADDERS[ladder]
    flops = np.geomspace(1e12, 1e15, count)
    common, shared = misfit * draw.standard_normal((count, 1)), draw.standard_normal((count, seeds))
    sides = []
    for times in (1.0, m):
        own = np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * draw.standard_normal(
            (count, seeds)
        )
        spread = NOISE * np.reshape(noise(count) * np.ones(count), (-1, 1))
        sides.append((0.7 + 50 * (times * flops[:, None]) ** -0.15) * np.exp(common + spread * own))
    return flops, sides[0], sides[1]


def _compare(flops: Array, base: Array, candidate: Array) -> Comparison:
    return compare(_trials("b", flops, base), _trials("c", flops, candidate), ("base", "candidate"))


def _trials(name: str, flops: Array, losses: Array) -> Sequence[Trial]:
    return [
        Trial(f"{name}{k}-{seed}", 4 + 2 * k, seed, float(flops[k]), loss)
        for k, row in enumerate(losses.tolist())
        for seed, loss in enumerate(row)
    ]


def _claims(found: Comparison) -> bool:
    return found.verdict.code not in ("equal", "cannot_tell")


def _covers(low: float | None, high: float | None, truth: float) -> bool:
    return (low or 0.0) <= truth <= (high or np.inf)


def _share(hits: Iterable[bool]) -> str:
    return f"{100 * np.mean(list(hits)):.1f}"
