"""What the store holds of an experiment, and its rows in words and columns."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from slm.figures.style import count_text, flops_text
from slm.fits import CurveFit
from slm.report.content import Drawing, Table

Row = Mapping[str, Any]
# A column of whole numbers of which some are missing comes from pandas as floats: hence :g, and ,.0f, all over.
Columns = dict[str, Callable[[Any], str]]
"""Headers, and what each takes from what a row of the table is of."""


@dataclass(frozen=True)
class Family:
    """The runs of one recipe, and what they say."""

    recipe: str
    """Its name."""
    fit: CurveFit | None
    """None where no run can be fitted."""
    why: str
    """Why there is none; empty where there is."""
    record: Row = field(default_factory=dict)
    """The recorded fit; empty without one."""
    drawings: Sequence[Drawing] = ()
    """Loss against compute first; the frontier, residuals and CORE where there is something to show."""

    def drawn(self, ending: str) -> list[Drawing]:
        """Those whose file ends so."""
        return [own for own in self.drawings if own.path.stem.endswith(ending)]


@dataclass(frozen=True)
class Found:
    """What the store holds of an experiment."""

    name: str
    """Of the experiment."""
    question: str
    """Empty where nobody said."""
    declared: Row
    """Recipes, depths, horizons, seeds, data and plans as asked."""
    rows: Sequence[Row]
    """Its rows of the view `results`, cheapest first."""
    attempts: Sequence[Row]
    """Its rows of the table `attempts`."""
    families: Sequence[Family]
    """One for each recipe that has a finished run."""

    @property
    def finished(self) -> list[Row]:
        """Rows with a result."""
        return [row for row in self.rows if row["status"] == "finished"]


def table(caption: str, columns: Columns, rows: Iterable[Any]) -> Table:
    """A row for each of `rows`."""
    return Table(caption, list(columns), [[cell(row) for cell in columns.values()] for row in rows])


def each(rows: Sequence[Row], name: str) -> list[str]:
    """Values of a column, each once."""
    return list(dict.fromkeys(str(row[name]) for row in rows if row[name] is not None))


def states(rows: Sequence[Row]) -> str:
    """`2 runs failed, 1 planned`."""
    counted = Counter(row["status"] for row in rows).most_common()
    return ", ".join(
        f"{counts(count, 'run') if k == 0 else count} {state}"
        for k, (state, count) in enumerate(counted)
    )


def depth(row: Row) -> str:
    """`d4`; of an imported run without a depth its own name."""
    return f"d{row['depth']:g}" if row["depth"] is not None else str(row["label"] or row["run_id"])


def label(row: Row) -> str:
    """A run's name for people: its depth and, where it says more, horizon and seed."""
    horizon = f" {row['horizon']}" if row["horizon"] and row["horizon"] != "compute-optimal" else ""
    return f"{depth(row)}{horizon}" + (f" seed {row['seed']:g}" if row["seed"] else "")


def names_of(rows: Sequence[Row]) -> str:
    """Few runs by name, more by their number."""
    return ", ".join(map(label, rows)) if len(rows) <= 4 else counts(len(rows), "run")


def counts(count: float, word: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{count:g} {word}{'s' * (count != 1)}"


def counted(value: float | None) -> str:
    """`1.3B`, nothing where it is not known."""
    return count_text(value) if value else ""


def compute(row: Row) -> str:
    """FLOPs spent, nothing where they are not known."""
    return flops_text(row["flops"]) if row["flops"] else ""


def number(value: float | None, form: str) -> str:
    """In that form, nothing where it is not known."""
    return "" if value is None else format(value, form)


def ratio(value: float | None, by: float | None, form: str) -> str:
    """Of the two, nothing where one is not known."""
    return format(value / by, form) if value and by else ""


def varying(rows: Sequence[Row], *names: str) -> Columns:
    """Those columns of `results` of which the rows hold several values."""
    return {name: partial(_said, name) for name in names if len({row[name] for row in rows}) > 1}


def _said(name: str, row: Row) -> str:
    value = row[name]
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def replicates(rows: Sequence[Row]) -> list[list[Row]]:
    """Runs that differ in nothing but the seed, where there are several."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if row["val_bpb"] is not None and row["seed"] is not None:
            groups[
                row["recipe"], row["depth"], row["horizon"], row["comparison_key"], row["code"]
            ].append(row)
    return [own for own in groups.values() if len(own) > 1]


def core_word(rows: Sequence[Row]) -> str:
    """What the benchmark is called: CORE is only the full one's name."""
    names = {str(row["core_metric"]) for row in rows if row["core_metric"]}
    return ", ".join(
        sorted(names - {"core"} | ({"CORE"} if "core" in names or not names else set()))
    )


def where(row: Row) -> str:
    """`2 × NVIDIA H100`, nothing where it is not known."""
    return (
        f"{row['ranks'] or 1:g} × {row['device_name'] or row['device']}"
        if row["device_name"] or row["device"]
        else ""
    )
