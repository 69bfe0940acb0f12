"""CORE, or the mean of another bundle, of two sides of a comparison: on the same examples, depth by depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas
    from numpy.typing import NDArray

    from slm.evaluate.records import Kept
    from slm.fits import Interval

    Answers = dict[str, NDArray[Any]]

CODE = "core_not_compared"


@dataclass(frozen=True)
class AtDepth:
    """One depth at which both sides were evaluated."""

    depth: int
    """Layers."""
    runs: tuple[int, int]
    """Evaluated runs of base and candidate."""
    means: tuple[float, float]
    """Their mean over tasks."""
    difference: Interval
    """Candidate minus base, with the interval over examples."""


@dataclass(frozen=True)
class Paired:
    """The same examples asked of both sides."""

    name: str
    """What the mean over tasks is called."""
    key: str
    """What makes the values comparable."""
    per_depth: tuple[AtDepth, ...]
    """Shared depths, smallest first."""
    difference: Interval
    """Mean over those depths, candidate minus base, with the interval over examples, which the depths share."""

    def document(self) -> dict[str, Any]:
        """As JSON."""
        own = [
            {"depth": own.depth, "base_runs": own.runs[0], "candidate_runs": own.runs[1]}
            | {
                "base": own.means[0],
                "candidate": own.means[1],
                "difference": _document(own.difference),
            }
            for own in self.per_depth
        ]
        return {
            "metric": self.name,
            "core_key": self.key,
            "difference": _document(self.difference),
            "per_depth": own,
        }

    def table(self, names: tuple[str, str]) -> tuple[list[str], list[list[str]]]:
        """Headers and rows: a row a depth, and one over all."""
        rows = [
            [
                f"d{own.depth}",
                "{} and {}".format(*own.runs),
                *map("{:.4f}".format, own.means),
                text(own.difference),
            ]
            for own in self.per_depth
        ]
        rows.append(["all", "", "", "", text(self.difference)])
        return [self.name, "runs", *names, "difference"], rows


def paired(
    home: Path, names: tuple[str, str], frames: Sequence[pandas.DataFrame]
) -> tuple[Paired | None, list[Any]]:
    """The comparison of base and candidate by what their runs' evaluations say of each example, and warnings.

    None where neither was evaluated, and, with a warning that says why, where only one was or where no depth has runs
    of both that were asked the same.
    """
    from slm.fits.points import differences, parts_of

    sides = [_evaluated(home, frame) for frame in frames]
    if not all(sides):
        one, none = (names[1], names[0]) if sides[1] else names
        message = (
            f"{one} was evaluated on examples and {none} was not: `slm eval RUN --core` does it"
        )
        return None, [_warning(message)] if any(sides) else []
    shared = sorted({own for own, _ in sides[0]} & {own for own, _ in sides[1]})
    if not shared:
        return None, [
            _warning(f"no depth of both {names[0]} and {names[1]} was evaluated on examples")
        ]
    ladders = [[found for depth, found in side if depth in shared] for side in sides]
    common = [
        own.key
        for own in ladders[0][0]
        if all(own.key in _keys(found) for side in ladders for found in side)
    ]
    if not common:
        told = differences([parts_of(found[0].key) for side in ladders for found in side])
        return None, [
            _warning(
                f"the runs were not evaluated alike: {told or 'none is one that all runs have'}"
            )
        ]
    return _compared(sides, shared, common[0]), []


def _evaluated(home: Path, frame: pandas.DataFrame) -> list[tuple[int, list[Kept]]]:
    """Depth and evaluations of each run that has some."""
    from slm.evaluate.records import kept

    found = [
        (int(depth), kept(home / run_id)) for run_id, depth in zip(frame["run_id"], frame["depth"])
    ]
    return [own for own in found if own[1]]


def _keys(found: list[Kept]) -> set[str]:
    return {own.key for own in found}


def _compared(sides: list[list[tuple[int, list[Kept]]]], shared: list[int], key: str) -> Paired:
    rows, answers = [], []
    for depth in shared:
        both = [
            [own for at, found in side if at == depth for own in found if own.key == key]
            for side in sides
        ]
        own = [_mean([_answers(run) for run in runs]) for runs in both]
        means = [sum(run.document["centred"] for run in runs) / len(runs) for runs in both]
        counts = len(both[0]), len(both[1])
        rows.append(AtDepth(depth, counts, (means[0], means[1]), _difference(own, both[0][0])))
        answers.append(own)
    over_all = [_mean(list(column)) for column in zip(*answers)]
    return Paired(both[0][0].name, key, tuple(rows), _difference(over_all, both[0][0]))


def _answers(run: Kept) -> Answers:
    """Of each task whether each example was answered rightly; NaN where it was skipped."""
    import numpy as np

    return {
        label: np.array(own["each"]["correct"], float)
        for label, own in run.document["tasks"].items()
    }


def _mean(answers: list[Answers]) -> Answers:
    import numpy as np

    return {label: np.mean([own[label] for own in answers], 0) for label in answers[0]}


def _difference(sides: list[Answers], run: Kept) -> Interval:
    import numpy as np

    from slm.fits import paired_core

    asked = {label: ~np.isnan(sides[0][label] + sides[1][label]) for label in sides[0]}
    base, candidate = ({label: own[label][asked[label]] for label in own} for own in sides)
    return paired_core(
        base, candidate, {label: own["baseline"] for label, own in run.document["tasks"].items()}
    )


def text(difference: Interval) -> str:
    """The difference and its standard error."""
    return f"{difference.estimate:+.4f} ± {_error(difference):.4f}"


def _error(difference: Interval) -> float:
    from slm.fits.compare.paired_core import NORMAL

    assert difference.low is not None
    assert difference.high is not None
    return (difference.high - difference.low) / (2 * NORMAL)


def _document(difference: Interval) -> dict[str, Any]:
    return {**difference.document(), "standard_error": _error(difference)}


def _warning(message: str) -> dict[str, str]:
    return {"code": CODE, "message": message}
