"""Merge an export's runs, experiments, evaluations, fits and imports into a home, each once.

A merge gives the same results in either order and removes nothing: what gives way to the other
home's version is moved to `<run_id>/aside/`, whole.
"""

from __future__ import annotations

import shutil
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import store
from slm.exchange.archive import FOLDERS
from slm.exchange.incoming import Export, MergeResult, verify_export
from slm.exchange.merge_records import merge_experiments, merge_fits, merge_imports
from slm.files import hold_lock, read_json, sha256_of
from slm.monitor.progress import Report, no_report
from slm.monitor.run_progress import last_events
from slm.plan import canonical
from slm.run import checkpoint_step
from slm.sweep import slurm
from slm.sweep.orchestrator import sweep_lock
from slm.text import plural
from store.paths import ensure_home_id

CHUNK_BYTES = 2**20
"""Bytes of a file that are compared at a time."""
RUN_OUTCOMES = ("new", "further", "replaced", "kept", "same", "waiting")
Record = dict[str, Path]
"""Files that record a run's training, by name."""
RECORD_FILES = ("plan.json", "attempts/*/*.json", "attempts/*/events.jsonl", "done.json")
"""Patterns of a record's files. Attempts are numbered, so those of two homes cannot mix."""


def merge(folder: Path, home: Path, report: Report = no_report) -> MergeResult:
    """Merge an export into a home.

    Every name and hash is checked before anything is written; an interrupted merge continues when
    it is called again. A run of both homes stays if it is the same or has trained further here; it
    is taken if it has trained further there. Where the attempts differ, a finished run wins, the
    one that finished first if both did, else the one with more steps; but no running run is
    touched, and no unfinished run that can resume here gives way to an unfinished one. An
    experiment of one name and question has the members of both; with another question it becomes
    `<name>@<home id>`, as does an import whose name is taken.

    Raises ValueError for a folder that is not an export, or a damaged one; StoreError as
    `store.ingest` does.
    """
    home_id, hashes = verify_export(folder, report)
    result = MergeResult()
    with sweep_lock(home) as is_held:
        ensure_home_id(home)
        export = Export(folder / "runs", home, home_id, hashes, is_held)
        runs = sorted(export.names.keys() - set(FOLDERS))
        for number, run in enumerate(runs):
            report(len(hashes) + number, len(hashes) + len(runs))
            result.counts[_merge_run(export, run, result.lines)] += 1
            result.counts["evaluations"] += _merge_evaluations(export, run)
            result.counts["weights"] += _merge_weights(export, run)
        renamed = merge_imports(export, result) | merge_experiments(export, result)
        merge_fits(export, renamed, result)
    result.lines.extend(store.ingest(home).problems)
    result.lines.insert(0, _summary(result.counts))
    return result


def _summary(counts: Counter[str]) -> str:
    parts = []
    for name, count in counts.items():
        if name in RUN_OUTCOMES and count:
            parts.append(plural(count, f"{name} run"))
        elif count:
            parts.append(f"{count} {name}")
    return ", ".join(parts) or "nothing new"


def _merge_run(export: Export, run: str, lines: list[str]) -> str:
    """Merge the record of a run; return the outcome, and add a message where one is due."""
    folder = export.home / run
    # 1) a run that is new here, or the same, or behind
    if not (folder / "plan.json").exists():
        _take_record(export, run)
        return "new"
    local = _record(folder)
    incoming = _record(export.folder / run)
    if _extends(local, incoming):
        return "same" if _extends(incoming, local) else "kept"
    with ExitStack() as stack:
        # 2) only while nobody trains it
        locks = (folder / "lock", folder / "train.lock")
        is_free = export.holds_sweep_lock and all(_hold(stack, lock) for lock in locks)
        if not is_free or slurm.jobs_of([folder]):
            lines.append(f"{run}: running here, left unchanged; merge again when it has ended")
            return "waiting"
        # 3) a run that has trained further there
        if _extends(incoming, local):
            _take_record(export, run)
            return "further"
        # 4) two different records: one of them wins
        reason = _reason_to_keep(folder, local, incoming)
        if reason is not None:
            lines.append(f"{run}: {reason}; this home's record is kept")
            return "kept"
        line = f"{run}: {_describe(incoming)} there, {_describe(local)} here: theirs is taken"
        aside = _move_aside(folder, incoming)
        _take_record(export, run)
        lines.append(f"{line}, ours is in {aside}")
        return "replaced"


def _record(folder: Path) -> Record:
    paths = (path for pattern in RECORD_FILES for path in folder.glob(pattern))
    return {path.relative_to(folder).as_posix(): path for path in paths}


