"""Supervisor: hung trainers are killed, busy ones are not, and the cause of every end is named."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest

from slm import events
from slm.data import PreparedDataset
from slm.hardware import devices
from slm.recipe import pocket
from slm.run import add_attempt, checkpoint_step, is_done, read_attempt, read_exit, run_holder
from slm.sweep import supervisor
from slm.sweep.out_of_memory import OUT_OF_MEMORY
from slm.sweep.supervisor import _cause, _StopRequests, _Watch, last_error
from tests import forked
from tests.attempts import ENVIRONMENT, log, make_attempt, plan_of

PATIENCE = 300.0
"""Seconds after which a test gives up."""
SUPERVISE = """
import sys
from pathlib import Path
from slm.sweep import supervisor as s
{}
sys.exit(s.supervise(Path(sys.argv[1]), None))
"""
IMPATIENT = """
is_hung = s._Watch.is_hung

def is_hung_after_a_second(watch):
    if Path({path!r}).exists():
        watch.allowed = 1.0
    return is_hung(watch)

s._Watch.is_hung = is_hung_after_a_second
"""
"""Changes that allow one second without an event once a file exists."""
LONG = replace(pocket(1, steps=10**4), batch_tokens=256)


@contextmanager
def supervised(
    folder: Path, changes: str = "pass", **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run the supervisor of an attempt, after changes to its module (`s`), and torchrun.

    They do not outlive the block.
    """
    command = [sys.executable, "-c", SUPERVISE.format(changes), str(folder)]
    with subprocess.Popen(command, env=ENVIRONMENT | environment) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                forked.kill_tree(process.pid)


def until(condition: Callable[[], Any]) -> Any:
    """Wait until a condition holds, and return its value."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return value


def ended(
    process: subprocess.Popen[bytes] | forked.Supervised, folder: Path
) -> tuple[int, str | None, str | None]:
    """Return the exit code of a supervisor, and reason and message of its attempt."""
    code = process.wait(PATIENCE)
    document = read_exit(folder)
    assert document is not None
    assert run_holder(folder.parent.parent) is None
    return code, document["reason"], document["message"]


def again(folder: Path, **changes: Any) -> Path:
    """Add the next attempt of a run, a copy of this one with changes."""
    return add_attempt(folder.parent.parent, {**read_attempt(folder), **changes})


def workers(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return the workers of torchrun, if it has started them."""
    return [
        worker
        for torchrun in psutil.Process(process.pid).children()
        for worker in torchrun.children()
    ]


def test_a_hung_trainer_is_killed_and_the_next_attempt_resumes_until_it_is_stopped(
    tmp_path: Path, prepared: PreparedDataset
) -> None:
    first = make_attempt(tmp_path, plan_of(LONG, prepared), prepared, checkpoint_seconds=0)
    suspended = tmp_path / "suspended"
    with supervised(first, IMPATIENT.format(path=str(suspended))) as process:
        until(lambda: len(log(first, "checkpoint")) > 5)
        [trainer] = workers(process)
        trainer.suspend()
        suspended.touch()
        code, reason, message = ended(process, first)
    assert (code, reason) == (1, "timeout")
    assert message is not None
    assert message.startswith("no event for ")
    assert not trainer.is_running()

    second = again(first)
    with forked.Supervised(second) as process:
        until(lambda: log(second, "checkpoint"))
        assert log(second, "started")[0]["resumed_from"] >= 5
        process.terminate()
        process.terminate()
        code, reason, message = ended(process, second)
    assert (code, reason) == (1, "interrupted")
    [failed] = log(second, "failed")
    assert failed["message"] == message
    step = checkpoint_step(first.parent.parent)
    assert f"at step {step} of" in failed["message"]


def report_every_row() -> None:
    """Let an evaluation write an event after every pass."""
    from slm.train import attempt

    attempt.HEARTBEAT_SECONDS = 0.0


