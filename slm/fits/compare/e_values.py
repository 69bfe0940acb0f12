"""Evidence that may be looked at as often as one likes: e-values of a t statistic, and what several of them show.

An effect delta of a linear model with noise sigma, delta/sigma ~ N(0, tau²) against delta = 0, every other mean and
sigma integrated out by their right-Haar priors, has the Bayes factor

    (1+g)^(-1/2) · ((1 + t²/f) / (1 + t²/(f(1+g))))^((f+1)/2),  g = tau²·information,

which, as runs are added, is a non-negative martingale of mean 1 where there is no effect (Hendriksen, de Heide and
Grünwald 2021, arXiv 1807.09077; Pérez-Ortiz, Lardy, de Heide and Grünwald 2024, arXiv 2208.07610). By Ville's
inequality it reaches 20 in at most one of 20 sequences, however many looks are taken and whenever they stop.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

Array = NDArray[np.float64]

ENOUGH = 20.0
"""e-value of a claim: wrong at most once in 20, over all looks together."""
SCALES = (1.0, 4.0, 16.0)
"""tau, the effects expected over the noise of a run: even shares of small, middle and large ones."""
LARGEST = 600.0
"""ln of the largest e-value given."""
BETTING = 0.8
"""Share of the evidence that the mean over depths brings; single depths share the rest."""


def e_value(t: Array | float, free: int, information: Array | float) -> Array:
    """Evidence against no effect, of any shape.

    `t` is the effect over its standard error, `free` the degrees of freedom of the noise, `information` noise variance
    of a run over variance of the effect. Without degrees of freedom it is 1: nothing is known.
    """
    square, g = np.square(t)[..., None], np.multiply.outer(information, np.square(SCALES))
    if free < 1:
        return np.ones(square.shape[:-1])
    log = (free + 1) / 2 * (
        np.log1p(square / free) - np.log1p(square / (free * (1 + g)))
    ) - np.log1p(g) / 2
    return np.asarray(np.exp(np.minimum(log, LARGEST)).mean(-1))


@lru_cache(4096)
def radius(free: int, information: float) -> float | None:
    """Standard errors to each side of the estimate that no look may leave out; None for all of them.

    The effects of which the e-value is below 20: a confidence sequence, wrong at any look in at most 5 %.
    """
    if e_value(1e6, free, information) < ENOUGH:
        return None
    return float(
        optimize.brentq(lambda t: float(e_value(t, free, information)) - ENOUGH, 0, 1e6, xtol=1e-6)
    )


def joint(whole: float, parts: Array) -> float:
    """Evidence that anything differs at all: a weighted mean of e-values is one, however they depend."""
    return float(BETTING * whole + (1 - BETTING) * parts.mean())


def shown(parts: Array, together: float) -> NDArray[np.bool_]:
    """Which of several e-values may be claimed, all claims being right in 95 %: closed testing by means.

    A part is claimed when the mean of every set that holds it reaches 20 (Vovk and Wang 2021, arXiv 1912.06116), the
    set of all by `together`. The worst set of each size is the part beside the smallest of the others.
    """
    if together < ENOUGH:
        return np.zeros(len(parts), bool)
    order = parts.argsort()
    rising = parts[order]
    claimed = np.zeros(len(parts), bool)
    for place, k in enumerate(order):
        beside = np.concatenate([[0.0], np.cumsum(np.delete(rising, place)[:-1])])
        claimed[k] = ((parts[k] + beside) / np.arange(1, len(beside) + 1)).min() >= ENOUGH
    return claimed
