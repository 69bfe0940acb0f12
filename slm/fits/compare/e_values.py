"""E-values of a t statistic: evidence that stays valid however often one looks at the runs.

An effect delta of a linear model with noise sigma, delta/sigma ~ N(0, tau²) against delta = 0,
every other mean and sigma integrated out by their right-Haar priors, has the Bayes factor

    (1+g)^(-1/2) · ((1 + t²/f) / (1 + t²/(f(1+g))))^((f+1)/2),  g = tau²·information,

which, as runs are added, is a non-negative martingale of mean 1 if there is no effect (Hendriksen,
de Heide and Grünwald 2021, arXiv 1807.09077; Pérez-Ortiz, Lardy, de Heide and Grünwald 2024, arXiv
2208.07610). By Ville's inequality it reaches 20 in at most one of 20 sequences, however many looks
are taken and whenever they stop.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from slm.fits.types import Array

CLAIM_THRESHOLD = 20.0
"""E-value from which an effect is claimed: wrong at most once in 20, over all looks together."""
EFFECT_SCALES = (1.0, 4.0, 16.0)
"""tau, in units of the noise of a run: equal shares of small, middle and large effects."""
MAX_LOG = 600.0
"""ln of the largest e-value returned."""
POOLED_SHARE = 0.8
"""Share of the pooled effect's e-value in the combined one; single depths share the rest."""


def e_value(t: Array | float, free: int, information: Array | float) -> Array:
    """Return the e-value against no effect, elementwise.

    `t` is the effect over its standard error, `free` the degrees of freedom of the noise,
    `information` the noise variance of a run over the variance of the effect. It is 1 without
    degrees of freedom.
    """
    square = np.square(t)[..., None]
    g = np.multiply.outer(information, np.square(EFFECT_SCALES))
    if free < 1:
        return np.ones(square.shape[:-1])
    ratio = np.log1p(square / free) - np.log1p(square / (free * (1 + g)))
    log = (free + 1) / 2 * ratio - np.log1p(g) / 2
    return np.asarray(np.exp(np.minimum(log, MAX_LOG)).mean(-1))


@lru_cache(4096)
def sequence_radius(free: int, information: float) -> float | None:
    """Return the half-width of the confidence sequence in standard errors; None if unbounded.

    The confidence sequence holds the effects whose e-value is below 20. At most 5 % of sequences of
    looks ever leave the truth out.
    """
    if e_value(1e6, free, information) < CLAIM_THRESHOLD:
        return None

    def excess(t: float) -> float:
        return float(e_value(t, free, information)) - CLAIM_THRESHOLD

    return float(optimize.brentq(excess, 0, 1e6, xtol=1e-6))


def combined_e_value(pooled: float, by_depth: Array) -> float:
    """Return the e-value of any difference: a weighted mean of e-values, however dependent."""
    return float(POOLED_SHARE * pooled + (1 - POOLED_SHARE) * by_depth.mean())


def closed_test(e_values: Array, combined: float) -> NDArray[np.bool_]:
    """Return which of several e-values may be claimed, all claims being right in 95 % of cases.

    Closed testing by means: an e-value is claimed if the mean of every set that holds it reaches 20
    (Vovk and Wang 2021, arXiv 1912.06116); the set of all has the e-value `combined`. The worst set
    of each size is the e-value with the smallest of the others.
    """
    claimed = np.zeros(len(e_values), bool)
    if combined < CLAIM_THRESHOLD:
        return claimed
    order = e_values.argsort()
    ascending = e_values[order]
    for rank, k in enumerate(order):
        smallest = np.concatenate([[0.0], np.cumsum(np.delete(ascending, rank)[:-1])])
        means = (e_values[k] + smallest) / np.arange(1, len(smallest) + 1)
        claimed[k] = means.min() >= CLAIM_THRESHOLD
    return claimed