def test_an_evaluation_writes_events_and_is_not_ended_by_a_stop(
    tmp_path: Path, prepared: PreparedDataset
) -> None:
    hp = pocket(1, steps=2)
    row = {"evaluation_tokens": hp.sequence_length}
    folder = make_attempt(tmp_path, plan_of(hp, prepared), prepared, **row)
    with forked.Supervised(folder, report_every_row) as process:
        until(lambda: evaluations(folder))
        process.terminate()
        assert ended(process, folder) == (0, None, None)
    assert len(evaluations(folder)) == 1 + hp.validation_rows
    assert is_done(folder.parent.parent)


def evaluations(folder: Path) -> list[dict[str, Any]]:
    """Return the events in which an evaluation reports its progress."""
    return [event for event in log(folder, "working") if event["what"] == "evaluation"]


@pytest.mark.parametrize("early", [True, pytest.param(False, marks=pytest.mark.soak)])
def test_a_stop_at_once_and_a_stop_before_the_first_step_are_obeyed(
    tmp_path: Path, prepared: PreparedDataset, early: bool
) -> None:
    folder = make_attempt(tmp_path, plan_of(LONG, prepared), prepared, ranks=1 if early else 2)
    with supervised(folder) as process:
        family = until(lambda: workers(process))
        if early:
            process.terminate()  # while torch is being imported
        else:
            until(lambda: log(folder, "train"))
            family = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGINT)
        code, reason, message = ended(process, folder)
    assert (code, reason) == (1, "interrupted")
    assert message == (
        "stopped on request before the first step" if early else "stopped at once on request"
    )
    assert not any(worker.is_running() for worker in family)
    assert not list(folder.parent.parent.glob("checkpoints/step-*"))


@pytest.mark.soak
def test_a_kill_while_memory_is_short_counts_as_oom_and_any_other_as_an_error(
    tmp_path: Path, prepared: PreparedDataset
) -> None:
    group = tmp_path / "root/sys/fs/cgroup/job"
    group.mkdir(parents=True)
    (tmp_path / "root/proc/self").mkdir(parents=True)
    (tmp_path / "root/proc/self/cgroup").write_text("0::/job\n")
    (group / "memory.events").write_text("oom 0\noom_kill 2\noom_group_kill 0\n")
    folder = make_attempt(tmp_path, plan_of(LONG, prepared), prepared, ranks=2)
    root = f"""
from functools import partial
s.devices.memory_kills = partial(s.devices.memory_kills, Path({str(tmp_path / "root")!r}))
"""
    with supervised(folder, root) as process:
        until(lambda: log(folder, "train"))
        (group / "memory.events").write_text("oom 1\noom_kill 3\noom_group_kill 0\n")
        workers(process)[1].kill()
        assert ended(process, folder)[:2] == (1, "oom")
    no_requests = cast(_StopRequests, SimpleNamespace(stop=False, at_once=False))
    watch = _Watch(folder)  # no process was killed since it began
    assert _cause(folder, 1, no_requests, watch)[0] == "error"


@pytest.fixture
def watched(tmp_path: Path) -> Callable[..., _Watch]:
    """Return a function that watches an attempt with these events and their times."""

    def watch(*written: tuple[float, dict[str, Any]]) -> _Watch:
        lines = [json.dumps({"time": time, **event}) for time, event in written]
        (tmp_path / "events.jsonl").write_text("".join(line + "\n" for line in lines))
        watch = _Watch(tmp_path)
        assert not watch.is_hung()
        return watch

    return watch


STEP = {"event": "train"}


def working(what: str) -> dict[str, str]:
    return {"event": "working", "what": what}


def test_a_hang_is_ten_median_pauses_and_at_least_two_minutes_without_an_event(
    watched: Callable[..., _Watch],
) -> None:
    slow = [(when, STEP) for when in (0.0, 20.0, 40.0, 3640.0, 3660.0)]  # one pause of an hour
    assert watched(*slow).allowed == 10 * 20
    assert watched(*[(float(when), STEP) for when in range(5)]).allowed == 120


