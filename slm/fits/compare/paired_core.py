"""CORE of two checkpoints on the same examples: the difference, and how far another draw of examples would move it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from slm.fits.intervals import Interval

Answers = Sequence[bool] | NDArray[np.float64]
NORMAL = 1.96
"""Standard errors of a 95 % interval; tasks have a hundred examples and more."""


def paired_core(
    base: Mapping[str, Answers], candidate: Mapping[str, Answers], baselines: Mapping[str, float]
) -> Interval:
    """CORE of the candidate minus that of the base, with the interval over examples; that over seeds is wider.

    Each side is task -> whether each example was answered rightly, or of several checkpoints how often, in one order of
    examples; `baselines` are the tasks' accuracies at chance. An example counts (candidate - base)/(1 - baseline), a
    task is the mean of its examples, CORE the mean of its tasks; what both get right or wrong adds no noise. Raises
    ValueError for tasks or examples that differ, and for a task of fewer than two examples.
    """
    if set(base) != set(candidate):
        raise ValueError(
            f"tasks of one side alone: {', '.join(sorted(set(base) ^ set(candidate)))}"
        )
    means, variances = [], []
    for task, answers in base.items():
        if len(answers) != len(candidate[task]) or len(answers) < 2:
            counts = f"{len(answers)} and {len(candidate[task])} examples"
            raise ValueError(f"{task}: {counts}; pairs take the same examples, two at least")
        gains = (np.asarray(candidate[task], float) - np.asarray(answers, float)) / (
            1 - baselines[task]
        )
        means.append(gains.mean())
        variances.append(gains.var(ddof=1) / len(gains))
    estimate, half = float(np.mean(means)), NORMAL * float(np.sqrt(np.sum(variances))) / len(means)
    return Interval(estimate, estimate - half, estimate + half, True)
