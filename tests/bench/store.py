"""Store: ten million metric rows of a thousand runs, then MLflow and Optuna on SQLite next to it.

ROWS=1000000 measures fewer rows, SLM_BENCH_SMALL=1 the smallest size. PEERS names a folder with the
peers' packages, which are not in the lock file.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

import store
from slm.events import FIELDS
from slm.experiment import Experiment
from slm.recipe import pocket
from tests.homes import home_of

SMALL = bool(os.environ.get("SLM_BENCH_SMALL"))
"""Whether to run at the smallest size, as a smoke test."""
NAMES = FIELDS["train"][1:]
"""Numbers that the trainer writes at a step, besides the step."""
ROWS = 40_000 if SMALL else int(os.environ.get("ROWS", 10_000_000))
"""Metric rows at scale."""
RUNS = 40 if SMALL else 1000
"""Runs at scale."""
PEER_ROWS = 4_000 if SMALL else 100_000
"""Metric rows for each store in the comparison."""
READERS = 2 if SMALL else 10
"""Concurrent readers."""
REPEATS = 1 if SMALL else 5
"""Repetitions of which the median counts."""
PEER_PACKAGES = "mlflow-skinny optuna sqlalchemy alembic"
INGEST = """
import resource, sys, time, store
from pathlib import Path
began = time.perf_counter()
counts = store.ingest(Path(sys.argv[1]))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(counts.metrics, time.perf_counter() - began, peak)
"""


class Row(NamedTuple):
    """A line of the table."""

    work: str
    rows: int
    seconds: float
    limit: float | None = None
    """Target in seconds."""
    microseconds: float | None = None
    """Microseconds per row."""
    ratio: float | None = None
    """Microseconds per row relative to slm at the same work."""
    megabytes: float | None = None


HEADERS = ("work", "rows", "seconds", "limit", "microseconds a row", "times slm", "MB")
Measured = Iterator[tuple[str, int, float, float | None]]
"""Work, rows, seconds and megabytes."""


def rows() -> Iterator[Row]:
    """Yield the rows of HEADERS: slm at scale, then each store with the same few rows."""
    with tempfile.TemporaryDirectory() as folder:
        yield from _at_scale(Path(folder))
    sys.path.append(os.environ.get("PEERS", ""))
    baseline: dict[str, float] = {}
    stores = (("slm", "store", _slm), ("MLflow", "mlflow", _mlflow), ("Optuna", "optuna", _optuna))
    for name, package, measure in stores:
        if not find_spec(package):
            install = f"pip install --target FOLDER {PEER_PACKAGES}; PEERS=FOLDER make bench"
            print(f"no {name}: {install}", file=sys.stderr)
            continue
        with tempfile.TemporaryDirectory() as folder:
            runs = [f"{number:04d}" for number in range(RUNS // 10)]
            lines = PEER_ROWS // len(runs) // len(NAMES)
            for work, count, seconds, megabytes in measure(Path(folder), runs, lines):
                each = 1e6 * seconds / count
                ratio = each / baseline.setdefault(work, each)
                yield Row(f"{name}: {work}", count, seconds, None, each, ratio, megabytes)


def _at_scale(home: Path) -> Iterator[Row]:
    lines = ROWS // RUNS // len(NAMES)
    # 1) make the files, and ingest them
    seconds = _seconds(lambda: _make(home, RUNS, lines))
    size = _megabytes(home, "*/attempts/*/events.jsonl")
    yield Row("make the files", ROWS, seconds, microseconds=1e6 * seconds / ROWS, megabytes=size)
    count, seconds, peak = _ingest(home)
    yield Row(
        "ingest; peak MB",
        count,
        seconds,
        limit=count / 300_000,
        microseconds=1e6 * seconds / count,
        megabytes=peak,
    )
    yield Row("  on disk", count, 0.0, megabytes=_megabytes(home, "slm.duckdb"))
    # 2) read results and curves
    run = store.results(home=home)["run_id"][RUNS // 2]
    yield Row("results()", RUNS, _median(lambda: store.results(home=home)), limit=0.2)
    yield Row("curves(run=…)", lines, _median(lambda: store.curves(home=home, run=run)), limit=0.1)
    yield Row("curves(experiment)", 10 * lines, _median(lambda: store.curves("ten", home)))
    # 3) ingest a few more lines, alone and while others read
    alone = median(_ingest_more(home) for _ in range(REPEATS))
    yield Row("ingest of forty more lines", 40 * len(NAMES), alone)
    with _readers(home):
        concurrent = median(_ingest_more(home) for _ in range(REPEATS))
    work = f"  next to {READERS} readers in a loop"
    yield Row(work, 40 * len(NAMES), concurrent, limit=alone + 1)


def _make(home: Path, runs: int, lines: int) -> None:
    """Make finished runs with this many lines of events each, and an experiment of ten of them."""
    seeds = tuple(range(max(1, runs // 4)))
    home_of(home, Experiment("all", (pocket,), (2, 3, 4, 5), steps=lines, seeds=seeds))
    home_of(home, Experiment("ten", (pocket,), (2,), steps=lines, seeds=tuple(range(10))))
    for number, path in enumerate(sorted(home.glob("*/attempts/001/events.jsonl"))):
        path.write_text("".join(_lines(number, lines)))


def _lines(number: int, count: int) -> Iterator[str]:
    """Yield lines of events as the trainer writes them, with all digits of the numbers random."""
    for step, values in enumerate(_values(number, count), 1):
        numbers = ", ".join(f'"{name}": {value}' for name, value in zip(NAMES, values, strict=True))
        time_of_step = 1.79e9 + 600 * number + 0.1 * step
        yield f'{{"event": "train", "time": {time_of_step}, "step": {step}, {numbers}}}\n'


def _values(number: int, count: int) -> Iterator[tuple[Any, ...]]:
    draw = np.random.default_rng(number)
    scales = np.array([[3.0], [0.3], [1e-3], [1e4], [0.1]])
    noise = (1 + 0.1 * draw.standard_normal((5, count))) * scales
    for step, (loss, norm, update, speed, seconds) in enumerate(noise.T.tolist(), 1):
        tokens = 1024 * step
        flops = 604717056 * step
        memory = 303271936 + 4096 * (step // 50)
        lr = min(1.0, step / 40)
        yield tokens, flops, loss, lr, norm, update, speed, step * seconds, memory


def _ingest(home: Path) -> tuple[int, float, float]:
    """Ingest in another process; return rows, seconds with imports, and peak memory in MB."""
    command = [sys.executable, "-c", INGEST, str(home)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    count, seconds, peak = map(float, result.stdout.split())
    return int(count), seconds, peak


def _ingest_more(home: Path) -> float:
    """Return the seconds to ingest ten more lines of each of four runs, as during a sweep."""
    for path in sorted(home.glob("*/attempts/001/events.jsonl"))[:4]:
        with path.open("a") as file:
            file.writelines(_lines(0, 10))
    return _seconds(lambda: store.ingest(home))


@contextmanager
def _readers(home: Path) -> Iterator[None]:
    command = [sys.executable, "-m", "tests.readers", str(home), str(READERS)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as readers:
        time.sleep(1 if SMALL else 5)  # until all of them read
        yield
        readers.communicate()


def _slm(home: Path, runs: list[str], lines: int) -> Measured:
    """Measure slm, from the files of the runs."""
    _make(home, len(runs), lines)
    count = len(runs) * lines * len(NAMES)
    yield "write", count, _seconds(lambda: store.ingest(home)), _megabytes(home, "slm.duckdb")
    yield "all results", len(runs), _median(lambda: store.results(home=home)), None
    run = store.results(home=home)["run_id"][0]
    seconds = _median(lambda: store.curves(home=home, run=run))
    yield "one run's curves", lines * len(NAMES), seconds, None


def _mlflow(folder: Path, runs: list[str], lines: int) -> Measured:
    """Measure MLflow: `log_batch` of its maximum of 1,000 metrics, and one history per name."""
    os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", MLFLOW_LOGGING_LEVEL="ERROR")
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.create_experiment("bench", artifact_location=str(folder))
    run_ids = []

    def write() -> None:
        for number, _ in enumerate(runs):
            run = client.create_run(experiment).info.run_id
            run_ids.append(run)
            metrics = []
            for step, values in enumerate(_values(number, lines), 1):
                metrics += [Metric(name, value, 0, step) for name, value in zip(NAMES, values)]
            for start in range(0, len(metrics), 1000):
                client.log_batch(run, metrics=metrics[start : start + 1000])
            client.set_terminated(run)

    def curves() -> None:
        for name in NAMES:
            client.get_metric_history(run_ids[0], name)

    yield "write", len(runs) * lines * len(NAMES), _seconds(write), _megabytes(folder, "mlflow.db")
    yield "all results", len(runs), _median(lambda: client.search_runs([experiment])), None
    yield "one run's curves", lines * len(NAMES), _median(curves), None


def _optuna(folder: Path, runs: list[str], lines: int) -> Measured:
    """Measure Optuna: one trial per run, added at once, with all numbers in its one series."""
    import optuna
    from optuna.distributions import FloatDistribution

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = optuna.storages.RDBStorage(f"sqlite:///{folder}/optuna.db")
    study = optuna.create_study(storage=storage)

    def write() -> None:
        for number, _ in enumerate(runs):
            series = [value for values in _values(number, lines) for value in values]
            trial = optuna.create_trial(
                value=1.5,
                intermediate_values=dict(enumerate(series)),
                params={"depth": 2.0},
                distributions={"depth": FloatDistribution(1, 20)},
            )
            study.add_trial(trial)

    def results() -> None:
        loaded = optuna.load_study(study_name=study.study_name, storage=storage)
        loaded.trials_dataframe(("number", "value", "params"))

    yield "write", len(runs) * lines * len(NAMES), _seconds(write), _megabytes(folder, "optuna.db")
    yield "all results", len(runs), _median(results), None
    yield "one run's curves", lines * len(NAMES), _median(lambda: storage.get_trial(1)), None


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _median(work: Callable[[], Any]) -> float:
    return median(_seconds(work) for _ in range(REPEATS))


def _megabytes(folder: Path, pattern: str) -> float:
    return sum(path.stat().st_size for path in folder.glob(pattern)) / 1e6
