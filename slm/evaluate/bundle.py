"""Bundles: the files that CORE reads. `core.yaml` lists the tasks, each a file of examples with a
number of shots; `eval_meta_data.csv` holds the accuracy of guessing.

The layout is that of nanochat's `eval_bundle.zip`. The id of a bundle is a hash of exactly these
files, so other content is another bundle, and further files in the folder do not count.
"""

from __future__ import annotations

import csv
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
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from slm.files import fingerprint

INDEX = "core.yaml"
BASELINES = "eval_meta_data.csv"
EXAMPLES = "eval_data"
CORE = "core"
"""Name of a bundle whose core.yaml gives none."""
FIELDS = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}
"""Fields of an example, by type of task."""
OPTIONS = {"multiple_choice": "choices", "schema": "context_options"}
"""Field that `gold` is an index into, by type of task."""
CORRECTED = {
    "commonsense_qa": 0.403,
    "bigbench_language_identification": 0.25,
    "agi_eval_lsat_ar": 0.25,
}
"""Baselines that DCLM corrected after the csv of CORE's bundle was written."""
LABEL = re.compile(r"\w[\w.-]*")
PATH = re.compile(r"[\w-][\w.-]*([/\\][\w-][\w.-]*)*")
"""A plain path: no part is empty or begins with a dot."""
MAX_FILE_BYTES = 2**28
MAX_TASKS = 1000
NO_TASKS = "has no list icl_tasks of tasks with label, dataset_uri and num_fewshot"

Read = Callable[[str], bytes]
"""Reads a file by its name in the bundle. Raises ValueError if it cannot be read."""
Example = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """Task of a bundle."""

    label: str
    kind: str
    """Type: multiple_choice, schema or language_modeling."""
    file: str
    """File of examples, relative to the bundle's folder."""
    shots: int
    """Examples shown before the scored one."""
    delimiter: str
    """Text between a question and its answer."""
    baseline: float
    """Accuracy of guessing, from the bundle's csv."""
    corrected: float
    """Accuracy of guessing as DCLM corrected it."""


@dataclass(frozen=True)
class Bundle:
    """Bundle on disk."""

    id: str
    """First 16 hex digits of the SHA-256 over names and contents of the files read."""
    folder: Path
    tasks: tuple[Task, ...]
    """Tasks in the order of core.yaml."""
    name: str = CORE
    """Name from core.yaml, under which its mean over tasks is recorded."""

    def examples(self, task: Task) -> list[Example]:
        """Return a task's examples in file order.

        Raises ValueError with file and line of a bad example.
        """
        path = self.folder / task.file
        return _examples(task, path.read_bytes(), path)


def read(folder: Path) -> Bundle:
    """Return the bundle in a folder that holds core.yaml, or that holds one such folder.

    Raises ValueError if it is not a bundle, or if a file is missing or outside the folder.
    """
    root = _root(folder)
    bundle, _ = _load(_folder_reader(root), root)
    return bundle


def install(source: Path, home: Path) -> Bundle:
    """Check the bundle in a zip or a folder, and copy it into a home under its id.

    Raises ValueError, before anything is written, if it is not a complete bundle.
    """
    with _open(source) as content:
        bundle, contents = _load(content, source)
    for task in bundle.tasks:
        _examples(task, contents[task.file], f"{source}: {task.file}")
    folder = _bundles(home) / bundle.id
    if not folder.exists():
        _write(contents, folder)
    return replace(bundle, folder=folder)


def installed(home: Path, name: str | None = None) -> Bundle:
    """Return a home's only bundle of this name, id or first digits of an id; CORE by default.

    Raises ValueError if there is none, if there are several, or if its files were changed.
    """
    names = names_of(home)
    key = name or CORE
    matches = [id for id in names if names[id] == key] or [id for id in names if id.startswith(key)]
    if len(matches) != 1:
        choices = ", ".join(f"{id} ({names[id]})" for id in names)
        choose = f"choose one of {choices} with --bundle"
        if matches:
            raise ValueError(f"{len(matches)} bundles match {key!r} in {home}: {choose}")
        fix = choose if choices and name else "get it with `slm data core`"
        raise ValueError(
            f"no bundle {key!r} in {home}: {fix}; "
            "--bundle pocket-core makes one from the run's own held-out text"
        )
    folder = _bundles(home) / matches[0]
    bundle = read(folder)
    if bundle.id != matches[0]:
        raise ValueError(
            f"{folder} was changed (its content is bundle {bundle.id}): remove it and get it again"
        )
    return bundle


