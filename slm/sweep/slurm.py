"""Slurm launcher: one job per run by a plain `sbatch` script, all states from one `squeue`.

A job's script calls `begin` to learn its attempt, starts a supervisor on each node, and calls `end`
to decide whether the job is requeued. A job that Slurm runs again (time limit, lost or preempted
nodes) therefore resumes in a new attempt. A run whose job is in the queue is alive, whatever its
files say: nothing else starts it.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from slm import events
from slm.files import read_json, write_json
from slm.hardware.runtime import RuntimeModel
from slm.hardware.slot import Slot
from slm.recipe import Hyperparameters
from slm.run import (
    CANCELLED,
    ExitDocument,
    add_attempt,
    is_cancelled,
    is_done,
    last_attempt,
    read_attempt,
    read_exit,
    record_exit,
    run_holder,
    stop_run,
)
from slm.sweep.launcher import RunningRun, WaitingRun
from slm.sweep.local import MAX_CPU_RANKS
from slm.sweep.micro_batch import MicroBatches
from slm.text import plural

CORES_PER_GPU = 4
"""Default number of cores of a node per GPU."""
WARNING_SECONDS = 120
"""Time before a job's limit at which its supervisors get SIGUSR2, to checkpoint and stop."""
QUEUE_SECONDS = 3.0
"""Shortest time between two queries of the queue."""
RETRY_SECONDS = 30.0
"""Pause after a query that Slurm did not answer; the second failure in a row is reported."""
TIMEOUT_SECONDS = 60.0
"""Time in which a Slurm command has to answer."""
RESERVED = {
    "nodes": "--nodes",
    "gpus-per-node": "--gpus-per-node",
    "cpus-per-task": "--cores-per-node",
    "partition": "--partition",
    "account": "--account",
    "qos": "--qos",
    "time": "--time",
} | dict.fromkeys(
    ("array", "chdir", "job-name", "ntasks", "ntasks-per-node", "output", "signal", "wrap")
)
"""Options of sbatch that `--sbatch` may not set, each with the option to use instead, if any."""
SHORT = {
    "N": "nodes",
    "c": "cpus-per-task",
    "p": "partition",
    "A": "account",
    "q": "qos",
    "t": "time",
    "a": "array",
    "D": "chdir",
    "J": "job-name",
    "n": "ntasks",
    "o": "output",
}
ENDS = {
    "CANCELLED": ("cancelled", "was cancelled; `slm retry` lets a sweep train it again"),
    "TIMEOUT": ("interrupted", "reached its time limit"),
    "DEADLINE": ("interrupted", "reached its deadline"),
    "PREEMPTED": ("interrupted", "was preempted"),
    "NODE_FAIL": ("node", "lost a node"),
    "BOOT_FAIL": ("node", "had a node that did not boot"),
    "OUT_OF_MEMORY": ("oom", "was killed: out of memory"),
    "FAILED": ("error", "failed without writing exit.json: its own output is in job.log"),
    "COMPLETED": ("interrupted", "ended without writing exit.json"),
    "REVOKED": ("interrupted", "was revoked"),
}
"""States of finished jobs: the reason for an attempt without exit.json, and the end of its message.
"""
RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "SIGNALING", "STAGE_OUT", "STOPPED")
"""States of jobs that have nodes."""
JOB_LINE = re.compile(r"(\d+)\|(slm-\w+-\d+)\|(\w+)\|([^|]*)\|(.+)")
FORMAT = "%A|%j|%T|%r|%Z"
"""Fields of a SlurmJob, and its folder."""


