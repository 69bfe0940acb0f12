"""Checks of what this machine can run and what is missing.

Each check yields one line per result, for people, with the way out. Checks change nothing except
for files that they make in the home and remove. None imports torch here: the last one loads it in
another process.
"""

from __future__ import annotations

import fcntl
import math
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
from functools import partial
from importlib import metadata, util
from pathlib import Path
from typing import Literal, NamedTuple

from slm.experiment import Experiment, RequestedRun
from slm.files import lock_holder, read_json
from slm.hardware import devices
from slm.hardware.slot import Slot
from slm.recipe import Hyperparameters
from slm.run import is_done, is_on_this_machine, last_attempt, list_runs, read_exit
from slm.text import first_few, plural

MIN_FILES = 256
"""Open files below which a sweep fails."""
LOW_FILES = 1024
"""Open files below which a large sweep may fail."""
LOW_PROCESSES = 256
"""Processes that a sweep may start: ranks, supervisors, compilers."""
MIN_DISK = 1e9
"""Free bytes below which no run should start."""
LOW_DISK = 20e9
"""Free bytes below which the disk soon fills up."""
MIN_SHARED_MEMORY = 2**30
"""Bytes of /dev/shm for a run on several GPUs; containers have 64 MB by default."""
STATE_BYTES = 12
"""Bytes of a checkpoint per parameter, at most: the weights and two moments."""
NETWORK_FILE_SYSTEMS = {
    *("nfs", "nfs4", "lustre", "gpfs", "beegfs", "cifs"),
    *("smb3", "ceph", "fuse.sshfs", "9p", "afs"),
}
"""File systems of several machines, by the kernel's names."""
SLURM_COMMANDS = ("sbatch", "squeue", "scancel", "scontrol")
CONNECT_SECONDS = 3.0
"""Time for a server to answer."""
LOAD_SECONDS = 120.0
"""Time for torch to load, from a slow network file system too."""
TORCH = """
import torch
devices = [f"{torch.cuda.device_count()} CUDA"] if torch.cuda.is_available() else []
devices += ["MPS"] if torch.backends.mps.is_available() else []
print(f"{torch.__version__} loads; devices: {', '.join([*devices, 'cpu'])}")
"""

State = Literal["ok", "note", "problem"]


class Outcome(NamedTuple):
    """Result of a check."""

    state: State
    """`note` may matter, `problem` keeps something from running."""
    message: str
    """Sentence with the values and the way out."""


class Finding(NamedTuple):
    """Result with the name of its check."""

    check: str
    state: State
    message: str


Check = Callable[[], Iterator[Outcome]]


def ok(message: str) -> Outcome:
    """Return the result of a check that passed."""
    return Outcome("ok", message)


def note(message: str) -> Outcome:
    """Return a result that may matter."""
    return Outcome("note", message)


def problem(message: str) -> Outcome:
    """Return a result that keeps something from running."""
    return Outcome("problem", message)


def machine_checks(home: Path, url: str | None = None) -> list[tuple[str, Check]]:
    """Return the checks of a machine and a home, by name; with `url`, also of its server."""
    machine: dict[str, Check] = {
        "python": python_version,
        "packages": package_versions,
        "devices": gpus,
        "cores": cores,
        "compiler": compiler,
        "limits": limits,
        "slurm": slurm,
    }
    of_home = {
        "home": writable,
        "locks": locks,
        "disk": disk,
        "data": prepared,
        "runs": leftovers,
        "store": database,
    }
    checks = list(machine.items())
    for name, check in of_home.items():
        checks.append((name, partial(check, home)))
    if url:
        checks.append(("network", partial(network, url)))
    return checks


def plan_checks(experiment: Experiment, home: Path, core: bool) -> list[tuple[str, Check]]:
    """Return the checks of an experiment's runs on this machine; `core` adds that of a bundle."""
    runs = experiment.requested_runs()
    checks: list[tuple[str, Check]] = [
        ("plan: data", partial(plan_data, experiment, runs, home)),
        ("plan: memory", partial(plan_memory, runs)),
        ("plan: disk", partial(plan_disk, runs, home)),
    ]
    if core:
        checks.append(("plan: CORE", partial(plan_bundle, home)))
    return checks


