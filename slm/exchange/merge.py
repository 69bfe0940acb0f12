"""An export's runs, experiments, evaluations, fits and imports into a home, each once.

A merge gives the same results in either order and removes nothing: what gives way to the other home's is moved to
`<run_id>/aside/`, whole.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import store
from slm.exchange import importers as imports
from slm.exchange.archive import FORMAT, NAMED, SHAPE, Json, copied, digest_of, run_of
from slm.files import hold_lock, read_json, replacing, write_json
from slm.monitor.run_progress import last_events
from slm.plan import canonical
from slm.run import checkpoint_step
from slm.sweep import orchestrator as conduct
from store.documents import rows_of, scan
from store.paths import ensure_home_id

Report = Callable[[int, int], None]
"""Told how many of how many files are done."""
OF_RUNS = ("new", "further", "replaced", "kept", "same", "waiting")
"""What may come of a run in a merge."""
RECORD = ("plan.json", "attempts/*/*.json", "attempts/*/events.jsonl", "done.json")
"""What was done of a run: an attempt's place in it is its number, so two homes' cannot be mixed."""


@dataclass(frozen=True)
class Merged:
    """What a merge did."""

    counts: Counter[str] = field(default_factory=Counter)
    """Runs: new, further (went on there), replaced, kept, same, waiting (for the end of their work here); and
    evaluations, experiments, fits, imports and weights: taken."""
    lines: list[str] = field(default_factory=list)
    """What a user should know of, a line each."""


def merge(folder: Path, home: Path, report: Report = lambda done, of: None) -> Merged:
    """Take the runs, experiments, evaluations, fits and imports of an export into a home, each once.

    Every name and hash is checked before anything is written; cut short, it goes on when it is called again. A run that
    both homes have stays where it is the same or has gone further; one that has gone further there is taken. Where
    their attempts differ, a finished one stands, the one that finished first if both have, else the one with more
    steps; but no run at work here is touched, and no unfinished one that can go on here gives way to an unfinished one.
    Experiments of one name and question have the members of both; of another question it becomes `<name>@<home id>`, as
    does an import whose name is another's here.

    Raises ValueError, one line, for a folder that is no export, or a damaged one; StoreError as `store.ingest` does.
    """
    theirs, digests = _checked(folder, report)
    merged = Merged()
    with conduct.sweep_lock(home) as ours:
        ensure_home_id(home)
        given = _Given(folder / "runs", home, digests, ours)
        runs = sorted({run for name in digests if (run := run_of(name))})
        for number, run in enumerate(runs):
            report(len(digests) + number, len(digests) + len(runs))
            what, line = _merge_run(given, run)
            merged.counts[what] += 1
            merged.lines.extend([line] if line else [])
            merged.counts.update(
                evaluations=_merge_evaluations(given, run), weights=_merge_weights(given, run)
            )
        renamed = _merge_imports(given, theirs, merged) | _merge_experiments(given, theirs, merged)
        _merge_fits(given, renamed, merged.counts)
    merged.lines.extend(store.ingest(home).problems)
    merged.lines.insert(0, _summary(merged.counts))
    return merged


def _summary(counts: Counter[str]) -> str:
    told = [
        f"{count} {what}" + f" run{'s' * (count > 1)}" * (what in OF_RUNS)
        for what, count in counts.items()
        if count
    ]
    return ", ".join(told) or "nothing new"


@dataclass(frozen=True)
class _Given:
    """An export that was checked, and the home that takes it in."""

    folder: Path
    """Its files, laid out as a home's."""
    home: Path
    """Takes them in."""
    digests: dict[str, str]
    """SHA-256 of each file, by name."""
    conducts: bool
    """Whether no sweep can be at work in the home."""

    def take(self, name: str, target: Path | None = None) -> bool:
        """Copy a file into the home, whole or not at all; whether it was not the same there already."""
        path = target or self.home / name
        if path.is_file() and digest_of(path) == self.digests[name]:
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            with (self.folder / name).open("rb") as source, temporary.open("wb") as copy:
                digest = copied(source, copy)
            if digest != self.digests[name]:
                raise ValueError(
                    f"{self.folder / name} was changed while it was read: export it again"
                )
        return True

    @cached_property
    def names(self) -> dict[str, list[str]]:
        """The files of each folder, in the order in which a run cut short is least said to be more than it is."""
        last = ("", "events.jsonl", "exit.json", "import.json", "done.json", "plan.json")
        order = {name: place for place, name in enumerate(last)}
        found: defaultdict[str, list[str]] = defaultdict(list)
        for name in sorted(self.digests, key=lambda own: order.get(own.rpartition("/")[2], 0)):
            found[name.partition("/")[0]].append(name)
        return found


