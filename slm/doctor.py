"""What this machine can run and what is missing: a flat list of checks, each one line for people with the way out.

A check looks and changes nothing, but for a file in the home that it makes and removes. None loads torch here: whether
it loads is asked of a process of its own, last.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Literal

from slm.experiment import Experiment, RequestedRun
from slm.files import lock_holder, read_json
from slm.hardware import devices
from slm.hardware.slot import Slot
from slm.recipe import Hyperparameters
from slm.run import is_done, is_on_this_machine, last_attempt, read_exit

FILES, FEW_FILES = 256, 1024
"""Open files below which a sweep fails, and below which a large one may."""
PROCESSES = 256
"""Processes that a sweep may need beside those there are: ranks, supervisors, compilers."""
DISK, LITTLE_DISK = 1e9, 20e9
"""Bytes free below which nothing should start, and below which a home soon fills."""
SHARED_MEMORY = 2**30
"""Bytes of /dev/shm that several GPUs of one run want; containers have 64 MB by default."""
STATE_BYTES = 12
"""Bytes of a checkpoint a parameter, at most: the weights and two moments."""
REMOTE = (
    "nfs",
    "nfs4",
    "lustre",
    "gpfs",
    "beegfs",
    "cifs",
    "smb3",
    "ceph",
    "fuse.sshfs",
    "9p",
    "afs",
)
"""File systems of several machines, by the kernel's names."""
SLURM = ("sbatch", "squeue", "scancel", "scontrol")
ANSWER_SECONDS = 3.0
"""Time in which a server answers."""
LOAD_SECONDS = 120.0
"""Time in which torch loads, from the slowest of network file systems."""
TORCH = """
import torch
found = [f"{torch.cuda.device_count()} CUDA"] if torch.cuda.is_available() else []
found += ["MPS"] if torch.backends.mps.is_available() else []
print(f"{torch.__version__} loads; devices: {', '.join([*found, 'cpu'])}")
"""

State = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """What a check found."""

    check: str
    """What was looked at, in a word or two."""
    state: State
    """`note` is what may matter, `problem` what keeps something from running."""
    message: str
    """One sentence: the values, and the way out."""


Check = Callable[[], Iterator[Finding]]


def machine(home: Path, url: str | None = None) -> list[tuple[str, Check]]:
    """The checks of a machine and a home, by name; with a `url`, whether its server answers."""
    checks: list[tuple[str, Check]] = [
        ("python", python),
        ("packages", packages),
        ("devices", found_devices),
        ("cores", cores),
        ("compiler", compiler),
        ("limits", limits),
        ("home", lambda: writable(home)),
        ("locks", lambda: locking(home)),
        ("disk", lambda: disk(home)),
        ("data", lambda: prepared(home)),
        ("runs", lambda: leftovers(home)),
        ("slurm", slurm),
        ("store", lambda: database(home)),
    ]
    return [*checks, *([("network", lambda: network(url))] if url else [])]


def plan(experiment: Experiment, home: Path, core: bool) -> list[tuple[str, Check]]:
    """The checks of an experiment's runs here; `core` asks for a bundle, too."""
    asked = experiment.requested_runs()
    checks: list[tuple[str, Check]] = [
        ("plan: data", lambda: enough_data(experiment, asked, home)),
        ("plan: memory", lambda: enough_memory(asked)),
        ("plan: disk", lambda: enough_disk(asked, home)),
    ]
    return [*checks, *([("plan: CORE", lambda: bundle(home))] if core else [])]


def examine(checks: Sequence[tuple[str, Check]]) -> Iterator[Finding]:
    """The findings, each as soon as it is there; a check that cannot look is a problem, and the others go on."""
    for name, check in checks:
        try:
            yield from check()
        except (RuntimeError, ValueError) as error:
            yield Finding(name, "problem", " ".join(str(error).split()))
        except (OSError, KeyError, TypeError) as error:
            yield Finding(name, "problem", f"could not look ({type(error).__name__}: {error})")


def python() -> Iterator[Finding]:
    """The interpreter against what the package asks for."""
    from packaging.specifiers import SpecifierSet

    wanted, here = metadata.metadata("slm")["Requires-Python"], platform.python_version()
    known = SpecifierSet(wanted).contains(here)
    way = "" if known else ": make an environment with one of those"
    yield Finding("python", "ok" if known else "problem", f"{here} (supported: {wanted}){way}")


