"""Checkpoints: the last two stay, and survive a killed writer, a flipped byte and a full disk."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import store
from slm import events
from slm.data import PreparedDataset
from slm.experiment import Experiment
from slm.files import lock_holder
from slm.model import checkpoints
from slm.monitor.display import Display
from slm.plan import Plan
from slm.recipe import pocket
from slm.run import read_exit
from tests.commands import slm
from tests.homes import home_of
from tests.train.test_train import ONE, TWO, Watcher, events_of, train

linux = pytest.mark.skipif(
    sys.platform != "linux", reason="limits of another process and tmpfs are Linux's"
)
SAME = ("run_id", "val_bpb", "val_loss", "train_loss", "tokens", "flops", "weights_sha256")


def tensors(step: int, size: int = 1000) -> dict[str, torch.Tensor]:
    return {"a": torch.full((size,), float(step)), "b": torch.tensor(step)}


def written(folder: Path, *steps: int, size: int = 1000) -> list[Path]:
    """Write checkpoints of steps, one after another."""
    paths: list[Path] = []
    for step in steps:
        before = paths[-1] if paths else None
        paths.append(checkpoints.write(folder, step, tensors(step, size), {"run_id": "r"}, before))
    return paths


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def make_unreadable(path: Path) -> None:
    path.unlink()
    path.mkdir()


def limit_files(pid: int, size: int) -> None:
    """Limit the size of files that a process may write; -1 lifts the limit."""
    _, hard = psutil.Process(pid).rlimit(psutil.RLIMIT_FSIZE)
    psutil.Process(pid).rlimit(psutil.RLIMIT_FSIZE, (size, hard))


@contextmanager
def limited(size: int) -> Iterator[None]:
    """Limit the size of files of this process within the block."""
    limit_files(os.getpid(), size)
    try:
        yield
    finally:
        limit_files(os.getpid(), -1)


def test_the_last_two_checkpoints_are_kept_under_their_step_and_hash(tmp_path: Path) -> None:
    *_, last, newest = written(tmp_path, 10, 20, 30)
    assert {*tmp_path.iterdir()} == {last, newest}
    digest = hashlib.sha256(newest.read_bytes()).hexdigest()[:16]
    assert newest.name == f"step-000000030.{digest}.safetensors"
    assert checkpoints.newest(tmp_path) == (newest, [])


def test_tensors_are_read_bit_by_bit_as_written(tmp_path: Path) -> None:
    tensors = {
        "f": torch.tensor([float("nan"), -0.0, 1e-45]),
        "b": torch.randn(3, 4).bfloat16().mT,
        "i": torch.tensor(7, dtype=torch.int64),
    }
    path = checkpoints.write(tmp_path / "new", 1, tensors, {"run_id": "r", "step": "1"})
    result, metadata = checkpoints.read(path)
    assert metadata == {"run_id": "r", "step": "1"}
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in result.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()
    }
    bits = torch.int32, torch.int16, torch.int64
    assert all(
        torch.equal(result[name].view(kind), tensors[name].contiguous().view(kind))
        for name, kind in zip("fbi", bits, strict=True)
    )


def test_save_returns_the_hash_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    assert checkpoints.save(path, tensors(1), {}) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(flip_a_byte, "hash"), (tear, "hash"), (make_unreadable, "Is a directory")],
)
def test_a_damaged_checkpoint_falls_back_to_the_previous_one(
    tmp_path: Path, damage: Callable[[Path], None], reason: str
) -> None:
    before, newest = written(tmp_path, 10, 20)
    damage(newest)
    good, [line] = checkpoints.newest(tmp_path)
    assert good == before
    assert line.startswith(f"checkpoint {newest.name} is damaged (")
    assert reason in line
    assert line.endswith(f": resumed from {before.name}")


def test_without_a_good_checkpoint_training_starts_from_step_0(tmp_path: Path) -> None:
    assert checkpoints.newest(tmp_path / "none") == (None, [])
    for path in written(tmp_path, 10, 20):
        flip_a_byte(path)
    good, lines = checkpoints.newest(tmp_path)
    assert good is None
    assert len(lines) == 2
    assert all(line.endswith(": started from step 0") for line in lines)


def test_a_damaged_checkpoint_never_replaces_a_good_one(tmp_path: Path) -> None:
    before, damaged = written(tmp_path, 10, 40)
    flip_a_byte(damaged)
    good, _ = checkpoints.newest(tmp_path)
    path = checkpoints.write(tmp_path, 20, tensors(20), {"run_id": "r"}, good)
    assert {*tmp_path.iterdir()} == {before, path}


def test_a_killed_writer_damages_nothing_and_its_unfinished_files_are_removed(
    tmp_path: Path,
) -> None:
    program = (
        "import torch; from pathlib import Path; from slm.model import checkpoints; path = None\n"
        f"for step in range(10**6): path = checkpoints.write(Path({str(tmp_path)!r}), step,\n"
        "    {'a': torch.zeros(10**6)}, {}, path)"
    )
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        while not (len([*tmp_path.glob("step-*")]) >= 2 and [*tmp_path.glob(".*")]):
            process.send_signal(signal.SIGCONT)
            time.sleep(0.003)
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        process.kill()
    good, damaged = checkpoints.newest(tmp_path)
    assert good is not None
    assert damaged == []
    path = checkpoints.write(tmp_path, 10**6, tensors(1), {}, good)
    assert {*tmp_path.iterdir()} == {good, path}


@linux
def test_a_failed_write_leaves_the_good_checkpoints_and_nothing_else(tmp_path: Path) -> None:
    *_, good = written(tmp_path, 10, 20, size=100_000)
    before = content(tmp_path)
    with limited(200_000), pytest.raises(OSError, match="File too large"):
        checkpoints.write(tmp_path, 30, tensors(30, 100_000), {}, good)
    assert content(tmp_path) == before


@linux
def test_a_full_disk_leaves_the_good_checkpoints_and_nothing_else(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a tmpfs")
    try:
        *_, good = written(tmp_path, 10, 20, size=100_000)
        before = content(tmp_path)
        with pytest.raises(OSError, match="No space left on device"):
            checkpoints.write(tmp_path, 30, tensors(30, 100_000), {}, good)
        assert content(tmp_path) == before
        assert checkpoints.newest(tmp_path) == (good, [])
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@linux
def test_an_event_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    writer = events.Writer(path)
    writer.write("warning", step=1, message="one")
    with (
        limited(path.stat().st_size + 20),
        pytest.raises(OSError, match=r"File too large: .*events\.jsonl"),
    ):
        writer.write("warning", step=2, message="two")
    writer.write("warning", step=3, message="three")
    assert [event["message"] for event in events.Reader(path).new()] == ["one", "three"]
    assert len(path.read_bytes().splitlines()) == 2


def test_a_warning_is_shown_and_is_no_metric(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = home_of(tmp_path, Experiment("e", (pocket,), (2,), steps=20))
    [folder] = [path.parent for path in home.glob("*/plan.json")]
    plan = Plan.read(folder / "plan.json")
    numbers = store.ingest(home).metrics
    writer = events.Writer(folder / "attempts" / "001" / "events.jsonl")
    writer.write("warning", step=7, message="30")
    counts = store.ingest(home)
    assert (counts.events, counts.metrics, counts.problems) == (1, 0, [])
    counts = store.rebuild(home)
    assert (counts.metrics, counts.problems) == (numbers, [])
    assert "warning: 30" in slm("show", folder.name, home=home).stdout
    Display([plan], set()).event(
        plan, {"event": "warning", "step": 7, "message": "free some space"}
    )
    assert capsys.readouterr().err.startswith(
        f"{folder.name} pocket d2 steps=20 seed 0: free some space"
    )


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, prepared: PreparedDataset
) -> dict[str, Any]:
    """Train a run on two ranks, undisturbed; return its results."""
    home = tmp_path_factory.mktemp("undisturbed")
    (home / "data").symlink_to(prepared.folder.parent)
    return result(train(home, TWO, Watcher())[0])


def result(folder: Path) -> dict[str, Any]:
    done = json.loads((folder / "done.json").read_text())
    return {key: done[key] for key in SAME}


def test_a_run_with_a_damaged_checkpoint_ends_with_the_results_of_an_undisturbed_one(
    home: Path, undisturbed: dict[str, Any]
) -> None:
    paths: list[Path] = []

    def kill_and_damage(attempt: Path, event: dict[str, Any]) -> None:
        run = attempt.parent.parent
        if event["event"] == "checkpoint" and event["step"] >= 10 and not paths:
            supervisor = psutil.Process(lock_holder(run / "lock") or 0)
            family = supervisor.children(recursive=True)
            for process in family:
                with suppress(psutil.NoSuchProcess):  # the supervisor killed it
                    process.kill()
            psutil.wait_procs([supervisor, *family], timeout=300)
            paths.extend(sorted((run / "checkpoints").glob("step-*")))
            flip_a_byte(paths[-1])

    watcher = Watcher(kill_and_damage)
    folder, outcome = train(home, TWO, watcher, checkpoint_seconds=0)
    *_, before, damaged = paths  # three if the kill came before the oldest was removed
    [warning] = events_of(watcher, "warning")
    assert warning["message"].startswith(f"checkpoint {damaged.name} is damaged")
    assert warning["message"].endswith(f"resumed from {before.name}")
    assert (
        events_of(watcher, "started")[1]["resumed_from"]
        == warning["step"]
        == int(before.name[5:14])
    )
    assert outcome.trained == [folder.name]
    assert result(folder) == undisturbed


def test_a_checkpoint_of_another_run_is_refused(home: Path) -> None:
    def put_another(attempt: Path) -> None:
        checkpoints.write(
            attempt.parent.parent / "checkpoints", 5, tensors(5), {"run_id": "0123456789ab"}
        )

    class Mixer(Watcher):
        def run_started(self, plan, attempt: Path, adopted: bool) -> None:
            put_another(attempt)

    folder, outcome = train(home, TWO, Mixer())
    assert "belongs to run 0123456789ab" in outcome.not_finished[folder.name]
    assert outcome.not_finished[folder.name].startswith("data: ")
    assert len([*(folder / "checkpoints").iterdir()]) == 1


@linux
@pytest.mark.soak
def test_training_continues_while_checkpoints_cannot_be_written(home: Path) -> None:
    snapshots: list[dict[str, bytes]] = []

    def limit_for_a_while(attempt: Path, event: dict[str, Any]) -> None:
        run = attempt.parent.parent
        trainer = lock_holder(run / "train.lock")
        if event["event"] == "checkpoint" and event["step"] == 10:
            assert trainer is not None
            limit_files(trainer, 200_000)
        if event["event"] == "warning" and len(snapshots) < 3:
            snapshots.append(content(run / "checkpoints"))
            if len(snapshots) == 3:
                assert trainer is not None
                limit_files(trainer, -1)

    watcher = Watcher(limit_for_a_while)
    folder, outcome = train(home, ONE, watcher, steps=250, checkpoint_seconds=0)
    warnings = events_of(watcher, "warning")
    last_good = max(snapshots[0])
    assert len(snapshots[0]) == 2
    assert snapshots == [snapshots[0]] * 3
    expected = (
        f"could not be written (File too large): the last good one is {last_good}; free some space"
    )
    assert all(
        warning["message"] == f"checkpoint at step {warning['step']} {expected}"
        for warning in warnings
    )
    assert events_of(watcher, "checkpoint")[-1]["step"] > warnings[-1]["step"]
    assert outcome.trained == [folder.name]
    assert len(events_of(watcher, "started")) == 1


@linux
def test_a_result_that_cannot_be_written_is_one_error_and_nothing_is_lost(
    home: Path, undisturbed: dict[str, Any]
) -> None:
    def limit(attempt: Path, event: dict[str, Any]) -> None:
        if event["event"] == "checkpoint" and event["step"] == 10 and attempt.name == "001":
            limit_files(lock_holder(attempt.parent.parent / "train.lock") or 0, 100_000)

    watcher = Watcher(limit)
    folder, outcome = train(home, TWO, watcher, checkpoint_seconds=0)
    ended = read_exit(folder / "attempts" / "001")
    assert ended is not None
    assert ended["reason"] == "error"
    assert (
        f"{folder / 'model.safetensors'} could not be written (File too large): free some space"
        in ended["message"]
    )
    last_good = events_of(watcher, "warning")[-1]["message"]
    _, second = events_of(watcher, "started")
    assert f"step-{second['resumed_from']:09d}" in last_good
    assert second["resumed_from"] >= 10
    assert outcome.trained == [folder.name]
    assert result(folder) == undisturbed
