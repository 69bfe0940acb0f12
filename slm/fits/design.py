"""Choose the next runs: those that remove most of a target's variance for the FLOPs available.

The model is the posterior of the coupled surface through all runs, with its weak prior
(`posterior`), so that even a ladder, which alone cannot tell alpha from beta, has a variance to
lower:

    M = P + Σ_k w_k·j_k·j_kᵀ,  w_k = 1/(tau² + sigma²/m_k),  Var(target) = gᵀM⁻¹g,

with j_k = d ln L_k/d theta, m_k the seeds of the distinct run k, P the prior's precision and g the
target's gradient. One more run of k raises w_k by u and removes (gᵀM⁻¹j_k)²·u/(1 + u·j_kᵀM⁻¹j_k):
c-optimal design, sequential as in Fedorov 1972. Everything is averaged over surfaces that the runs
allow, since the best design at one estimate is not that at the truth. No selected form fixes the
floor at 0 or gamma at 1: uncertainty about the form is part of the variance. A bias that grows with
the distance to the target is part of it only as far as gamma and the prior allow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from slm.fits.optimize import Centre, solve_each
from slm.fits.points import Axes, Point, check
from slm.fits.posterior import PRECISION, Cell, information, log_losses, rows_of, sample_posterior
from slm.fits.power_law import REACH, Noise
from slm.fits.surface import loss_data, obstacle, quantities
from slm.fits.types import Array, FitWarning, to_json

KINDS = ("loss", "E", "alpha", "beta", "params_exponent")
"""Targets: the loss of a run, or a parameter of the surface."""
MIN_RUNS = 3
"""Distinct runs that a design needs."""
MAX_RUNS = 24
"""Most runs of a design."""
TRIMMED_SHARE = 0.01
"""Share of the variance that the least useful runs may be worth together and still be dropped."""
EVEN_COMPUTES = 5
"""Distinct computes of evenly spaced runs."""
POWERS = (1.0, 0.5, 0.0)
"""Exponents tried in the score variance_removed / FLOPs**power."""
MAX_EXCHANGES = 20
"""Most exchanges of one run of a design for others."""


@dataclass(frozen=True)
class Candidate:
    """A run that could be made."""

    depth: int
    params: float
    """N, in the convention of the points."""
    tokens: float
    """D."""
    flops: float
    """C, as counted."""
    horizon: str
    """Horizon as in a plan: `compute-optimal`, `flops=1e+18`."""

    @property
    def text(self) -> str:
        """Label: `d12 flops=1e+18 (1e+18 FLOPs)`."""
        return f"d{self.depth} {self.horizon} ({self.flops:.3g} FLOPs)"


@dataclass(frozen=True)
class Goal:
    """The target whose uncertainty a design lowers."""

    kind: str
    """Member of KINDS."""
    at: Candidate | None = None
    """The run whose loss is the target; None for a parameter."""

    def __post_init__(self) -> None:
        """Raise ValueError for an unknown kind, and for a loss without a run."""
        if self.kind not in KINDS:
            raise ValueError(f"target is {self.kind!r}; known are {', '.join(KINDS)}")
        if (self.kind == "loss") != (self.at is not None):
            verb = "needs a" if self.kind == "loss" else "takes no"
            raise ValueError(f"target {self.kind} {verb} run to be evaluated at")

    @property
    def text(self) -> str:
        """Label: `loss@d26 compute-optimal`."""
        return f"loss@d{self.at.depth} {self.at.horizon}" if self.at else self.kind


@dataclass(frozen=True)
class NextRun:
    """A chosen run."""

    candidate: Candidate
    repeat: bool
    """Whether it is a further seed of an existing run or of an earlier choice."""
    before: float
    """Standard deviation of the target before this run, in the target's unit."""
    after: float
    """Standard deviation of the target after this run."""

    def document(self) -> dict[str, Any]:
        """Return the run as JSON."""
        return {
            **to_json(self.candidate),
            "repeat": self.repeat,
            "sd_before": self.before,
            "sd_after": self.after,
        }


