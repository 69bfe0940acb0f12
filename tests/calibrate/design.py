"""Compare chosen designs with evenly spaced runs of the same FLOPs, on unknown surfaces.

The evaluation shares no code with the design: it has a surface, parameters and a prior of its own,
takes slopes by differences, and refits. Runs have independent noise only, so that seeds are worth
more than the design assumes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy import optimize

from slm.fits import Point
from slm.fits.design import Candidate, Goal, evenly_spaced, next_runs
from slm.recipe import Hyperparameters, pocket
from tests.calibrate.workers import parallel_map

Runs = list[Candidate]

WEAK = np.array([0.5, 1, 1, 0.5, 0.5, 0.4])
"""Prior standard deviations of the evaluation's theta."""
SCENARIOS = {
    "loss, any run": ("loss", True),
    "loss, ladder": ("loss", False),
    "exponent": ("params_exponent", True),
}
REFITS = 30
"""Noisy copies of a sweep whose refits are compared."""


@dataclass(frozen=True)
class Truth:
    """L = E + (A·(N/N0)^-alpha + B·(D/D0)^-beta)^gamma, every run with noise of its problem."""

    theta: np.ndarray
    """(ln E, ln A, ln B, ln alpha, ln beta, ln gamma)."""
    centre: np.ndarray
    """ln N0, ln D0."""
    sigma: float
    """Noise of ln loss."""

    def logs(self, runs: Runs, theta: np.ndarray | None = None) -> np.ndarray:
        e, a, b, alpha, beta, gamma = np.exp(
            np.clip(self.theta if theta is None else theta, -30, 5)
        )
        n, d = (np.log([[run.params, run.tokens] for run in runs]) - self.centre).T
        terms = np.logaddexp(np.log(a) - alpha * n, np.log(b) - beta * d)
        return np.asarray(np.log(e + np.exp(np.minimum(gamma * terms, 300))))

    def value(self, target: Goal, theta: np.ndarray) -> float:
        if target.at:
            return float(np.exp(self.logs([target.at], theta)[0]))
        return float(1 / (1 + np.exp(theta[3] - theta[4])))

    def variance(self, runs: Runs, target: Goal) -> float:
        """Return the variance of the target with these runs, linearised at the truth."""
        steps = 1e-5 * np.eye(6)
        slopes = (
            np.array(
                [self.logs(runs, self.theta + h) - self.logs(runs, self.theta - h) for h in steps]
            )
            / 2e-5
        )
        aim = [
            (self.value(target, self.theta + h) - self.value(target, self.theta - h)) / 2e-5
            for h in steps
        ]
        return float(
            aim @ np.linalg.solve(slopes @ slopes.T / self.sigma**2 + np.diag(WEAK**-2), aim)
        )

    def miss(self, runs: Runs, noise: np.ndarray, target: Goal) -> float:
        """Return the squared error of the target after a refit to the runs with this noise."""
        logs = self.logs(runs) + self.sigma * noise
        half = np.log(0.3) + logs.mean()
        mean = np.array(
            [
                np.log(0.7) + logs.mean(),
                *2 * [half / 0.75 - np.log(2)],
                *2 * [np.log(0.47)],
                np.log(0.75),
            ]
        )

        def errors(theta: np.ndarray) -> np.ndarray:
            return np.concatenate(
                [(self.logs(runs, theta) - logs) / self.sigma, (theta - mean) / WEAK]
            )

        theta = optimize.least_squares(errors, mean, method="lm", ftol=1e-7, xtol=1e-7).x
        return (self.value(target, theta) - self.value(target, self.theta)) ** 2


@dataclass(frozen=True)
class Sweep:
    """A true surface, existing runs, candidates, and the target of a design."""

    truth: Truth
    made: Runs
    candidates: Runs
    target: Goal
    budget: float

    def points(self, draw: np.random.Generator) -> list[Point]:
        losses = np.exp(
            self.truth.logs(self.made) + self.truth.sigma * draw.standard_normal(len(self.made))
        )
        return [
            Point(
                f"r{k}", "pocket", run.depth, run.params, run.tokens, run.flops, loss, k, None, "a"
            )
            for k, (run, loss) in enumerate(zip(self.made, losses.tolist()))
        ]

    def chosen(self, draw: np.random.Generator) -> Runs:
        """Return the runs of the design."""
        design = next_runs(self.points(draw), self.candidates, self.target, self.budget)
        return [run.candidate for run in design.runs]

    def rivals(self) -> dict[str, Runs]:
        """Return evenly spaced runs: of all candidates, of the ladder, of its new depths."""
        dial = [run for run in self.candidates if run.horizon == "compute-optimal"]
        new = [run for run in dial if run not in self.made]
        return {
            "all": evenly_spaced(self.candidates, self.budget),
            "ladder": evenly_spaced(dial, self.budget),
            "new": evenly_spaced(new, self.budget),
        }


