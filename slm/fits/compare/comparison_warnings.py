"""Warnings of a comparison, one cause per function."""

from __future__ import annotations

import math
from collections.abc import Iterator

from slm.fits.compare.e_values import CLAIM_THRESHOLD
from slm.fits.compare.result import Comparison
from slm.fits.compare.trials import AXES, flops_by_depth, format_depths
from slm.fits.types import FitWarning

MAX_COMPUTE_DIFFERENCE = 0.1
"""Largest relative difference in FLOPs at a depth that needs no warning."""
MIN_FREE = 4
"""Degrees of freedom below which the noise is poorly known."""
SIGNIFICANT = 0.05
"""p-value below which chance is an unlikely explanation."""
MAX_EXTRAPOLATION = 2.0
"""Largest factor outside the base's compute that a multiplier may lead to without a warning."""


def comparison_warnings(comparison: Comparison) -> list[FitWarning]:
    """Return the limits of the comparison that a reader must know before using its numbers."""
    return [
        *_missing_depths(comparison),
        *_noise(comparison),
        *_base_curve(comparison),
        *_compute_differs(comparison),
        *_extrapolated(comparison),
        *_depths_differ(comparison),
        *_single_look(comparison),
    ]


def _missing_depths(comparison: Comparison) -> Iterator[FitWarning]:
    names = {"base": comparison.base, "candidate": comparison.candidate}
    for side, depths in comparison.missing.items():
        if depths:
            message = f"{names[side]} has no run at {format_depths(depths)}: not compared there"
            yield FitWarning("missing_depths", message)


def _noise(comparison: Comparison) -> Iterator[FitWarning]:
    if not comparison.differences.free:
        message = (
            "no seed is repeated: noise is estimated from the scatter of the depths, and no depth "
            "can be judged alone"
        )
        yield FitWarning("no_replicates", message)
    if comparison.pooled.free < MIN_FREE:
        message = (
            f"the noise has {comparison.pooled.free} degrees of freedom: further seeds would "
            "narrow every interval"
        )
        yield FitWarning("noise_uncertain", message)


def _base_curve(comparison: Comparison) -> Iterator[FitWarning]:
    if not comparison.differences.curve.falls:
        message = (
            f"the loss of {comparison.base} is not known to fall with {AXES[comparison.axis]}: "
            "only losses are compared"
        )
        yield FitWarning("no_slope", message)
    elif comparison.multiplier.estimate is None:
        message = f"the curve of {comparison.base} never reaches the candidate's losses"
        yield FitWarning("out_of_reach", message)


def _compute_differs(comparison: Comparison) -> Iterator[FitWarning]:
    base = flops_by_depth(comparison.base_trials)
    depths = [
        effect.depth
        for effect in comparison.per_depth
        if abs(math.log(effect.flops / base[effect.depth])) > math.log1p(MAX_COMPUTE_DIFFERENCE)
    ]
    if not depths:
        return
    message = (
        f"the recipes' FLOPs differ by more than {MAX_COMPUTE_DIFFERENCE:.0%} at "
        f"{format_depths(depths)}; the base's slope accounts for it"
    )
    yield FitWarning("compute_differs", message)


def _extrapolated(comparison: Comparison) -> Iterator[FitWarning]:
    flops = [trial.flops for trial in comparison.base_trials]
    reached = []
    for effect in comparison.per_depth:
        if effect.multiplier.estimate:
            reached.append(effect.flops * effect.multiplier.estimate)
    if comparison.axis != "flops" or not reached:
        return
    above = max(reached) > MAX_EXTRAPOLATION * max(flops)
    below = MAX_EXTRAPOLATION * min(reached) < min(flops)
    if not (above or below):
        return
    message = (
        f"multipliers lead more than {MAX_EXTRAPOLATION:g} times outside the compute of "
        f"{comparison.base}: extrapolated"
    )
    yield FitWarning("multiplier_extrapolated", message)


def _depths_differ(comparison: Comparison) -> Iterator[FitWarning]:
    """Heterogeneity (F test) and trend (e-value) of the multiplier."""
    heterogeneity, trend = comparison.heterogeneity, comparison.trend
    if heterogeneity and heterogeneity.p < SIGNIFICANT:
        message = (
            f"one multiplier does not fit all depths (F test, p = {heterogeneity.p:.2g}): "
            "it is their mean"
        )
        yield FitWarning("depths_differ", message)
    if trend and trend.evidence >= CLAIM_THRESHOLD:
        message = "the multiplier changes with compute: it is unknown beyond the depths compared"
        yield FitWarning("trend", message)


def _single_look(comparison: Comparison) -> Iterator[FitWarning]:
    """Significance by p-value alone."""
    evidence = comparison.evidence
    if evidence.p is None or evidence.p >= SIGNIFICANT or evidence.combined >= CLAIM_THRESHOLD:
        return
    message = (
        f"the difference is significant in a single planned look (p = {evidence.p:.2g}), but "
        "adding seeds until p is small makes any difference significant: a claim takes an e-value "
        f"of {CLAIM_THRESHOLD:g}, this is {evidence.combined:.2g}"
    )
    yield FitWarning("one_look_only", message)
