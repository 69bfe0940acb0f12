"""Planning: an experiment and its prepared datasets give plans, which are recorded in the home."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from slm.data import PreparedDataset, prepare, prepared_for, row_shape, tokenizer_of
from slm.experiment import Experiment, RequestedRun
from slm.files import read_json, write_json
from slm.plan import Plan, code_fingerprint
from slm.recipe import Hyperparameters


class ExperimentDocument(TypedDict):
    """experiments/<name>.json: the runs of an experiment and what declared them."""

    name: str
    question: str
    recipe: str
    declared: dict[str, Any]
    """`Experiment.declared`, with the recipes of earlier sweeps."""
    runs: list[str]
    """run_ids."""
    created: float
    """Unix seconds."""


@dataclass(frozen=True)
class PlannedRun:
    """A requested run and its plan."""

    request: RequestedRun
    plan: Plan | None
    """None while its dataset is not prepared, unless a plan requested it."""
    is_prepared: bool

    @property
    def run_id(self) -> str | None:
        """run_id of the plan."""
        return self.plan.run_id if self.plan else None


def plans_of(runs: Iterable[PlannedRun]) -> list[Plan]:
    """Return the plans of the runs that have one."""
    return [run.plan for run in runs if run.plan]


class Planner:
    """Plan the runs of an experiment on prepared datasets, one for each shape of rows."""

    def __init__(self, experiment: Experiment, home: Path) -> None:
        self.experiment = experiment
        self.requests = experiment.requested_runs()
        self._home = home
        self._tokenizer = tokenizer_of(experiment.tokenizer) if experiment.tokenizer else None
        by_rows = [run.hyperparameters for run in self.requests]
        by_rows.sort(key=lambda hp: hp.train_rows)
        self._longest = {_shape(hp): hp for hp in by_rows}
        self._datasets: dict[tuple[int, ...], PreparedDataset | None] = {}

    def runs(self) -> list[PlannedRun]:
        """Plan every run on the datasets that exist; cheapest first, each once.

        Raises ValueError for a horizon beyond the data.
        """
        planned: dict[str, PlannedRun] = {}
        for position, request in enumerate(self.requests):
            dataset = self.find(request)
            plan = plan_of(request, dataset) if dataset else request.plan
            run = PlannedRun(request, plan, dataset is not None)
            planned.setdefault(run.run_id or str(position), run)
        return list(planned.values())

    def prepare(self, report: Callable[[str], None] = lambda line: None) -> list[PlannedRun]:
        """Prepare the datasets that are missing, and plan every run; cheapest first, each once.

        Raises ValueError for a horizon beyond the data.
        """
        for shape, hp in self._longest.items():
            if self._datasets.get(shape) is None:
                self._datasets[shape] = prepare(
                    self.experiment.data, hp, self._home, report, tokenizer=self._tokenizer
                )
        return self.runs()

    def find(self, request: RequestedRun) -> PreparedDataset | None:
        """Return the prepared dataset of a run, None if there is none yet."""
        shape = _shape(request.hyperparameters)
        if shape not in self._datasets:
            self._datasets[shape] = prepared_for(
                self.experiment.data, self._longest[shape], self._home, self._tokenizer
            )
        return self._datasets[shape]

    def dataset(self, plan: Plan) -> PreparedDataset:
        """Return the dataset that a plan of this planner was made on."""
        dataset = self._datasets[_shape(plan.hyperparameters)]
        assert dataset is not None
        return dataset


def _shape(hp: Hyperparameters) -> tuple[int, ...]:
    return tuple(row_shape(hp).values())


def repeat_plans(files: Sequence[Path], name: str | None, data: str | None) -> Experiment:
    """Return the experiment that repeats the runs of plan.json files, or of run folders.

    A single run may go without a name: its run_id is the experiment's. Raises ValueError for a file
    that is missing or no plan, for a plan of another version of the trainer, for one on a folder of
    texts without `data`, and for several plans without a name.
    """
    plans = {plan.run_id: plan for plan in (_read_plan(file, data) for file in files)}
    if name is None and len(plans) > 1:
        raise ValueError(
            f"{len(plans)} plans without a name: --name says under which they are recorded together"
        )
    return Experiment(
        name=name or next(iter(plans)),
        recipes=(),
        depths=(),
        seeds=(),
        data=data or "python",
        plans=tuple(plans.values()),
    )


def _read_plan(file: Path, data: str | None) -> Plan:
    path = file / "plan.json" if file.is_dir() else file
    if not path.is_file():
        raise ValueError(f"--plan {path}: no such file")
    plan = Plan.read(path)
    if plan.code != code_fingerprint():
        raise ValueError(
            f"{path} was planned by another version of the trainer "
            f"({plan.code}; this is {code_fingerprint()}): repeat it with the commit that "
            f"`slm show {plan.run_id} --json` names where it was trained, or sweep its recipe"
        )
    if data is None and plan.data.corpus != "python":
        raise ValueError(
            f"{path} was planned on a folder {plan.data.corpus!r}: "
            "name its texts with --data FOLDER"
        )
    return plan


def plan_of(request: RequestedRun, dataset: PreparedDataset) -> Plan:
    """Return the plan of a run on a prepared dataset.

    Raises ValueError for a horizon beyond the data, and for a run to be repeated on other rows than
    its plan names.
    """
    rows = None
    if request.plan and request.plan.data.rows < dataset.train_rows:
        rows = request.plan.data.rows
    plan = Plan(
        request.recipe,
        request.horizon,
        request.seed,
        request.hyperparameters,
        dataset.identity(request.hyperparameters, rows),
        code_fingerprint(),
    )
    if request.plan and request.plan.run_id != plan.run_id:
        raise ValueError(_data_mismatch(request.plan, plan))
    return plan


def _data_mismatch(expected: Plan, actual: Plan) -> str:
    """Return the error message for a run that cannot be repeated on this machine's rows."""
    parts = {
        "tokenizer": "another tokeniser",
        "train": "other training rows",
        "validation": "other validation rows",
    }
    actual_data = vars(actual.data)
    expected_data = vars(expected.data)
    differences = [parts[name] for name in parts if actual_data[name] != expected_data[name]]
    corpus = actual.data.corpus
    if corpus == "python":
        corpus += f" (the library of Python {platform.python_version()})"
    return (
        f"run {expected.run_id}: corpus {corpus} gives {', '.join(differences)} "
        f"than its plan's corpus {expected.data.corpus}: repeat it on the same texts, "
        "with --data FOLDER or the same Python"
    )