def test_start_compilation_checkpoint_and_evaluation_may_take_longer(
    watched: Callable[..., _Watch],
) -> None:
    steps = [(0.0, STEP), (1.0, STEP)]
    started = {"event": "started"}
    written = {"event": "checkpoint"}
    measured = {"event": "eval"}
    assert (
        watched().allowed == watched((0.0, started)).allowed == watched((0.0, STEP)).allowed == 1800
    )
    assert watched((0.0, started), (0.0, working("compilation"))).allowed == 3600
    assert watched(*steps, (2.0, working("checkpoint"))).allowed == 3600
    assert watched(*steps, (2.0, working("checkpoint")), (3.0, written)).allowed == 120
    assert watched(*steps, (2.0, working("evaluation"))).allowed == 600
    assert (
        watched(*steps, (2.0, working("evaluation")), (3.0, measured)).allowed == 600
    )  # the final weights follow
    assert set(supervisor.PHASE_SECONDS) == {"start", *events.WORKS}


class Clock:
    """Monotonic clock that a test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(supervisor.time, "monotonic", lambda: self.now)

    def is_hung_after(self, watch: _Watch, seconds: float) -> bool:
        """Poll a watch every POLL_SECONDS for a while, and return whether it found a hang."""
        for _ in range(round(seconds / supervisor.POLL_SECONDS)):
            self.now += supervisor.POLL_SECONDS
            watch.is_hung()
        return watch.is_hung()


def test_an_evaluation_that_writes_events_may_exceed_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "events.jsonl"
    clock = Clock(monkeypatch)
    watch = _Watch(tmp_path)
    for _ in range(4):
        with path.open("a") as file:
            file.write(json.dumps({"time": 0.0, **working("evaluation")}) + "\n")
        assert not clock.is_hung_after(watch, 590)
    assert clock.is_hung_after(watch, 20)
    assert watch.silence is not None
    assert 600 < watch.silence < 620


def test_time_in_which_the_supervisor_was_suspended_does_not_count(
    watched: Callable[..., _Watch], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    watch = watched((0.0, working("evaluation")))
    clock.now += 3600
    assert not watch.is_hung()
    assert clock.is_hung_after(watch, 605)


def test_a_damaged_line_of_events_is_skipped(watched: Callable[..., _Watch], tmp_path) -> None:
    watch = watched((0.0, STEP))
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write(
            '{"event": "tra{"event": "train"}\n'
            + json.dumps({"time": 0.0, **working("evaluation")})
            + "\n"
        )
    assert not watch.is_hung()
    assert watch.allowed == 600


OOM = [
    "RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: "
    "can't allocate memory: you tried",
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
    "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "OSError: [Errno 12] Cannot allocate memory",
    "MemoryError",
    "  what():  std::bad_alloc",
]


@pytest.mark.parametrize("line", OOM)
def test_an_out_of_memory_error_is_named_before_its_consequences(line: str) -> None:
    gloo = "RuntimeError: [../gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:7777"
    end = (
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n"
        "=====\n  exitcode  : -6 (pid: 7)\n====="
    )
    error = last_error(
        f"Traceback (most recent call last):\n{line}\nValueError: later\n{gloo}\n{end}\n"
    )
    assert error == line.strip()
    assert OUT_OF_MEMORY.search(error)
    assert not OUT_OF_MEMORY.search(last_error(f"KeyError: 'x'\n{gloo}\n{end}\n"))


def test_memory_kills_are_those_of_the_control_group_else_of_the_machine(tmp_path: Path) -> None:
    group = tmp_path / "sys/fs/cgroup/user/session"
    for folder in (group, tmp_path / "proc/self"):
        folder.mkdir(parents=True)
    assert devices.memory_kills(tmp_path) == 0
    (tmp_path / "proc/vmstat").write_text("pgfault 5\noom_kill 7\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/user/session\n")
    assert devices.memory_kills(tmp_path) == 7
    (group.parent / "memory.events").write_text("max 9\noom 1\noom_kill 3\noom_group_kill 1\n")
    assert devices.memory_kills(tmp_path) == 3
    (group / "memory.events").write_text("oom_kill 2\n")
    assert devices.memory_kills(tmp_path) == 2
    assert devices.memory_kills() >= 0
