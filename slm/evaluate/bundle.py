"""A bundle: the files that CORE reads, by content. `core.yaml` names the tasks, each a file of examples with its shots;
`eval_meta_data.csv` says what guessing reaches.

The layout is that of nanochat's `eval_bundle.zip`. A bundle's id is the hash of exactly these files, so that another
content is another bundle, wherever it came from and whatever lies beside it.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

INDEX, BASELINES, EXAMPLES = "core.yaml", "eval_meta_data.csv", "eval_data"
CORE = "core"
"""The name of a bundle whose core.yaml gives none."""
FIELDS = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}
"""Fields of an example by the type of its task."""
OPTIONS = {"multiple_choice": "choices", "schema": "context_options"}
"""The field that `gold` counts in."""
CORRECTED = {
    "commonsense_qa": 0.403,
    "bigbench_language_identification": 0.25,
    "agi_eval_lsat_ar": 0.25,
}
"""Baselines that DCLM corrected after the csv of CORE's bundle was written."""
MOST_BYTES = 2**28
"""Of one file."""
MOST_TASKS = 1000
TASKS = "icl_tasks of tasks with label, dataset_uri and num_fewshot"
"""What core.yaml lists."""

Read = Callable[[str], bytes]
"""The content of a file by its name in the bundle. Raises ValueError when it cannot be had."""
Example = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One task of a bundle."""

    label: str
    """Its name."""
    kind: str
    """multiple_choice, schema or language_modeling."""
    file: str
    """Its examples, below the bundle's folder."""
    shots: int
    """Examples shown before the one that is asked."""
    delimiter: str
    """Between a question and its answer."""
    baseline: float
    """Accuracy of guessing by the bundle's csv."""
    corrected: float
    """Accuracy of guessing as DCLM corrected it."""


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk."""

    id: str
    """First 16 hex digits of the SHA-256 over names and contents of the files read."""
    folder: Path
    """Where they lie."""
    tasks: tuple[Task, ...]
    """In the order of core.yaml."""
    name: str = CORE
    """What its mean is called: the name that core.yaml gives it, CORE's own without one."""

    def examples(self, task: Task) -> list[Example]:
        """A task's examples in the order of its file. Raises ValueError naming file and line of what is none."""
        path = self.folder / task.file
        return _examples(task, path.read_bytes(), str(path))


def read(folder: Path) -> Bundle:
    """The bundle in a folder that holds core.yaml, or holds one that does, such as `eval_bundle`.

    Raises ValueError when it is none, or a file is missing or outside the folder.
    """
    root = _root(folder)
    contents, tasks, name = _checked(_of_folder(root), str(root))
    return Bundle(_id(contents), root, tasks, name)


def install(source: Path, home: Path) -> Bundle:
    """The bundle of a zip or a folder, checked, and copied into a home under its id.

    Raises ValueError, before anything is written, for what is no whole bundle.
    """
    with _opened(source) as given:
        contents, tasks, name = _checked(given, str(source))
        for task in tasks:
            _examples(task, contents[task.file], f"{source}: {task.file}")
    own, root = _id(contents), _kept(home)
    root.mkdir(parents=True, exist_ok=True)
    if not (root / own).exists():
        _write(contents, root / own)
    return Bundle(own, root / own, tasks, name)


def installed(home: Path, named: str | None = None) -> Bundle:
    """A home's bundle: the only one of a name, or of an id or its first digits; without either, of CORE's name.

    Raises ValueError when there is none, several, or when its files were changed.
    """
    names, wanted = names_of(home), named or CORE
    chosen = [own for own, name in names.items() if name == wanted] or [
        own for own in names if own.startswith(wanted)
    ]
    if len(chosen) != 1:
        known = ", ".join(f"{own} ({name})" for own, name in names.items())
        if chosen:
            raise ValueError(
                f"{len(chosen)} bundles in {home} could be meant: choose one of {known} with --bundle"
            )
        way = (
            f"choose one of {known} with --bundle"
            if known and named
            else "get it with `slm data core`"
        )
        made = "--bundle pocket-core makes one of the run's own held-out text"
        raise ValueError(f"no bundle {named or 'of CORE'} in {home}: {way}; {made}")
    folder = _kept(home) / chosen[0]
    bundle = read(folder)
    if bundle.id != chosen[0]:
        raise ValueError(
            f"{folder} was changed (its content is bundle {bundle.id}): remove it and get it again"
        )
    return bundle


