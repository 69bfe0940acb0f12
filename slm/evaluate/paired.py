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

CODE = "core_not_compared"


@dataclass(frozen=True)
class PairedDepth:
    """CORE of both sides at one depth."""

    depth: int
    runs: tuple[int, int]
    """Number of evaluated runs of base and candidate."""
    means: tuple[float, float]
    """Mean over tasks and runs of base and candidate."""
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
                {
                    "depth": row.depth,
                    "base_runs": row.runs[0],
                    "candidate_runs": row.runs[1],
                    "base": row.means[0],
                    "candidate": row.means[1],
                    "difference": _document(row.difference),
                }
                for row in self.per_depth
            ],
        }

    def table(self, names: tuple[str, str]) -> tuple[list[str], list[list[str]]]:
        """Return headers and rows of a table: one row per depth, and one over all depths."""
        rows = [
            [
                f"d{row.depth}",
                f"{row.runs[0]} and {row.runs[1]}",
                f"{row.means[0]:.4f}",
                f"{row.means[1]:.4f}",
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

    base, candidate = (_read_side(home, frame) for frame in frames)
    depths = sorted({run.depth for run in base} & {run.depth for run in candidate})
    runs = [run for run in (*base, *candidate) if run.depth in depths]
    if not base and not candidate:
        return None, []
    if not base or not candidate:
        evaluated, other = names if base else names[::-1]
        return None, _warning(
            f"{evaluated} was evaluated on examples and {other} was not: run `slm eval RUN --core`"
        )
    if not depths:
        return None, _warning(f"no depth of both {' and '.join(names)} was evaluated on examples")
    for record in runs[0].records:
        if all(run.with_key(record.key) for run in runs):
            return _compare(base, candidate, depths, record.key), []
    differences = Axes.of_keys(run.records[0].key for run in runs).differences
    return None, _warning(
        f"the runs were not evaluated alike: {differences or 'they have no evaluation in common'}"
    )


@dataclass(frozen=True)
class _Run:
    depth: int
    records: list[EvaluationRecord]

    def with_key(self, key: str) -> list[EvaluationRecord]:
        return [record for record in self.records if record.key == key]


def _read_side(home: Path, frame: pandas.DataFrame) -> list[_Run]:
    """Return the runs in a frame that have evaluation records."""
    runs = [
        _Run(int(depth), read_records(home / run_id))
        for run_id, depth in zip(frame["run_id"], frame["depth"])
    ]
    return [run for run in runs if run.records]


def _compare(base: list[_Run], candidate: list[_Run], depths: list[int], key: str) -> PairedCore:
    rows: list[PairedDepth] = []
    base_answers: list[Answers] = []
    candidate_answers: list[Answers] = []
    for depth in depths:
        base_records = _records_at(base, depth, key)
        candidate_records = _records_at(candidate, depth, key)
        first = base_records[0]
        base_answers.append(_mean_answers(base_records))
        candidate_answers.append(_mean_answers(candidate_records))
        rows.append(
            PairedDepth(
                depth=depth,
                runs=(len(base_records), len(candidate_records)),
                means=(_mean_core(base_records), _mean_core(candidate_records)),
                difference=_difference(base_answers[-1], candidate_answers[-1], first),
            )
        )
    difference = _difference(_mean(base_answers), _mean(candidate_answers), first)
    return PairedCore(first.name, key, tuple(rows), difference)


def _records_at(runs: list[_Run], depth: int, key: str) -> list[EvaluationRecord]:
    records: list[EvaluationRecord] = []
    for run in runs:
        if run.depth == depth:
            records += run.with_key(key)
    return records


def _mean_core(records: list[EvaluationRecord]) -> float:
    return sum(record.document["centred"] for record in records) / len(records)


def _mean_answers(records: list[EvaluationRecord]) -> Answers:
    return _mean(
        [
            {
                label: np.array(task["each"]["correct"], float)
                for label, task in record.document["tasks"].items()
            }
            for record in records
        ]
    )


def _mean(answers: list[Answers]) -> Answers:
    return {label: np.mean([each[label] for each in answers], 0) for label in answers[0]}


def _difference(base: Answers, candidate: Answers, record: EvaluationRecord) -> Interval:
    from slm.fits import paired_core

    answered = {label: ~np.isnan(base[label] + candidate[label]) for label in base}
    return paired_core(
        {label: base[label][answered[label]] for label in base},
        {label: candidate[label][answered[label]] for label in base},
        {label: task["baseline"] for label, task in record.document["tasks"].items()},
    )


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
