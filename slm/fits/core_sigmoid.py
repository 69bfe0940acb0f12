"""The sigmoid from loss to CORE: noise of a CORE, fits with a given top, and joint draws with
the law."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

from slm.fits.intervals import LEVEL
from slm.fits.power_law import Law
from slm.fits.types import Array

TASKS = np.array(
    [
        (10042, 0.25),  # hellaswag_zeroshot
        (2117, 0.0),  # jeopardy
        (20321, 0.0),  # bigbench_qa_wikidata
        (2376, 0.25),  # arc_easy
        (1172, 0.25),  # arc_challenge
        (100, 0.5),  # copa
        (1221, 0.2),  # commonsense_qa
        (1838, 0.5),  # piqa
        (500, 0.25),  # openbook_qa
        (5153, 0.0),  # lambada_openai
        (10042, 0.25),  # hellaswag
        (273, 0.5),  # winograd
        (1267, 0.5),  # winogrande
        (1000, 0.0),  # bigbench_dyck_languages
        (230, 0.2),  # agi_eval_lsat_ar
        (1320, 0.0),  # bigbench_cs_algorithms
        (210, 0.0),  # bigbench_operators
        (32, 0.0),  # bigbench_repeat_copy_logic
        (10570, 0.0),  # squad
        (7983, 0.0),  # coqa
        (3270, 0.62),  # boolq
        (10000, 0.091),  # bigbench_language_identification
    ]
)
"""Examples and accuracy at chance of the 22 CORE tasks, as in nanochat's `eval_bundle.zip`. The
error of a published CORE follows from them without the bundle."""
SEED_ERROR = 0.0057
"""Standard deviation of CORE over seeds: four sets of nanochat's d24, 35 runs, pooled (.0034 to
.0062 each)."""
CHANCE = -0.01
"""CORE at chance. Uniform guesses give -.001 with the bundle's baselines and -.026 with DCLM's
corrected ones; two baselines are majority rates, so that small models lie from -.045 to .02 by the
answer they prefer. A floor of 0 predicts .23 to .41 for Gadre et al.'s 1.4B model on C4 from the
smaller runs, which measured .174; this floor predicts .19."""
CHANCE_ERROR = 0.02
"""Standard error of CHANCE."""
CHANCE_LIMIT = CHANCE + 2 * CHANCE_ERROR
"""CORE up to which a model cannot be told from chance."""
TOPS = np.linspace(0.6, 1, 5)
"""CORE at no loss: at least that of the best model of 7B parameters (Phi-3, .61, in DCLM-7B's model
card), at most that of every answer right."""
DELTA = 1.345
"""Residual at which the Huber loss turns linear, in units of a run's noise."""
RIDGE = 1e-9
"""Added to the curvature, so that parameters without any have a large variance and not none."""
DRAWS = 4000
"""Joint draws of the law and the sigmoid."""
TAIL = (1 - LEVEL) / 2
"""Share of the draws beyond each end of an interval."""


def evaluation_error(core: Array | float, per_task: int | None = None) -> Array:
    """Return the standard error of a CORE over examples, binomial over the 22 tasks; any shape.

    `per_task` is the maximum of examples per task; None for all. Every task has the centred
    accuracy of the whole. The accuracies of GPT-2 1.5B give .0065 on all examples, .0081 at 500 and
    .0143 at 100 per task; this gives .0072, .0086 and .0147.
    """
    examples, chance = TASKS.T
    accuracy = chance + (1 - chance) * np.clip(np.asarray(core, float)[..., None], 0, 1)
    examples = np.minimum(examples, per_task or np.inf)
    variance = accuracy * (1 - accuracy) / examples / (1 - chance) ** 2
    return np.asarray(np.sqrt(variance.sum(-1)) / len(TASKS))


def run_error(core: Array | float, evaluation: Array | float | None = None) -> Array:
    """Return the standard deviation of a run's CORE around its family's: evaluation and seed.

    `evaluation` is the standard error over examples; None for that of all CORE examples.
    """
    if evaluation is None:
        evaluation = evaluation_error(core)
    return np.hypot(evaluation, SEED_ERROR)


def sigmoid(parameters: Array, gained: Array) -> Array:
    """Return CORE from (a, b, floor, top) and L0 - L."""
    a, b, floor, top = parameters
    return np.asarray(floor + (top - floor) * special.expit(a + b * gained))


@dataclass(frozen=True)
class SigmoidFit:
    """A sigmoid fitted with a given top."""

    best: Array
    """(a, b, floor)."""
    covariance: Array
    """Covariance of `best` for residuals of variance one."""
    objective: float
    """Twice the sum of Huber losses: a chi square."""
    top: float
    """CORE at no loss."""

    @property
    def steepness(self) -> float:
        """b in units of its standard error."""
        return float(self.best[1] / np.sqrt(self.covariance[1, 1]))


