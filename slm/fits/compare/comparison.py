"""Compare two recipes: the compute multiplier at which the base reaches the candidate's loss.

Differences of ln loss within each depth become multipliers m by the base's own slope (`effects`).
The pooled m solves the differences of all depths by least squares, weighted by runs: one number if
the depths agree, else the mean of ln m weighted by information. Noise is pooled over depths and
recipes: that of replicate seeds for a single depth; for all depths also the scatter of the
differences around one m, so that one seed per depth gives an interval, and the interval widens if
depths disagree.

Intervals are nominal 95 % of a single look. Claims do not follow from them, but from e-values,
which hold under any number of looks with runs added in between (`e_values`): all claims of all
looks are right in 95 % of comparisons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from slm.fits.compare.comparison_warnings import comparison_warnings
from slm.fits.compare.decision import decide
from slm.fits.compare.effects import common_effect, linear_effect, measure
from slm.fits.compare.result import Comparison
from slm.fits.compare.significance import (
    depth_effects,
    exponential,
    mean_difference,
    measure_evidence,
    measure_heterogeneity,
    measure_trend,
)
from slm.fits.compare.trials import (
    Trial,
    check_trials,
    group_by_depth,
    require_equal_compute,
    require_shared_depth,
)
from slm.fits.intervals import Interval
from slm.fits.points import Axes


def compare(
    base: Sequence[Trial],
    candidate: Sequence[Trial],
    names: tuple[str, str],
    axis: str = "flops",
    allow_mixed: bool = False,
) -> Comparison:
    """Return how many times its compute, FLOPs or seconds, the base needs for the candidate's loss.

    `names` are those of base and candidate. Depths of one side alone are not compared; the base's
    still shape its curve. If that curve is not known to fall, m is unknown and the claims are about
    losses. `allow_mixed` accepts several comparison keys.

    Raises NotComparable for several comparison keys otherwise, no shared depth, or compute that
    differs and cannot be accounted for; ValueError for no run, a repeated run, FLOPs that differ
    among the seeds of a depth, an unknown axis, or a run without seconds.
    """
    # 1) check the runs and group them by depth
    check_trials(base, candidate, names, axis)
    axes = Axes.of_keys(trial.comparison_key for trial in (*base, *candidate))
    axes.require_one(allow_mixed)
    ladders = group_by_depth(base, names[0], axis), group_by_depth(candidate, names[1], axis)
    require_shared_depth(ladders, names)

    # 2) measure the differences at equal compute
    differences = measure(*ladders)
    falls = differences.curve.falls
    if not falls:
        require_equal_compute(ladders, axis)

    # 3) test against no effect, where the curve adds no uncertainty; estimate at the common effect
    h = common_effect(differences) if falls else None
    pooled, _ = linear_effect(differences, 0.0)
    best, between = linear_effect(differences, h or 0.0)
    known = h is not None
    evidence, e_values = measure_evidence(differences, pooled, best if known else None)
    comparison = Comparison(
        base=names[0],
        candidate=names[1],
        axis=axis,
        mixed=axes.mixed,
        base_trials=tuple(base),
        candidate_trials=tuple(candidate),
        multiplier=exponential(best.nominal_interval()) if known else Interval(None),
        difference=mean_difference(differences),
        per_depth=depth_effects(differences, evidence.combined, e_values),
        heterogeneity=measure_heterogeneity(differences, between) if known else None,
        trend=None if h is None else measure_trend(differences, h),
        evidence=evidence,
        differences=differences,
        pooled=pooled,
    )

    # 4) decide and warn
    return replace(
        comparison,
        decision=decide(comparison),
        warnings=(*axes.warnings, *comparison_warnings(comparison)),
    )
