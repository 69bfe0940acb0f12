"""Which runs to make next: those that remove most of a target's variance for the FLOPs there are.

Model: the surface of `belief` through all runs at once, with its weak prior, so that a ladder, which alone cannot tell
alpha from beta, has a variance too and is told what would lower it:

    M = P + Σ_k w_k·j_k·j_kᵀ,  w_k = 1/(tau² + sigma²/m_k),  Var(target) = gᵀM⁻¹g,

j_k = d ln L_k/d theta, m_k seeds of the different run k, P the prior's precision, g the target's gradient. One more run
of k raises w_k by u and removes (gᵀM⁻¹j_k)²·u/(1 + u·j_kᵀM⁻¹j_k): c-optimal design, sequential as in Fedorov 1972. All
of it is averaged over surfaces that the runs allow, since the best design at one estimate is not that at the truth. The
floor is never 0 nor gamma 1 because some selected form says so: what is not known of the form is variance. Bias that
grows with the distance to the target is in it only as far as gamma and the prior allow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from slm.fits.optimize import Array
from slm.fits.points import Point, axes_of, check, mixture
from slm.fits.posterior import SPREADS, Cell, believe, log_losses, rows_of, weight
from slm.fits.power_law import REACH, Noise
from slm.fits.surface import cloud_of, obstacle, quantities
from slm.fits.warning import FitWarning

KINDS = ("loss", "E", "alpha", "beta", "params_exponent")
"""What a target may be: the loss of a run, or a parameter of the surface."""
FEWEST = 3
"""Different runs that a design stands on."""
MOST = 24
"""Runs of a design at most."""
SLACK = 0.01
"""Share of the variance for which the runs of least use, all together, are left out again."""
LEVELS = 5
"""Computes of evenly spaced runs."""
POWERS = (1.0, 0.5, 0.0)
"""Of FLOPs that the variance a run removes is divided by, in turn."""
ROUNDS = 20
"""Exchanges of a design at most."""


@dataclass(frozen=True)
class Candidate:
    """A run that could be made."""

    depth: int
    """Layers."""
    params: float
    """N, in the convention of the points."""
    tokens: float
    """D."""
    flops: float
    """C, as counted."""
    horizon: str
    """As a plan says it: `compute-optimal`, `flops=1e+18`."""

    @property
    def text(self) -> str:
        """`d12 flops=1e+18 (1e+18 FLOPs)`."""
        return f"d{self.depth} {self.horizon} ({self.flops:.3g} FLOPs)"


@dataclass(frozen=True)
class Goal:
    """What is to be known better. Raises ValueError for what is not of KINDS, or a loss of no run."""

    kind: str
    """One of KINDS."""
    at: Candidate | None = None
    """The run whose loss it is."""

    def __post_init__(self) -> None:
        """Refuse what no surface has."""
        if self.kind not in KINDS:
            raise ValueError(f"target is {self.kind!r}; known are {', '.join(KINDS)}")
        if (self.kind == "loss") != (self.at is not None):
            raise ValueError(
                f"target {self.kind} {'takes' if self.kind == 'loss' else 'has no'} run it is wanted at"
            )

    @property
    def text(self) -> str:
        """`loss@d26 compute-optimal`."""
        return f"loss@d{self.at.depth} {self.at.horizon}" if self.at else self.kind


@dataclass(frozen=True)
class Pick:
    """A run to make."""

    candidate: Candidate
    """Which."""
    repeat: bool
    """Whether it is a further seed: of a run there is, or of an earlier pick."""
    before: float
    """Standard deviation of the target before this run, in the target's unit."""
    after: float
    """After it."""