def _checked(folder: Path, report: Report) -> tuple[str, dict[str, str]]:
    """The id of an export's home, and the SHA-256 of each of its truth files; all of it is as it was written."""
    document = read_json(folder / "export.json")
    try:
        if document["format"] != FORMAT:
            raise ValueError(f"format {document['format']!r} is of another version of slm")
        home, listed = (
            document["home"]["id"],
            {row["name"]: (row["bytes"], row["sha256"]) for row in document["files"]},
        )
        if not re.fullmatch("[0-9a-f]{8}", home):
            raise ValueError(f"its home is {home!r}")
        for name in listed:
            if not _is_known(name):
                raise ValueError(f"{name!r} is no name of an export's file")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{folder / 'export.json'} is no export's: {why}") from None
    for number, (name, (size, digest)) in enumerate(listed.items()):
        report(number, 2 * len(listed))
        _check_file(folder, name, size, digest)
    truth = {
        name.removeprefix("runs/"): digest
        for name, (_, digest) in listed.items()
        if name.startswith("runs/")
    }
    _check_documents(folder / "runs", truth)
    return home, truth


def _is_known(name: str) -> bool:
    if name.startswith("runs/"):
        return SHAPE.fullmatch(name.removeprefix("runs/")) is not None
    return re.fullmatch(r"tables/[a-z_]{1,99}\.parquet|columns\.json|README\.md", name) is not None


def _check_file(folder: Path, name: str, size: int, digest: str) -> None:
    """Raises ValueError for a file that is not there, lies behind a link or is not what was exported."""
    path = folder / name
    below = [path, *path.parents][: len(Path(name).parts)]
    if any(place.is_symlink() for place in below):
        raise ValueError(f"{path} is a link: an export holds none")
    if not path.is_file():
        raise ValueError(f"{path} is not there: the export is not whole, copy it again")
    if path.stat().st_size != size or digest_of(path) != digest:
        raise ValueError(
            f"{path} is not what was exported: it was changed or cut short, copy it again"
        )


def _check_documents(folder: Path, names: Iterable[str]) -> None:
    """Raises ValueError for a document that the store cannot read, as of another run than its name says, and for one
    whose names would lead elsewhere than to a run, an experiment or a time."""
    for file in scan(folder):
        if file.kind != "events" and file.name in names:
            rows_of(file)
            try:
                _check_values(file.kind, read_json(file.path))
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise ValueError(f"{file.path}: {error}") from None
    for name in names:
        if (run := run_of(name)) and f"{run}/plan.json" not in names:
            raise ValueError(f"{folder / name}: the run has no plan.json in this export")


def _check_values(kind: str, document: Json) -> None:
    """Raises one of several errors where a merge could not go by what a document says."""
    for moment in ("time", "created"):
        float(document.get(moment) or 0)
    match kind:
        case "experiment":
            _all_like("[0-9a-f]{12}", document["runs"])
            _all_like(".*", ((document.get("declared") or {}).get("recipes") or {}).keys())
        case "plan":
            _all_like(
                ".*",
                (document["code"], document["data"]["tokenizer"], document["data"]["validation"]),
            )
        case "fit":
            _all_like(NAMED, document["experiments"])
        case "import":
            _all_like(NAMED, [document["experiment"]])
            _all_like("x[0-9a-f]{11}", [row["run_id"] for row in document["rows"]])


def _all_like(rule: str, names: Iterable[Any]) -> None:
    """Paths are made of names."""
    for name in names:
        if not re.fullmatch(rule, name):
            raise ValueError(f"{name!r} is no name that it could hold")


def _merge_run(given: _Given, run: str) -> tuple[str, str | None]:
    """Bring a run up to what either home knows of it: what that came to, and a line where it is worth one."""
    here, there = given.home / run, given.folder / run
    if not (here / "plan.json").exists():
        _take_record(given, run)
        return "new", None
    ours, theirs = _record(here), _record(there)
    if _extends(ours, theirs):
        return "same" if _extends(theirs, ours) else "kept", None
    with ExitStack() as stack:
        held = given.conducts and all(_held(stack, here / name) for name in ("lock", "train.lock"))
        if not held or _is_queued(here):
            return "waiting", f"{run}: at work here, left as it is; type it again when it has ended"
        if _extends(theirs, ours):
            _take_record(given, run)
            return "further", None
        if (why := _why_ours(here, ours, theirs)) is not None:
            return "kept", f"{run}: {why}; what this home has stands"
        line = f"{run}: {_how(theirs)} there, {_how(ours)} here: theirs is taken"
        aside = _set_aside(here, theirs)
        _take_record(given, run)
        return "replaced", f"{line}, what was here is in {aside}"