@dataclass(frozen=True)
class Design:
    """The answer of `next_runs`; standard deviations are in the target's unit."""

    target: Goal
    budget: float
    """FLOPs available."""
    estimate: float
    """Posterior mode of the target; a loss in its unit."""
    runs: tuple[NextRun, ...]
    """Chosen runs by variance removed per FLOP, each after those before it."""
    prior: float
    """Standard deviation of the target by the prior alone."""
    before: float
    """Standard deviation with the existing runs."""
    after: float
    """Standard deviation with the chosen runs too."""
    evenly_spaced: float
    """Standard deviation with evenly spaced runs of the same budget instead."""
    noise: Noise
    """Noise of one run."""
    mixed: tuple[str, ...]
    """Axes of the existing runs, if they are on several."""
    warnings: tuple[FitWarning, ...] = ()

    @property
    def flops(self) -> float:
        """Cost of the chosen runs."""
        return sum(run.candidate.flops for run in self.runs)

    def document(self) -> dict[str, Any]:
        """Return the design as JSON; compute in FLOPs."""
        target = {"text": self.target.text, **to_json(self.target), "estimate": self.estimate}
        return {
            "target": target,
            "model": "coupled surface with a weak prior",
            "budget": self.budget,
            "flops": self.flops,
            "sd": {
                "prior": self.prior,
                "before": self.before,
                "after": self.after,
                "evenly_spaced": self.evenly_spaced,
            },
            "mixed": list(self.mixed),
            "sigma": self.noise.sigma,
            "sigma_from": self.noise.source,
            "picks": to_json(self.runs),
            "warnings": to_json(self.warnings),
        }


@dataclass(frozen=True)
class DesignProblem:
    """The k distinct runs, existing or possible, and what they tell of the target at s surfaces."""

    slopes: Array
    """(s, k, 6) d ln L / d theta."""
    gradients: Array
    """(s, 6) gradients of the target."""
    costs: Array
    """(k,) FLOPs of one more run; infinite for no candidate."""
    made: Array
    """(k,) existing seeds."""
    budget: float
    """FLOPs available."""
    sigma: float
    """Relative noise of one run."""

    def variance(self, counts: Array) -> float:
        """Return the variance of the target with `counts` (k,) seeds, geometric mean over s."""
        solved = solve_each(self._precision(counts), self.gradients)
        variances = (self.gradients * solved).sum(1)
        return np.exp(np.log(variances).mean())

    def deviation(self, counts: Array) -> float:
        """Return the standard deviation of the target."""
        return np.sqrt(self.variance(counts))

    def removed(self, counts: Array) -> Array:
        """Return the share of the variance that one more of each run removes, (k,), mean over s."""
        covariance = np.linalg.inv(self._precision(counts))
        pulled = covariance @ self.gradients[:, :, None]
        variances = (self.gradients[:, None] @ pulled)[:, :, 0]
        leverage = (self.slopes @ covariance * self.slopes).sum(2)
        more = information(counts + 1, self.sigma) - information(counts, self.sigma)
        gains = (self.slopes @ pulled)[:, :, 0] ** 2 * more / (1 + more * leverage)
        return (gains / variances).mean(0)

    def fill(self, counts: Array, power: float, excluded: int | None = None) -> Array:
        """Return `counts` with runs added by variance removed over FLOPs**power.

        Adds runs, but none of `excluded`, until the budget is spent or there are MAX_RUNS.
        """
        counts = counts.copy()
        costs = np.where(np.arange(len(counts)) == excluded, np.inf, self.costs)
        candidate = np.isfinite(self.costs)
        while True:
            added = counts - self.made
            spent = added[candidate] @ self.costs[candidate]
            affordable = costs <= self.budget * (1 + 1e-12) - spent
            if not affordable.any() or added.sum() >= MAX_RUNS:
                return counts
            scores = self.removed(counts) / np.where(affordable, costs, 1.0) ** power
            counts[np.where(affordable, scores, -1.0).argmax()] += 1

    def optimise(self) -> Array:
        """Return the seeds (k,) of the best design.

        The best of the greedy designs, improved by exchanging one run for others of its cost.
        """
        best = min((self.fill(self.made, power) for power in POWERS), key=self.variance)
        for _ in range(MAX_EXCHANGES):
            trials = []
            for k, fewer in self._one_fewer(best).items():
                trials += [self.fill(fewer, power, excluded=k) for power in POWERS[::2]]
            better = min(trials, key=self.variance, default=best)
            if self.variance(better) >= self.variance(best) * (1 - 1e-4):
                break
            best = better
        return best

    def trim(self, counts: Array) -> Array:
        """Return `counts` without runs worth TRIMMED_SHARE of the variance together."""
        limit = self.variance(counts) * (1 + TRIMMED_SHARE)
        while fewer := self._one_fewer(counts):
            least = min(fewer.values(), key=self.variance)
            if self.variance(least) > limit:
                break
            counts = least
        return counts

    def _one_fewer(self, counts: Array) -> dict[int, Array]:
        """Return the designs with one run less, by the run left out."""
        units = np.eye(len(counts))
        return {k: counts - units[k] for k in np.flatnonzero(counts > self.made).tolist()}

    def in_order(self, best: Array, candidates: Sequence[Candidate | None]) -> tuple[NextRun, ...]:
        """Return the runs of a design by variance removed per FLOP; `candidates` are the k runs."""
        counts = self.made.copy()
        runs = []
        while (counts < best).any():
            scores = np.where(counts < best, self.removed(counts) / self.costs, -1.0)
            k = int(scores.argmax())
            candidate = candidates[k]
            assert candidate is not None
            repeat = bool(counts[k])
            before = self.deviation(counts)
            counts[k] += 1
            runs.append(NextRun(candidate, repeat, before, self.deviation(counts)))
        return tuple(runs)

    def _precision(self, counts: Array) -> Array:
        scaled = self.slopes * information(counts, self.sigma)[:, None]
        return scaled.mT @ self.slopes + PRECISION


