"""The decision of a comparison, and the further seeds expected to reach one.

A claim takes an e-value of at least CLAIM_THRESHOLD, which `e_values` defines.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from slm.fits.compare.e_values import CLAIM_THRESHOLD, POOLED_SHARE, e_value
from slm.fits.compare.result import Advice, Comparison, Decision
from slm.fits.compare.trials import AXES, flops_by_depth, format_depths

EQUAL = 0.05
"""Share of compute below which a difference is none."""
COUNTS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
"""Words for the further seeds per recipe that count as affordable."""


def decide(comparison: Comparison) -> Decision:
    """Return the decision that the claims allow, or the seeds that would allow one."""
    evidence = comparison.evidence
    depths = {
        direction: [effect.depth for effect in comparison.per_depth if effect.claim == direction]
        for direction in ("better", "worse")
    }
    pooled = None
    if min(evidence.pooled, evidence.combined) >= CLAIM_THRESHOLD:
        pooled = "better" if comparison.pooled.estimate > 0 else "worse"
    claimed = [direction for direction in depths if depths[direction] or direction == pooled]
    if len(claimed) > 1:
        decision = _mixed(comparison, depths)
    elif claimed:
        (direction,) = claimed
        decision = _one_direction(comparison, direction, depths[direction], direction == pooled)
    else:
        decision = _no_claim(comparison)
    if comparison.mixed:
        return replace(decision, sentence=f"Mixed axes: {decision.sentence}")
    return decision


def _mixed(comparison: Comparison, depths: dict[str, list[int]]) -> Decision:
    parts = []
    for direction, claimed in depths.items():
        extent = f"at {format_depths(claimed)}" if claimed else "over all depths"
        parts.append(f"{direction} {extent}")
    lead = f"{comparison.candidate} is {' and '.join(parts)} than {comparison.base}"
    return Decision("mixed", f"{lead}: {_effect(comparison)}")


def _one_direction(
    comparison: Comparison, direction: str, depths: list[int], pooled: bool
) -> Decision:
    shrinking = _shrinking(comparison)
    several = len(comparison.per_depth) > 1
    if direction == "better" and pooled and shrinking:
        code = "gain_shrinks"
        extent = f", but the gain shrinks with depth, {shrinking}"
    elif several and len(depths) == len(comparison.per_depth):
        code = f"{direction}_every_depth"
        extent = " at every depth"
    elif several and pooled:
        code = f"{direction}_overall"
        single = f"at {format_depths(depths)}" if depths else "at no depth"
        extent = f" over all depths, significantly {single} alone"
    else:
        code = f"{direction}_some_depths"
        elsewhere = "not significantly at the others" if several else "the only depth compared"
        extent = f" at {format_depths(depths)} only, {elsewhere}"
    lead = f"{comparison.candidate} is {direction} than {comparison.base}"
    return Decision(code, f"{lead}{extent}: {_effect(comparison)}")


def _no_claim(comparison: Comparison) -> Decision:
    sequence = comparison.evidence.confidence_sequence
    effect = _effect(comparison)
    limit = ""
    if sequence.low and sequence.high:
        bound = max(1 / sequence.low, sequence.high) - 1
        share = f"{100 * bound:.2g} %"
        if bound < EQUAL:
            names = f"{comparison.candidate} and {comparison.base}"
            return Decision("equal", f"{names} are equal within {share}: {effect}")
        limit = f"; the effect, if any, is below {share}"
    advice = advise(comparison)
    if not comparison.pooled.free:
        reason = ": one run of each gives no noise estimate; run more seeds or depths"
    elif advice:
        depths = f"d{advice.depth}" if advice.depth else "every depth"
        noun = "seed" if advice.seeds == 1 else "seeds"
        reason = f": {COUNTS[advice.seeds - 1]} more {noun} at {depths} should decide it"
    else:
        reason = f", and no affordable number of seeds is expected to{limit}"
    return Decision("cannot_tell", f"cannot tell{reason} ({effect})", advice)


def _effect(comparison: Comparison) -> str:
    if comparison.multiplier.estimate is None:
        return f"its ln loss differs by {comparison.difference.text('+.2g', 100)} %"
    times = comparison.multiplier.text(".3g")
    return f"{comparison.base} would need {times} times the {AXES[comparison.axis]}"


def _shrinking(comparison: Comparison) -> str | None:
    """Describe a multiplier whose trend is significantly negative; None for any other."""
    trend = comparison.trend
    if not trend or trend.evidence < CLAIM_THRESHOLD or (trend.slope.estimate or 0.0) >= 0:
        return None
    first = comparison.per_depth[0].depth
    last = comparison.per_depth[-1].depth
    return f"from {trend.ends[0]:.3g} at d{first} to {trend.ends[1]:.3g} at d{last}"


def advise(comparison: Comparison) -> Advice | None:
    """Return the cheapest of up to 8 further seeds per recipe, at one depth or at each.

    None if none is expected to decide, if the true effect is the pooled one, with its noise.
    """
    pooled = comparison.pooled
    differences = comparison.differences
    depths = comparison.per_depth
    if pooled.free < 1 or comparison.evidence.combined >= CLAIM_THRESHOLD:
        return None
    runs = np.array([[effect.base_runs, effect.candidate_runs] for effect in depths], float).T
    base_flops = flops_by_depth(comparison.base_trials)
    flops = np.array([effect.flops + base_flops[effect.depth] for effect in depths])
    sigma = differences.run_noise(pooled)
    free_per_seed = 1 if differences.paired else 2
    options = []
    for k in (*range(len(depths)), None):
        chosen = np.ones(len(depths), bool) if k is None else np.arange(len(depths)) == k
        for seeds in range(1, len(COUNTS) + 1):
            base, candidate = runs + seeds * chosen
            weight = base * candidate / (base + candidate)
            t = pooled.estimate * np.sqrt(weight @ differences.slope**2) / sigma
            free = pooled.free + seeds * int(chosen.sum()) * free_per_seed
            expected = e_value(t, free, weight.sum())
            if POOLED_SHARE * expected + 1 - POOLED_SHARE >= CLAIM_THRESHOLD:
                depth = None if k is None else depths[k].depth
                options.append(Advice(depth, seeds, seeds * flops @ chosen))
                break
    return min(options, key=lambda option: option.flops, default=None)