def _take_record(export: Export, run: str) -> None:
    """Copy the record of a run, its plan last: a folder without a plan is not a run."""
    for name in export.names[run]:
        if not name.endswith(".safetensors") and not name.startswith(f"{run}/evals/"):
            export.take(name)


def _hold(stack: ExitStack, lock: Path) -> bool:
    """Take a lock for as long as the stack lasts; return whether it was free."""
    file = hold_lock(lock)
    if file is None:
        return False
    stack.enter_context(file)
    return True


def _extends(longer: Record, shorter: Record) -> bool:
    """Whether a record holds all of another: its files, with its events as their beginning."""
    if not shorter.keys() <= longer.keys():
        return False
    return all(_begins(longer[name], path) for name, path in shorter.items())


def _begins(path: Path, beginning: Path) -> bool:
    """Whether a file is the same as another; an event file may continue it."""
    longer = path.stat().st_size
    shorter = beginning.stat().st_size
    if longer < shorter or (path.suffix != ".jsonl" and longer != shorter):
        return False
    with path.open("rb") as file, beginning.open("rb") as other:
        chunks = iter(lambda: other.read(CHUNK_BYTES), b"")
        return all(file.read(len(chunk)) == chunk for chunk in chunks)


def _reason_to_keep(folder: Path, local: Record, incoming: Record) -> str | None:
    """Return why this home's record wins over a different one, None where the other wins."""
    is_unfinished = "done.json" not in local and "done.json" not in incoming
    if is_unfinished and checkpoint_step(folder):
        return "unfinished in both homes, and it can resume here"
    if _rank(local) <= _rank(incoming):
        return f"{_describe(local)} here, {_describe(incoming)} there"
    return None


def _rank(record: Record) -> tuple[bool, float, str]:
    """Sort key of records, the winner first: finished, and earliest; else most steps."""
    hashes = {name: sha256_of(path) for name, path in record.items()}
    tie_breaker = canonical(hashes)
    done = record.get("done.json")
    if done:
        return False, float(read_json(done).get("time") or 0), tie_breaker
    return True, -_steps(record), tie_breaker


def _steps(record: Record) -> int:
    """Return the number of steps that the attempts of a record reached."""
    steps = [0]
    for path in record.values():
        if path.name == "events.jsonl":
            steps += [event.get("step") or 0 for event in last_events(path)]
    return max(steps)


def _describe(record: Record) -> str:
    if "done.json" in record:
        return f"finished with val_bpb {read_json(record['done.json'])['val_bpb']}"
    return f"unfinished at step {_steps(record):,}"


def _move_aside(folder: Path, incoming: Record) -> Path:
    """Move the record of a run out of the way, its result first.

    Weights stay where both results have the same ones.
    """
    numbers = [int(path.name) for path in folder.glob("aside/[0-9]*")]
    number = max(numbers, default=0) + 1
    aside = folder / "aside" / f"{number:03d}"
    aside.mkdir(parents=True)
    shutil.copyfile(folder / "plan.json", aside / "plan.json")
    names = ["done.json", "attempts", "checkpoints"]
    local_hash = _weights_hash(folder / "done.json")
    if "done.json" not in incoming or _weights_hash(incoming["done.json"]) != local_hash:
        names.append("model.safetensors")
    for name in names:
        if (folder / name).exists():
            (folder / name).rename(aside / name)
    return aside


def _weights_hash(done: Path) -> str | None:
    """Return the SHA-256 of a run's final weights."""
    return read_json(done).get("weights_sha256") if done.exists() else None


def _merge_evaluations(export: Export, run: str) -> int:
    """Take the evaluation records of a run, the earlier of two of the same; return their number."""
    count = 0
    for name in export.names[run]:
        path = export.home / name
        if path.parent.name != "evals":
            continue
        if path.exists():
            if _age(path) <= _age(export.folder / name):
                continue
            aside = export.home / run / "aside" / "evals"
            aside.mkdir(parents=True, exist_ok=True)
            path.rename(aside / path.name)
        count += export.take(name)
    return count


def _age(evaluation: Path) -> tuple[float, str]:
    return float(read_json(evaluation).get("time") or 0), sha256_of(evaluation)


def _merge_weights(export: Export, run: str) -> bool:
    """Take a run's final weights if they were exported and belong to the result in this home."""
    name = f"{run}/model.safetensors"
    sha256 = export.hashes.get(name)
    if not sha256 or (export.home / name).exists():
        return False
    if sha256 != _weights_hash(export.home / run / "done.json"):
        return False
    return export.take(name)
