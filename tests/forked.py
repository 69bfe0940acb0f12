"""Trainers without torchrun: supervisors and ranks are forked from a process that has torch loaded.

A trainer that starts Python and torchrun spends six seconds before its first step, a forked one a
tenth of that. The supervisor is the real one; only the ranks have no torchrun.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import reduction
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any
from unittest import mock

import psutil

from tests.commands import command_line, forks, run

SECONDS = 600.0
GRACE_SECONDS = 30.0
"""Time that torchrun gives the other ranks after one has failed."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)


@contextmanager
def supervisors() -> Iterator[None]:
    """Fork the supervisors of the local launcher, and their ranks; none outlives the block."""
    started: list[Supervised] = []

    def start(arguments: Sequence[str], log: Path, inherited: Sequence[int]) -> Supervised:
        *_, folder, _ = arguments
        [lock] = inherited
        with log.open("ab") as output:
            supervisor = Supervised(
                Path(folder), lock=_Descriptor(lock), log=_Descriptor(output.fileno())
            )
        started.append(supervisor)
        return supervisor

    try:
        with mock.patch("slm.sweep.local.start_session", start):
            yield
    finally:
        for supervisor in started:
            supervisor.kill()


def slm(*arguments: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command line, with forked supervisors; return its exit code and output."""
    return run(_with_supervisors, arguments, SLM_HOME=str(home), **environment)


def _with_supervisors(arguments: tuple[str, ...]) -> None:
    with supervisors():
        command_line(arguments)


class Supervised:
    """Forked supervisor of an attempt, with the methods of `Popen`.

    `change` is called in its process before it supervises.
    """

    def __init__(
        self,
        folder: Path,
        change: Callable[[], None] | None = None,
        lock: _Descriptor | None = None,
        log: _Descriptor | None = None,
    ) -> None:
        arguments = (folder, change, lock, log, dict(os.environ))
        self._process = forks.Process(target=_supervise, args=arguments)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Return the exit code, None while the process runs."""
        return self._process.exitcode

    def wait(self, seconds: float = SECONDS) -> int:
        """Wait for the end, and return the exit code."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("supervisor", seconds)
        return self._process.exitcode

    def terminate(self) -> None:
        """Send SIGTERM."""
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """Kill the process and its ranks, if they run."""
        _kill(self._process)

    def __enter__(self) -> Supervised:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class _Descriptor:
    """File descriptor that a forked process inherits."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __getstate__(self) -> dict[str, Any]:
        return {"copy": reduction.DupFd(self.number)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.number = state["copy"].detach()


def _supervise(
    folder: Path,
    change: Callable[[], None] | None,
    lock: _Descriptor | None,
    log: _Descriptor | None,
    environment: dict[str, str],
) -> None:
    """Supervise an attempt in this process."""
    from slm.sweep import supervisor

    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    if log:
        _write_to(log.number)
    if change:
        change()
    launcher = SimpleNamespace(Popen=_Torchrun, DEVNULL=subprocess.DEVNULL)
    with mock.patch.object(supervisor, "subprocess", launcher):
        code = supervisor.supervise(folder, lock.number if lock else None)
    sys.exit(code)


def _write_to(output: int) -> None:
    """Let this process write its output to a file."""
    for descriptor in (1, 2):
        os.dup2(output, descriptor)


class _Torchrun:
    """Forked ranks of an attempt in place of the `Popen` of torchrun."""

    def __init__(
        self, command: Sequence[str], stdout: IO[bytes], env: Mapping[str, str], **_: Any
    ) -> None:
        from torch.distributed import TCPStore

        *options, folder = command
        [count] = [int(word.partition("=")[2]) for word in options if "--nproc" in word]
        fork = multiprocessing.get_context("fork")
        self.pid = os.getpid()
        self._ranks = []
        pipes = [fork.Pipe(duplex=False) for _ in range(count)]  # to send the port of the store
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until a rank has handlers of its own
        for rank, (port, _) in enumerate(pipes):
            arguments = (rank, folder, count, env, stdout.fileno(), port)
            process = fork.Process(target=_train, args=arguments)
            process.start()
            self._ranks.append(process)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for _, sender in pipes:
            sender.send(self._store.port)

    def poll(self) -> int | None:
        """Return the exit code, None while ranks run; a rank that fails ends the others."""
        codes = [process.exitcode for process in self._ranks]
        if any(codes):
            for process in self._ranks:
                process.terminate()
            for process in self._ranks:
                process.join(GRACE_SECONDS)
                process.kill()
                process.join()
            return 1
        return None if None in codes else 0


def _train(
    rank: int, folder: str, count: int, env: Mapping[str, str], output: int, port: Connection
) -> None:
    """Train in this process as one rank."""
    import torch

    from slm.train.trainer import main

    signal.set_wakeup_fd(-1)  # the supervisor's
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    _write_to(output)
    os.environ.clear()
    os.environ.update(env)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port.recv())}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    sys.argv = ["slm.train", folder]
    sys.exit(main())


@contextmanager
def _training(folder: Path, ranks: int, output: IO[bytes]) -> Iterator[Any]:
    """Train an attempt without a supervisor; yield the parent of the ranks.

    Wait for its end on leaving the block, and kill it after SECONDS or an error.
    """
    process = forks.Process(target=_launch, args=(folder, ranks, _Descriptor(output.fileno())))
    process.start()
    try:
        yield process
        process.join(SECONDS)
    finally:
        _kill(process)


def _launch(folder: Path, ranks: int, output: _Descriptor) -> None:
    """Train an attempt in children of this process."""
    _write_to(output.number)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [f"--nproc-per-node={ranks}", str(folder)]
    torchrun = _Torchrun(command, sys.stdout.buffer, environment)
    while (code := torchrun.poll()) is None:
        time.sleep(0.01)
    sys.exit(code)


def train(folder: Path, ranks: int) -> subprocess.CompletedProcess[str]:
    """Train an attempt on some ranks; the result's stderr holds their output."""
    with tempfile.TemporaryFile() as output:
        with _training(folder, ranks, output) as process:
            pass
        output.seek(0)
        text = output.read().decode()
    return subprocess.CompletedProcess(["train", str(folder)], process.exitcode, "", text)


def train_until(folder: Path, ranks: int, condition: Callable[[], object]) -> None:
    """Train an attempt until a condition holds, then stop every rank and wait for the end."""
    with tempfile.TemporaryFile() as output, _training(folder, ranks, output) as process:
        while process.exitcode is None and not condition():
            time.sleep(0.01)
        for rank in psutil.Process(process.pid).children() if process.exitcode is None else ():
            rank.terminate()


def _kill(process: Any) -> None:
    """Kill a process and its descendants, if they run, and wait for its end."""
    if process.is_alive():
        kill_tree(process.pid)
    process.join()


def kill_tree(pid: int) -> None:
    """Kill a process and its descendants, if they run."""
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in [*parent.children(recursive=True), parent]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