def _record(folder: Path) -> dict[str, Path]:
    return {
        path.relative_to(folder).as_posix(): path for place in RECORD for path in folder.glob(place)
    }


def _take_record(given: _Given, run: str) -> None:
    """Copy what was done of a run, its plan last: a folder without one is no run."""
    for name in given.names[run]:
        if not name.endswith(".safetensors") and not name.startswith(f"{run}/evals/"):
            given.take(name)


def _held(stack: ExitStack, lock: Path) -> bool:
    """Whether a lock could be taken, for as long as the stack lasts."""
    file = hold_lock(lock)
    return file is not None and stack.enter_context(file) is file


def _is_queued(run_folder: Path) -> bool:
    from slm.sweep import slurm

    return bool(slurm.jobs_of([run_folder]))


def _extends(more: dict[str, Path], less: dict[str, Path]) -> bool:
    """Whether a record holds all that another does: its files, and its events as a beginning."""
    return all(name in more and _begins(more[name], path) for name, path in less.items())


def _begins(whole: Path, part: Path) -> bool:
    """Whether a file begins with another, or for all but events is the same."""
    size = part.stat().st_size
    if whole.stat().st_size < size or (part.suffix != ".jsonl" and whole.stat().st_size != size):
        return False
    with whole.open("rb") as one, part.open("rb") as other:
        return copied(one, None, size) == copied(other, None, size)


def _why_ours(here: Path, ours: dict[str, Path], theirs: dict[str, Path]) -> str | None:
    """Why of two differing records that of this home stands; None where theirs does."""
    if "done.json" not in ours and "done.json" not in theirs and checkpoint_step(here):
        return "unfinished in both homes, and it can go on here"
    if _rank(ours) <= _rank(theirs):
        return f"{_how(ours)} here, {_how(theirs)} there"
    return None


def _rank(record: dict[str, Path]) -> tuple[bool, float, str]:
    """The least stands: what finished, and first; else what has most steps."""
    content = canonical({name: digest_of(path) for name, path in record.items()})
    done = record.get("done.json")
    measure = float(read_json(done).get("time") or 0) if done else -_steps(record)
    return done is None, measure, content


def _steps(record: dict[str, Path]) -> int:
    """Steps that the attempts of a record reached."""
    logs = [path for name, path in record.items() if name.endswith("/events.jsonl")]
    return max((event.get("step") or 0 for log in logs for event in last_events(log)), default=0)


def _how(record: dict[str, Path]) -> str:
    if "done.json" in record:
        return f"finished with val_bpb {read_json(record['done.json'])['val_bpb']}"
    return f"unfinished at step {_steps(record):,}"


def _set_aside(here: Path, theirs: dict[str, Path]) -> Path:
    """Move what was done of a run out of the way, its result first; weights stay where both results have the same."""
    number = 1 + max((int(path.name) for path in (here / "aside").glob("[0-9]*")), default=0)
    aside = here / "aside" / f"{number:03d}"
    aside.mkdir(parents=True)
    shutil.copyfile(here / "plan.json", aside / "plan.json")
    same = "done.json" in theirs and _weights_of(theirs["done.json"]) == _weights_of(
        here / "done.json"
    )
    for name in ("done.json", "attempts", "checkpoints", *(() if same else ("model.safetensors",))):
        if (here / name).exists():
            (here / name).rename(aside / name)
    return aside


def _weights_of(done: Path) -> str | None:
    """SHA-256 of the final weights of a run."""
    return read_json(done).get("weights_sha256") if done.exists() else None


def _merge_evaluations(given: _Given, run: str) -> int:
    """Take the evaluations of a run's weights; of two of the same thing the earlier. How many were taken."""
    taken = 0
    for name in given.names[run]:
        own = given.home / name
        if not name.startswith(f"{run}/evals/"):
            continue
        if own.exists() and _time(own) <= _time(given.folder / name):
            continue
        if own.exists():
            aside = own.parent.parent / "aside" / "evals"
            aside.mkdir(parents=True, exist_ok=True)
            own.rename(aside / own.name)
        taken += given.take(name)
    return taken


def _time(evaluation: Path) -> tuple[float, str]:
    return float(read_json(evaluation).get("time") or 0), digest_of(evaluation)


def _merge_weights(given: _Given, run: str) -> int:
    """Take a run's final weights where they came along, and are those of the result that stands."""
    name, target = f"{run}/model.safetensors", given.home / run / "model.safetensors"
    if target.exists() or given.digests.get(name) != _weights_of(given.home / run / "done.json"):
        return 0
    return int(name in given.digests and given.take(name))


