"""Out of memory: the micro-batch is halved with equal results, remembered, and not tried again."""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

import store
from slm.data import prepare
from slm.hardware.slot import MicroBatch, Slot
from slm.monitor.follow import Follower
from slm.plan import Plan
from slm.recipe import pocket
from slm.selection import records
from slm.sweep.micro_batch import MicroBatches
from tests.attempts import log, make_attempt, plan_of
from tests.store.test_store import dump, event, write_run
from tests.sweep.test_supervisor import ended, supervised, until, workers
from tests.train.test_train import Watcher

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="limits of a process's data are Linux's"
)

GIVING = {
    name: str(2**17)
    for name in ("MALLOC_TOP_PAD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
}
GIVING |= {"MALLOC_MMAP_MAX_": "65536", "OPENBLAS_NUM_THREADS": "1"}
"""Settings that make glibc return freed memory at once: a process holds only its tensors."""
DATA = """
from pathlib import Path
import slm.train.trainer
print(Path("/proc/self/status").read_text().split("VmData:")[1])
"""
DEEP = (
    'replace(pocket, name="deep", aspect_ratio=4, reference_batch=24_000, validation_tokens=2**13)'
)
"""Recipe whose d16 needs 460 MiB beyond torch's data at 64 rows per micro-batch, 260 at 32."""
WIDE = (
    'replace(pocket, name="wide", aspect_ratio=512, head_dim=64, reference_batch=1024, '
    "validation_tokens=2**13)"
)
"""Recipe whose d1 needs 130 MiB to train one row, 370 to evaluate 2^13 tokens, 240 for 2^12."""
SWEEP = """
import resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv.pop(1)), -1))
from slm.cli import main
main()
"""
UNLIMITED = resource.RLIM_INFINITY


@pytest.fixture(scope="module")
def torch_data() -> int:
    """Return the bytes of data of a trainer after its imports."""
    command = [sys.executable, "-c", DATA]
    return 1024 * int(
        subprocess.run(
            command, env=os.environ | GIVING, capture_output=True, check=True
        ).stdout.split()[0]
    )


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Return a small folder of texts."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 8))) for _ in range(400)]
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.txt").write_text(" ".join(draw.choices(words, k=1500)))
    return folder


def sweep(
    home: Path, corpus: Path, recipe: str, depth: int, limit: int, seed: int = 0
) -> subprocess.Popen[str]:
    """Sweep one run of two steps on one core, with a limit on the data of each process in bytes."""
    home.mkdir(exist_ok=True)
    path = home.with_name(f"{home.name}-{seed}.py")
    path.write_text(f"""
from dataclasses import replace
from slm.experiment import Experiment
from slm.recipe import pocket
experiment = Experiment(
    "test", ({recipe},), ({depth},), steps=2, seeds=({seed},), data={str(corpus)!r}
)
""")
    command = [sys.executable, "-c", SWEEP, str(limit), "sweep", str(path), "--cores=1", "--json"]
    environment = os.environ | GIVING | {"SLM_HOME": str(home)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finished(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Return the document of a sweep that finished every run."""
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    document: dict[str, Any] = json.loads(out)
    return document


def attempts(home: Path, run_id: str) -> list[tuple[int, int, str | None]]:
    """Return micro-batch, evaluation tokens and reason of each attempt of a run."""
    columns = "micro_batch, evaluation_tokens, reason"
    query = f"select {columns} from attempts where run_id = ? order by attempt"
    return [tuple(row.values()) for row in records(store.sql(query, [run_id], home=home))]  # type: ignore[misc]


@pytest.mark.soak
def test_a_forced_out_of_memory_ends_in_a_finished_run_and_a_remembered_micro_batch(
    tmp_path: Path, corpus: Path, torch_data: int
) -> None:
    limited, free = tmp_path / "limited", tmp_path / "free"
    limit = torch_data + 360 * 2**20
    sweeps = sweep(limited, corpus, DEEP, 16, limit), sweep(free, corpus, DEEP, 16, UNLIMITED)
    [[halved], [unlimited]] = (finished(process)["trained"] for process in sweeps)
    assert halved == unlimited
    assert attempts(free, unlimited) == [(64, 2**13, None)]
    assert attempts(limited, halved) == [(64, 2**13, "oom"), (32, 2**13, None)]
    query = (
        "select step, loss from curves where loss is not null "
        "union all select tokens, val_loss from finished"
    )
    losses = [
        store.sql(f"{query} order by 1", home=home)["loss"].tolist() for home in (limited, free)
    ]
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    [known] = records(store.sql("select * from micro_batches", home=limited))
    assert (known["depth"], known["width"], known["training"], known["evaluation_tokens"]) == (
        16,
        64,
        32,
        None,
    )
    assert records(store.sql("select * from micro_batches", home=free)) == []
    [other] = finished(sweep(limited, corpus, DEEP, 16, limit, seed=1))["trained"]
    assert attempts(limited, other) == [(32, 2**13, None)]


@pytest.mark.soak
def test_an_evaluation_out_of_memory_reads_fewer_tokens_at_the_same_micro_batch(
    tmp_path: Path, corpus: Path, torch_data: int
) -> None:
    home = tmp_path / "limited"
    [run_id] = finished(sweep(home, corpus, WIDE, 1, torch_data + 305 * 2**20))["trained"]
    assert attempts(home, run_id) == [(1, 2**13, "oom"), (1, 2**12, None)]
    [known] = records(store.sql("select * from micro_batches", home=home))
    assert (known["training"], known["evaluation_tokens"]) == (None, 2**12)


def test_the_error_names_a_remedy_where_one_row_is_too_much(
    tmp_path: Path, corpus: Path, torch_data: int
) -> None:
    process = sweep(tmp_path / "limited", corpus, WIDE, 1, torch_data + 75 * 2**20)
    out, _ = process.communicate(timeout=600)
    [message] = json.loads(out)["not_finished"].values()
    assert process.returncode == 1
    assert message.startswith("oom: ")
    assert message.endswith(
        "one row is the smallest micro-batch: use more memory per run, or a smaller depth"
    )


@pytest.mark.soak
def test_the_reason_is_oom_if_one_of_two_ranks_is_out_of_memory(
    tmp_path: Path, corpus: Path, torch_data: int
) -> None:
    recipe = replace(pocket, aspect_ratio=4, reference_batch=24_000, validation_tokens=2**13)
    hp = recipe(16, steps=2)
    prepared = prepare(str(corpus), hp, tmp_path)
    folder = make_attempt(tmp_path, plan_of(hp, prepared), prepared, ranks=2, micro_batch=32)
    with supervised(folder, **GIVING) as process:
        [second] = until(
            lambda: [worker for worker in workers(process) if worker.environ().get("RANK") == "1"]
        )
        second.rlimit(resource.RLIMIT_DATA, (torch_data + 160 * 2**20, UNLIMITED))
        code, reason, message = ended(process, folder)
    assert (code, reason) == (1, "oom")
    assert message is not None
    assert "allocate memory" in message
    assert not log(folder, "train")


def test_a_follower_knows_that_the_attempt_failed_in_an_evaluation(tmp_path: Path) -> None:
    attempt = tmp_path / "attempts" / "001"
    attempt.mkdir(parents=True)
    plan = cast(Plan, None)
    follower = Follower(plan, tmp_path, Watcher())
    lines = [{"event": "working", "what": "evaluation"}, {"event": "failed", "reason": "oom"}]
    (attempt / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in lines))
    follower.look()
    assert follower.evaluating


HP = replace(pocket(2, steps=4), batch_tokens=2**20)
SLOT = Slot("cpu", 2, 1, "test")


def known(training: int | None, evaluation_tokens: int | None) -> MicroBatches:
    shape = {
        name: getattr(HP, name) for name in ("depth", "width", "sequence_length", "vocab_size")
    }
    row = {
        "device_name": "test",
        "ranks": 2,
        "training": training,
        "evaluation_tokens": evaluation_tokens,
    }
    return MicroBatches([shape | row])


def test_a_second_failure_of_a_larger_micro_batch_does_not_raise_the_limit() -> None:
    micro_batches = known(8, 2**11)
    assert micro_batches.halve(HP, SLOT, MicroBatch(64, 2**13), evaluating=False) == MicroBatch(
        8, 2**11
    )
    assert micro_batches.halve(HP, SLOT, MicroBatch(64, 2**13), evaluating=True) == MicroBatch(
        8, 2**11
    )
    assert micro_batches.halve(HP, SLOT, MicroBatch(8, 2**11), evaluating=False) == MicroBatch(
        4, 2**11
    )
    assert micro_batches.halve(HP, SLOT, MicroBatch(4, 2**11), evaluating=True) == MicroBatch(
        4, 2**10
    )
    assert micro_batches.halve(HP, SLOT, MicroBatch(1, 2**10), evaluating=False) is None
    assert micro_batches.halve(HP, SLOT, MicroBatch(4, 128), evaluating=True) is None


def test_a_limit_of_one_shape_on_one_device_applies_to_no_other() -> None:
    micro_batches = known(8, None)
    free = MicroBatches().choose(HP, SLOT)
    assert micro_batches.choose(HP, SLOT) == replace(free, training=8)
    assert micro_batches.choose(replace(HP, width=32), SLOT) == free
    assert micro_batches.choose(HP, replace(SLOT, device_name="other")) == free


Attempt = tuple[int, int, int, str | None]
TRIED: list[tuple[list[Attempt], int | None, int | None]] = [
    ([(64, 2**13, 4, None), (32, 2**13, 4, "error")], None, None),
    ([(64, 2**13, 0, "oom")], 32, None),
    ([(64, 2**13, 0, "oom"), (32, 2**13, 2, "oom"), (16, 2**13, 4, None)], 16, None),
    ([(64, 2**13, 0, "oom"), (48, 2**13, 1, "interrupted")], 48, None),
    ([(1, 2**13, 4, None), (64, 2**13, 0, "oom")], 32, None),
    ([(64, 2**13, 4, "oom")], None, 2**12),
    ([(64, 2**13, 4, "oom"), (64, 2**12, 4, "oom"), (64, 2**11, 4, None)], None, 2**11),
    ([(64, 2**13, 0, "oom"), (32, 2**13, 4, "oom"), (32, 2**12, 4, None)], 32, 2**12),
    ([(1, 2**13, 0, "oom")], 0, None),
]
"""Attempts of four steps (micro-batch, evaluation tokens, steps, reason), and their limits."""


def test_the_store_derives_the_largest_micro_batch_that_may_fit(tmp_path: Path) -> None:
    for depth, (tried, _, _) in enumerate(TRIED):
        run = write_run(tmp_path, f"run{depth}", depth=depth, done=False)
        for number, attempt in enumerate(tried, 1):
            write_attempt(run / "attempts" / f"{number:03d}", number, *attempt)
    assert store.ingest(tmp_path).problems == []
    query = "select depth, training, evaluation_tokens from micro_batches order by depth"
    rows = [tuple(row.values()) for row in records(store.sql(query, home=tmp_path))]
    assert rows == [
        (depth, *known) for depth, (_, *known) in enumerate(TRIED) if known != [None, None]
    ]


def write_attempt(
    folder: Path,
    number: int,
    micro_batch: int,
    evaluation_tokens: int,
    step: int,
    reason: str | None,
) -> None:
    """Write an attempt that reached a step and ended for a reason."""
    folder.mkdir(exist_ok=True)
    document = {
        "attempt": number,
        "created": float(number),
        "device": "cpu",
        "device_name": "test",
        "ranks": 2,
    }
    document |= {"threads": 1, "micro_batch": micro_batch, "evaluation_tokens": evaluation_tokens}
    dump(folder / "attempt.json", document)
    (folder / "events.jsonl").write_text("".join(event(done) for done in range(1, step + 1)))
    dump(
        folder / "exit.json",
        {"attempt": number, "time": 1.0, "code": 1, "signal": None, "reason": reason},
    )
