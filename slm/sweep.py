"""The conductor: experiment + data -> plans -> attempts, one after another, until every run is done or says why not."""

from __future__ import annotations

import os
import platform
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen
from typing import Any, Protocol

from slm import events, launch, locks
from slm.data import Prepared, prepare, prepared_for, row_shape
from slm.experiment import Asked, Experiment
from slm.plan import Plan, code_fingerprint
from slm.recipe import Hyperparameters

FRUITLESS_ATTEMPTS = 2
"""Attempts in a row without a new checkpoint after which a run has failed."""
RESULTS = ("diverged", "cancelled")
"""Ends that no sweep tries again."""
FINAL_REASONS = (*RESULTS, "data")
"""Ends that another attempt of this sweep would only repeat."""
POLL_SECONDS = 0.2
INGEST_SECONDS = 30.0


class View(Protocol):
    """Who is shown what happens."""

    def run_started(self, plan: Plan, attempt: Path | None) -> None:
        """A run goes on, in an attempt of ours or (None) in one that lives already."""

    def event(self, plan: Plan, event: dict[str, Any]) -> None:
        """A trainer wrote an event."""

    def run_ended(self, plan: Plan, outcome: str, message: str | None) -> None:
        """A run ended: finished, failed, diverged or interrupted."""


@dataclass
class Outcome:
    """What became of each run, by run_id."""

    already_done: list[str] = field(default_factory=list)
    """Finished before this sweep."""
    trained: list[str] = field(default_factory=list)
    """Finished by this sweep."""
    not_finished: dict[str, str] = field(default_factory=dict)
    """The others, with the reason."""


class Corpora:
    """The prepared data of an experiment's runs: one folder for each shape of rows."""

    def __init__(self, experiment: Experiment, home: Path) -> None:
        self._name = experiment.data
        self._home = home
        self._found: dict[tuple[int, ...], Prepared | None] = {}

    def prepare(self, asked: Asked, report: Callable[[str], None]) -> Prepared:
        """Prepared data, made now if they are not there yet."""
        key = _key(asked.hyperparameters)
        prepared = self._found.get(key) or prepare(self._name, asked.hyperparameters, self._home, report)
        self._found[key] = prepared
        return prepared

    def of(self, plan: Plan) -> Path:
        """Prepared folder of a plan made from these data."""
        prepared = self._found[_key(plan.hyperparameters)]
        assert prepared is not None
        return prepared.folder

    def find(self, asked: Asked) -> Prepared | None:
        """Prepared data, if they are there."""
        key = _key(asked.hyperparameters)
        if key not in self._found:
            self._found[key] = prepared_for(self._name, asked.hyperparameters, self._home)
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
        raise ValueError(f"{len(plans)} plans without a name: --name says under which they are recorded together")
    (first, *_) = plans
    return Experiment(name or first, (), (), seeds=(), data=data or "python", plans=tuple(plans.values()))


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
        raise ValueError(f"{path} was planned on a folder {plan.data.corpus!r}: --data FOLDER says where its texts are")
    return plan


def plan_of(asked: Asked, prepared: Prepared) -> Plan:
    """The plan of a run on prepared data.

    Raises ValueError for a horizon beyond the data, and where a run is to be repeated whose rows are not these.
    """
    identity = prepared.identity(asked.hyperparameters)
    plan = Plan(asked.recipe, asked.horizon, asked.seed, asked.hyperparameters, identity, code_fingerprint())
    if asked.plan is not None and asked.plan.run_id != plan.run_id:
        raise ValueError(_other_rows(asked.plan, plan))
    return plan


def _other_rows(wanted: Plan, here: Plan) -> str:
    """What keeps a run from being repeated on the rows that are here."""
    names = {"tokenizer": "another tokeniser", "train": "other training rows", "validation": "other validation rows"}
    other = [words for name, words in names.items() if getattr(wanted.data, name) != getattr(here.data, name)]
    source = f" (the library of Python {platform.python_version()})" if here.data.corpus == "python" else ""
    return (
        f"run {wanted.run_id}: corpus {here.data.corpus}{source} gives {', '.join(other)} than its plan's corpus "
        f"{wanted.data.corpus}: repeat it on the same texts, with --data FOLDER or the Python that had them"
    )