def _merge_experiments(given: _Given, theirs: str, merged: Merged) -> dict[str, str]:
    """Take experiments: another's name here for each that asks something else here."""
    renamed, imported = {}, set(imports.kept(given.home).values())
    for name in given.names["experiments"]:
        path, document = given.home / name, read_json(given.folder / name)
        own = read_json(path) if path.exists() else None
        if path.stem in imported or (own and not _asks_the_same(given.home, own, document)):
            renamed[path.stem] = f"{path.stem}@{theirs}"
            merged.lines.append(
                f"experiment {path.stem} asks something else here: theirs is {renamed[path.stem]}"
            )
            path, own = path.with_name(f"{renamed[path.stem]}.json"), None
            document |= {"name": path.stem}
        if not path.exists() and path.stem not in renamed.values():
            merged.counts["experiments"] += given.take(name)
            continue
        wanted = _union(given.home, own, document) if own else document
        if path.exists() and read_json(path) == wanted:
            continue
        if own:
            merged.lines.append(
                f"experiment {path.stem}: {len(wanted['runs']) - len(own['runs'])} more runs"
            )
        path.parent.mkdir(exist_ok=True)
        write_json(path, wanted)
        merged.counts["experiments"] += 1
    return renamed


def _asks_the_same(home: Path, ours: Json, theirs: Json) -> bool:
    """Whether two experiments of a name put one question: in the same words, of the same recipes and data, and of runs
    of the same trainers on the same tokens."""
    one, other = (document.get("declared") or {} for document in (ours, theirs))
    if (ours.get("question"), one.get("data")) != (theirs.get("question"), other.get("data")):
        return False
    recipes, more = (declared.get("recipes") or {} for declared in (one, other))
    if any(recipes[name] != more[name] for name in recipes.keys() & more.keys()):
        return False
    kinds, others = (
        {_kind(home / run) for run in document["runs"]} - {None} for document in (ours, theirs)
    )
    return kinds <= others or others <= kinds


def _kind(run_folder: Path) -> tuple[str, ...] | None:
    """What runs of one experiment share: trainer, tokeniser, validation rows; None where a run is not there."""
    path = run_folder / "plan.json"
    if not path.exists():
        return None
    plan = read_json(path)
    return plan["code"], plan["data"]["tokenizer"], plan["data"]["validation"]


def _union(home: Path, ours: Json, theirs: Json) -> Json:
    """An experiment that asks for the runs of two, cheapest first, and otherwise is the earlier one."""
    first, second = sorted(
        (ours, theirs), key=lambda own: (float(own.get("created") or 0), canonical(own))
    )
    one, other = (document.get("declared") or {} for document in (first, second))
    declared = (
        other | one | {name: _both(one[name], other[name]) for name in one.keys() & other.keys()}
    )
    runs = sorted({*ours["runs"], *theirs["runs"]}, key=lambda run: (_flops(home / run), run))
    return first | {"declared": declared, "runs": runs}


def _both(one: Any, other: Any) -> Any:
    if isinstance(one, list) and isinstance(other, list):
        return sorted({*one, *other})
    return other | one if isinstance(one, dict) and isinstance(other, dict) else one


def _flops(run_folder: Path) -> float:
    path = run_folder / "plan.json"
    if not path.exists():
        return float("inf")
    given = read_json(path)["hyperparameters"]
    return float(given["flops_per_token"]) * float(given["batch_tokens"]) * float(given["steps"])


def _merge_imports(given: _Given, theirs: str, merged: Merged) -> dict[str, str]:
    """Take imports, which are known by their hashes: what is here stays. Another's name here for each that is taken."""
    renamed = {}
    taken = {
        *imports.kept(given.home).values(),
        *(path.stem for path in given.home.glob("experiments/*.json")),
    }
    for name in given.names["imports"]:
        path = given.home / name
        if path.exists():
            continue
        if path.name != "import.json":
            given.take(name)
            continue
        merged.counts["imports"] += 1
        document = read_json(given.folder / name)
        if (experiment := document["experiment"]) in taken:
            renamed[experiment] = document["experiment"] = f"{experiment}@{theirs}"
            merged.lines.append(
                f"import {experiment} is another here: theirs is {renamed[experiment]}"
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, document)
        else:
            given.take(name)
    return renamed


def _merge_fits(given: _Given, renamed: dict[str, str], counts: Counter[str]) -> None:
    """Take fits, which are known by their hashes: what is here stays."""
    for name in given.names["fits"]:
        if (given.home / name).exists():
            continue
        document = read_json(given.folder / name)
        names = [renamed.get(experiment, experiment) for experiment in document["experiments"]]
        if names == document["experiments"]:
            given.take(name)
        else:
            (given.home / "fits").mkdir(exist_ok=True)
            write_json(given.home / name, document | {"experiments": names})
        counts["fits"] += 1