def next_runs(
    points: Sequence[Point],
    candidates: Sequence[Candidate],
    target: Goal,
    budget: float,
    allow_mixed: bool = False,
) -> Design:
    """Choose the candidates that leave the target the least variance for `budget` FLOPs.

    Candidates may be further seeds of existing runs. Greedy designs by variance removed per FLOP,
    by variance alone and in between are compared; the best is improved by exchanges, then loses the
    runs that hardly help. Every run counts as one, whatever its weight.

    Raises ValueError for fewer than MIN_RUNS distinct runs, a run of unknown size, no candidate and
    a budget below the cheapest, NotComparable for runs on several axes unless `allow_mixed`.
    """
    # 1) check the input
    check(points, allow_mixed)
    _check_candidates(points, candidates, budget)

    # 2) linearise the losses of all distinct runs, and the target, at surfaces the runs allow
    cells = list(dict.fromkeys([*map(_cell, points), *map(_cell, candidates)]))
    by_cell = {_cell(run): run for run in candidates}
    runs = [by_cell.get(cell) for cell in cells]
    centre = loss_data(points, np.inf).centre
    mode, thetas, noise = sample_posterior(points)
    problem = DesignProblem(
        slopes=log_losses(thetas, np.log(cells) - centre)[1],
        gradients=np.array([_gradient(target, theta, centre) for theta in thetas]),
        costs=np.array([float(run.flops) if run else np.inf for run in runs]),
        made=_counts(cells, points),
        budget=budget,
        sigma=noise.sigma,
    )

    # 3) choose, and compare with evenly spaced runs
    best = problem.trim(problem.optimise())
    even = problem.made + _counts(cells, evenly_spaced(candidates, budget))
    axes = Axes.of_points(points)
    design = Design(
        target=target,
        budget=budget,
        estimate=_values(target, mode, centre)[0],
        runs=problem.in_order(best, runs),
        prior=problem.deviation(0 * problem.made),
        before=problem.deviation(problem.made),
        after=problem.deviation(best),
        evenly_spaced=problem.deviation(even),
        noise=noise,
        mixed=tuple(axes.mixed),
    )
    return replace(design, warnings=(*axes.warnings, *_warnings(points, design)))