def packages() -> Iterator[Finding]:
    """Every package against the range that slm names."""
    from packaging.requirements import Requirement

    wanted = [Requirement(text) for text in metadata.requires("slm") or ()]
    needed = [own for own in wanted if own.marker is None or own.marker.evaluate({"extra": ""})]
    wrong = [why for own in needed if (why := wrong_version(own.name, str(own.specifier)))]
    if wrong:
        names = " ".join(f"'{why.partition(' ')[0]}{why.rpartition(' ')[2]}'" for why in wrong)
        yield Finding("packages", "problem", f"{'; '.join(wrong)}: pip install {names}")
    else:
        yield Finding("packages", "ok", f"{len(needed)} as needed, slm {metadata.version('slm')}")


def wrong_version(name: str, wanted: str) -> str | None:
    """What is wrong with an installed package: `NAME … wants RANGE`; None when nothing is."""
    from packaging.specifiers import SpecifierSet

    try:
        here = metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"{name} is not installed, slm wants {wanted}"
    return (
        None
        if SpecifierSet(wanted).contains(here, prereleases=True)
        else f"{name} is {here}, slm wants {wanted}"
    )


def found_devices() -> Iterator[Finding]:
    """GPUs, and whether torch was built for them; asked of the driver and of torch's files."""
    names, built = devices.gpu_names(), torch_cuda()
    if names:
        memory = f"{(devices.gpu_memory() or 0) / 1e9:.3g} GB, driver {devices.driver()}"
        what = f"{len(names)} x {names[0]}, {memory}"
        if built is None:
            way = "torch is built without CUDA, so they stay idle: install torch's CUDA build"
            yield Finding("devices", "problem", f"{what}; {way}")
        else:
            yield Finding("devices", "ok", f"{what}; torch is built for CUDA {built}")
    elif devices.apple_gpu():
        yield Finding(
            "devices",
            "note",
            f"{devices.name('mps')}: `slm sweep --gpus 1` takes it, else the cores train",
        )
    elif built:
        yield Finding(
            "devices",
            "note",
            f"no GPU is seen, though torch is built for CUDA {built}: the cores train",
        )
    else:
        yield Finding(
            "devices", "ok", "no GPU: the cores train, which is what recipe pocket is for"
        )


def torch_cuda() -> str | None:
    """The CUDA that torch is built for, by its own version file, which takes no import; None without."""
    spec = util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    found = re.search(
        r"^cuda\b[^=]*= *'([\d.]+)'",
        Path(spec.origin).with_name("version.py").read_text(),
        re.MULTILINE,
    )
    return found[1] if found else None


def cores() -> Iterator[Finding]:
    """Cores and memory that this process may use."""
    import psutil

    free = min(psutil.virtual_memory().available, devices.memory())
    text = f"{devices.cores()} x {devices.name('cpu')}, {devices.memory() / 1e9:.3g} GB of which {free / 1e9:.3g} free"
    yield Finding("cores", "ok", text)


def compiler() -> Iterator[Finding]:
    """What `torch.compile` calls."""
    names = (os.environ.get("CXX", "g++"), "clang++")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found:
        yield Finding("compiler", "ok", f"{found} compiles long runs")
    else:
        way = "long runs train uncompiled, which is slower: install g++, or name one in CXX"
        yield Finding("compiler", "note", f"no {' and no '.join(names)}: {way}")