def examine(checks: Sequence[tuple[str, Check]]) -> Iterator[Finding]:
    """Yield findings as soon as they are known. A check that fails is a problem; the others run."""
    for name, check in checks:
        try:
            for outcome in check():
                yield Finding(name, *outcome)
        except (RuntimeError, ValueError) as error:
            yield Finding(name, "problem", " ".join(str(error).split()))
        except (OSError, KeyError, TypeError) as error:
            message = f"the check failed ({type(error).__name__}: {error})"
            yield Finding(name, "problem", message)


# The machine


def python_version() -> Iterator[Outcome]:
    """Check the interpreter against the versions that slm supports."""
    from packaging.specifiers import SpecifierSet

    supported = metadata.metadata("slm")["Requires-Python"]
    version = f"{platform.python_version()} (supported: {supported})"
    if SpecifierSet(supported).contains(platform.python_version()):
        yield ok(version)
    else:
        yield problem(f"{version}: make an environment with one of those")


def package_versions() -> Iterator[Outcome]:
    """Check every package against the range that slm requires."""
    from packaging.requirements import Requirement

    requirements = [Requirement(text) for text in metadata.requires("slm") or ()]
    required = [
        requirement
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    ]
    errors = {}
    for requirement in required:
        if error := version_error(requirement.name, str(requirement.specifier)):
            errors[f"'{requirement.name}{requirement.specifier}'"] = error
    if errors:
        yield problem(f"{'; '.join(errors.values())}: pip install {' '.join(errors)}")
    else:
        yield ok(f"{len(required)} as required, slm {metadata.version('slm')}")


def version_error(name: str, required: str) -> str | None:
    """Return what is wrong with an installed package, None if its version is in the range."""
    from packaging.specifiers import SpecifierSet

    try:
        installed = metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"{name} is not installed, slm requires {required}"
    if SpecifierSet(required).contains(installed, prereleases=True):
        return None
    return f"{name} is {installed}, slm requires {required}"


def gpus() -> Iterator[Outcome]:
    """Check GPUs, and that torch is built for them, by the driver and by torch's files."""
    names = devices.gpu_names()
    cuda = torch_cuda()
    if names:
        memory = f"{(devices.gpu_memory() or 0) / 1e9:.3g} GB, driver {devices.driver()}"
        description = f"{len(names)} x {names[0]}, {memory}"
        if cuda is None:
            yield problem(
                f"{description}; torch is built without CUDA, so they stay idle: "
                "install torch's CUDA build"
            )
        else:
            yield ok(f"{description}; torch is built for CUDA {cuda}")
    elif devices.apple_gpu():
        yield note(f"{devices.name('mps')}: `slm sweep --gpus 1` uses it, else the CPU trains")
    elif cuda:
        yield note(f"no GPU found, though torch is built for CUDA {cuda}: the CPU trains")
    else:
        yield ok("no GPU: the CPU trains, which the recipe pocket is made for")


def torch_cuda() -> str | None:
    """Return the CUDA version torch is built for, from its version.py without importing it."""
    spec = util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = Path(spec.origin).with_name("version.py").read_text()
    match = re.search(r"^cuda\b[^=]*= *'([\d.]+)'", text, re.MULTILINE)
    return match[1] if match else None


def cores() -> Iterator[Outcome]:
    """Report the cores and memory that this process may use."""
    import psutil

    free = min(psutil.virtual_memory().available, devices.memory())
    memory = f"{devices.memory() / 1e9:.3g} GB of which {free / 1e9:.3g} free"
    yield ok(f"{devices.cores()} x {devices.name('cpu')}, {memory}")


def compiler() -> Iterator[Outcome]:
    """Check that there is a compiler for `torch.compile`."""
    names = (os.environ.get("CXX", "g++"), "clang++")
    path = shutil.which(names[0]) or shutil.which(names[1])
    if path:
        yield ok(f"{path} compiles long runs")
    else:
        yield note(
            f"no {' and no '.join(names)}: long runs train uncompiled, which is slower: "
            "install g++, or name a compiler in CXX"
        )


