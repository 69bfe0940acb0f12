"""CORE, or the mean of another bundle, of two sides of a comparison on the same examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slm.evaluate.records import EvaluationRecord, read_records

if TYPE_CHECKING:
    import pandas
    from numpy.typing import NDArray

    from slm.fits import Interval

    Answers = dict[str, NDArray[Any]]
    """Share of correct answers per task and example; NaN for skipped examples."""
    Run = tuple[int, list[EvaluationRecord]]
    """Depth and evaluations of a run."""

CODE = "core_not_compared"


@dataclass(frozen=True)
class PairedDepth:
    """CORE of both sides at one depth."""

    depth: int
    base_runs: int
    """Number of evaluated runs of the base."""
    candidate_runs: int
    base: float
    """Mean over tasks and runs of the base."""
    candidate: float
    difference: Interval
    """Candidate minus base, with the interval over examples."""


@dataclass(frozen=True)
class PairedCore:
    """CORE of base and candidate on the same examples."""

    name: str
    """Name of the mean over tasks."""
    key: str
    """Key of the evaluation records compared."""
    per_depth: tuple[PairedDepth, ...]
    """Shared depths in ascending order."""
    difference: Interval
    """Mean difference over those depths, with the interval over their shared examples."""

    def document(self) -> dict[str, Any]:
        """Return the comparison as JSON."""
        return {
            "metric": self.name,
            "core_key": self.key,
            "difference": _document(self.difference),
            "per_depth": [
                {**vars(row), "difference": _document(row.difference)} for row in self.per_depth
            ],
        }

    def table(self, names: tuple[str, str]) -> tuple[list[str], list[list[str]]]:
        """Return headers and rows of a table: one row per depth, and one over all depths."""
        rows = [
            [
                f"d{row.depth}",
                f"{row.base_runs} and {row.candidate_runs}",
                f"{row.base:.4f}",
                f"{row.candidate:.4f}",
                difference_text(row.difference),
            ]
            for row in self.per_depth
        ]
        rows.append(["all", "", "", "", difference_text(self.difference)])
        return [self.name, "runs", *names, "difference"], rows


def compare_core(
    home: Path, names: tuple[str, str], frames: Sequence[pandas.DataFrame]
) -> tuple[PairedCore | None, list[dict[str, str]]]:
    """Return the comparison of base and candidate on the examples of their evaluations, and
    warnings.

    `names` and `frames` are those of base and candidate; frames have columns run_id and depth. The
    comparison is None if neither side was evaluated, and, with a warning that says why, if only one
    was or no depth has comparable evaluations of both.
    """
    from slm.fits.points import Axes

    base, candidate = sides = [_read_side(home, frame) for frame in frames]
    if not base and not candidate:
        return None, []
    if not base or not candidate:
        evaluated, other = names if base else names[::-1]
        return None, _warning(
            f"{evaluated} was evaluated on examples and {other} was not: run `slm eval RUN --core`"
        )
    depths = sorted({depth for depth, _ in base} & {depth for depth, _ in candidate})
    if not depths:
        return None, _warning(f"no depth of both {' and '.join(names)} was evaluated on examples")
    evaluations = [records for depth, records in base + candidate if depth in depths]
    keys = [[record.key for record in records] for records in evaluations]
    for record in evaluations[0]:
        if all(record.key in run_keys for run_keys in keys):
            return _compare(sides, depths, record), []
    differences = Axes.of_keys(first for first, *_ in keys).differences
    return None, _warning(
        f"the runs were not evaluated alike: {differences or 'they have no evaluation in common'}"
    )


def _read_side(home: Path, frame: pandas.DataFrame) -> list[Run]:
    """Return the runs in a frame that have evaluation records."""
    records = [read_records(home / run_id) for run_id in frame["run_id"]]
    return [run for run in zip(map(int, frame["depth"]), records) if run[1]]


def _compare(
    sides: Sequence[list[Run]], depths: list[int], reference: EvaluationRecord
) -> PairedCore:
    """Return the comparison of the evaluations with the key of a reference."""
    tasks = reference.document["tasks"].items()
    baselines = {label: task["baseline"] for label, task in tasks}
    rows: list[PairedDepth] = []
    answers: list[list[Answers]] = []
    for depth in depths:
        base, candidate = (_documents_at(side, depth, reference.key) for side in sides)
        answers.append([_answers(base), _answers(candidate)])
        rows.append(
            PairedDepth(
                depth=depth,
                base_runs=len(base),
                candidate_runs=len(candidate),
                base=_mean_core(base),
                candidate=_mean_core(candidate),
                difference=_difference(answers[-1], baselines),
            )
        )
    difference = _difference([_mean(side) for side in zip(*answers)], baselines)
    return PairedCore(reference.name, reference.key, tuple(rows), difference)


def _documents_at(runs: list[Run], depth: int, key: str) -> list[dict[str, Any]]:
    documents: list[dict[str, Any]] = []
    for run_depth, records in runs:
        if run_depth == depth:
            documents += [record.document for record in records if record.key == key]
    return documents


def _mean_core(documents: list[dict[str, Any]]) -> float:
    return sum(document["centred"] for document in documents) / len(documents)


def _answers(documents: list[dict[str, Any]]) -> Answers:
    """Return the mean answers of several evaluations."""
    answers = []
    for document in documents:
        tasks = document["tasks"].items()
        answers.append({label: np.array(task["each"]["correct"], float) for label, task in tasks})
    return _mean(answers)


def _mean(answers: Sequence[Answers]) -> Answers:
    return {label: np.mean([each[label] for each in answers], 0) for label in answers[0]}


def _difference(answers: Sequence[Answers], baselines: dict[str, float]) -> Interval:
    """Return the difference of base and candidate on the examples that both answer."""
    from slm.fits import paired_core

    pairs = {}
    for label in baselines:
        pair = np.array([side[label] for side in answers])
        pairs[label] = pair[:, ~np.isnan(pair).any(0)]
    base, candidate = ({label: pair[side] for label, pair in pairs.items()} for side in (0, 1))
    return paired_core(base, candidate, baselines)


def difference_text(difference: Interval) -> str:
    """Return the difference and its standard error."""
    return f"{difference.estimate:+.4f} ± {_standard_error(difference):.4f}"


def _standard_error(difference: Interval) -> float:
    from slm.fits.compare.paired_core import NORMAL

    assert difference.low is not None
    assert difference.high is not None
    return (difference.high - difference.low) / (2 * NORMAL)


def _document(difference: Interval) -> dict[str, Any]:
    from slm.fits.types import to_json

    return {**to_json(difference), "standard_error": _standard_error(difference)}


def _warning(message: str) -> list[dict[str, str]]:
    return [{"code": CODE, "message": message}]