def names_of(home: Path) -> dict[str, str]:
    """Return the name of every bundle of a home by id. Raises ValueError for a bad core.yaml."""
    indices = sorted(_bundles(home).glob(f"[!.]*/{INDEX}"))
    return {path.parent.name: _index(path.read_bytes(), path)[1] for path in indices}


def _bundles(home: Path) -> Path:
    return home / "data" / "core"


@contextmanager
def _open(source: Path) -> Iterator[Read]:
    """Yield a reader for a zip or a folder."""
    if source.is_dir():
        yield _folder_reader(_root(source))
        return
    if not source.is_file():
        raise ValueError(f"{source}: neither a zip nor a folder")
    try:
        with zipfile.ZipFile(source) as file:
            yield _zip_reader(file, source)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ValueError(f"{source} is not a complete zip file: {error}") from None


def _root(folder: Path) -> Path:
    """Return the folder that holds core.yaml: this one, or the only one inside it."""
    if (folder / INDEX).is_file():
        return folder
    roots = sorted(path.parent for path in folder.glob(f"*/{INDEX}"))
    if not roots:
        raise ValueError(f"{folder} is not a bundle: there is no {INDEX} in it")
    if len(roots) > 1:
        names = ", ".join(path.name for path in roots)
        raise ValueError(f"{folder} holds {len(roots)} bundles: name one of {names}")
    return roots[0]


def _folder_reader(folder: Path) -> Read:
    """Return a reader of a folder's files that refuses links to the outside."""
    root = folder.resolve()

    def read_file(name: str) -> bytes:
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            raise ValueError(f"{folder / name} is a link out of the bundle")
        if not path.is_file():
            raise ValueError(f"{folder} has no {name}")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"{path} is larger than {MAX_FILE_BYTES:,} bytes")
        return path.read_bytes()

    return read_file


def _zip_reader(file: zipfile.ZipFile, source: Path) -> Read:
    """Return a reader of the files next to the zip's core.yaml; nothing is unpacked by path."""
    indices = [name for name in file.namelist() if PurePosixPath(name).name == INDEX]
    if not indices:
        raise ValueError(f"{source} is not a bundle: there is no {INDEX} in it")
    root = min(indices, key=len).removesuffix(INDEX)

    def read_file(name: str) -> bytes:
        path = root + name
        try:
            member = file.getinfo(path)
        except KeyError:
            raise ValueError(f"{source} has no {path}") from None
        problems = {
            "is a link": stat.S_ISLNK(member.external_attr >> 16),
            "is encrypted": member.flag_bits & 1,
            f"is larger than {MAX_FILE_BYTES:,} bytes": member.file_size > MAX_FILE_BYTES,
        }
        _raise_first(problems, f"{source}: {path}")
        return file.read(member)

    return read_file


def _load(content: Read, source: Path) -> tuple[Bundle, dict[str, bytes]]:
    """Return the bundle at a source, and the contents of the files that CORE reads."""
    contents = {name: content(name) for name in (INDEX, BASELINES)}
    entries, name = _index(contents[INDEX], f"{source}: {INDEX}")
    baselines = _baselines(contents[BASELINES], f"{source}: {BASELINES}")
    tasks = _tasks(entries, baselines, f"{source}: {INDEX}")
    for task in tasks:
        if task.file not in contents:
            contents[task.file] = content(task.file)
    hashes = [[file, fingerprint(contents[file], 64)] for file in sorted(contents)]
    return Bundle(fingerprint(json.dumps(hashes)), source, tasks, name), contents


def _raise_first(problems: dict[str, Any], subject: str) -> None:
    """Raise ValueError with the first of the problems that a subject has."""
    for problem, has_problem in problems.items():
        if has_problem:
            raise ValueError(f"{subject} {problem}")


