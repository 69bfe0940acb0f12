"""Tests of the effects: e-values, intervals by depth, heterogeneity and trend."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from scipy import special

from slm.fits.compare.e_values import closed_test, combined_e_value, e_value, sequence_radius
from slm.fits.compare.effects import (
    Effect,
    LossDifferences,
    effects_by_depth,
    linear_effect,
)
from slm.fits.compare.result import DepthEffect, Evidence, Heterogeneity, Trend
from slm.fits.intervals import Interval
from slm.fits.types import Array

MIN_TREND_SPAN = 0.01
"""Smallest range of ln C that a trend is fitted to."""


def exponential(logs: Interval) -> Interval:
    """Return the interval of m from that of ln m; what overflows is open."""
    ends = []
    for end in (logs.estimate, logs.low, logs.high):
        ends.append(None if end is None or abs(end) > 600 else math.exp(end))
    return Interval.of_ends(*ends)


def measure_evidence(
    differences: LossDifferences, pooled: Effect, best: Effect | None
) -> tuple[Evidence, Array]:
    """Return the evidence over all depths, and the e-value of each depth (K,).

    `best` is the effect of the multiplier, None if that is unknown.
    """
    information = differences.information
    pooled_e_value = float(e_value(pooled.t, pooled.free, information))
    # A depth noisier than the others is judged by its own seeds.
    variance = np.maximum(differences.variance or 1.0, differences.depth_variance)
    t = differences.difference * np.sqrt(differences.weight / variance)
    by_depth = e_value(t, differences.free, differences.weight)
    sequence = Interval(None)
    if best:
        sequence = exponential(best.interval(sequence_radius(best.free, information)))
    combined = combined_e_value(pooled_e_value, by_depth)
    return Evidence(pooled_e_value, combined, pooled.p, sequence), by_depth


def depth_effects(
    differences: LossDifferences,
    combined: float,
    e_values: Array,
) -> tuple[DepthEffect, ...]:
    """Return the effect at each depth; `combined` and `e_values` (K,) are those of the evidence."""
    errors = np.sqrt(differences.variance / differences.weight)
    claimed = closed_test(e_values, combined)
    effects = effects_by_depth(differences)
    results = []
    for k, (base, candidate) in enumerate(differences.pairs):
        effect = effects[k]
        difference = Effect(differences.difference[k], errors[k], differences.free)
        direction = "better" if difference.estimate < 0 else "worse"
        results.append(
            DepthEffect(
                depth=candidate.depth,
                flops=candidate.flops,
                base_runs=len(base.seeds),
                candidate_runs=len(candidate.seeds),
                difference=difference.nominal_interval(),
                multiplier=exponential(effect.nominal_interval()) if effect else Interval(None),
                e_value=e_values[k],
                claim=direction if claimed[k] else None,
            )
        )
    return tuple(results)


def mean_difference(differences: LossDifferences) -> Interval:
    """Return the interval of the mean difference in ln loss: minus h for a known slope of -1."""
    flat = replace(differences, slope=-np.ones(len(differences.slope)), bend=0.0)
    effect, _ = linear_effect(flat, 0.0)
    return replace(effect, estimate=-effect.estimate).nominal_interval()


def measure_heterogeneity(differences: LossDifferences, between: float) -> Heterogeneity | None:
    """Return the F test of the sum of squares `between` depths against that within."""
    across = len(differences.difference) - 1
    within = differences.free
    if across < 1 or within < 1:
        return None
    statistic = between / across / differences.variance
    p = float(special.fdtrc(across, within, statistic))
    return Heterogeneity(statistic, [across, within], p)


def measure_trend(differences: LossDifferences, h: float) -> Trend | None:
    """Return the slope of ln m over ln C around the common effect h."""
    compute = differences.compute
    if len(compute) < 3 or np.ptp(compute) < MIN_TREND_SPAN:
        return None
    slope, _ = linear_effect(differences, h, trend=True)
    ends = compute[[0, -1]] - differences.middle(h)
    line = h + slope.estimate * ends
    evidence = float(e_value(slope.t, slope.free, differences.information))
    return Trend(slope.nominal_interval(), slope.p, evidence, np.exp(line).tolist())
