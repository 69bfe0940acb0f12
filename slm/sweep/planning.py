"""Experiment + data -> plans, recorded."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from slm.data import Prepared, prepare, prepared_for, row_shape, tokenizer_of
from slm.experiment import Experiment, RequestedRun
from slm.files import read_json, write_json
from slm.plan import Plan, code_fingerprint
from slm.recipe import Hyperparameters


class Corpora:
    """The prepared data of an experiment's runs: one folder for each shape of rows."""

    def __init__(self, experiment: Experiment, home: Path) -> None:
        self._name = experiment.data
        self._tokenizer = tokenizer_of(experiment.tokenizer) if experiment.tokenizer else None
        self._home = home
        asked = sorted(
            (own.hyperparameters for own in experiment.requested_runs()), key=lambda given: given.train_rows
        )
        self._longest = {_key(given): given for given in asked}
        self._found: dict[tuple[int, ...], Prepared | None] = {}

    def prepare(self, asked: RequestedRun, report: Callable[[str], None]) -> Prepared:
        """Prepared data, made now if they are not there yet."""
        key = _key(asked.hyperparameters)
        prepared = self._found.get(key)
        if prepared is None:
            prepared = prepare(
                self._name, self._longest[key], self._home, report, tokenizer=self._tokenizer
            )
        self._found[key] = prepared
        return prepared

    def of(self, plan: Plan) -> Path:
        """Prepared folder of a plan made from these data."""
        return self.prepared(plan).folder

    def prepared(self, plan: Plan) -> Prepared:
        """Data of a plan made from these."""
        prepared = self._found[_key(plan.hyperparameters)]
        assert prepared is not None
        return prepared

    def find(self, asked: RequestedRun) -> Prepared | None:
        """Prepared data, if they are there."""
        key = _key(asked.hyperparameters)
        if key not in self._found:
            self._found[key] = prepared_for(
                self._name, self._longest[key], self._home, self._tokenizer
            )
        return self._found[key]


def _key(given: Hyperparameters) -> tuple[int, ...]:
    return tuple(row_shape(given).values())


def repetition(files: Sequence[Path], name: str | None, data: str | None) -> Experiment:
    """The experiment of the runs that plan.json files hold, under a name (one run's is its run_id) and on a corpus.

    Raises ValueError for a file that is not there or no plan, for a plan of another trainer, for one on a folder's
    texts without a corpus, and for several without a name.
    """
    plans = {plan.run_id: plan for plan in (_plan_in(file, data) for file in files)}
    if name is None and len(plans) > 1:
        raise ValueError(
            f"{len(plans)} plans without a name: --name says under which they are recorded together"
        )
    (first, *_) = plans
    return Experiment(
        name or first, (), (), seeds=(), data=data or "python", plans=tuple(plans.values())
    )


def _plan_in(file: Path, data: str | None) -> Plan:
    """The plan of a file, or of a run's folder, if this trainer can repeat it."""
    path = file / "plan.json" if file.is_dir() else file
    if not path.is_file():
        raise ValueError(f"--plan {path}: no such file")
    plan = Plan.read(path)
    if plan.code != code_fingerprint():
        raise ValueError(
            f"{path} was planned by another version of the trainer ({plan.code}; this is {code_fingerprint()}): repeat "
            f"it with the commit that `slm show {plan.run_id} --json` names where it was trained, or sweep its recipe"
        )
    if data is None and plan.data.corpus != "python":
        raise ValueError(
            f"{path} was planned on a folder {plan.data.corpus!r}: --data FOLDER says where its texts are"
        )
    return plan


def plan_of(asked: RequestedRun, prepared: Prepared) -> Plan:
    """The plan of a run on prepared data.

    Raises ValueError for a horizon beyond the data, and where a run is to be repeated whose rows are not these.
    """
    rows = (
        asked.plan.data.rows if asked.plan and asked.plan.data.rows < prepared.train_rows else None
    )
    identity = prepared.identity(asked.hyperparameters, rows)
    plan = Plan(
        asked.recipe, asked.horizon, asked.seed, asked.hyperparameters, identity, code_fingerprint()
    )
    if asked.plan is not None and asked.plan.run_id != plan.run_id:
        raise ValueError(_other_rows(asked.plan, plan))
    return plan


def _other_rows(wanted: Plan, here: Plan) -> str:
    """What keeps a run from being repeated on the rows that are here."""
    names = {
        "tokenizer": "another tokeniser",
        "train": "other training rows",
        "validation": "other validation rows",
    }
    other = [
        words
        for name, words in names.items()
        if getattr(wanted.data, name) != getattr(here.data, name)
    ]
    source = (
        f" (the library of Python {platform.python_version()})"
        if here.data.corpus == "python"
        else ""
    )
    return (
        f"run {wanted.run_id}: corpus {here.data.corpus}{source} gives {', '.join(other)} than its plan's corpus "
        f"{wanted.data.corpus}: repeat it on the same texts, with --data FOLDER or the Python that had them"
    )


def make_plans(experiment: Experiment, data: Callable[[RequestedRun], Prepared]) -> list[Plan]:
    """The plans of an experiment, cheapest first, each once. Raises ValueError for a horizon beyond the data."""
    plans: dict[str, Plan] = {}
    for asked in experiment.requested_runs():
        plan = plan_of(asked, data(asked))
        plans.setdefault(plan.run_id, plan)
    return list(plans.values())


def record(experiment: Experiment, plans: list[Plan], home: Path) -> None:
    """Write the plans, and the experiment that asks for them.

    A name swept before keeps its runs, so that a sweep can be widened; those of another trainer, of other data or of a
    recipe that was edited do not belong to it any more (they stay in the store).
    """
    for plan in plans:
        folder = home / plan.run_id
        folder.mkdir(parents=True, exist_ok=True)
        if _recorded(folder) is None:
            write_json(folder / "plan.json", plan.document())
    path = home / "experiments" / f"{experiment.name}.json"
    path.parent.mkdir(exist_ok=True)
    before: dict[str, Any] = {"created": time.time(), "runs": [], "declared": {"recipes": {}}}
    if path.exists():
        before = read_json(path)
    declared, planned = experiment.declared(), {plan.run_id for plan in plans}
    edited = {
        name
        for name, constants in before["declared"]["recipes"].items()
        if declared["recipes"].get(name, constants) != constants
    }
    kept = [
        run_id
        for run_id in before["runs"]
        if run_id not in planned and _comparable(home / run_id, plans[0], edited)
    ]
    declared["recipes"] = before["declared"]["recipes"] | declared["recipes"]
    document = {
        "name": experiment.name,
        "question": experiment.question,
        "recipe": experiment.families[0],
        "declared": declared,
        "runs": [*kept, *(plan.run_id for plan in plans)],
        "created": before["created"],
    }
    if document != before:
        write_json(path, document)


def _comparable(run_folder: Path, plan: Plan, edited: set[str]) -> bool:
    """Whether a recorded run was planned for the same trainer, tokeniser and validation rows, by a recipe still so."""
    before = _recorded(run_folder)
    if before is None or before.recipe in edited:
        return False
    keys = [(own.code, own.data.tokenizer, own.data.validation) for own in (before, plan)]
    return keys[0] == keys[1]


def _recorded(run_folder: Path) -> Plan | None:
    """The plan of a run's folder, None when there is none that this version reads."""
    try:
        return Plan.read(run_folder / "plan.json")
    except (OSError, ValueError):
        return None