def _index(text: bytes, source: Path | str) -> tuple[list[Any], str]:
    """Return the entries of core.yaml, and the name that it gives the bundle."""
    try:
        document = yaml.safe_load(text)
        entries = list(document["icl_tasks"])
        name = document.get("name", CORE)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not YAML: {' '.join(str(error).split())}") from None
    except (AttributeError, KeyError, TypeError):
        raise ValueError(f"{source} {NO_TASKS}") from None
    if not re.fullmatch(r"[a-z][a-z0-9-]{0,31}", str(name)):
        raise ValueError(
            f"{source}: name {name!r} must be a lower-case letter, then letters, digits and -"
        )
    return entries, str(name)


def _tasks(entries: list[Any], baselines: dict[str, float], source: str) -> tuple[Task, ...]:
    try:
        tasks = tuple(_task(entry, baselines, source) for entry in entries)
    except (KeyError, TypeError):
        raise ValueError(f"{source} {NO_TASKS}") from None
    names = {task.label for task in tasks}
    if not 0 < len(tasks) <= MAX_TASKS or len(names) < len(tasks):
        raise ValueError(
            f"{source} has {len(tasks)} tasks, {len(names)} by name: "
            f"it takes 1 to {MAX_TASKS}, each once"
        )
    return tasks


def _task(entry: dict[str, Any], baselines: dict[str, float], source: str) -> Task:
    label = entry["label"]
    uri = entry["dataset_uri"]
    shots = entry["num_fewshot"]
    kind = entry.get("icl_task_type")
    is_count = isinstance(shots, list) and len(shots) == 1 and isinstance(shots[0], int)
    problems = {
        "has a name of more than letters, digits, _, - and .": not LABEL.fullmatch(str(label)),
        f"has type {kind!r}, which is none of {', '.join(FIELDS)}": kind not in FIELDS,
        f"has num_fewshot {shots!r}, not a list of one number": not is_count or shots[0] < 0,
        f"reads {uri!r}, which is not a plain path below {EXAMPLES}": not PATH.fullmatch(str(uri)),
        f"has no baseline in {BASELINES}": str(label) not in baselines,
    }
    _raise_first(problems, f"{source}: task {label!r}")
    baseline = baselines[label]
    return Task(
        label=label,
        kind=str(kind),
        file=f"{EXAMPLES}/{uri}",
        shots=shots[0],
        delimiter=str(entry.get("continuation_delimiter", " ")),
        baseline=baseline,
        corrected=CORRECTED.get(label, baseline),
    )


def _baselines(text: bytes, source: str) -> dict[str, float]:
    """Return the accuracy of guessing by task; the csv has it in percent."""
    rows = csv.DictReader(io.StringIO(text.decode(errors="replace")))
    try:
        baselines = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in rows}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{source} has no columns 'Eval Task' and 'Random baseline' in percent ({error})"
        ) from None
    for name, baseline in baselines.items():
        if not 0 <= baseline < 1:
            raise ValueError(f"{source}: the baseline of {name} is not from 0 to below 100")
    return baselines


def _examples(task: Task, content: bytes, source: Path | str) -> list[Example]:
    examples = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            example = json.loads(line)
            problem = _problem(task, example)
        except ValueError:
            problem = "not JSON"
        if problem:
            raise ValueError(f"{source}, line {number}: {problem}")
        examples.append(example)
    if len(examples) <= task.shots:
        raise ValueError(
            f"{source} has {len(examples)} examples: "
            f"too few for the {task.shots} shots of {task.label}"
        )
    return examples


def _problem(task: Task, example: Any) -> str | None:
    """Return why a value is not an example of a task; None if it is one."""
    if not isinstance(example, dict):
        return "not a JSON object"
    for name in FIELDS[task.kind]:
        value = example.get(name)
        if name == OPTIONS.get(task.kind):
            options = value if isinstance(value, list) else []
            if not options or not all(isinstance(option, str) for option in options):
                return f"{name!r} is not a list of texts"
        elif name == "gold":
            if type(value) is not int or not 0 <= value < len(options):
                return f"'gold' is {value!r}, not the index of one of its {len(options)} choices"
        elif not isinstance(value, str):
            return f"{name!r} is not a text"
    return None


def _write(contents: dict[str, bytes], folder: Path) -> None:
    """Write a folder completely or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder.parent) as temporary:
        unfinished = Path(temporary, "bundle")
        for name, content in contents.items():
            path = unfinished / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.write(content)
                os.fsync(file.fileno())
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another process was first
                raise
