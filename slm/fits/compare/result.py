"""The result of a comparison, and its JSON document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from slm.fits.compare.e_values import CLAIM_THRESHOLD
from slm.fits.compare.effects import Effect, LossDifferences
from slm.fits.compare.trials import Trial
from slm.fits.intervals import Interval
from slm.fits.power_law import Noise
from slm.fits.types import FitWarning, to_json


@dataclass(frozen=True)
class Advice:
    """The cheapest further seeds expected to decide, if the estimate and its noise are right."""

    depth: int | None
    """None is every depth."""
    seeds: int
    """Further seeds of each recipe."""
    flops: float
    """Cost of all of them."""


@dataclass(frozen=True)
class Decision:
    """The claim that the evidence allows."""

    code: str
    """better_every_depth, better_overall, better_some_depths, gain_shrinks, worse_every_depth,
    worse_overall, worse_some_depths, mixed, equal or cannot_tell."""
    sentence: str
    advice: Advice | None = None
    """Further seeds, if `cannot_tell` and seeds are expected to help."""


@dataclass(frozen=True)
class DepthEffect:
    """The effect at one depth that both recipes have."""

    depth: int
    flops: float
    """FLOPs of the candidate's runs."""
    base_runs: int
    """Number of runs of the base."""
    candidate_runs: int
    """Number of runs of the candidate."""
    difference: Interval
    """ln loss, candidate minus base, at the candidate's compute; open without replicate seeds."""
    multiplier: Interval
    """m of this depth alone."""
    e_value: float
    """E-value of a difference at this depth; 1 is no evidence."""
    claim: str | None
    """`better` or `worse` if claimed at this depth; the claims of all depths are right together
    in 95 % of comparisons."""

    def document(self) -> dict[str, Any]:
        """Return the effect as JSON."""
        return {
            "depth": self.depth,
            "flops": self.flops,
            "base_runs": self.base_runs,
            "candidate_runs": self.candidate_runs,
            **to_json(self.multiplier),
            "difference": to_json(self.difference),
            "e_value": self.e_value,
            "claim": self.claim,
        }


@dataclass(frozen=True)
class Heterogeneity:
    """F test that one multiplier fits all depths: scatter of the differences over that of seeds."""

    statistic: float
    """F."""
    degrees: list[int]
    """Degrees of freedom: between depths, within depths."""
    p: float
    """p-value."""


@dataclass(frozen=True)
class Trend:
    """Linear trend of ln m in ln compute."""

    slope: Interval
    """d ln m / d ln C."""
    p: float | None
    """Two-sided p-value of no slope, for a single look."""
    evidence: float
    """E-value of a slope."""
    ends: list[float]
    """m of the line at the smallest and the largest compute."""


@dataclass(frozen=True)
class Evidence:
    """Evidence for a claim about all depths."""

    pooled: float
    """E-value of a multiplier other than 1 over all depths."""
    combined: float
    """E-value of any difference, pooled or at one depth; claims take CLAIM_THRESHOLD."""
    p: float | None
    """Two-sided p-value of m = 1, for a single look; None if the noise is unknown."""
    confidence_sequence: Interval
    """Interval of m that holds the truth at every look, in 95 % of sequences of looks."""


@dataclass(frozen=True)
class Comparison:
    """The answer of `compare`."""

    base: str
    """Name of the base."""
    candidate: str
    """Name of the candidate."""
    axis: str
    """Compute that m multiplies: `flops` or `seconds`."""
    mixed: list[str]
    """Axes of the runs if they are on several; empty if on one."""
    base_trials: tuple[Trial, ...]
    candidate_trials: tuple[Trial, ...]
    multiplier: Interval
    """m over all shared depths; unknown if the base's loss is not known to fall with compute."""
    difference: Interval
    """Mean ln loss over all shared depths, candidate minus base."""
    per_depth: tuple[DepthEffect, ...]
    """Effects at the shared depths, shallowest first."""
    heterogeneity: Heterogeneity | None
    """None without replicate seeds, or at one depth."""
    trend: Trend | None
    """None with fewer than three depths."""
    evidence: Evidence
    differences: LossDifferences
    pooled: Effect
    """ln m linearised at 0, which needs no slope; without a slope, minus the mean difference of ln
    loss."""
    decision: Decision = Decision("cannot_tell", "")
    warnings: tuple[FitWarning, ...] = ()

    @property
    def noise(self) -> Noise | None:
        """Noise of ln loss of a run; None if the runs do not determine it."""
        if self.differences.sigma is not None:
            return Noise(self.differences.sigma, "replicate seeds")
        if not self.pooled.free:
            return None
        return Noise(self.differences.run_noise(self.pooled), "scatter of the depths")

    @property
    def missing(self) -> dict[str, list[int]]:
        """Depths that only the other recipe has, by side."""
        base = {trial.depth for trial in self.base_trials}
        candidate = {trial.depth for trial in self.candidate_trials}
        return {"base": sorted(candidate - base), "candidate": sorted(base - candidate)}

    def document(self) -> dict[str, Any]:
        """Return the comparison as JSON; differences are of ln loss."""
        sequence = self.evidence.confidence_sequence
        noise = to_json(self.noise) or {"sigma": None, "source": None}
        return {
            "base": _side(self.base, self.base_trials),
            "candidate": _side(self.candidate, self.candidate_trials),
            "comparison_key": None if self.mixed else self.base_trials[0].comparison_key,
            "mixed": self.mixed,
            "axis": self.axis,
            "compute_multiplier": {
                **to_json(self.multiplier),
                "always": [sequence.low, sequence.high],
            },
            "difference": to_json(self.difference),
            "per_depth": to_json(self.per_depth),
            "homogeneity": to_json(self.heterogeneity),
            "trend": to_json(self.trend),
            "verdict": to_json(self.decision),
            "evidence": {
                "e_value": self.evidence.combined,
                "e_value_over_all": self.evidence.pooled,
                "needed": CLAIM_THRESHOLD,
                "p_of_one_look": self.evidence.p,
                "degrees_of_freedom": self.pooled.free,
            },
            "noise": noise | {"seed_correlation": self.differences.correlation},
            "missing": self.missing,
            "warnings": to_json(self.warnings),
        }


def _side(name: str, trials: tuple[Trial, ...]) -> dict[str, Any]:
    return {"name": name, "run_ids": sorted(trial.run_id for trial in trials)}