@dataclass(frozen=True)
class Cluster:
    """Resources of one run on a cluster, as `slm sweep` takes them."""

    nodes: int = 1
    gpus_per_node: int = 0
    """GPUs of a node, one rank on each; 0 to train on cores."""
    cores_per_node: int | None = None
    """None for CORES_PER_GPU per GPU, or one core without GPUs."""
    device_name: str = ""
    """GPU or CPU, for people and for estimates."""
    memory: int | None = None
    """Bytes of one GPU, or of a rank on cores; None if unknown."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    """Limit of one job, after which it checkpoints and is requeued."""
    options: tuple[str, ...] = ()
    """Further options of sbatch, one word each."""

    def __post_init__(self) -> None:
        for flag, value, minimum in (
            ("--nodes", self.nodes, 1),
            ("--gpus-per-node", self.gpus_per_node, 0),
            ("--cores-per-node", self.cores, 1),
        ):
            if value < minimum:
                raise ValueError(f"{flag} {value}: at least {minimum}")
        for option in self.options:
            _refuse_reserved(option)
        if any("\n" in line for line in self.lines()):
            raise ValueError(f"options of sbatch over several lines: {self.lines()}")

    @property
    def cores(self) -> int:
        """Cores of a node."""
        if self.cores_per_node is not None:
            return self.cores_per_node
        return CORES_PER_GPU * self.gpus_per_node or 1

    def slot(self, hp: Hyperparameters) -> Slot:
        """Return the slot of a run: at most one rank per row of a batch, as many on every node."""
        nodes = min(self.nodes, hp.batch_rows)
        ranks = min(self.gpus_per_node or min(self.cores, MAX_CPU_RANKS), hp.batch_rows // nodes)
        return Slot(
            "cuda" if self.gpus_per_node else "cpu",
            nodes * ranks,
            1 if self.gpus_per_node else self.cores // ranks,
            self.device_name,
            nodes=nodes,
            memory=self.memory,
        )

    def lines(self) -> list[str]:
        """Return the options of sbatch that are the same for all runs."""
        flags = [
            f"--{name}={value}"
            for name in ("partition", "account", "qos", "time")
            if (value := getattr(self, name))
        ]
        options = (option.partition("=") for option in (*flags, *self.options))
        return [name + equals + (value and shlex.quote(value)) for name, equals, value in options]


def _refuse_reserved(option: str) -> None:
    """Raise ValueError for an option of sbatch that a sweep sets itself, or for a value alone."""
    if not option.startswith("-"):
        raise ValueError(
            f"--sbatch {option}: write an option and its value as one word, such as --mem=64G"
        )
    name = option[2:].partition("=")[0] if option.startswith("--") else SHORT.get(option[1:2], "")
    if name in RESERVED:
        instead = f"use {RESERVED[name]}" if RESERVED[name] else "slm sets it itself"
        raise ValueError(f"--sbatch {option}: {instead}")


@dataclass(frozen=True)
class SlurmJob:
    """A job of this user: queued, running, or ended a few minutes ago."""

    id: str
    name: str
    """Name of the attempt that it was submitted for (`job_name`)."""
    state: str
    """Slurm's own word."""
    why: str = ""
    """Slurm's reason for the state."""

    @property
    def is_alive(self) -> bool:
        """Whether it runs or will run."""
        return self.state not in ENDS

    @property
    def status(self) -> str | None:
        """State of its run: "running" if it has nodes, "queued" if not; None once it has ended."""
        if not self.is_alive:
            return None
        return "running" if self.state in RUNNING else "queued"


def queue() -> dict[Path, SlurmJob]:
    """Return the job of each run folder: the one that is alive, else the newest; {} without Slurm.

    Raises RuntimeError with Slurm's message if it does not answer.
    """
    if shutil.which("squeue") is None:
        return {}
    output = _run("squeue", "--me", "--states=all", "--noheader", f"--format={FORMAT}")
    jobs = []
    for match in filter(None, map(JOB_LINE.fullmatch, output.splitlines())):
        *fields, folder = match.groups()
        jobs.append((Path(folder), SlurmJob(*fields)))
    jobs.sort(key=lambda item: (item[1].is_alive, int(item[1].id)))
    return dict(jobs)


def jobs_of(run_folders: Iterable[Path]) -> dict[Path, SlurmJob]:
    """Return the jobs of runs that are alive. Slurm is queried only if one of them was submitted.

    Raises RuntimeError if it does not answer.
    """
    submitted = {folder.resolve(): folder for folder in run_folders if _is_submitted(folder)}
    if not submitted:
        return {}
    jobs = queue().items()
    return {submitted[path]: job for path, job in jobs if path in submitted and job.is_alive}


def _is_submitted(run_folder: Path) -> bool:
    attempt = last_attempt(run_folder)
    return attempt is not None and (attempt / "job.sh").exists() and not is_done(run_folder)