@dataclass(frozen=True)
class Design:
    """The answer of `next_runs`."""

    target: Goal
    """What is to be known better."""
    budget: float
    """FLOPs there are."""
    estimate: float
    """The target by the runs and the prior; a loss in its unit."""
    picks: tuple[Pick, ...]
    """By variance removed per FLOP, each given those before it."""
    prior: float
    """Standard deviation of the target by the prior alone, in the target's unit like those below."""
    before: float
    """By the runs there are."""
    after: float
    """With the picks."""
    evenly: float
    """With evenly spaced runs instead, for the same budget."""
    noise: Noise
    """sigma of one run."""
    cautions: tuple[FitWarning, ...]
    """What a reader must know before spending."""
    mixed: tuple[str, ...] = ()
    """Axes of the runs there are, where they are on several."""

    @property
    def flops(self) -> float:
        """What the picks cost."""
        return sum(pick.candidate.flops for pick in self.picks)

    def document(self) -> dict[str, Any]:
        """As JSON. Standard deviations in the target's unit, compute in FLOPs."""
        return {
            "target": {"text": self.target.text, **asdict(self.target), "estimate": self.estimate},
            "model": "coupled surface with a weak prior",
            "budget": self.budget,
            "flops": self.flops,
            "sd": {
                "prior": self.prior,
                "before": self.before,
                "after": self.after,
                "evenly_spaced": self.evenly,
            },
            "mixed": list(self.mixed),
            "sigma": self.noise.sigma,
            "sigma_from": self.noise.source,
            "picks": [
                {
                    **asdict(pick.candidate),
                    "repeat": pick.repeat,
                    "sd_before": pick.before,
                    "sd_after": pick.after,
                }
                for pick in self.picks
            ],
            "warnings": [vars(caution) for caution in self.cautions],
        }


@dataclass(frozen=True)
class Board:
    """Every different run, made or possible, and how well runs hold the target, at each of several theta."""

    slopes: Array
    """(s, k, 6) d ln L / d theta."""
    costs: Array
    """(k,) FLOPs of one more; infinite where it is no candidate."""
    aims: Array
    """(s, 6) gradients of the target."""
    sigma: float
    """Of one run, relative."""

    def variance(self, counts: Array) -> float:
        """Of the target with so many seeds (k,) of each run: geometric mean over the theta."""
        solved = np.linalg.solve(self._information(counts), self.aims[:, :, None])[:, :, 0]
        return float(np.exp(np.log((self.aims * solved).sum(1)).mean()))

    def removed(self, counts: Array) -> Array:
        """(k,) share of the variance that one more of each run removes, mean over the theta."""
        inverse = np.linalg.inv(self._information(counts))
        turned, pulled = self.slopes @ inverse, (inverse @ self.aims[:, :, None])
        more = weight(counts + 1, self.sigma) - weight(counts, self.sigma)
        gains = (
            (self.slopes @ pulled)[:, :, 0] ** 2 * more / (1 + more * (turned * self.slopes).sum(2))
        )
        return np.asarray((gains / (self.aims[:, None] @ pulled)[:, :, 0]).mean(0))

    def _information(self, counts: Array) -> Array:
        scaled = self.slopes * weight(counts, self.sigma)[:, None]
        return np.asarray(scaled.transpose(0, 2, 1) @ self.slopes + np.diag(SPREADS**-2))


def next_runs(
    points: Sequence[Point],
    candidates: Sequence[Candidate],
    target: Goal,
    budget: float,
    mixed: bool = False,
) -> Design:
    """The candidates, seeds of runs there are included, that leave the target the least variance for `budget` FLOPs.

    Greedy by variance removed per FLOP, by the variance alone and between; the best of these, improved by taking a run
    out and spending what it cost on others, less what hardly helps. Every run counts one, whatever its weight. Raises
    ValueError for fewer than FEWEST different runs, a run of unknown size, no candidate and a budget below the
    cheapest, NotComparable as `fit_curves` does.
    """
    check(points, mixed)
    _refuse(points, candidates, budget)
    cells = list(dict.fromkeys([*map(_cell, points), *map(_cell, candidates)]))
    made, centre = _counts(cells, points), cloud_of(points, np.inf).centre
    theta, draws, noise = believe(points)
    board = _board(cells, candidates, target, centre, draws, noise.sigma)
    best = _trimmed(board, made, _best(board, made, budget))
    rival = made + _counts(cells, evenly(candidates, budget))
    prior, before, after, even = (
        float(np.sqrt(board.variance(own))) for own in (0 * made, made, best, rival)
    )
    estimate = float(_values(target, theta, centre)[0])
    named = {_cell(run): run for run in candidates}
    picks = _picks(board, made, best, [named.get(cell) for cell in cells])
    parts = [point.parts for point in points]
    design = Design(
        target,
        budget,
        estimate,
        picks,
        prior,
        before,
        after,
        even,
        noise,
        (),
        tuple(axes_of(parts)),
    )
    return replace(design, cautions=(*mixture(parts), *_cautions(points, design)))


