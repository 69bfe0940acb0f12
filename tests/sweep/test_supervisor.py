"""An attempt's supervisor: hung trainers end, busy ones go on, signals are heard at any moment, causes are named."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
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
from slm.sweep.supervisor import _Asked, _Watch, _why, last_error
from tests.attempts import ENVIRONMENT, log, make_attempt, plan_of

PATIENCE = 30.0
"""Seconds after which a test gives up."""
SUPERVISE = "import sys; from pathlib import Path; from slm.run import supervisor as s; {}; \
sys.exit(s.supervise(Path(sys.argv[1]), None))"
LONG = replace(pocket(1, steps=10**4), batch_tokens=256)
TALKATIVE = "import sys, slm.train as t; t.TALK_SECONDS = 0.0; sys.exit(t.main())"


def supervised(folder: Path, changes: str = "pass", **environment: str) -> subprocess.Popen[bytes]:
    """The supervisor of an attempt, with changes made to its module first."""
    command = [sys.executable, "-c", SUPERVISE.format(changes), str(folder)]
    return subprocess.Popen(command, env=ENVIRONMENT | environment)


def until(true: Callable[[], Any]) -> Any:
    """What is found as soon as there is something."""
    deadline = time.monotonic() + PATIENCE
    while not (found := true()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def ended(process: subprocess.Popen[bytes], folder: Path) -> tuple[int, str | None, str | None]:
    """Exit code of a supervisor, reason and message of its attempt; nobody is left behind."""
    code, found = process.wait(PATIENCE), read_exit(folder)
    assert found is not None
    assert run_holder(folder.parent.parent) is None
    return code, found["reason"], found["message"]


def again(folder: Path, **changes: Any) -> Path:
    """The next attempt of a run, made as this one was but for the changes."""
    document = read_attempt(folder)
    del document["attempt"]
    return add_attempt(folder.parent.parent, document | changes)


def workers(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Processes of torchrun's, once it has some."""
    return [
        worker
        for torchrun in psutil.Process(process.pid).children()
        for worker in torchrun.children()
    ]


def test_a_hung_trainer_is_ended_and_stops_and_an_evaluation_are_waited_for(
    tmp_path: Path, prepared: PreparedDataset
) -> None:
    """One run in three attempts: stopped by a signal, asked to stop twice, asked when only evaluation is left."""
    given = pocket(1, steps=600)
    first = make_attempt(tmp_path, plan_of(given, prepared), prepared, checkpoint_seconds=0)
    limits = "s.SILENT_SECONDS = s.LOOK_SECONDS = 1.0; s.WORKING_SECONDS['checkpoint'] = 1.0"
    process = supervised(first, limits)
    until(lambda: len(log(first, "checkpoint")) > 5)
    [trainer] = workers(process)
    trainer.suspend()
    code, reason, message = ended(process, first)
    assert (code, reason) == (1, "timeout")
    assert message is not None
    assert message.startswith("no event for ")
    assert not trainer.is_running()

    second = again(first)
    process = supervised(second)
    until(lambda: log(second, "checkpoint"))
    assert log(second, "started")[0]["resumed_from"] >= 5
    process.terminate()
    process.terminate()
    code, reason, message = ended(process, second)
    assert (code, reason) == (1, "interrupted")
    [word] = log(second, "failed")
    assert word["message"] == message
    kept = checkpoint_step(first.parent.parent)
    assert f"stopped at step {kept} of" in word["message"]

    third = again(first, evaluation_tokens=given.sequence_length, checkpoint_seconds=1e9)
    script = tmp_path / "talkative.py"
    script.write_text(TALKATIVE)
    process = supervised(
        third,
        f"c = s._command; s._command = lambda *own: [*c(*own)[:-3], {str(script)!r}, str(own[0])]",
    )
    until(lambda: [event for event in log(third, "working") if event["what"] == "evaluation"])
    process.terminate()
    assert ended(process, third) == (0, None, None)
    assert log(third, "started")[0]["resumed_from"] == kept
    words = [event for event in log(third, "working") if event["what"] == "evaluation"]
    assert len(words) == 1 + given.validation_rows
    assert is_done(third.parent.parent)


@pytest.mark.parametrize("early", [True, False])
def test_a_stop_at_once_and_a_stop_before_the_trainer_is_there_are_heard(
    tmp_path: Path, prepared: PreparedDataset, early: bool
) -> None:
    folder = make_attempt(tmp_path, plan_of(LONG, prepared), prepared, ranks=1 if early else 2)
    process = supervised(folder)
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
        "stopped before the first step, as asked" if early else "ended at once, as asked"
    )
    assert not any(worker.is_running() for worker in family)
    assert not list(folder.parent.parent.glob("checkpoints/step-*"))


