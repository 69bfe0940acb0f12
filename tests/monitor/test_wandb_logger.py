"""The Weights & Biases logger: wandb's own offline files read back, failing servers, no wandb."""

from __future__ import annotations

import json
import math
import os
import pty
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from slm.experiment import Experiment
from slm.plan import Plan
from slm.recipe import pocket
from tests.homes import home_of

ROOT = Path(__file__).parents[2]
BLOCK = 2**15
"""Bytes of a block of wandb's files, which are LevelDB's logs behind a header of seven bytes."""
PROGRAM = """
import json, sys
from pathlib import Path
from slm.monitor.wandb_logger import WandbLogger
from slm.plan import Plan
home = Path(sys.argv[1])

class Notes:
    def run_started(self, plan, attempt, adopted): ...
    def event(self, plan, event): ...
    def run_ended(self, plan, outcome, message): ...
    def refresh(self): ...
    def note(self, line):
        print(line, flush=True)

with WandbLogger(Notes(), "family", home, timeout=float(sys.argv[2])) as logger:
    for run_id, method, *arguments in json.loads((home / "calls.json").read_text()):
        if method == "run_started":
            arguments = [home / run_id / "attempts" / "001", False]
        getattr(logger, method)(Plan.read(home / run_id / "plan.json"), *arguments)
"""

needs_wandb = pytest.mark.skipif(
    find_spec("wandb") is None, reason="wandb is not installed: pip install 'slm[wandb]'"
)


@dataclass
class OfflineRun:
    """Content of an offline run's file."""

    run: Any = None
    """Record of the run itself."""
    history: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    """Step and values of each row."""
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None


