"""The sigmoid from loss to CORE: noise of a CORE, fits with a given top, and joint draws with
the law."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from slm.fits.intervals import LEVEL
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
    centred = np.clip(core, 0, 1)[..., None]
    accuracy = chance + (1 - chance) * centred
    examples = np.minimum(examples, per_task or np.inf)
    variance = accuracy * (1 - accuracy) / examples / (1 - chance) ** 2
    return np.sqrt(variance.sum(-1)) / len(TASKS)


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
    return floor + (top - floor) * special.expit(a + b * gained)


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
        return self.best[1] / np.sqrt(self.covariance[1, 1])


def fit_sigmoid(gained: Array, cores: Array, errors: Array, top: float) -> SigmoidFit:
    """Fit (a, b, floor) to the CORE of runs whose losses are `gained` (n,) below L0.

    The prior of the floor at CHANCE is one more residual.
    """

    def residuals(theta: Array) -> Array:
        misfit = (sigmoid(np.append(theta, top), gained) - cores) / errors
        return np.append(misfit, (theta[2] - CHANCE) / CHANCE_ERROR)

    def jacobian(theta: Array) -> Array:
        a, b, floor = theta
        share = special.expit(a + b * gained)
        steep = (top - floor) * share * (1 - share)
        rows = np.stack([steep, steep * gained, 1 - share], 1) / errors[:, None]
        return np.vstack([rows, [0, 0, 1 / CHANCE_ERROR]])

    # Levenberg-Marquardt takes least squares: residuals whose squares sum to twice the Huber loss.
    def huber_residuals(theta: Array) -> Array:
        misfit = residuals(theta)
        size = np.abs(misfit)
        inner = np.minimum(size, DELTA)
        return np.sign(misfit) * np.sqrt(inner * (2 * size - inner))

    def huber_jacobian(theta: Array) -> Array:
        size = np.maximum(np.abs(residuals(theta)), DELTA)
        factor = np.sqrt(DELTA / (2 * size - DELTA))
        return jacobian(theta) * factor[:, None]

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
    size = np.maximum(np.abs(residuals(best.x)), DELTA)
    curvature = (rows.T * np.minimum(1, DELTA / size)) @ rows + RIDGE * np.eye(3)
    covariance = np.asarray(np.linalg.inv(curvature), float)
    return SigmoidFit(best.x, covariance, 2 * best.cost, top)


def at_chance(gained: Array, cores: Array, errors: Array) -> NDArray[np.bool_]:
    """Return which runs (n,) are at chance by the curve, which a low draw alone is not."""
    top = TOPS.mean()
    fit = fit_sigmoid(gained, cores, errors, top)
    return sigmoid(np.append(fit.best, top), gained) < CHANCE_LIMIT


@dataclass(frozen=True)
class CoreDraws:
    """Joint draws of the sigmoid and of the law."""

    parameters: Array
    """(DRAWS, 4): a, b, floor, top."""
    noise: Array
    """(DRAWS,) noise of a run in units of `run_error`."""
    law_t: Array
    """(DRAWS, 1) position of the law in its band, t-distributed."""


def draw_jointly(fits: Sequence[SigmoidFit], scale: float, free: int, law_free: int) -> CoreDraws:
    """Draw a top by its likelihood, (a, ln b, floor) and the law by t distributions.

    `free` and `law_free` are the degrees of freedom of the sigmoid and of the law.
    """
    random = np.random.default_rng(0)
    objectives = np.array([fit.objective for fit in fits])
    likelihood = np.exp(-objectives / scale**2 / 2)
    share = likelihood / likelihood.sum()
    chosen = [fits[k] for k in random.choice(len(fits), DRAWS, p=share)]
    noise = scale * np.sqrt(free / random.chisquare(free, DRAWS))
    roots = np.linalg.cholesky([fit.covariance for fit in chosen])
    normal = random.standard_normal((DRAWS, 3))
    moved = noise[:, None] * np.einsum("mij,mj->mi", roots, normal)
    a, b, floor = np.array([fit.best for fit in chosen]).T
    tops = [fit.top for fit in chosen]
    steepness = b * np.exp(moved[:, 1] / b)
    parameters = np.column_stack([a + moved[:, 0], steepness, floor + moved[:, 2], tops])
    law_t = random.standard_t(law_free, DRAWS)[:, None]
    return CoreDraws(parameters, noise, law_t)