def limits() -> Iterator[Finding]:
    """Open files, processes and shared memory."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    room, shared = process_room(), shared_memory()
    found = []
    if 0 <= files < FEW_FILES:
        state: State = "problem" if files < FILES else "note"
        found.append(
            Finding("limits", state, f"{files} open files: `ulimit -n {4 * FEW_FILES}` allows more")
        )
    if room is not None and room < PROCESSES:
        state = "problem" if room < devices.cores() else "note"
        found.append(
            Finding("limits", state, f"{room} more processes are allowed: `ulimit -u` allows more")
        )
    if shared is not None and shared < SHARED_MEMORY and devices.gpu_count() > 1:
        way = "give the container more (--shm-size=8g, --ipc=host), or take --gpus-per-run 1"
        found.append(
            Finding(
                "limits", "problem", f"/dev/shm has {shared / 1e6:.0f} MB for several GPUs: {way}"
            )
        )
    yield from found or [
        Finding("limits", "ok", f"{files if files >= 0 else 'any number of'} open files, processes")
    ]


def process_room() -> int | None:
    """Processes that this user may still start; None without a limit."""
    import psutil

    most = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if most == resource.RLIM_INFINITY or os.getuid() == 0:  # root is not held to it
        return None
    own = [process for process in psutil.process_iter(["uids"]) if process.info["uids"]]
    return most - sum(process.info["uids"].real == os.getuid() for process in own)


def shared_memory() -> int | None:
    """Bytes of /dev/shm; None where there is none."""
    folder = Path("/dev/shm")
    return shutil.disk_usage(folder).total if folder.is_dir() else None


def writable(home: Path) -> Iterator[Finding]:
    """Whether files can be made and renamed in the home."""
    if (problem := unwritable(home)) is None:
        made = "" if home.is_dir() else " (a sweep makes it)"
        yield Finding("home", "ok", f"{home.absolute()}{made} can be written")
    else:
        yield Finding(
            "home",
            "problem",
            f"{home.absolute()} cannot be written ({problem}): SLM_HOME names another",
        )


def unwritable(home: Path) -> str | None:
    """Why no file can be made in a home, or where it will be made; None when one can."""
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=standing(home)) as folder:
            (Path(folder) / "a").write_text("slm")
            (Path(folder) / "a").rename(Path(folder) / "b")
    except OSError as error:
        return error.strerror or str(error)
    return None


def standing(home: Path) -> Path:
    """The home, else the folder above that there is."""
    return next(folder for folder in (home.absolute(), *home.absolute().parents) if folder.exists())


def locking(home: Path) -> Iterator[Finding]:
    """Whether a lock keeps others out, as runs, sweeps and the store rely on; and who holds the home's."""
    if unwritable(home):
        return
    kind = file_system(home)
    if problem := unlockable(standing(home)):
        way = f"two sweeps could train one run: mount {kind or 'it'} with locks, or put SLM_HOME on another disk"
        yield Finding("locks", "problem", f"{problem}; {way}")
    elif kind in REMOTE:
        way = "hold on this machine; between machines they need its lock service (no `nolock`, no `local_lock`)"
        yield Finding("locks", "note", f"the home lies on {kind}: locks {way}")
    else:
        yield Finding("locks", "ok", f"hold here{f', on {kind}' if kind else ''}")
    for name, what in (
        ("sweep.lock", "conducts a sweep of this home"),
        ("store.lock", "writes its database"),
    ):
        if process := lock_holder(home / name):
            yield Finding(
                "locks", "note", f"process {process} {what}: `slm status --watch` shows it"
            )


def unlockable(folder: Path) -> str | None:
    """What is wrong with `flock` in a folder: it is refused, or granted twice; None when it is right."""
    with (
        tempfile.NamedTemporaryFile(prefix=".doctor-", dir=folder) as first,
        open(first.name) as second,
    ):
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return f"this file system refuses locks ({error.strerror})"
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
    return "this file system grants one lock twice"


def file_system(home: Path) -> str | None:
    """What the kernel calls the file system of a home; None where it does not say."""
    import psutil

    place = standing(home).resolve()
    mounts = [
        own for own in psutil.disk_partitions(all=True) if place.is_relative_to(own.mountpoint)
    ]
    return max(mounts, key=lambda own: len(own.mountpoint)).fstype if mounts else None


def disk(home: Path) -> Iterator[Finding]:
    """Space at the home."""
    free = shutil.disk_usage(standing(home)).free
    text = f"{free / 1e9:.3g} GB free at the home"
    if free < LITTLE_DISK:
        state: State = "problem" if free < DISK else "note"
        yield Finding(
            "disk",
            state,
            f"{text}: free some, `slm rm` removes runs, or SLM_HOME names another disk",
        )
    else:
        yield Finding("disk", "ok", text)


def prepared(home: Path) -> Iterator[Finding]:
    """Corpora and bundles that are there."""
    found, wrong = [], []
    for path in sorted((home / "data").glob("*/manifest.json")):
        try:
            manifest = read_json(path)
            found.append(
                f"{path.parent.name} ({manifest['train']['rows'] * (manifest['row_tokens'] - 1):,} tokens)"
            )
        except (ValueError, KeyError, TypeError):
            wrong.append(
                Finding(
                    "data",
                    "problem",
                    f"{path} cannot be read: remove its folder and prepare it again",
                )
            )
    bundles = [folder.name for folder in bundles_of(home)]
    text = f"corpora: {', '.join(found) or 'none yet (a sweep prepares what it needs)'}"
    yield from wrong
    yield Finding(
        "data", "ok", f"{text}; bundles: {', '.join(bundles) or 'none (`slm data core` gets one)'}"
    )