def names_of(home: Path) -> dict[str, str]:
    """The bundles of a home: of each id its name. Raises ValueError for one whose core.yaml is none."""
    indices = sorted(_kept(home).glob(f"[!.]*/{INDEX}"))
    return {path.parent.name: _index(path.read_bytes(), str(path))[1] for path in indices}


def _kept(home: Path) -> Path:
    """Where a home's bundles lie."""
    return home / "data" / "core"


@contextmanager
def _opened(source: Path) -> Iterator[Read]:
    """How to read a zip or a folder."""
    if source.is_dir():
        yield _of_folder(_root(source))
        return
    if not source.is_file():
        raise ValueError(f"{source}: neither a zip nor a folder")
    try:
        with zipfile.ZipFile(source) as file:
            yield _of_zip(file, source)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ValueError(f"{source} is no whole zip file: {error}") from None


def _root(folder: Path) -> Path:
    """The folder that holds core.yaml: this one, else the one in it."""
    found = (
        [folder]
        if (folder / INDEX).is_file()
        else sorted(path.parent for path in folder.glob(f"*/{INDEX}"))
    )
    if not found:
        raise ValueError(f"{folder} is no bundle: there is no {INDEX} in it")
    if len(found) > 1:
        raise ValueError(
            f"{folder} holds {len(found)} bundles: name one of {', '.join(path.name for path in found)}"
        )
    return found[0]


def _of_folder(folder: Path) -> Read:
    """Files of a folder, none from outside it."""
    root = folder.resolve()

    def content(name: str) -> bytes:
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            raise ValueError(f"{folder / name} is a link out of the bundle")
        if not path.is_file():
            raise ValueError(f"{folder} has no {name}")
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"{path} is larger than {MOST_BYTES:,} bytes")
        return path.read_bytes()

    return content


def _of_zip(file: zipfile.ZipFile, source: Path) -> Read:
    """Files beside the zip's core.yaml, read by name and never unpacked by what the zip says of itself."""
    indices = [name for name in file.namelist() if PurePosixPath(name).name == INDEX]
    if not indices:
        raise ValueError(f"{source} is no bundle: there is no {INDEX} in it")
    above = min(indices, key=len).removesuffix(INDEX)

    def content(name: str) -> bytes:
        try:
            member = file.getinfo(above + name)
        except KeyError:
            raise ValueError(f"{source} has no {above + name}") from None
        if stat.S_ISLNK(member.external_attr >> 16):
            raise ValueError(f"{source}: {member.filename} is a link")
        if member.flag_bits & 1:
            raise ValueError(f"{source}: {member.filename} is encrypted")
        if member.file_size > MOST_BYTES:
            raise ValueError(f"{source}: {member.filename} is larger than {MOST_BYTES:,} bytes")
        return file.read(member)

    return content


def _checked(content: Read, where: str) -> tuple[dict[str, bytes], tuple[Task, ...], str]:
    """The files that CORE reads by name, the tasks, and the bundle's name."""
    contents = {name: content(name) for name in (INDEX, BASELINES)}
    entries, name = _index(contents[INDEX], f"{where}: {INDEX}")
    tasks = _tasks(
        entries, _baselines(contents[BASELINES], f"{where}: {BASELINES}"), f"{where}: {INDEX}"
    )
    return (
        contents | {file: content(file) for file in sorted({task.file for task in tasks})},
        tasks,
        name,
    )


def _index(text: bytes, where: str) -> tuple[list[Any], str]:
    """What core.yaml lists, and the name that it gives."""
    try:
        document = yaml.safe_load(text)
        entries, name = list(document["icl_tasks"]), document.get("name", CORE)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not YAML: {' '.join(str(error).split())}") from None
    except (AttributeError, KeyError, TypeError):
        raise ValueError(f"{where} has no list {TASKS}") from None
    if not re.fullmatch(r"[a-z][a-z0-9-]{0,31}", str(name)):
        raise ValueError(
            f"{where} gives the name {name!r}: it takes a small letter, then such, digits and -"
        )
    return entries, str(name)