@dataclass
class Slurm:
    """Start attempts as jobs of a cluster."""

    cluster: Cluster
    runtime: RuntimeModel
    micro_batches: MicroBatches
    note: Callable[[str], None]
    """Called when Slurm stops responding and when it recovers."""
    max_jobs: int | None = None
    """Maximum jobs in the queue; None for no limit."""
    name = "slurm"
    _jobs: dict[Path, SlurmJob] = field(default_factory=dict)
    _next_query: float = 0.0
    _failures: int = 0
    """Queries without an answer since the last answer."""

    @property
    def description(self) -> str:
        cluster = self.cluster
        each = f"{cluster.cores} cores"
        if cluster.gpus_per_node:
            each = f"{cluster.gpus_per_node} x {cluster.device_name}"
        return f"Slurm, {plural(cluster.nodes, 'node')} of {each} a run"

    def check(self) -> None:
        """Raise ValueError without Slurm on this machine, RuntimeError if it does not answer."""
        if shutil.which("sbatch") is None:
            raise ValueError(
                "--launcher slurm: no sbatch on this machine; run the sweep on a login node"
            )
        self._jobs = queue()

    def assign(
        self, waiting: Sequence[WaitingRun], running: Sequence[RunningRun]
    ) -> list[tuple[str, Slot]]:
        """Return the waiting runs that the queue has room for; none while Slurm does not answer."""
        self._update()
        if self._failures:
            return []
        room = None
        if self.max_jobs is not None:
            room = max(0, self.max_jobs - len(running))
        return [(run.name, self.cluster.slot(run.hp)) for run in waiting[:room]]

    def _update(self) -> None:
        """Query the queue if the last answer is old. Without an answer the last one stays valid."""
        if time.monotonic() < self._next_query:
            return
        pause = QUEUE_SECONDS
        try:
            self._jobs = queue()
            if self._failures > 1:
                self.note("Slurm answers again")
            self._failures = 0
        except RuntimeError as error:
            pause = RETRY_SECONDS
            self._failures += 1
            if self._failures == 2:
                self.note(
                    f"Slurm does not answer ({error}): jobs continue, "
                    "and no more are submitted until it does"
                )
        self._next_query = time.monotonic() + pause

    def start(self, attempt: Path) -> None:
        """Submit a job for an attempt, unless its run has one.

        If sbatch refuses, exit.json holds its message.
        """
        if self._job(attempt):
            return
        script = attempt / "job.sh"
        script.write_text(job_script(attempt, self.cluster), encoding="utf-8")
        run_folder = _run_folder(attempt)
        try:
            output = _run("sbatch", "--parsable", str(script.resolve()), folder=run_folder)
        except RuntimeError as error:
            self._next_query = 0.0  # the job may have been accepted all the same
            record_exit(attempt, 1, "error", f"not submitted: {error}")
            return
        number = output.strip().partition(";")[0]
        self._jobs[run_folder] = SlurmJob(number, job_name(attempt), "PENDING")
        _record_job(attempt, number)

    def _job(self, attempt: Path) -> SlurmJob | None:
        """Return the job of an attempt's run if it is alive."""
        job = self._jobs.get(_run_folder(attempt))
        return job if job and job.is_alive else None

    def alive(self, attempts: Iterable[Path]) -> set[Path]:
        """Return the attempts whose run has a job in the queue, or is held by a process."""
        self._update()
        return {attempt for attempt in attempts if self._job(attempt) or _is_held(attempt)}

    def stop(self, attempt: Path, at_once: bool = False) -> None:
        """Ask an attempt to checkpoint and stop, or to stop at once."""
        if job := self._job(attempt):
            stop_job(job, attempt, at_once)
            self._next_query = 0.0
        elif _is_held(attempt):
            stop_run(_run_folder(attempt), at_once)

    def reap(self, attempt: Path) -> ExitDocument:
        """Write and return exit.json for an attempt that ended without writing it.

        Slurm knows the cause for some minutes.
        """
        reason = "interrupted"
        message = "ended without writing exit.json, and Slurm has forgotten its job"
        job = self._jobs.get(_run_folder(attempt))
        if job and job.id == _job_id(attempt, job):
            reason, end = ENDS.get(job.state, (reason, f"is {job.state}"))
            message = f"Slurm's job {job.id} {end}"
        if is_cancelled(_run_folder(attempt)):
            reason, message = CANCELLED
        elif _stop_marker(attempt).exists():
            reason, message = "interrupted", "removed from the queue on request"
        return record_exit(attempt, 1, reason, message)


def _is_held(attempt: Path) -> bool:
    run_folder = _run_folder(attempt)
    for folder in (run_folder, attempt):
        os.listdir(folder)  # opening a folder makes a network file system show new files
    return run_holder(run_folder) is not None


def stop_job(job: SlurmJob, attempt: Path, at_once: bool = False) -> None:
    """Remove a job from the queue for good.

    A running one checkpoints and stops, or is killed at once.
    """
    _stop_marker(attempt).touch()
    commands = [[]] if at_once else [["--state=PENDING"], ["--state=RUNNING", "--signal=USR2"]]
    for options in commands:
        with suppress(RuntimeError):  # the job has ended, or Slurm does not answer: callers repeat
            _run("scancel", *options, job.id)