def limits() -> Iterator[Outcome]:
    """Check the limits of open files, processes and shared memory."""
    outcomes = []
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files < LOW_FILES and files != resource.RLIM_INFINITY:
        message = f"{files} open files: `ulimit -n {4 * LOW_FILES}` allows more"
        outcomes.append(problem(message) if files < MIN_FILES else note(message))
    processes = process_room()
    if processes < LOW_PROCESSES:
        message = f"{processes:.0f} more processes are allowed: `ulimit -u` allows more"
        outcomes.append(problem(message) if processes < devices.cores() else note(message))
    shared = Path("/dev/shm")
    size = shutil.disk_usage(shared).total if shared.is_dir() else MIN_SHARED_MEMORY
    if size < MIN_SHARED_MEMORY and devices.gpu_count() > 1:
        outcomes.append(
            problem(
                f"{shared} has {size / 1e6:.0f} MB for several GPUs: give the container more "
                "(--shm-size=8g, --ipc=host), or use --gpus-per-run 1"
            )
        )
    yield from outcomes or [ok(f"{files if files >= 0 else 'unlimited'} open files, processes")]


def process_room() -> float:
    """Return how many more processes this user may start, infinity without a limit."""
    import psutil

    limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if limit == resource.RLIM_INFINITY or os.getuid() == 0:  # the limit does not apply to root
        return math.inf
    uids = [process.info["uids"] for process in psutil.process_iter(["uids"])]
    return limit - sum(uid is not None and uid.real == os.getuid() for uid in uids)


# The home


def writable(home: Path) -> Iterator[Outcome]:
    """Check that files can be created and renamed in the home."""
    error = write_error(home)
    if error is None:
        remark = "" if home.is_dir() else " (a sweep creates it)"
        yield ok(f"{home.absolute()}{remark} is writable")
    else:
        yield problem(f"{home.absolute()} is not writable ({error}): SLM_HOME names another")


def write_error(home: Path) -> str | None:
    """Return why no file can be created in a home, or where it will be; None if one can."""
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=existing_folder(home)) as folder:
            (Path(folder) / "a").write_text("slm")
            (Path(folder) / "a").rename(Path(folder) / "b")
    except OSError as error:
        return error.strerror or str(error)
    return None


def existing_folder(home: Path) -> Path:
    """Return the home, or the nearest folder above it that exists."""
    return next(folder for folder in (home.absolute(), *home.absolute().parents) if folder.exists())


def locks(home: Path) -> Iterator[Outcome]:
    """Check that locks exclude others, as runs, sweeps and the store need; name those held."""
    if write_error(home):
        return
    kind = file_system(home)
    if error := lock_error(existing_folder(home)):
        yield problem(
            f"{error}; two sweeps could train one run: mount {kind or 'it'} with locks, "
            "or put SLM_HOME on another disk"
        )
    elif kind in NETWORK_FILE_SYSTEMS:
        yield note(
            f"the home is on {kind}: locks work on this machine; between machines they need its "
            "lock service (no `nolock`, no `local_lock`)"
        )
    else:
        yield ok(f"locks work{f', on {kind}' if kind else ''}")
    holders = {"sweep.lock": "sweeps this home", "store.lock": "writes its database"}
    for name, activity in holders.items():
        if process := lock_holder(home / name):
            yield note(f"process {process} {activity}: `slm status --watch` shows it")


def lock_error(folder: Path) -> str | None:
    """Return what is wrong with `flock` in a folder: refused, or granted twice; None if it
    works."""
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
    """Return the kernel's name of the file system of a home, None if unknown."""
    import psutil

    folder = existing_folder(home).resolve()
    mounts = [
        mount
        for mount in psutil.disk_partitions(all=True)
        if folder.is_relative_to(mount.mountpoint)
    ]
    return max(mounts, key=lambda mount: len(mount.mountpoint)).fstype if mounts else None


def disk(home: Path) -> Iterator[Outcome]:
    """Check the free space for the home."""
    free = shutil.disk_usage(existing_folder(home)).free
    text = f"{free / 1e9:.3g} GB free for the home"
    if free >= LOW_DISK:
        yield ok(text)
    else:
        message = f"{text}: free some, `slm rm` removes runs, or SLM_HOME names another disk"
        yield problem(message) if free < MIN_DISK else note(message)