def _tasks(entries: list[Any], baselines: dict[str, float], where: str) -> tuple[Task, ...]:
    try:
        tasks = tuple(_task(entry, baselines, where) for entry in entries)
    except (KeyError, TypeError):
        raise ValueError(f"{where} has no list {TASKS}") from None
    labels = [task.label for task in tasks]
    if not 0 < len(tasks) <= MOST_TASKS or len({*labels}) < len(labels):
        raise ValueError(
            f"{where} has {len(labels)} tasks, {len({*labels})} by name: 1 to {MOST_TASKS}, each once"
        )
    return tasks


def _task(entry: dict[str, Any], baselines: dict[str, float], where: str) -> Task:
    label, uri, shots, kind = (
        entry["label"],
        entry["dataset_uri"],
        entry["num_fewshot"],
        entry.get("icl_task_type"),
    )
    delimiter = entry.get("continuation_delimiter", " ")
    if not re.fullmatch(r"\w[\w.-]*", str(label)):
        raise ValueError(
            f"{where}: task {label!r} has a name of more than letters, digits, _, - and ."
        )
    if kind not in FIELDS:
        raise ValueError(
            f"{where}: task {label} is of type {kind!r}, which is none of {', '.join(FIELDS)}"
        )
    if not (
        isinstance(shots, list) and len(shots) == 1 and isinstance(shots[0], int) and shots[0] >= 0
    ):
        raise ValueError(
            f"{where}: task {label} has num_fewshot {shots!r}, not a list of one number"
        )
    parts = re.split(r"[/\\]", str(uri))
    if not all(re.fullmatch(r"[\w-][\w.-]*", part) for part in parts):
        raise ValueError(
            f"{where}: task {label} reads {uri!r}, which is no plain path below {EXAMPLES}"
        )
    if label not in baselines:
        raise ValueError(f"{where}: task {label} has no baseline in {BASELINES}")
    known = baselines[label]
    return Task(
        label,
        kind,
        f"{EXAMPLES}/{uri}",
        shots[0],
        str(delimiter),
        known,
        CORRECTED.get(label, known),
    )


def _baselines(text: bytes, where: str) -> dict[str, float]:
    """Accuracy of guessing by task, of percents."""
    rows = csv.DictReader(io.StringIO(text.decode(errors="replace")))
    try:
        found = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in rows}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where} has no columns 'Eval Task' and 'Random baseline' in percent ({error})"
        ) from None
    if wrong := [name for name, baseline in found.items() if not 0 <= baseline < 1]:
        raise ValueError(f"{where}: the baseline of {wrong[0]} is not from 0 to below 100")
    return found


def _examples(task: Task, content: bytes, where: str) -> list[Example]:
    examples = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            try:
                example = json.loads(line)
            except ValueError:
                raise ValueError(f"{where}, line {number}: not JSON") from None
            if problem := _problem(task, example):
                raise ValueError(f"{where}, line {number}: {problem}")
            examples.append(example)
    if len(examples) <= task.shots:
        raise ValueError(
            f"{where} has {len(examples)} examples: too few for the {task.shots} shots of {task.label}"
        )
    return examples


def _problem(task: Task, example: Any) -> str | None:
    """What keeps a value from being an example of a task."""
    if not isinstance(example, dict):
        return "not a JSON object"
    options = OPTIONS.get(task.kind)
    for name in FIELDS[task.kind]:
        value = example.get(name)
        if name == options and not (
            isinstance(value, list) and value and all(isinstance(one, str) for one in value)
        ):
            return f"its {name!r} is no list of texts"
        if name not in (options, "gold") and not isinstance(value, str):
            return f"its {name!r} is no text"
    if options and not (
        type(example.get("gold")) is int and 0 <= example["gold"] < len(example[options])
    ):
        return f"its 'gold' is {example.get('gold')!r}, not the place of one of its {len(example[options])} choices"
    return None


def _id(contents: dict[str, bytes]) -> str:
    listed = [[name, hashlib.sha256(contents[name]).hexdigest()] for name in sorted(contents)]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]


def _write(contents: dict[str, bytes], folder: Path) -> None:
    """Write a folder whole or not at all."""
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder.parent) as temporary:
        whole = Path(temporary, "bundle")
        for name, content in contents.items():
            path = whole / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.write(content)
                os.fsync(file.fileno())
        try:
            whole.rename(folder)
        except OSError:
            if not folder.exists():  # else another one was first
                raise