def evenly_spaced(candidates: Sequence[Candidate], budget: float) -> list[Candidate]:
    """Return the runs one would choose without a model.

    EVEN_COMPUTES runs, or fewer, evenly spaced in ln C from the cheapest to the largest affordable;
    then seeds of them, from the largest down, until no more fits.
    """
    runs = sorted(candidates, key=lambda run: run.flops)
    logs = np.log(np.array([run.flops for run in runs], float))
    for count in range(EVEN_COMPUTES, 0, -1):
        for top in logs[logs <= np.log(budget)][::-1]:
            spaced = np.linspace(logs[0] if count > 1 else top, top, count)
            nearest = {int(np.abs(logs - level).argmin()) for level in spaced}
            chosen = [runs[k] for k in sorted(nearest, reverse=True)]
            remaining = budget - sum(run.flops for run in chosen)
            if len(chosen) == count and remaining >= 0:
                return chosen + _repeats(chosen, remaining)
    return []


def _repeats(chosen: Sequence[Candidate], budget: float) -> list[Candidate]:
    repeats: list[Candidate] = []
    for run in chosen:
        count = int(min(budget // run.flops, MAX_RUNS))
        repeats += [run] * count
        budget -= count * run.flops
    return repeats


def _check_candidates(
    points: Sequence[Point], candidates: Sequence[Candidate], budget: float
) -> None:
    cheapest = sorted(candidates, key=lambda run: run.flops)
    if not cheapest:
        raise ValueError("there is no candidate to choose from")
    unsized = [point.run_id for point in points if not point.sized]
    if unsized:
        raise ValueError(
            f"run {unsized[0]} has no params or no tokens: a design needs runs of known size"
        )
    distinct = len(set(map(_cell, points)))
    if distinct < MIN_RUNS:
        first = ", ".join(run.text for run in cheapest[:MIN_RUNS])
        raise ValueError(f"{distinct} distinct runs; a design needs {MIN_RUNS}: first run {first}")
    if not cheapest[0].flops <= budget < np.inf:
        raise ValueError(
            f"a budget of {budget:.3g} FLOPs; the cheapest candidate is {cheapest[0].text}"
        )


def _cell(run: Point | Candidate) -> Cell:
    return run.params, run.tokens


def _counts(cells: Sequence[Cell], runs: Sequence[Point] | Sequence[Candidate]) -> Array:
    """Return the number of runs of each cell, (k,)."""
    counts = Counter(map(_cell, runs))
    return np.array([float(counts[cell]) for cell in cells])


def _gradient(target: Goal, theta: Array, centre: Centre) -> Array:
    """Return the gradient of the target at theta by central differences, (6,)."""
    step = 1e-5 * np.eye(len(theta))
    above = _values(target, theta + step, centre)
    below = _values(target, theta - step, centre)
    return (above - below) / 2e-5


def _values(target: Goal, thetas: Array, centre: Centre) -> Array:
    """Return the target at each theta, (m, 6) -> (m,)."""
    if target.at is None:
        return quantities(rows_of(thetas), centre)[target.kind]
    return np.exp(log_losses(thetas, np.log([_cell(target.at)]) - centre)[0][:, 0])


def _warnings(points: Sequence[Point], design: Design) -> Iterator[FitWarning]:
    chosen = [run.candidate for run in design.runs]
    problem = obstacle(points)
    if problem:
        added = [replace(points[0], params=run.params, tokens=run.tokens) for run in chosen]
        if obstacle([*points, *added]):
            remedy = "and with these runs too: candidates at FLOPs budgets would help"
        else:
            remedy = "which these runs would change"
        code, reason = problem
        yield FitWarning(code, f"{reason}: the rest is from the prior, {remedy}")
    if design.before > design.prior / 2:
        message = (
            f"the runs leave {design.before / design.prior:.0%} of the prior's standard deviation: "
            "the choice follows mostly from the prior"
        )
        yield FitWarning("prior_rules", message)
    largest = max([point.flops for point in points] + [run.flops for run in chosen])
    at = design.target.at
    if at and at.flops > REACH * largest:
        message = (
            f"the target has {at.flops / largest:.3g} times the compute of the largest of these "
            "runs, an untested extrapolation"
        )
        yield FitWarning("extrapolation", message)
    if design.flops < 0.9 * design.budget:
        message = (
            f"{design.budget - design.flops:.3g} FLOPs are unspent: a design has at most "
            f"{MAX_RUNS} runs, and none that remove less than {TRIMMED_SHARE:.0%} of the variance"
        )
        yield FitWarning("budget_left", message)