def read_offline(path: Path) -> OfflineRun:
    from wandb.proto.wandb_internal_pb2 import Record

    offline = OfflineRun()
    for data in leveldb_records(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        match record.WhichOneof("record_type"):
            case "run":
                offline.run = record.run
            case "history":
                offline.history.append((record.history.step.num, values(record.history.item)))
            case "summary":
                offline.summary |= values(record.summary.update)
            case "exit":
                offline.exit_code = record.exit.exit_code
    return offline


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a LevelDB log: whole (kind 1), or in pieces, the last of kind 4."""
    position = 7
    record = b""
    while position < len(data):
        if BLOCK - position % BLOCK < 7:
            position += BLOCK - position % BLOCK
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def values(items: Any) -> dict[str, Any]:
    """Return key and value of each item, without those of wandb itself."""
    pairs = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
    return {key: value for key, value in pairs.items() if not key.startswith("_")}


def log_calls(
    home: Path, calls: list[list[Any]], timeout: float, **environment: str
) -> tuple[int, str, str]:
    """Log some calls in a terminal without a login. Return exit code, warnings and terminal."""
    (home / "calls.json").write_text(json.dumps(calls))
    command = [sys.executable, "-W", "error", "-c", PROGRAM, str(home), str(timeout)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    clean |= {
        "HOME": str(home),
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "TERM": "xterm",
    }
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    with os.fdopen(master, "rb", buffering=0) as screen, os.fdopen(slave) as terminal:
        env = clean | environment
        result = subprocess.run(
            command,
            env=env,
            stdin=terminal,
            stderr=terminal,
            stdout=subprocess.PIPE,
            text=True,
            timeout=300,
            check=False,
        )
        return result.returncode, result.stdout, (screen.read(2**16) or b"").decode()


def train(step: int, loss: float = 2.0) -> dict[str, Any]:
    event: dict[str, Any] = {
        "event": "train",
        "time": 1.0,
        "step": step,
        "tokens": 64 * step,
        "flops": 1e6 * step,
    }
    event |= {
        "loss": loss,
        "lr": 0.5,
        "gradient_norm": 0.25,
        "update_size": None,
        "tokens_per_second": 1e9,
    }
    return event | {"train_seconds": 0.125 * step}


def family(home: Path) -> dict[int, Plan]:
    """Write four finished runs on two H100s, and return their plans by depth."""
    home_of(home, Experiment("family", (pocket,), (2, 3, 4, 5)), core=lambda hp: hp.depth / 100)
    plans = [Plan.read(path) for path in home.glob("*/plan.json")]
    return {plan.hyperparameters.depth: plan for plan in plans}


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """A local server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        yield listening


def url_of(server: socket.socket) -> str:
    return f"http://127.0.0.1:{server.getsockname()[1]}"


@needs_wandb
def test_offline_files_hold_the_values_of_the_events(tmp_path: Path, server: socket.socket) -> None:
    plans = family(tmp_path)
    two, three, four, five = (plans[depth].run_id for depth in (2, 3, 4, 5))
    bpb = json.loads((tmp_path / two / "done.json").read_text())["val_bpb"]
    evaluated = {
        "event": "eval",
        "time": 1.0,
        "step": 3,
        "tokens": 192,
        "flops": 3e6,
        "val_bpb": bpb,
        "val_loss": 3.0,
    }
    core = {
        "event": "core",
        "time": 1.0,
        "step": 3,
        "metric": "core",
        "mode": "full",
        "core": 0.02,
        "core_error": 0.01,
    }
    small = core | {"metric": "pocket-core", "mode": "500 per task", "core": 0.25}
    saved = {"event": "checkpoint", "time": 1.0, "step": 3, "file": "f", "bytes": 1, "seconds": 1.0}
    calls = [[run, "run_started"] for run in (two, three, four, five)]
    calls += [[run, "event", train(step)] for step in (1, 2, 3) for run in (two, three, five)]
    calls += [[two, "event", event] for event in (evaluated, core, small, saved)] + [
        [two, "run_ended", "finished", None]
    ]
    calls += [[three, "run_ended", "retried", "error"]]
    calls += [[three, "run_started"], *([three, "event", train(step, 9.0)] for step in (2, 4))]
    calls += [
        [three, "run_ended", "interrupted", "stopped"],
        [four, "event", train(1, float("nan"))],
    ]
    calls += [[four, "run_ended", "diverged", "loss is nan"]]

    assert log_calls(tmp_path, calls, 30, WANDB_MODE="offline", WANDB_BASE_URL=url_of(server)) == (
        0,
        "",
        "",
    )
    with pytest.raises(BlockingIOError):
        server.accept()  # no connection was made
    files = {
        path.stem.removeprefix("run-"): path
        for path in tmp_path.glob("wandb/offline-run-*/*.wandb")
    }
    runs = {run_id: read_offline(path) for run_id, path in files.items()}
    assert sorted(runs) == sorted((two, three, four, five))
    assert {run_id: run.exit_code for run_id, run in runs.items()} == {
        two: 0,
        three: 255,
        four: 1,
        five: 255,
    }

    run = runs[two].run
    hp = plans[2].hyperparameters
    assert (run.run_id, run.display_name, run.run_group, run.project) == (
        two,
        "pocket d2 seed 0",
        "family",
        "slm",
    )
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["depth"] == 2
    assert config["matrix_lr"] == hp.matrix_lr
    assert [config[name] for name in ("recipe", "seed", "code", "run_id")] == [
        "pocket",
        0,
        "c0de1",
        two,
    ]
    assert config["data"]["tokenizer"] == "tok"

    logged = {
        "step": 3,
        "train/loss": 2.0,
        "train/lrm": 0.5,
        "train/gradient_norm": 0.25,
        "train/tok_per_sec": 1e9,
    }
    logged |= {"total_training_time": 0.375, "total_training_flops": 3e6, "val/bpb": bpb}
    logged |= {"core_metric": 0.02, "pocket-core/500 per task": 0.25}
    logged |= {"train/mfu": pytest.approx(100 * 1e9 * hp.flops_per_token / (2 * 989e12))}
    assert [step for step, _ in runs[two].history] == [1, 2, 3]
    assert runs[two].history[-1][1] == logged
    assert (runs[two].summary["val/bpb"], runs[two].summary["core_metric"]) == (bpb, 0.02)

    losses = [(step, row["train/loss"]) for step, row in runs[three].history]
    assert losses == [
        (1, 2.0),
        (2, 2.0),
        (3, 2.0),
        (4, 9.0),
    ]  # the second attempt's step 2 is left out
    assert math.isnan(runs[four].history[0][1]["train/loss"])


@needs_wandb
def test_a_server_that_never_answers_costs_a_warning_and_not_the_sweep(
    tmp_path: Path, server: socket.socket
) -> None:
    run_id = family(tmp_path)[2].run_id
    calls = [[run_id, "run_started"], *([run_id, "event", train(step)] for step in (1, 2))]
    calls += [[run_id, "run_ended", "finished", None]]
    code, warnings, _ = log_calls(
        tmp_path, calls, 1, WANDB_BASE_URL=url_of(server), WANDB_API_KEY="0" * 40
    )
    assert code == 0
    late = "Weights & Biases did not take everything within 2 s"
    assert warnings.startswith((f"run {run_id} is no longer logged to Weights & Biases: ", late))


@needs_wandb
def test_without_a_login_there_is_a_warning_and_no_prompt(tmp_path: Path) -> None:
    run_id = family(tmp_path)[2].run_id
    code, warnings, terminal = log_calls(
        tmp_path, [[run_id, "run_started"], [run_id, "event", train(1)]], 30
    )
    assert (code, terminal) == (0, "")
    (line,) = warnings.splitlines()
    assert line.startswith(f"run {run_id} is no longer logged to Weights & Biases: ")
    assert "wandb login" in line


def test_without_wandb_the_option_is_refused(tmp_path: Path) -> None:
    program = "from slm.monitor.wandb_logger import check_installed; check_installed()"
    command = [sys.executable, "-S", "-c", program]  # -S: the standard library alone
    result = subprocess.run(
        command, env={"PYTHONPATH": str(ROOT)}, cwd=tmp_path, capture_output=True, text=True
    )
    assert result.stderr.splitlines()[-1] == (
        "ValueError: --wandb needs wandb, which is not installed: pip install 'slm[wandb]'"
    )