def evenly(candidates: Sequence[Candidate], budget: float) -> list[Candidate]:
    """What one would run without a model: LEVELS runs evenly spaced in ln C from the cheapest to as large as can be
    paid, fewer if need be, then seeds of them, from the largest down, until no more fits."""
    runs = sorted(candidates, key=lambda run: run.flops)
    logs = np.log(np.array([run.flops for run in runs], float))
    for levels in range(LEVELS, 0, -1):
        for top in logs[logs <= np.log(budget)][::-1]:
            spaced = np.linspace(logs[0] if levels > 1 else top, top, levels)
            chosen = [
                runs[k]
                for k in sorted(
                    {int(np.abs(logs - level).argmin()) for level in spaced}, reverse=True
                )
            ]
            left = budget - sum(run.flops for run in chosen)
            if len(chosen) == levels and left >= 0:
                return chosen + _repeats(chosen, left)
    return []


def _repeats(chosen: Sequence[Candidate], left: float) -> list[Candidate]:
    found: list[Candidate] = []
    for run in chosen:
        count = int(min(left // run.flops, MOST))
        found += [run] * count
        left -= count * run.flops
    return found


def _refuse(points: Sequence[Point], candidates: Sequence[Candidate], budget: float) -> None:
    cheap = sorted(candidates, key=lambda run: run.flops)
    if not cheap:
        raise ValueError("there is no candidate to choose from")
    unsized = [point.run_id for point in points if not point.sized]
    if unsized:
        raise ValueError(
            f"run {unsized[0]} has no params or no tokens: a design stands on runs of known size"
        )
    different = len(set(map(_cell, points)))
    if different < FEWEST:
        first = ", ".join(run.text for run in cheap[:FEWEST])
        raise ValueError(
            f"{different} different runs; a design stands on {FEWEST}: first run {first}"
        )
    if not cheap[0].flops <= budget < np.inf:
        raise ValueError(
            f"a budget of {budget:.3g} FLOPs; the cheapest candidate is {cheap[0].text}"
        )


def _cell(run: Point | Candidate) -> Cell:
    return run.params, run.tokens


def _counts(cells: Sequence[Cell], runs: Sequence[Point] | Sequence[Candidate]) -> Array:
    """Seeds (k,) of each cell."""
    found = Counter(map(_cell, runs))
    return np.array([float(found[cell]) for cell in cells])


def _board(
    cells: Sequence[Cell],
    candidates: Sequence[Candidate],
    target: Goal,
    centre: tuple[float, float],
    thetas: Array,
    sigma: float,
) -> Board:
    costs = {_cell(run): float(run.flops) for run in candidates}
    step = 1e-5 * np.eye(thetas.shape[1])
    aims = [
        (_values(target, theta + step, centre) - _values(target, theta - step, centre)) / 2e-5
        for theta in thetas
    ]
    slopes = log_losses(thetas, np.log(cells) - centre)[1]
    return Board(
        slopes, np.array([costs.get(cell, np.inf) for cell in cells]), np.array(aims), sigma
    )


def _values(target: Goal, thetas: Array, centre: tuple[float, float]) -> Array:
    """The target at each theta (m, 6)."""
    if target.at is None:
        own = quantities(rows_of(thetas), centre)[target.kind]
        return np.exp(own) if target.kind == "E" else own
    return np.exp(log_losses(thetas, np.log([_cell(target.at)]) - centre)[0][:, 0])


def _best(board: Board, made: Array, budget: float) -> Array:
    """Counts (k,) of the best design found."""
    best = min((_filled(board, made, made, budget, power) for power in POWERS), key=board.variance)
    for _ in range(ROUNDS):
        trials = [
            _filled(
                board,
                made,
                np.where(np.arange(len(best)) == cell, best - 1, best),
                budget,
                power,
                cell,
            )
            for cell in np.flatnonzero(best > made).tolist()
            for power in POWERS[::2]
        ]
        better = min(trials, key=board.variance, default=best)
        if board.variance(better) >= board.variance(best) * (1 - 1e-4):
            break
        best = better
    return best


def _filled(
    board: Board, made: Array, counts: Array, budget: float, power: float, barred: int | None = None
) -> Array:
    """Runs added to `counts` by variance removed over FLOPs^power, while budget and MOST allow."""
    counts, costs = counts.copy(), np.where(np.arange(len(counts)) == barred, np.inf, board.costs)
    candidate = np.isfinite(board.costs)
    while True:
        added = counts - made
        affordable = costs <= budget * (1 + 1e-12) - added[candidate] @ board.costs[candidate]
        if not affordable.any() or added.sum() >= MOST:
            return counts
        scores = np.where(
            affordable, board.removed(counts) / np.where(affordable, costs, 1.0) ** power, -1.0
        )
        counts[scores.argmax()] += 1


def _trimmed(board: Board, made: Array, counts: Array) -> Array:
    """Without the runs that together are worth SLACK of the variance."""
    limit = board.variance(counts) * (1 + SLACK)
    while True:
        fewer = [
            counts - (np.arange(len(counts)) == cell) for cell in np.flatnonzero(counts > made)
        ]
        least = min(fewer, key=board.variance, default=made)
        if board.variance(least) > limit or not fewer:
            return counts
        counts = least


def _picks(
    board: Board, made: Array, best: Array, runs: Sequence[Candidate | None]
) -> tuple[Pick, ...]:
    """The runs of a design in order."""
    counts, found = made.copy(), []
    while (counts < best).any():
        k = int(np.where(counts < best, board.removed(counts) / board.costs, -1.0).argmax())
        run, repeat, before = runs[k], bool(counts[k]), board.variance(counts)
        assert run is not None
        counts[k] += 1
        found.append(
            Pick(run, repeat, float(np.sqrt(before)), float(np.sqrt(board.variance(counts))))
        )
    return tuple(found)


def _cautions(points: Sequence[Point], design: Design) -> list[FitWarning]:
    found, picked = [], [pick.candidate for pick in design.picks]
    problem = obstacle(points)
    if problem:
        then = obstacle(
            [*points, *(replace(points[0], params=run.params, tokens=run.tokens) for run in picked)]
        )
        end = (
            "and with these runs too: candidates at FLOPs budgets would tell"
            if then
            else "which these runs would end"
        )
        found.append(FitWarning(problem[0], f"{problem[1]}: the rest is the prior's, {end}"))
    if design.before > design.prior / 2:
        message = (
            f"the runs leave {design.before / design.prior:.0%} of the prior's standard deviation"
        )
        found.append(
            FitWarning("prior_rules", f"{message}: what to run next follows mostly from the prior")
        )
    largest, at = (
        max([point.flops for point in points] + [run.flops for run in picked]),
        design.target.at,
    )
    if at and at.flops > REACH * largest:
        message = f"the target is {at.flops / largest:.3g} times beyond the largest of these runs, untested by any"
        found.append(FitWarning("extrapolation", message))
    if design.flops < 0.9 * design.budget:
        message = f"{design.budget - design.flops:.3g} FLOPs are left: {MOST} runs at most, and what removes less than "
        found.append(
            FitWarning("budget_left", f"{message}{SLACK:.0%} of the variance is not proposed")
        )
    return found
