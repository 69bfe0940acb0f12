"""CORE of two checkpoints on the same examples: the difference, with its interval over examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from slm.fits.intervals import Interval
from slm.fits.types import Array

Answers = Sequence[bool] | Array
NORMAL = 1.96
"""Half-width of a 95 % interval in standard errors; tasks have at least a hundred examples."""


def paired_core(
    base: Mapping[str, Answers], candidate: Mapping[str, Answers], baselines: Mapping[str, float]
) -> Interval:
    """Return CORE of the candidate minus that of the base, with its 95 % interval over examples.

    An interval over seeds is wider. `base` and `candidate` map each task to whether each example
    was answered correctly, or, of several checkpoints, to the share of correct answers, in the same
    order of examples; `baselines` are the tasks' accuracies at chance. An example counts (candidate
    - base)/(1 - baseline), a task is the mean of its examples, CORE the mean of its tasks; examples
    that both answer alike add no noise.

    Raises ValueError for tasks or examples that differ, and for a task of fewer than two examples.
    """
    if set(base) != set(candidate):
        unpaired = ", ".join(sorted(set(base) ^ set(candidate)))
        raise ValueError(f"only one side has the tasks {unpaired}")
    means = []
    variances = []
    for task, answers in base.items():
        if len(answers) != len(candidate[task]) or len(answers) < 2:
            raise ValueError(
                f"{task}: {len(answers)} and {len(candidate[task])} examples; "
                "pairs take the same examples, at least two"
            )
        gains = np.asarray(candidate[task], float) - np.asarray(answers, float)
        gains /= 1 - baselines[task]
        means.append(gains.mean())
        variances.append(gains.var(ddof=1) / len(gains))
    estimate = float(np.mean(means))
    half = NORMAL * float(np.sqrt(np.sum(variances))) / len(means)
    return Interval(estimate, estimate - half, estimate + half, True)
