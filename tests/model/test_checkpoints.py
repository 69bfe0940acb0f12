"""Checkpoints: kept in twos, known by their hash, and never lost to a dead writer, a flipped byte or a full disk."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import store
from slm import events
from slm.data import Prepared
from slm.experiment import Experiment
from slm.files import lock_holder
from slm.model import checkpoints
from slm.monitor.display import Display
from slm.plan import Plan
from slm.recipe import pocket
from slm.run import read_exit
from tests.conftest import slm
from tests.homes import home_of
from tests.train.test_train import ONE, TWO, Watcher, of, train

linux = pytest.mark.skipif(
    sys.platform != "linux", reason="limits of another process and tmpfs are Linux's"
)
SAME = ("run_id", "val_bpb", "val_loss", "train_loss", "tokens", "flops", "weights_sha256")


def tensors(step: int, size: int = 1000) -> dict[str, torch.Tensor]:
    return {"a": torch.full((size,), float(step)), "b": torch.tensor(step)}


def written(folder: Path, *steps: int, size: int = 1000) -> list[Path]:
    """Checkpoints of steps, one after another."""
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
    """Let a process write no file beyond a size; -1 lets it again."""
    _, most = psutil.Process(pid).rlimit(psutil.RLIMIT_FSIZE)
    psutil.Process(pid).rlimit(psutil.RLIMIT_FSIZE, (size, most))


@contextmanager
def limited(size: int) -> Iterator[None]:
    """The same for this process, for a while."""
    limit_files(os.getpid(), size)
    try:
        yield
    finally:
        limit_files(os.getpid(), -1)


def test_the_last_two_are_kept_under_their_step_and_hash(tmp_path: Path) -> None:
    *_, last, newest = written(tmp_path, 10, 20, 30)
    assert {*tmp_path.iterdir()} == {last, newest}
    digest = hashlib.sha256(newest.read_bytes()).hexdigest()[:16]
    assert newest.name == f"step-000000030.{digest}.safetensors"
    assert checkpoints.newest(tmp_path) == (newest, [])


def test_what_is_read_is_to_the_bit_what_was_written(tmp_path: Path) -> None:
    given = {
        "f": torch.tensor([float("nan"), -0.0, 1e-45]),
        "b": torch.randn(3, 4).bfloat16().mT,
        "i": torch.tensor(7, dtype=torch.int64),
    }
    path = checkpoints.write(tmp_path / "new", 1, given, {"run_id": "r", "step": "1"})
    found, metadata = checkpoints.read(path)
    assert metadata == {"run_id": "r", "step": "1"}
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in given.items()
    }
    bits = torch.int32, torch.int16, torch.int64
    assert all(
        torch.equal(found[name].view(kind), given[name].contiguous().view(kind))
        for name, kind in zip("fbi", bits, strict=True)
    )


def test_a_saved_file_has_the_hash_that_is_told(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    assert checkpoints.save(path, tensors(1), {}) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize(
    ("damage", "words"),
    [(flip_a_byte, "hash"), (tear, "hash"), (make_unreadable, "Is a directory")],
)
def test_a_damaged_one_falls_back_to_the_one_before(
    tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    before, newest = written(tmp_path, 10, 20)
    damage(newest)
    found, [line] = checkpoints.newest(tmp_path)
    assert found == before
    assert line.startswith(f"checkpoint {newest.name} is damaged (")
    assert words in line
    assert line.endswith(f": went on from {before.name}")


def test_where_all_are_damaged_or_none_is_there_it_starts_from_step_0(tmp_path: Path) -> None:
    assert checkpoints.newest(tmp_path / "none") == (None, [])
    for path in written(tmp_path, 10, 20):
        flip_a_byte(path)
    found, lines = checkpoints.newest(tmp_path)
    assert found is None
    assert len(lines) == 2
    assert all(line.endswith(": started from step 0") for line in lines)


def test_a_damaged_one_never_takes_the_place_of_a_good_one(tmp_path: Path) -> None:
    before, damaged = written(tmp_path, 10, 40)
    flip_a_byte(damaged)
    good, _ = checkpoints.newest(tmp_path)
    path = checkpoints.write(tmp_path, 20, tensors(20), {"run_id": "r"}, good)
    assert {*tmp_path.iterdir()} == {before, path}


def test_a_killed_writer_harms_nothing_and_its_leftovers_go(tmp_path: Path) -> None:
    program = (
        "import torch; from pathlib import Path; from slm import checkpoints; path = None\n"
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
def test_a_write_that_fails_leaves_the_good_ones_and_nothing_else(tmp_path: Path) -> None:
    *_, good = written(tmp_path, 10, 20, size=100_000)
    before = content(tmp_path)
    with limited(200_000), pytest.raises(OSError, match="File too large"):
        checkpoints.write(tmp_path, 30, tensors(30, 100_000), {}, good)
    assert content(tmp_path) == before


@linux
def test_a_full_disk_leaves_the_good_ones_and_nothing_else(tmp_path: Path) -> None:
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
def undisturbed(tmp_path_factory: pytest.TempPathFactory, prepared: Prepared) -> dict[str, Any]:
    """The done.json of a run that two ranks trained without a disturbance."""
    home = tmp_path_factory.mktemp("undisturbed")
    (home / "data").symlink_to(prepared.folder.parent)
    return result(train(home, TWO, Watcher())[0])


def result(folder: Path) -> dict[str, Any]:
    done = json.loads((folder / "done.json").read_text())
    return {key: done[key] for key in SAME}


def test_a_run_whose_newest_checkpoint_is_damaged_ends_as_an_undisturbed_one(
    home: Path, undisturbed: dict[str, Any]
) -> None:
    kept: list[Path] = []

    def kill_and_damage(attempt: Path, event: dict[str, Any]) -> None:
        run = attempt.parent.parent
        if event["event"] == "checkpoint" and event["step"] >= 30 and not kept:
            supervisor = psutil.Process(lock_holder(run / "lock") or 0)
            family = supervisor.children(recursive=True)
            for process in family:
                process.kill()
            psutil.wait_procs([supervisor, *family], timeout=30)
            kept.extend(sorted((run / "checkpoints").glob("step-*")))
            flip_a_byte(kept[-1])

    watcher = Watcher(kill_and_damage)
    folder, outcome = train(home, TWO, watcher, checkpoint_seconds=0)
    *_, before, damaged = kept  # three where the kill came before the oldest was dropped
    [warning] = of(watcher, "warning")
    assert warning["message"].startswith(f"checkpoint {damaged.name} is damaged")
    assert warning["message"].endswith(f"went on from {before.name}")
    assert of(watcher, "started")[1]["resumed_from"] == warning["step"] == int(before.name[5:14])
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
def test_a_run_goes_on_while_checkpoints_cannot_be_written(home: Path) -> None:
    seen: list[dict[str, bytes]] = []

    def limit_for_a_while(attempt: Path, event: dict[str, Any]) -> None:
        run = attempt.parent.parent
        trainer = lock_holder(run / "train.lock")
        if event["event"] == "checkpoint" and event["step"] == 10:
            assert trainer is not None
            limit_files(trainer, 200_000)
        if event["event"] == "warning" and len(seen) < 3:
            seen.append(content(run / "checkpoints"))
            if len(seen) == 3:
                assert trainer is not None
                limit_files(trainer, -1)

    watcher = Watcher(limit_for_a_while)
    folder, outcome = train(home, ONE, watcher, steps=250, checkpoint_seconds=0)
    warnings = of(watcher, "warning")
    last_good = max(seen[0])
    assert len(seen[0]) == 2
    assert seen == [seen[0]] * 3
    expected = (
        f"could not be written (File too large): the last good one is {last_good}; free some space"
    )
    assert all(
        warning["message"] == f"checkpoint at step {warning['step']} {expected}"
        for warning in warnings
    )
    assert of(watcher, "checkpoint")[-1]["step"] > warnings[-1]["step"]
    assert outcome.trained == [folder.name]
    assert len(of(watcher, "started")) == 1


@linux
def test_a_result_that_cannot_be_written_is_one_line_and_nothing_is_lost(
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
    last_good = of(watcher, "warning")[-1]["message"]
    _, second = of(watcher, "started")
    assert f"step-{second['resumed_from']:09d}" in last_good
    assert second["resumed_from"] >= 10
    assert outcome.trained == [folder.name]
    assert result(folder) == undisturbed