def bundles_of(home: Path) -> list[Path]:
    """Folders of the bundles that a home has."""
    return sorted(path.parent for path in (home / "data" / "core").glob("[!.]*/core.yaml"))


def leftovers(home: Path) -> Iterator[Finding]:
    """What dead processes left: runs without a word of their end, trainers without a supervisor, half-made folders."""
    folders, dead, alone = sorted(path.parent for path in home.glob("*/plan.json")), [], []
    for folder in folders:
        last = last_attempt(folder)
        supervisor, trainer = (lock_holder(folder / name) for name in ("lock", "train.lock"))
        if supervisor is None and trainer is not None:
            alone.append(f"{folder.name} (process {trainer})")
        elif supervisor is None and last and is_on_this_machine(folder) and not is_done(folder):
            dead += [folder.name] if read_exit(last) is None else []
    half = [
        path.parent
        for path in home.glob("data/*/lock")
        if not (path.parent / "manifest.json").exists()
    ]
    half = [folder for folder in half if lock_holder(folder / "lock") is None]
    if alone:
        yield Finding(
            "runs",
            "note",
            f"train without a supervisor: {named(alone)}; `slm sweep` typed again adopts them",
        )
    if dead:
        yield Finding(
            "runs",
            "note",
            f"ended without a word: {named(dead)}; `slm sweep` typed again goes on with them",
        )
    if half:
        yield Finding(
            "runs",
            "note",
            f"half-prepared data: {named([path.name for path in half])}; the next sweep goes on",
        )
    if not (alone or dead or half):
        yield Finding(
            "runs", "ok", f"{len(folders)} in the home, nothing left behind by dead processes"
        )


def named(words: Sequence[str], most: int = 4) -> str:
    """Some of the words, and how many more."""
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def slurm() -> Iterator[Finding]:
    """Slurm's commands, and whether it answers."""
    from slm.sweep.slurm import queue

    missing = [name for name in SLURM if shutil.which(name) is None]
    if len(missing) == len(SLURM):
        yield Finding("slurm", "ok", "none here: runs train on this machine")
    elif missing:
        yield Finding(
            "slurm",
            "problem",
            f"no {', '.join(missing)} beside the others: sweep where you submit jobs from",
        )
    else:
        try:
            yield Finding("slurm", "ok", f"answers, {len(queue())} jobs of runs in the queue")
        except RuntimeError as error:
            yield Finding("slurm", "note", f"does not answer ({error}): --launcher slurm needs it")


def database(home: Path) -> Iterator[Finding]:
    """Whether the store, in the home or on the server that SLM_STORE names, answers and holds the files as they are."""
    import store
    from store import paths

    try:
        if url := paths.server_url():
            from store import server

            what = f"{server.ping(url)} answers"
        elif paths.snapshot(home).exists():
            runs = store.sql("select count(*) as n from runs", home=home)["n"].iloc[0]
            what = f"runs: {runs}"
        else:
            yield Finding("store", "ok", "no results yet: the first sweep makes them")
            return
    except store.StoreError as error:
        yield Finding("store", "problem", str(error))
        return
    if store.is_current(home):
        yield Finding("store", "ok", f"{what}, as the files are")
    else:
        way = "any command that reads results brings it up to date; if that fails, `slm store rebuild`"
        yield Finding("store", "note", f"{what}, older than the files: {way}")


def network(url: str) -> Iterator[Finding]:
    """Whether the bundle of CORE can be downloaded from here."""
    from urllib.parse import urlsplit

    host = urlsplit(url).hostname or ""
    try:
        socket.create_connection((host, 443), ANSWER_SECONDS).close()
        yield Finding("network", "ok", f"{host} answers: `slm data core` can download")
    except OSError as error:
        yield Finding(
            "network",
            "note",
            f"{host} is not reached ({error}): `slm data core --from ZIP` takes a copy",
        )


