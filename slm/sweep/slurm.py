"""Attempts on a cluster: a Slurm job for each run, by plain `sbatch` text, and how they are from one `squeue` for all.

A job's script asks `begin` which attempt to work at, starts a supervisor on each node, and has `end` say whether the
job goes back into the queue. So a job that Slurm runs again (its time was over, its nodes were lost or given to others)
goes on in an attempt of its own. A run whose job is in the queue lives, whatever its files say: nobody else starts it.
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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

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
from slm.sweep.local import MOST_RANKS
from slm.sweep.micro_batch import MicroBatches

if TYPE_CHECKING:
    from slm.sweep.launcher import Waiting, Working

CORES_PER_GPU = 4
"""Where it is not said how many cores a node gives."""
WARNING_SECONDS = 120
"""Time before a job's limit at which its supervisors hear SIGUSR2, to checkpoint and end."""
QUEUE_SECONDS = 3.0
"""Shortest time between two looks at the queue."""
SILENT_SECONDS = 30.0
"""Pause after a look that Slurm did not answer; at the second one in a row it is said."""
ASK_SECONDS = 60.0
"""Time in which a command of Slurm answers."""
OWN = {
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
"""Options of sbatch that are not the user's to give, each with what says the same; None where nothing does."""
SHORT = {
    "N": "nodes",
    "c": "cpus-per-task",
    "p": "partition",
    "A": "account",
    "q": "qos",
    "t": "time",
}
SHORT |= {"a": "array", "D": "chdir", "J": "job-name", "n": "ntasks", "o": "output"}
ENDS = {
    "CANCELLED": ("cancelled", "was cancelled; `slm retry` lets a sweep train it again"),
    "TIMEOUT": ("interrupted", "reached its time limit"),
    "DEADLINE": ("interrupted", "reached its deadline"),
    "PREEMPTED": ("interrupted", "gave way to another job"),
    "NODE_FAIL": ("node", "lost a node"),
    "BOOT_FAIL": ("node", "had a node that did not boot"),
    "OUT_OF_MEMORY": ("oom", "was killed for want of memory"),
    "FAILED": ("error", "failed without a word: its own output is in job.log"),
    "COMPLETED": ("interrupted", "ended without a word"),
    "REVOKED": ("interrupted", "was revoked"),
}
"""States of jobs that are over: the reason of an attempt that did not say how it ended, and the rest of a sentence."""
WORKING = ("RUNNING", "COMPLETING", "SUSPENDED", "SIGNALING", "STAGE_OUT", "STOPPED")
"""States of jobs that have nodes."""
JOB = re.compile(r"(\d+)\|(\w+)\|([^|]*)\|(slm-\w+-\d+)\|(.+)")
FORMAT = "%A|%T|%r|%j|%Z"


@dataclass(frozen=True)
class Cluster:
    """What a run asks a cluster for."""

    nodes: int = 1
    """Machines of one run."""
    gpus_per_node: int = 0
    """GPUs on each, one rank on each; 0 to train on cores."""
    cores_per_node: int | None = None
    """Cores on each; None for CORES_PER_GPU for each GPU, or one where there is none."""
    device_name: str = ""
    """GPU or CPU, for people and for estimates."""
    memory: int | None = None
    """Bytes of one GPU, or of a rank on cores; None where that is not known."""
    partition: str | None = None
    """As sbatch takes it, as all that follow."""
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    """Limit of one job, after which it checkpoints and queues again."""
    options: tuple[str, ...] = ()
    """Further options of sbatch, one word each."""

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("--nodes", self.nodes, 1),
            ("--gpus-per-node", self.gpus_per_node, 0),
            ("--cores-per-node", self.cores, 1),
        ):
            if value < least:
                raise ValueError(f"{flag} {value}: at least {least}")
        for option in self.options:
            _refuse_own(option)
        if any("\n" in line for line in self.lines()):
            raise ValueError(f"options of sbatch over several lines: {self.lines()}")

    @property
    def cores(self) -> int:
        """Cores of a node."""
        return (
            (CORES_PER_GPU * self.gpus_per_node or 1)
            if self.cores_per_node is None
            else self.cores_per_node
        )

    def slot(self, given: Hyperparameters) -> Slot:
        """What a run trains on: no more ranks than its batch has rows, and the same number on each node."""
        nodes = min(self.nodes, given.batch_rows)
        ranks = min(self.gpus_per_node or min(self.cores, MOST_RANKS), given.batch_rows // nodes)
        device, threads = ("cuda", 1) if self.gpus_per_node else ("cpu", self.cores // ranks)
        return Slot(
            device, nodes * ranks, threads, self.device_name, nodes=nodes, memory=self.memory
        )

    def lines(self) -> list[str]:
        """Options of sbatch that are the same for all runs."""
        named = {
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "time": self.time,
        }
        words = [*(f"--{name}={value}" for name, value in named.items() if value), *self.options]
        parted = (word.partition("=") for word in words)
        return [name + equals + (value and shlex.quote(value)) for name, equals, value in parted]


def _refuse_own(option: str) -> None:
    """Raises ValueError for an option of sbatch that would break what a job is to us."""
    name = option[2:].partition("=")[0] if option.startswith("--") else SHORT.get(option[1:2], "")
    if not option.startswith("-"):
        raise ValueError(
            f"--sbatch {option}: write an option and its value as one word, such as --mem=64G"
        )
    if name in OWN:
        raise ValueError(
            f"--sbatch {option}: "
            + (f"say it by {OWN[name]}" if OWN[name] else "a sweep says it itself")
        )


@dataclass(frozen=True)
class Job:
    """A job of this user, in the queue or ended a few minutes ago."""

    id: str
    """Its number."""
    name: str
    """That of the attempt that it was submitted for."""
    state: str
    """As Slurm calls it."""
    why: str = ""
    """Why it waits, in Slurm's word."""

    @property
    def lives(self) -> bool:
        """Whether it works, or will."""
        return self.state not in ENDS

    @property
    def status(self) -> str | None:
        """What it says of its run: "queued" without nodes, "running" with them, None when it is over."""
        if not self.lives:
            return None
        return "running" if self.state in WORKING else "queued"


def queue() -> dict[Path, Job]:
    """The job of each run that has one, by the run's folder: that which lives, else the newest. {} where there is no
    Slurm. Raises RuntimeError with Slurm's own words when it does not answer.
    """
    if shutil.which("squeue") is None:
        return {}
    lines = _ask("squeue", "--me", "--states=all", "--noheader", f"--format={FORMAT}").splitlines()
    found = [
        (match[5], Job(match[1], match[4], match[2], match[3]))
        for match in map(JOB.fullmatch, lines)
        if match
    ]
    found.sort(key=lambda one: (one[1].lives, int(one[1].id)))
    return {Path(folder): job for folder, job in found}


def jobs_of(run_folders: Iterable[Path]) -> dict[Path, Job]:
    """The living jobs of runs, by their folders as given. Slurm is asked only where one of them was submitted to it.

    Raises RuntimeError when it does not answer.
    """
    asked = {folder.resolve(): folder for folder in run_folders if _is_submitted(folder)}
    return (
        {asked[place]: job for place, job in queue().items() if place in asked and job.lives}
        if asked
        else {}
    )


def _is_submitted(run_folder: Path) -> bool:
    attempt = last_attempt(run_folder)
    return attempt is not None and (attempt / "job.sh").exists() and not is_done(run_folder)


class Slurm:
    """Starts attempts on a cluster and knows how they are."""

    name = "slurm"

    def __init__(
        self,
        cluster: Cluster,
        seconds: RuntimeModel,
        memory: MicroBatches,
        note: Callable[[str], None],
        most: int | None = None,
    ) -> None:
        """At most so many jobs are in the queue at once; `note` hears when Slurm does not answer, and when again."""
        self.cluster, self.seconds, self.memory = cluster, seconds, memory
        self._note, self._most = note, most
        self._jobs: dict[Path, Job] = {}
        self._ask_again, self._unanswered = 0.0, 0

    @property
    def where(self) -> str:
        """What a run gets, for people."""
        own = self.cluster
        each = (
            f"{own.gpus_per_node} x {own.device_name}"
            if own.gpus_per_node
            else f"{own.cores} cores"
        )
        return f"Slurm, {own.nodes} node{'s' * (own.nodes > 1)} of {each} a run"

    def check(self) -> None:
        """Raises ValueError where there is no Slurm, RuntimeError where it does not answer."""
        if shutil.which("sbatch") is None:
            raise ValueError(
                "--launcher slurm: no sbatch on this machine: sweep where you submit jobs from"
            )
        self._jobs = queue()

    def places(
        self, waiting: Sequence[Waiting], working: Sequence[Working]
    ) -> list[tuple[str, Slot]]:
        """All runs that wait, or as many as may be in the queue; none while Slurm does not answer."""
        self._look()
        room = len(waiting) if self._most is None else max(0, self._most - len(working))
        now = [] if self._unanswered else waiting[:room]
        return [(run.name, self.cluster.slot(run.given)) for run in now]

    def _look(self) -> None:
        """Ask for the queue if the last answer is old. Without an answer what was so stays so."""
        if time.monotonic() < self._ask_again:
            return
        try:
            self._jobs = queue()
            if self._unanswered > 1:
                self._note("Slurm answers again")
            self._unanswered = 0
        except RuntimeError as error:
            self._unanswered += 1
            if self._unanswered == 2:
                self._note(
                    f"Slurm does not answer ({error}): jobs go on, and no more are submitted until it does"
                )
        self._ask_again = time.monotonic() + (SILENT_SECONDS if self._unanswered else QUEUE_SECONDS)

    def start(self, attempt: Path) -> None:
        """Submit a job for an attempt, unless its run has one. Where sbatch refuses, the attempt has ended with its
        words.
        """
        run_folder = _run_folder(attempt)
        if self._job(attempt):
            return
        script = attempt / "job.sh"
        script.write_text(script_of(attempt, self.cluster), encoding="utf-8")
        try:
            said = _ask("sbatch", "--parsable", str(script.resolve()), folder=run_folder)
        except RuntimeError as error:
            self._ask_again = 0.0  # it may have been accepted all the same
            record_exit(attempt, 1, "error", f"not submitted: {error}")
            return
        job = Job(said.strip().partition(";")[0], name_of(attempt), "PENDING")
        self._jobs[run_folder] = job
        _note_job(attempt, job.id)

    def _job(self, attempt: Path) -> Job | None:
        """The living job of an attempt's run."""
        job = self._jobs.get(_run_folder(attempt))
        return job if job and job.lives else None

    def living(self, attempts: Iterable[Path]) -> set[Path]:
        """Those whose run has a job in the queue, or is worked at outside of it."""
        self._look()
        return {attempt for attempt in attempts if self._job(attempt) or self._held(attempt)}

    def _held(self, attempt: Path) -> bool:
        for folder in (_run_folder(attempt), attempt):
            os.listdir(
                folder
            )  # a network's file system sees what other machines wrote when a folder is opened
        return run_holder(_run_folder(attempt)) is not None

    def stop(self, attempt: Path, at_once: bool = False) -> None:
        """Ask an attempt to checkpoint and end, or to end at once."""
        if job := self._job(attempt):
            stop(job, attempt, at_once)
            self._ask_again = 0.0
        elif self._held(attempt):
            stop_run(_run_folder(attempt), at_once)

    def reap(self, attempt: Path) -> ExitDocument:
        """Record the end of an attempt that ended without a word: Slurm knows why, for some minutes."""
        reason, message = "interrupted", "ended without a word, and Slurm has forgotten its job"
        job = self._jobs.get(_run_folder(attempt))
        if job and job.id == _job_id(attempt, job):
            reason, why = ENDS.get(job.state, ("interrupted", f"is {job.state}"))
            message = f"Slurm's job {job.id} {why}"
        if is_cancelled(_run_folder(attempt)):
            reason, message = CANCELLED
        elif _stopped(attempt).exists():
            reason, message = "interrupted", "taken from the queue, as asked"
        return record_exit(attempt, 1, reason, message)


def stop(job: Job, attempt: Path, at_once: bool = False) -> None:
    """Take a job from the queue for good; one at work is asked to checkpoint and end, or ended at once."""
    _stopped(attempt).touch()
    for options in (
        ([],) if at_once else (["--state=PENDING"], ["--state=RUNNING", "--signal=USR2"])
    ):
        with suppress(
            RuntimeError
        ):  # it ended in this moment, or Slurm does not answer: who asks, asks again
            _ask("scancel", *options, job.id)


def script_of(attempt: Path, cluster: Cluster) -> str:
    """The sbatch script of an attempt, to be submitted from its run's folder, by which a job is known."""
    document = read_attempt(attempt)
    nodes, ranks, gpus = (
        document["nodes"],
        document["ranks"] // document["nodes"],
        document["device"] == "cuda",
    )
    cores = cluster.cores if gpus else ranks * document["threads"]
    options = [
        f"--job-name={name_of(attempt)}",
        f"--output={_quoted(attempt / 'job.log').replace('%', '%%')}",
        "--open-mode=append",
        "--requeue",
        f"--signal=USR2@{WARNING_SECONDS}",
        f"--nodes={nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={cores}",
        *([f"--gpus-per-node={ranks}"] if gpus else []),
        *cluster.lines(),
    ]
    python = f"{shlex.quote(sys.executable)} -P -m"
    each = f"srun --mpi=none --nodes={nodes} --ntasks={nodes} --cpus-per-task={cores} --kill-on-bad-exit=1"
    return "\n".join(
        [
            "#!/bin/sh",
            *(f"#SBATCH {option}" for option in options),
            f"attempt=$({python} slm.sweep.slurm begin {_quoted(attempt)}) || exit",
            f'{each} {python} slm.sweep.supervisor "$attempt"',
            f'{python} slm.sweep.slurm end "$attempt"',
            "",
        ]
    )


def _quoted(path: Path) -> str:
    """A path as shells and sbatch read it."""
    return shlex.quote(str(path.resolve()))


def begin(folder: Path) -> int:
    """Print the attempt that a job works at: the one that it was submitted for, or a new one where that was begun.

    Fails where there is nothing to do, or somebody does it: Slurm may start a job twice.
    """
    run_folder = _run_folder(folder)
    if is_done(run_folder) or is_cancelled(run_folder) or run_holder(run_folder):
        return 1
    attempt = last_attempt(run_folder)
    assert attempt is not None
    if attempt != folder or read_exit(folder) or (folder / "log").exists():
        if not read_exit(attempt):
            record_exit(
                attempt, 1, "interrupted", "Slurm took its nodes away, and runs its job again"
            )
        document = {**read_attempt(attempt), "created": time.time()}
        attempt = add_attempt(run_folder, document)
    _note_job(attempt, os.environ["SLURM_JOB_ID"])
    sys.stdout.write(f"{attempt}\n")
    return 0


def end(attempt: Path) -> int:
    """Put a job that was interrupted back into the queue; whether its run is unfinished.

    Not if it was asked to stop, and not without a new checkpoint: a job that never gets to one would come for ever.
    """
    if is_done(_run_folder(attempt)):
        return 0
    ended = read_exit(attempt)
    if (
        ended
        and ended["reason"] == "interrupted"
        and not _stopped(attempt).exists()
        and _advanced(attempt)
    ):
        _ask("scontrol", "requeue", os.environ["SLURM_JOB_ID"])
    return 1


def _advanced(attempt: Path) -> bool:
    return any(
        event["event"] == "checkpoint" for event in events.Reader(attempt / "events.jsonl").new()
    )


def name_of(attempt: Path) -> str:
    """The name of an attempt's job."""
    return f"slm-{_run_folder(attempt).name}-{attempt.name}"


def _run_folder(attempt: Path) -> Path:
    return attempt.resolve().parent.parent


def _stopped(attempt: Path) -> Path:
    """There when an attempt was asked to stop."""
    return attempt / "stopped"


def _note_job(attempt: Path, number: str) -> None:
    write_json(attempt / "job.json", {"job": number})


def _job_id(attempt: Path, job: Job) -> str | None:
    """Number of an attempt's job; one of its name is its own, too: who submitted it may have been killed."""
    path = attempt / "job.json"
    if path.exists():
        return str(read_json(path)["job"])
    return job.id if job.name == name_of(attempt) else None


def _ask(*command: str, folder: Path | None = None) -> str:
    """What a command of Slurm says. Raises RuntimeError with the first line of its complaint.

    Where this is itself part of a job, that job's variables are left out: srun would take them for the other's.
    """
    here = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("SLURM_") or name == "SLURM_CONF"
    }
    try:
        result = subprocess.run(
            command,
            cwd=folder,
            env=here,
            capture_output=True,
            text=True,
            timeout=ASK_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{command[0]}: no answer in {ASK_SECONDS:.0f} s") from None
    if result.returncode:
        complaint = (
            result.stderr.strip().splitlines() or [f"{command[0]} failed ({result.returncode})"]
        )[0]
        raise RuntimeError(complaint)
    return result.stdout


if __name__ == "__main__":
    sys.exit({"begin": begin, "end": end}[sys.argv[1]](Path(sys.argv[2])))