def prepared(home: Path) -> Iterator[Outcome]:
    """List the prepared corpora and the bundles, and check that manifests are readable."""
    from slm.evaluate.bundle import names_of

    corpora = []
    for path in sorted((home / "data").glob("*/manifest.json")):
        try:
            manifest = read_json(path)
            tokens = manifest["train"]["rows"] * (manifest["row_tokens"] - 1)
            corpora.append(f"{path.parent.name} ({tokens:,} tokens)")
        except (ValueError, KeyError, TypeError):
            yield problem(f"{path} cannot be read: remove its folder and prepare it again")
    known = ", ".join(corpora) or "none yet (a sweep prepares what it needs)"
    bundles = ", ".join(names_of(home)) or "none (`slm data core` gets one)"
    yield ok(f"corpora: {known}; bundles: {bundles}")


def leftovers(home: Path) -> Iterator[Outcome]:
    """Find what dead processes left: runs without an exit, lone trainers, half-prepared data."""
    from slm.data.inventory import entries

    runs = list_runs(home) if home.is_dir() else []
    orphans = []
    dead = []
    for folder in runs:
        attempt = last_attempt(folder)
        if lock_holder(folder / "lock"):
            continue
        if trainer := lock_holder(folder / "train.lock"):
            orphans.append(f"{folder.name} (process {trainer})")
        elif attempt and not (is_done(folder) or read_exit(attempt)):
            dead += [folder.name] if is_on_this_machine(folder) else []
    unfinished = [entry.folder.name for entry in entries(home) if entry.state == "unfinished"]
    if orphans:
        yield note(
            f"trainers without a supervisor: {first_few(orphans)}; the next `slm sweep` adopts them"
        )
    if dead:
        yield note(f"ended without an exit.json: {first_few(dead)}; the next `slm sweep` resumes")
    if unfinished:
        yield note(f"half-prepared data: {first_few(unfinished)}; the next sweep resumes")
    if not (orphans or dead or unfinished):
        yield ok(f"{plural(len(runs), 'run')}, nothing left behind by dead processes")


def slurm() -> Iterator[Outcome]:
    """Check Slurm's commands, and that it answers."""
    from slm.sweep.slurm import queue

    missing = [name for name in SLURM_COMMANDS if shutil.which(name) is None]
    if len(missing) == len(SLURM_COMMANDS):
        yield ok("not installed: runs train on this machine")
    elif missing:
        yield problem(
            f"no {', '.join(missing)}, unlike the other commands: "
            "start sweeps where you submit jobs from"
        )
    else:
        try:
            yield ok(f"answers, {plural(len(queue()), 'job')} of runs in the queue")
        except RuntimeError as error:
            yield note(f"does not answer ({error}): --launcher slurm needs it")


def database(home: Path) -> Iterator[Outcome]:
    """Check that the store, in the home or on SLM_STORE's server, answers and is up to date."""
    import store
    from store import paths

    try:
        if url := paths.server_url():
            from store import server

            status = f"{server.ping(url)} answers"
        elif paths.snapshot(home).exists():
            runs = store.sql("select count(*) as n from runs", home=home)["n"].iloc[0]
            status = f"runs: {runs}"
        else:
            yield ok("no results yet: the first sweep makes them")
            return
    except store.StoreError as error:
        yield problem(str(error))
        return
    if store.is_current(home):
        yield ok(f"{status}, up to date")
    else:
        yield note(
            f"{status}, older than the files: any command that reads results updates it; "
            "if that fails, `slm store rebuild`"
        )


def network(url: str) -> Iterator[Outcome]:
    """Check that the server of the CORE bundle answers."""
    from urllib.parse import urlsplit

    host = urlsplit(url).hostname or ""
    try:
        socket.create_connection((host, 443), CONNECT_SECONDS).close()
        yield ok(f"{host} answers: `slm data core` can download")
    except OSError as error:
        yield note(f"{host} does not answer ({error}): `slm data core --from ZIP` takes a copy")