def fit_sigmoid(gained: Array, cores: Array, errors: Array, top: float) -> SigmoidFit:
    """Fit (a, b, floor) to the CORE of runs whose losses are `gained` (n,) below L0.

    The prior of the floor at CHANCE is one more residual.
    """

    def residuals(theta: Array) -> Array:
        misfit = (sigmoid(np.append(theta, top), gained) - cores) / errors
        return np.append(misfit, (theta[2] - CHANCE) / CHANCE_ERROR)

    def jacobian(theta: Array) -> Array:
        share = special.expit(theta[0] + theta[1] * gained)
        steep = (top - theta[2]) * share * (1 - share)
        rows = np.stack([steep, steep * gained, 1 - share], 1) / errors[:, None]
        return np.vstack([rows, [0, 0, 1 / CHANCE_ERROR]])

    # Levenberg-Marquardt takes least squares: residuals whose squares sum to twice the Huber loss.
    def huber_residuals(theta: Array) -> Array:
        misfit = residuals(theta)
        size = np.abs(misfit)
        inner = np.minimum(size, DELTA)
        return np.asarray(np.sign(misfit) * np.sqrt(inner * (2 * size - inner)))

    def huber_jacobian(theta: Array) -> Array:
        size = np.maximum(np.abs(residuals(theta)), DELTA)
        return np.asarray(jacobian(theta) * np.sqrt(DELTA / (2 * size - DELTA))[:, None])

    share = np.clip((cores - CHANCE) / (top - CHANCE), 0.01, 0.99)
    steepness = 1 / gained.std() if np.ptp(gained) > 0 else 1.0
    best = optimize.least_squares(
        huber_residuals,
        [special.logit(share).mean(), steepness, CHANCE],
        huber_jacobian,
        method="lm",
        x_scale="jac",
    )
    rows = jacobian(best.x)
    weights = np.minimum(1, DELTA / np.maximum(np.abs(residuals(best.x)), DELTA))
    curvature = (rows.T * weights) @ rows + RIDGE * np.eye(3)
    covariance: Array = np.linalg.inv(curvature).astype(float)
    return SigmoidFit(best.x, covariance, float(2 * best.cost), top)


def at_chance(gained: Array, cores: Array, errors: Array) -> NDArray[np.bool_]:
    """Return which runs (n,) are at chance by the curve, which a low draw alone is not."""
    top = float(TOPS.mean())
    best = fit_sigmoid(gained, cores, errors, top).best
    return np.asarray(sigmoid(np.append(best, top), gained) < CHANCE_LIMIT)


@dataclass(frozen=True)
class CoreDraws:
    """Joint draws of the sigmoid and of the law."""

    law: Law
    """Loss from compute."""
    centre: float
    """L0, the mean loss of the points."""
    parameters: Array
    """(DRAWS, 4): a, b, floor, top."""
    noise: Array
    """(DRAWS,) noise of a run in units of `run_error`."""
    law_t: Array
    """(DRAWS, 1) position of the law in its band, t-distributed."""

    def at_loss(self, losses: Array) -> Array:
        """Return CORE at losses, (1 or DRAWS, n) -> (DRAWS, n)."""
        return sigmoid(self.parameters.T[..., None], self.centre - losses)

    def at_compute(self, flops: Array) -> Array:
        """Return CORE at compute, (n,) -> (DRAWS, n)."""
        return self.at_loss(self._losses(self.law.loss(flops), *self.law.band(flops)))

    def share_below(self, core: float) -> float | None:
        """Return the share of draws that never reach `core`; None for a law without a floor."""
        floor = self.law.E
        ends = [end for end in (floor.estimate, floor.low, floor.high) if end is not None]
        if len(ends) < 3:
            return None
        losses = self._losses(*(np.array([end]) for end in ends))
        return float((self.at_loss(losses) < core).mean())

    def _losses(self, best: Array, low: Array, high: Array) -> Array:
        """Return losses (DRAWS, n) with the law's 95 % interval, a t distribution per side."""
        position = self.law_t / stats.t.ppf(1 - TAIL, self.law.free)
        width = np.where(position > 0, high - best, best - low)
        return np.maximum(best + position * width, 0.0)


def draw_jointly(
    fits: Sequence[SigmoidFit], scale: float, free: int, law: Law, centre: float
) -> CoreDraws:
    """Draw a top by its likelihood, (a, ln b, floor) and the law by t distributions."""
    random = np.random.default_rng(0)
    likelihood = np.exp(-np.array([fit.objective for fit in fits]) / scale**2 / 2)
    chosen = random.choice(len(fits), DRAWS, p=likelihood / likelihood.sum())
    noise = scale * np.sqrt(free / random.chisquare(free, DRAWS))
    roots = np.array([np.linalg.cholesky(fit.covariance) for fit in fits])[chosen]
    moved = noise[:, None] * np.einsum("mij,mj->mi", roots, random.standard_normal((DRAWS, 3)))
    a, b, floor = np.array([fit.best for fit in fits])[chosen].T
    tops = np.array([fit.top for fit in fits])[chosen]
    steepness = b * np.exp(moved[:, 1] / b)
    parameters = np.column_stack([a + moved[:, 0], steepness, floor + moved[:, 2], tops])
    law_t = random.standard_t(law.free, DRAWS)[:, None]
    return CoreDraws(law, centre, parameters, noise, law_t)