def make_plans(experiment: Experiment, data: Callable[[Asked], Prepared]) -> list[Plan]:
    """The plans of an experiment, cheapest first, each once. Raises ValueError for a horizon beyond the data."""
    plans: dict[str, Plan] = {}
    for asked in experiment.asked():
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
            events.write_json(folder / "plan.json", plan.document())
    path = home / "experiments" / f"{experiment.name}.json"
    path.parent.mkdir(exist_ok=True)
    before: dict[str, Any] = {"created": time.time(), "runs": [], "declared": {"recipes": {}}}
    if path.exists():
        before = events.read_json(path)
    declared, planned = experiment.declared(), {plan.run_id for plan in plans}
    edited = {
        name
        for name, constants in before["declared"]["recipes"].items()
        if declared["recipes"].get(name, constants) != constants
    }
    kept = [
        run_id for run_id in before["runs"] if run_id not in planned and _comparable(home / run_id, plans[0], edited)
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
        events.write_json(path, document)


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


@contextmanager
def conducting(home: Path) -> Iterator[None]:
    """Hold the home's sweep.lock. Raises RuntimeError naming the process that has it."""
    home.mkdir(parents=True, exist_ok=True)
    lock = locks.hold(home / "sweep.lock")
    if lock is None:
        raise RuntimeError(
            f"{home} is being swept by process {locks.holder(home / 'sweep.lock')}: wait for it, or stop it"
        )
    with lock:
        yield


def run_all(
    plans: list[Plan],
    corpora: Corpora,
    home: Path,
    where: launch.Slot,
    view: View,
    ingest: Callable[[], None],
    checkpoint_seconds: float = launch.CHECKPOINT_SECONDS,
) -> Outcome:
    """Train what is not done, one run after another; a run that fails does not stop the next.

    Interrupted (KeyboardInterrupt), the trainer at work checkpoints and stops first.
    """
    outcome = Outcome()
    for plan in plans:
        if is_done(home, plan.run_id):
            _drop_checkpoints(home / plan.run_id)
            outcome.already_done.append(plan.run_id)
            continue
        run = _Run(plan, home, corpora.of(plan), where, view, ingest, checkpoint_seconds)
        try:
            reason, message = run.to_its_end()
        except KeyboardInterrupt:
            run.stop()
            if not is_done(home, plan.run_id):
                view.run_ended(plan, "interrupted", "stopped; type the sweep again to go on")
            raise
        finally:
            ingest()
        if reason:
            outcome.not_finished[plan.run_id] = f"{reason}: {message}"
        else:
            outcome.trained.append(plan.run_id)
        view.run_ended(plan, _state(reason), message)
    return outcome


def is_done(home: Path, run_id: str) -> bool:
    """Whether a run is finished: done.json alone says so."""
    return (home / run_id / "done.json").exists()


def _drop_checkpoints(run_folder: Path) -> None:
    """Remove what a trainer killed just after done.json left behind."""
    for path in (run_folder / "checkpoints").glob("*"):
        path.unlink()


def _state(reason: str | None) -> str:
    return {None: "finished", "diverged": "diverged", "interrupted": "interrupted"}.get(reason, "failed")


class _Run:
    """One plan on its way to done.json."""

    def __init__(
        self,
        plan: Plan,
        home: Path,
        data_folder: Path,
        where: launch.Slot,
        view: View,
        ingest: Callable[[], None],
        checkpoint_seconds: float,
    ) -> None:
        self._plan = plan
        self._home = home
        self._folder = home / plan.run_id
        self._data_folder = data_folder
        self._where = where
        self._view = view
        self._ingest = ingest
        self._checkpoint_seconds = checkpoint_seconds
        self._process: Popen[bytes] | None = None

    def to_its_end(self) -> tuple[str | None, str | None]:
        """Attempts until the run is finished or has failed; reason and message of a failure, None when finished."""
        if launch.holder(self._folder) and (living := launch.last_attempt(self._folder)):
            self._follow(living, ours=False)
        last = launch.last_attempt(self._folder)
        ended = launch.exit_of(last) if last else None
        if ended and ended["reason"] in RESULTS and not is_done(self._home, self._plan.run_id):
            return ended["reason"], ended["message"]
        fruitless = 0
        while not is_done(self._home, self._plan.run_id):
            attempt, self._process = launch.start(
                self._plan, self._home, self._data_folder, self._where, self._checkpoint_seconds
            )
            advanced = self._follow(attempt, ours=True)
            if is_done(self._home, self._plan.run_id):
                break
            ended = launch.exit_of(attempt) or launch.reap(attempt)
            fruitless = 0 if advanced else fruitless + 1
            if ended["reason"] in FINAL_REASONS or fruitless >= FRUITLESS_ATTEMPTS:
                return ended["reason"], ended["message"]
        return None, None

    def _follow(self, attempt: Path, ours: bool) -> bool:
        """Show an attempt's events until it has ended; whether it wrote a checkpoint."""
        self._view.run_started(self._plan, attempt if ours else None)
        reader = events.Reader(attempt / "events.jsonl")
        advanced, ingested = False, time.monotonic()
        alive = True
        while alive:
            alive = self._alive()
            for event in reader.new():
                self._view.event(self._plan, event)
                advanced |= event["event"] == "checkpoint"
            if time.monotonic() - ingested > INGEST_SECONDS:
                self._ingest()
                ingested = time.monotonic()
            if alive:
                time.sleep(POLL_SECONDS)
        return advanced

    def _alive(self) -> bool:
        started_by_us = self._process is not None and self._process.poll() is None
        return started_by_us or launch.holder(self._folder) is not None

    def stop(self) -> None:
        """Ask whoever holds the run, supervisor or orphaned trainer, to checkpoint and end; wait until it has."""
        told: set[int] = set()
        while self._alive():
            holder = launch.holder(self._folder)
            if holder is not None and holder not in told:
                told.add(holder)
                with suppress(ProcessLookupError):
                    os.kill(holder, signal.SIGTERM)
            time.sleep(POLL_SECONDS)