def torch_loads() -> Iterator[Outcome]:
    """Check that torch loads, in another process, and sees the devices."""
    began = time.monotonic()
    command = [sys.executable, "-c", TORCH]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=LOAD_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        yield problem(f"does not load within {LOAD_SECONDS:.0f} s: check its disk")
        return
    output = result.stderr if result.returncode else result.stdout
    message = (output.strip().splitlines() or [str(result.returncode)])[-1]
    if result.returncode:
        yield problem(f"does not load ({message}): reinstall it")
    elif devices.gpu_count() and torch_cuda() and "CUDA" not in message:
        yield problem(f"{message}: it cannot use the GPU; its CUDA and the driver do not match")
    else:
        yield ok(f"{message} ({time.monotonic() - began:.1f} s)")


# A plan


def plan_data(
    experiment: Experiment, runs: Sequence[RequestedRun], home: Path
) -> Iterator[Outcome]:
    """Check that the corpus is prepared, and long enough for every run."""
    from slm.sweep.planning import Planner, plan_of

    planner = Planner(experiment, home)
    errors = []
    for run in runs:
        data = planner.find(run)
        if data is None:
            yield note(
                f"corpus {experiment.data} is not prepared for {run.recipe}: "
                f"`slm data prepare {experiment.data} --recipe {run.recipe}` does it now, "
                "else the sweep does"
            )
            return
        try:
            plan_of(run, data)
        except ValueError as error:
            errors.append(str(error))
    if errors:
        yield problem(f"{len(errors)} of {plural(len(runs), 'run')}: {errors[0]}")
    else:
        yield ok(f"corpus {experiment.data} has the rows of all {plural(len(runs), 'run')}")


def plan_memory(runs: Sequence[RequestedRun]) -> Iterator[Outcome]:
    """Check that each run fits on some share of the devices with at least one row per pass."""
    from slm.sweep import local

    machine = local.this_machine()
    slots = [machine.slot(range(count)) for count in machine.run_sizes("auto")]
    failed: dict[int, str] = {}
    for run in runs:
        errors = [memory_error(run.hyperparameters, slot) for slot in slots]
        if all(errors):
            failed[run.hyperparameters.depth] = str(errors[-1])
    if failed:
        yield problem(f"{failed[min(failed)]} ({plural(len(failed), 'depth')} too large)")
    else:
        device = f"{len(machine.ids)} x {machine.device_name}"
        yield ok(f"all {plural(len(runs), 'run')} fit on {device}")


def memory_error(hp: Hyperparameters, slot: Slot) -> str | None:
    """Return why a run does not fit into the memory of a slot, None if it does."""
    from slm.sweep.micro_batch import MicroBatches

    try:
        MicroBatches().choose(hp, slot)
    except ValueError as error:
        return str(error)
    return None


def plan_disk(runs: Sequence[RequestedRun], home: Path) -> Iterator[Outcome]:
    """Check space for all weights, and for two checkpoints of the largest run on every device."""
    from slm.sweep import local

    sizes = [run.hyperparameters.parameters.total for run in runs]
    concurrent = min(len(sizes), len(local.this_machine().ids))
    need = 4 * sum(sizes) + 2 * STATE_BYTES * max(sizes) * concurrent
    free = shutil.disk_usage(existing_folder(home)).free
    text = f"weights and checkpoints take {need / 1e9:.3g} GB of {free / 1e9:.3g} free"
    if need > free:
        yield problem(f"{text}: free some, or SLM_HOME names another disk")
    else:
        yield ok(text)


def plan_bundle(home: Path) -> Iterator[Outcome]:
    """Check that there is a bundle to evaluate with, and that its files are unchanged."""
    from slm.evaluate.bundle import installed, names_of

    ids = list(names_of(home))
    if not ids:
        yield problem(f"no bundle in {home}: `slm data core` gets it")
    for bundle_id in ids:
        try:
            bundle = installed(home, bundle_id)
            yield ok(f"bundle {bundle.id}: {plural(len(bundle.tasks), 'task')}")
        except ValueError as error:
            yield problem(str(error))
