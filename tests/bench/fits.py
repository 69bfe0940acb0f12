"""Fits: one core's time beside a plain multi-start L-BFGS of the same objective, on Epoch's 240 Chinchilla points.

Without SLM_REFERENCE the points are 240 of a known surface. Time is the CPU's, all threads together. Excess is how far
above the least objective found a fit ends, in parts per million. Hoffmann's grid has 4,500 starts: 50 evenly chosen
ones are run (and 50 resamples), and the whole is extrapolated.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize
from scipy.special import logsumexp, softmax

from slm.fits import PAPER, Point, Surface, bootstrap, fit_curves, fit_surface
from tests.calibrate.truths import CENTURIES, EPOCH, LARGE, gauss, grid, noisy
from tests.reproduce import chinchilla

HEADERS = ("fit", "milliseconds", "target", "excess, ppm")
TERMS, FLOORS, EXPONENTS = range(0, 30, 5), (-1, -0.5, 0, 0.5, 1), (0, 0.5, 1, 1.5, 2)
STARTS = list(itertools.product(TERMS, TERMS, FLOORS, EXPONENTS, EXPONENTS))
"""(a, b, e, alpha, beta) of Hoffmann et al. 2022."""
TRIED, RESAMPLES = 50, 4000

Array = NDArray[np.float64]


def rows() -> Iterator[tuple[str, float, float | None, float | None]]:
    """Fit, milliseconds, the most that is wanted, and the excess."""
    folder = os.environ.get("SLM_REFERENCE")
    points, source = (
        (chinchilla(Path(folder)), "Chinchilla") if folder else (known(CENTURIES, 30), "synthetic")
    )
    took, found = timed(lambda: fit_surface(points, delta=PAPER))
    plain = [
        descended(points, start, np.ones(len(points))) for start in STARTS[:: len(STARTS) // TRIED]
    ]
    each, objectives = float(np.mean([own for own, _ in plain])), [value for _, value in plain]
    least = min(found.objective, *objectives)
    typical, lowest, ours = (
        1e6 * (own / least - 1) for own in (median(objectives), min(objectives), found.objective)
    )
    yield f"point fit, 240 points ({source})", took, 1e3, ours
    yield "  L-BFGS, one start; median of 50", each, None, typical
    yield (
        f"  L-BFGS, {len(STARTS):,} starts, extrapolated; best of 50",
        each * len(STARTS),
        None,
        lowest,
    )
    yield (
        f"{RESAMPLES:,} bootstraps",
        timed(lambda: bootstrap(points, found, RESAMPLES))[0],
        1e4,
        None,
    )
    draws = np.random.default_rng(0).multinomial(
        len(points), np.full(len(points), 1 / len(points)), TRIED
    )
    each = float(np.mean([descended(points, start_of(found), weights)[0] for weights in draws]))
    yield f"  L-BFGS, {RESAMPLES:,} from the optimum, extrapolated", each * RESAMPLES, None, None
    yield "fit_curves, 30 runs", timed(lambda: fit_curves(known(CENTURIES[:3], 5)))[0], 1.5e4, None


def timed(work: Callable[[], Any], times: int = 3) -> tuple[float, Any]:
    """Median CPU milliseconds, and the last result."""
    taken = []
    for _ in range(times):
        began = time.process_time()
        result = work()
        taken.append(1e3 * (time.process_time() - began))
    return median(taken), result


def known(budgets: Sequence[float], sizes: int) -> list[Point]:
    """Two seeds of a grid on Epoch's surface, with nanochat's noise."""
    return noisy(grid(EPOCH, budgets, sizes, seeds=2), gauss(LARGE), np.random.default_rng(0))


def start_of(surface: Surface) -> tuple[float, ...]:
    """(a, b, e, alpha, beta) of a surface."""
    E, A, B = (np.log(surface.intervals[name].estimate or 1.0) for name in "EAB")
    return float(A), float(B), float(E), *surface.exponents


def descended(
    points: Sequence[Point], start: Sequence[float], weights: Array
) -> tuple[float, float]:
    """CPU milliseconds and the sum of Huber losses that one L-BFGS ends at, its gradient given."""
    logn, logd, logl = np.log([[own.params, own.tokens, own.loss] for own in points]).T

    def objective(theta: Array) -> tuple[float, Array]:
        a, b, e, alpha, beta = theta
        terms = np.stack([a - alpha * logn, b - beta * logd, np.full_like(logn, e)])
        errors = (logsumexp(terms, axis=0) - logl) / PAPER
        inner = np.clip(errors, -1, 1)
        first, second, floor = softmax(terms, axis=0) * inner * weights / PAPER
        slopes = [first.sum(), second.sum(), floor.sum(), -(first @ logn), -(second @ logd)]
        return float(weights @ (inner * (errors - inner / 2))), np.array(slopes)

    began = time.process_time()
    options = {"ftol": 1e-13, "gtol": 1e-6, "maxiter": 5000, "maxfun": 20000}
    best = optimize.minimize(
        objective, np.array(start, float), (), "L-BFGS-B", jac=True, options=options
    )
    return 1e3 * (time.process_time() - began), float(best.fun) * PAPER**2