def candidate(model: Hyperparameters, horizon: str = "compute-optimal") -> Candidate:
    return Candidate(model.depth, model.parameters.scaling, model.tokens, model.flops, horizon)


def ladder(low: int, high: int) -> Runs:
    """Return compute-optimal runs."""
    return [candidate(pocket(depth)) for depth in range(low, high + 1)]


def isoflop(budgets: list[float], depths: range) -> Runs:
    """Return runs at FLOPs budgets."""
    return [
        candidate(pocket(depth, flops=budget), f"flops={budget:.3g}")
        for budget, depth in product(budgets, depths)
    ]


def truth(draw: np.random.Generator, made: Runs) -> Truth:
    """Draw a surface with an optimum near the recipe's; half of them are additive."""
    centre = np.log([[run.params, run.tokens] for run in made]).mean(0)
    alpha, beta = draw.uniform(0.2, 0.5, 2)
    gamma = 1.0 if draw.random() < 0.5 else draw.uniform(0.45, 1.0)
    share, lean = draw.uniform(0.2, 0.6), np.exp(0.4 * draw.standard_normal())
    terms = (2 * share) ** (1 / gamma) * np.array([beta, alpha * lean]) / (beta + alpha * lean)
    theta = np.log([2 * (1 - share), *terms, alpha / gamma, beta / gamma, gamma])
    return Truth(theta, centre, float(np.exp(draw.uniform(np.log(2e-4), np.log(3e-3)))))


def sweep(draw: np.random.Generator, kind: str, off_dial: bool) -> Sweep:
    """Draw existing runs of 4 to 6 depths, a deeper target, and a budget."""
    low, rungs = int(draw.integers(2, 5)), int(draw.integers(4, 7))
    top = low + rungs - 1
    deep = top + int(draw.integers(2, 9))
    made, could = ladder(low, top), ladder(2, min(deep - 1, top + 4))
    if off_dial:
        budgets = [run.flops for run in ladder(low + 1, top + 2)[::2]]
        could += isoflop(budgets, range(2, top + 4))
        made += isoflop(budgets[:2], range(low, low + 4)) if draw.random() < 0.4 else []
    target = Goal("loss", candidate(pocket(deep))) if kind == "loss" else Goal(kind)
    budget = float(np.exp(draw.uniform(np.log(0.5), np.log(10)))) * sum(run.flops for run in made)
    return Sweep(truth(draw, made), made, could, target, budget)


def report(
    repetitions: int, seed: int = 0, count: int | None = None
) -> tuple[list[str], list[list[str]]]:
    """Return how often the design leaves less variance and, every fifth time, less error."""
    tasks = [(name, repetitions, seed) for name in SCENARIOS]
    tables = parallel_map(_scenario, tasks[:count], "designs", 1)
    headers = ["target", "evenly over", "less variance", "ratio", "less error", "ratio"]
    return headers, [row for rows in tables for row in rows]


def _scenario(task: tuple[str, int, int]) -> list[list[str]]:
    name, repetitions, seed = task
    kind, off_dial = SCENARIOS[name]
    draw = np.random.default_rng(seed)
    ratios: dict[str, list[float]] = {}
    errors: dict[str, list[float]] = {}
    for number in range(repetitions):
        problem = sweep(draw, kind, off_dial)
        chosen = problem.chosen(draw)
        after = problem.truth.variance(problem.made + chosen, problem.target)
        for rival, runs in problem.rivals().items():
            ratios.setdefault(rival, []).append(
                after / problem.truth.variance(problem.made + runs, problem.target)
            )
            if rival == "all" and number % 5 == 0:
                errors.setdefault(rival, []).append(squared_errors(problem, chosen, runs, draw))
    return [
        [name, rival, *_shares(shares), *(_shares(errors[rival]) if rival in errors else ["", ""])]
        for rival, shares in ratios.items()
    ]


def squared_errors(problem: Sweep, chosen: Runs, rival: Runs, draw: np.random.Generator) -> float:
    """Return the ratio of mean squared errors after REFITS refits, chosen over rival."""
    totals = np.zeros(2)
    for _ in range(REFITS):
        for side, runs in enumerate((chosen, rival)):
            totals[side] += problem.truth.miss(
                problem.made + runs, draw.standard_normal(len(problem.made + runs)), problem.target
            )
    return float(totals[0] / totals[1])


def _shares(ratios: list[float]) -> list[str]:
    """Return the share below 1, and the median."""
    return [f"{np.mean(np.array(ratios) < 1):.1%} of {len(ratios)}", f"{np.median(ratios):.2f}"]