def test_a_kill_while_memory_is_short_is_out_of_memory_and_any_other_an_error(
    tmp_path: Path, prepared: PreparedDataset
) -> None:
    group = tmp_path / "root/sys/fs/cgroup/job"
    group.mkdir(parents=True)
    (tmp_path / "root/proc/self").mkdir(parents=True)
    (tmp_path / "root/proc/self/cgroup").write_text("0::/job\n")
    (group / "memory.events").write_text("oom 0\noom_kill 2\noom_group_kill 0\n")
    folder = make_attempt(tmp_path, plan_of(LONG, prepared), prepared, ranks=2)
    root = f"from functools import partial; k = s.devices.memory_kills; \
s.devices.memory_kills = partial(k, Path({str(tmp_path / 'root')!r}))"
    process = supervised(folder, root)
    until(lambda: log(folder, "train"))
    (group / "memory.events").write_text("oom 1\noom_kill 3\noom_group_kill 0\n")
    workers(process)[1].kill()
    assert ended(process, folder)[:2] == (1, "oom")
    nobody = cast(_Asked, SimpleNamespace(stop=False, at_once=False))
    assert (
        _why(folder, 1, nobody, _Watch(folder))[0] == "error"
    )  # no process was killed since it began to watch


@pytest.fixture
def watched(tmp_path: Path) -> Callable[..., _Watch]:
    """A watch of an attempt that wrote these events, each given with its time."""

    def watch(*written: tuple[float, dict[str, Any]]) -> _Watch:
        lines = [json.dumps({"time": time, **event}) for time, event in written]
        (tmp_path / "events.jsonl").write_text("".join(line + "\n" for line in lines))
        watch = _Watch(tmp_path)
        assert not watch.hung()
        return watch

    return watch


STEP = {"event": "train"}


def working(what: str) -> dict[str, str]:
    return {"event": "working", "what": what}


def test_silence_is_a_hang_after_ten_median_pauses_and_two_minutes_at_least(
    watched: Callable[..., _Watch],
) -> None:
    slow = [(when, STEP) for when in (0.0, 20.0, 40.0, 3640.0, 3660.0)]  # one pause of an hour
    assert watched(*slow).allowed == 10 * 20
    assert watched(*[(float(when), STEP) for when in range(5)]).allowed == 120


def test_a_start_a_compilation_a_checkpoint_and_an_evaluation_may_take_longer(
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
    )  # the weights are written
    assert set(supervisor.WORKING_SECONDS) == {"start", *events.WORKS}


def test_an_evaluation_longer_than_its_silence_limit_is_no_hang_while_it_speaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(supervisor.WORKING_SECONDS, "evaluation", 0.6)
    path = tmp_path / "events.jsonl"
    watch = _Watch(tmp_path)
    began = time.monotonic()
    while time.monotonic() - began < 1.5:
        with path.open("a") as file:
            file.write(json.dumps({"time": 0.0, **working("evaluation")}) + "\n")
        assert not watch.hung()
        time.sleep(0.1)
    until(watch.hung)
    assert watch.silence is not None
    assert watch.silence > 0.6


def test_time_in_which_the_supervisor_was_stopped_too_is_no_silence(
    watched: Callable[..., _Watch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "LOOK_SECONDS", 0.1)
    monkeypatch.setitem(supervisor.WORKING_SECONDS, "evaluation", 0.5)
    watch = watched((0.0, working("evaluation")))
    time.sleep(1)
    assert not watch.hung()


def test_a_damaged_line_of_events_ends_no_attempt_and_hides_no_other(
    watched: Callable[..., _Watch], tmp_path
) -> None:
    watch = watched((0.0, STEP))
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write(
            '{"event": "tra{"event": "train"}\n'
            + json.dumps({"time": 0.0, **working("evaluation")})
            + "\n"
        )
    assert not watch.hung()
    assert watch.allowed == 600


OOM = [
    "RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried",
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
    "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "OSError: [Errno 12] Cannot allocate memory",
    "MemoryError",
    "  what():  std::bad_alloc",
]


@pytest.mark.parametrize("line", OOM)
def test_a_full_memory_is_named_before_what_it_did_to_the_other_ranks(line: str) -> None:
    gloo = "RuntimeError: [../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:7777"
    end = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n=====\n  exitcode  : -6 (pid: 7)\n====="
    found = last_error(
        f"Traceback (most recent call last):\n{line}\nValueError: later\n{gloo}\n{end}\n"
    )
    assert found == line.strip()
    assert supervisor.OUT_OF_MEMORY.search(found)
    assert not supervisor.OUT_OF_MEMORY.search(last_error(f"KeyError: 'x'\n{gloo}\n{end}\n"))


def test_kills_of_the_kernel_are_those_of_the_own_group_else_of_the_machine(tmp_path: Path) -> None:
    own = tmp_path / "sys/fs/cgroup/user/session"
    for folder in (own, tmp_path / "proc/self"):
        folder.mkdir(parents=True)
    assert devices.memory_kills(tmp_path) == 0
    (tmp_path / "proc/vmstat").write_text("pgfault 5\noom_kill 7\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/user/session\n")
    assert devices.memory_kills(tmp_path) == 7
    (own.parent / "memory.events").write_text("max 9\noom 1\noom_kill 3\noom_group_kill 1\n")
    assert devices.memory_kills(tmp_path) == 3
    (own / "memory.events").write_text("oom_kill 2\n")
    assert devices.memory_kills(tmp_path) == 2
    assert devices.memory_kills() >= 0