def record(experiment: Experiment, plans: list[Plan], home: Path) -> None:
    """Write the plans, and the experiment that they belong to.

    An experiment keeps the runs of earlier sweeps of its name, so that a sweep can be widened,
    except those of another trainer, of other data or of a recipe that was edited since (the store
    still has them).
    """
    for plan in plans:
        folder = home / plan.run_id
        folder.mkdir(parents=True, exist_ok=True)
        if _recorded(folder) is None:
            write_json(folder / "plan.json", plan.document())
    path = home / "experiments" / f"{experiment.name}.json"
    path.parent.mkdir(exist_ok=True)
    before = read_json(path) if path.exists() else {}
    document = _experiment_document(experiment, plans, home, before)
    if document != before:
        write_json(path, document)


def _experiment_document(
    experiment: Experiment, plans: list[Plan], home: Path, before: dict[str, Any]
) -> ExperimentDocument:
    declared = experiment.declared()
    earlier = before.get("declared", {"recipes": {}})["recipes"]
    recipes = earlier | declared["recipes"]
    edited = {name for name in earlier if recipes[name] != earlier[name]}
    declared["recipes"] = recipes
    planned = [plan.run_id for plan in plans]
    earlier_runs = [
        run_id
        for run_id in before.get("runs", [])
        if run_id not in planned and _is_comparable(home / run_id, plans[0], edited)
    ]
    return {
        "name": experiment.name,
        "question": experiment.question,
        "recipe": experiment.families[0],
        "declared": declared,
        "runs": [*earlier_runs, *planned],
        "created": before.get("created", time.time()),
    }


def _is_comparable(run_folder: Path, plan: Plan, edited: set[str]) -> bool:
    """Whether a recorded run has the same trainer, data and recipe, the latter not edited since."""
    recorded = _recorded(run_folder)
    return (
        recorded is not None
        and recorded.recipe not in edited
        and recorded.code == plan.code
        and recorded.data.tokenizer == plan.data.tokenizer
        and recorded.data.validation == plan.data.validation
    )


def _recorded(run_folder: Path) -> Plan | None:
    """Return the plan of a run folder, None if there is none that this version reads."""
    try:
        return Plan.read(run_folder / "plan.json")
    except (OSError, ValueError):
        return None