def job_script(attempt: Path, cluster: Cluster) -> str:
    """Return the sbatch script of an attempt.

    It is submitted from the run folder, which identifies the job.
    """
    document = read_attempt(attempt)
    nodes = document["nodes"]
    ranks = document["ranks"] // nodes
    has_gpus = document["device"] == "cuda"
    cores = cluster.cores if has_gpus else ranks * document["threads"]
    options = [
        f"--job-name={job_name(attempt)}",
        f"--output={_quoted(attempt / 'job.log').replace('%', '%%')}",
        "--open-mode=append",
        "--requeue",
        f"--signal=USR2@{WARNING_SECONDS}",
        f"--nodes={nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={cores}",
        *([f"--gpus-per-node={ranks}"] if has_gpus else []),
        *cluster.lines(),
    ]
    python = f"{shlex.quote(sys.executable)} -P -m"
    srun = (
        f"srun --mpi=none --nodes={nodes} --ntasks={nodes} --cpus-per-task={cores} "
        "--kill-on-bad-exit=1"
    )
    lines = [
        "#!/bin/sh",
        *(f"#SBATCH {option}" for option in options),
        f"attempt=$({python} slm.sweep.slurm begin {_quoted(attempt)}) || exit",
        f'{srun} {python} slm.sweep.supervisor "$attempt"',
        f'{python} slm.sweep.slurm end "$attempt"',
    ]
    return "\n".join(lines) + "\n"


def _quoted(path: Path) -> str:
    """Quote a path for the shell and for sbatch."""
    return shlex.quote(str(path.resolve()))


def begin(folder: Path) -> int:
    """Print the attempt of a job: its own, or a new one if that has started before.

    Fails if the run is finished, cancelled or held by a process: Slurm may start a job twice.
    """
    run_folder = _run_folder(folder)
    if is_done(run_folder) or is_cancelled(run_folder) or run_holder(run_folder):
        return 1
    attempt = last_attempt(run_folder)
    assert attempt is not None
    if attempt != folder or read_exit(folder) or (folder / "log").exists():
        if not read_exit(attempt):
            record_exit(attempt, 1, "interrupted", "Slurm took its nodes away and requeued its job")
        document = {**read_attempt(attempt), "created": time.time()}
        attempt = add_attempt(run_folder, document)
    _record_job(attempt, os.environ["SLURM_JOB_ID"])
    sys.stdout.write(f"{attempt}\n")
    return 0


def end(attempt: Path) -> int:
    """Requeue an interrupted job; return 1 for an unfinished run.

    Not after a stop request, and not without a new checkpoint: a job that never reaches one would
    requeue forever.
    """
    if is_done(_run_folder(attempt)):
        return 0
    document = read_exit(attempt)
    is_interrupted = document is not None and document["reason"] == "interrupted"
    if is_interrupted and not _stop_marker(attempt).exists() and _wrote_checkpoint(attempt):
        _run("scontrol", "requeue", os.environ["SLURM_JOB_ID"])
    return 1


def _wrote_checkpoint(attempt: Path) -> bool:
    reader = events.Reader(attempt / "events.jsonl")
    return any(event["event"] == "checkpoint" for event in reader.new())


def job_name(attempt: Path) -> str:
    """Return the name of an attempt's job."""
    return f"slm-{_run_folder(attempt).name}-{attempt.name}"


def _run_folder(attempt: Path) -> Path:
    return attempt.resolve().parent.parent


def _stop_marker(attempt: Path) -> Path:
    """Return the file that exists once an attempt was asked to stop."""
    return attempt / "stopped"


def _record_job(attempt: Path, number: str) -> None:
    write_json(attempt / "job.json", {"job": number})


def _job_id(attempt: Path, job: SlurmJob) -> str | None:
    """Return the number of an attempt's job.

    Without job.json (the submitting process was killed) the job's name decides.
    """
    path = attempt / "job.json"
    if path.exists():
        return str(read_json(path)["job"])
    return job.id if job.name == job_name(attempt) else None


def _run(*command: str, folder: Path | None = None) -> str:
    """Return the output of a Slurm command.

    Raises RuntimeError with the first line of its error message. The variables of a surrounding job
    are removed: srun would take them for the new job's.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("SLURM_") or name == "SLURM_CONF"
    }
    try:
        result = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{command[0]}: no answer in {TIMEOUT_SECONDS:.0f} s") from None
    if result.returncode:
        errors = result.stderr.strip().splitlines()
        raise RuntimeError(errors[0] if errors else f"{command[0]} failed ({result.returncode})")
    return result.stdout


if __name__ == "__main__":
    sys.exit({"begin": begin, "end": end}[sys.argv[1]](Path(sys.argv[2])))