def torch_loads() -> Iterator[Finding]:
    """Whether torch loads, in a process of its own, and the devices it sees."""
    began = time.monotonic()
    command = [sys.executable, "-c", TORCH]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=LOAD_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        yield Finding(
            "torch", "problem", f"does not load within {LOAD_SECONDS:.0f} s: look at its disk"
        )
        return
    said = (result.stdout if result.returncode == 0 else result.stderr).strip().splitlines()
    if result.returncode:
        yield Finding(
            "torch",
            "problem",
            f"does not load ({said[-1] if said else result.returncode}): install it anew",
        )
    elif devices.gpu_count() and torch_cuda() and "CUDA" not in said[-1]:
        yield Finding(
            "torch",
            "problem",
            f"{said[-1]}: it cannot use the GPU; its CUDA and the driver do not match",
        )
    else:
        yield Finding("torch", "ok", f"{said[-1]} ({time.monotonic() - began:.1f} s)")


def enough_data(experiment: Experiment, asked: Sequence[RequestedRun], home: Path) -> Iterator[Finding]:
    """Whether the corpus is there, prepared, and long enough for every run."""
    from slm.sweep.planning import Corpora, plan_of

    corpora, short = Corpora(experiment, home), []
    for run in asked:
        data = corpora.find(run)
        if data is None:
            way = f"`slm data prepare {experiment.data} --recipe {run.recipe}` does it now, else the sweep"
            yield Finding(
                "plan: data",
                "note",
                f"corpus {experiment.data} is not prepared for {run.recipe}: {way}",
            )
            return
        try:
            plan_of(run, data)
        except ValueError as error:
            short.append(str(error))
    if short:
        yield Finding("plan: data", "problem", f"{len(short)} of {len(asked)} runs: {short[0]}")
    else:
        yield Finding(
            "plan: data", "ok", f"corpus {experiment.data} has the rows of all {len(asked)} runs"
        )


def enough_memory(asked: Sequence[RequestedRun]) -> Iterator[Finding]:
    """Whether every run has a share of the devices of which the memory holds one row a pass."""
    from slm.sweep import local

    here = local.machine()
    slots = [here.slot(range(count)) for count in local.sizes("auto", here)]
    failed: dict[int, str] = {}
    for given in [run.hyperparameters for run in asked]:
        refusals = [why for slot in slots if (why := too_much(given, slot))]
        if len(refusals) == len(slots):
            failed[given.depth] = refusals[-1]
    if failed:
        yield Finding(
            "plan: memory",
            "problem",
            f"{failed[min(failed)]} ({len(failed)} depths do not fit here)",
        )
    else:
        yield Finding(
            "plan: memory",
            "ok",
            f"all {len(asked)} runs fit on {len(here.ids)} x {here.device_name}",
        )


def too_much(given: Hyperparameters, slot: Slot) -> str | None:
    """Why the memory of a slot does not hold a run; None when it does."""
    from slm.sweep.micro_batch import MicroBatches

    try:
        MicroBatches().rows(given, slot)
    except ValueError as error:
        return str(error)
    return None


def enough_disk(asked: Sequence[RequestedRun], home: Path) -> Iterator[Finding]:
    """Whether the weights of all runs fit beside two checkpoints of the largest on every device."""
    from slm.sweep import local

    sizes = [run.hyperparameters.parameters.total for run in asked]
    need = 4 * sum(sizes) + 2 * STATE_BYTES * max(sizes) * min(len(sizes), len(local.machine().ids))
    free = shutil.disk_usage(standing(home)).free
    text = f"weights and checkpoints take {need / 1e9:.3g} GB of {free / 1e9:.3g} free"
    if need > free:
        yield Finding("plan: disk", "problem", f"{text}: free some, or SLM_HOME names another disk")
    else:
        yield Finding("plan: disk", "ok", text)


def bundle(home: Path) -> Iterator[Finding]:
    """Whether there is a bundle to evaluate with, its files as they were."""
    from slm.evaluate.bundle import read

    found = bundles_of(home)
    if not found:
        yield Finding("plan: CORE", "problem", f"no bundle in {home}: `slm data core` gets it")
    for folder in found:
        own = read(folder)
        if own.id == folder.name:
            yield Finding("plan: CORE", "ok", f"bundle {own.id}: {len(own.tasks)} tasks")
        else:
            yield Finding(
                "plan: CORE", "problem", f"{folder} was changed: remove it and get it again"
            )
