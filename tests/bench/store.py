"""Store: ten million metric rows of a thousand runs, then MLflow's and Optuna's SQLite stores beside ours on fewer.

ROWS=1000000 measures on fewer. PEERS names a folder of packages for the peers, which the lock does not hold.
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
from typing import Any

import numpy as np

import store
from slm.events import FIELDS
from slm.experiment import Experiment
from slm.recipe import pocket
from tests.homes import home_of

HEADERS = ("work", "rows", "seconds", "wanted", "microseconds a row", "times ours", "MB")
NAMES = FIELDS["train"][1:]
"""The numbers that the trainer writes at a step, beside the step."""
FEW, RUNS, READERS = 100_000, 1000, 10
INGEST = """
import resource, sys, time, store
from pathlib import Path
began = time.perf_counter()
counts = store.ingest(Path(sys.argv[1]))
print(counts.metrics, time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""

Row = tuple[str, int, float, float | None, float | None, float | None, float | None]
Peer = Callable[[Path, list[str], int], Iterator[tuple[str, int, float, float | None]]]


def rows() -> Iterator[Row]:
    """Rows of HEADERS: at scale, then each store with the same few rows."""
    asked = int(os.environ.get("ROWS", 10_000_000))
    with tempfile.TemporaryDirectory() as folder:
        yield from _at_scale(Path(folder), asked)
    sys.path.append(os.environ.get("PEERS", ""))
    ours: dict[str, float] = {}
    for name, needed, peer in (
        ("slm", "store", _slm),
        ("MLflow", "mlflow", _mlflow),
        ("Optuna", "optuna", _optuna),
    ):
        if not find_spec(needed):
            packages = "mlflow-skinny optuna sqlalchemy alembic"
            print(
                f"no {name}: pip install --target FOLDER {packages}; PEERS=FOLDER make bench",
                file=sys.stderr,
            )
            continue
        with tempfile.TemporaryDirectory() as folder:
            runs = [f"{number:04d}" for number in range(RUNS // 10)]
            for work, count, seconds, megabytes in peer(
                Path(folder), runs, FEW // len(runs) // len(NAMES)
            ):
                each = 1e6 * seconds / count
                yield (
                    f"{name}: {work}",
                    count,
                    seconds,
                    None,
                    each,
                    each / ours.setdefault(work, each),
                    megabytes,
                )


def _at_scale(home: Path, asked: int) -> Iterator[Row]:
    lines = asked // RUNS // len(NAMES)
    took = _seconds(lambda: _make(home, RUNS, lines))
    yield (
        "make the files",
        asked,
        took,
        None,
        1e6 * took / asked,
        None,
        _megabytes(home, "*/attempts/*/events.jsonl"),
    )
    count, took, peak = _ingest(home)
    yield "ingest; peak MB", count, took, count / 300_000, 1e6 * took / count, None, peak
    yield "  on disk", count, 0.0, None, None, None, _megabytes(home, "slm.duckdb")
    run = store.results(home=home)["run_id"][RUNS // 2]
    yield "results()", RUNS, _often(lambda: store.results(home=home)), 0.2, None, None, None
    yield (
        "curves(run=…)",
        lines,
        _often(lambda: store.curves(home=home, run=run)),
        0.1,
        None,
        None,
        None,
    )
    yield (
        "curves(experiment)",
        10 * lines,
        _often(lambda: store.curves("ten", home)),
        None,
        None,
        None,
        None,
    )
    alone = median(_more(home) for _ in range(5))
    yield "ingest of forty lines more", 40 * len(NAMES), alone, None, None, None, None
    with _readers(home):
        beside = median(_more(home) for _ in range(5))
    yield (
        f"  beside {READERS} readers in a loop",
        40 * len(NAMES),
        beside,
        alone + 1,
        None,
        None,
        None,
    )


def _make(home: Path, runs: int, lines: int) -> None:
    """Finished runs with so many lines of events each, and an experiment of ten of them."""
    home_of(
        home, Experiment("all", (pocket,), (2, 3, 4, 5), steps=lines, seeds=tuple(range(runs // 4)))
    )
    home_of(home, Experiment("ten", (pocket,), (2,), steps=lines, seeds=tuple(range(10))))
    for number, path in enumerate(sorted(home.glob("*/attempts/001/events.jsonl"))):
        path.write_text("".join(_lines(number, lines)))


def _lines(number: int, count: int) -> Iterator[str]:
    """Lines of events as the trainer writes them, every digit of their numbers drawn."""
    for step, values in enumerate(_values(number, count), 1):
        numbers = ", ".join(f'"{name}": {value}' for name, value in zip(NAMES, values, strict=True))
        yield f'{{"event": "train", "time": {1.79e9 + 600 * number + 0.1 * step}, "step": {step}, {numbers}}}\n'


def _values(number: int, count: int) -> Iterator[tuple[Any, ...]]:
    draw = np.random.default_rng(number)
    noise = (1 + 0.1 * draw.standard_normal((5, count))) * np.array(
        [[3.0], [0.3], [1e-3], [1e4], [0.1]]
    )
    for step, (loss, norm, update, speed, took) in enumerate(noise.T.tolist(), 1):
        counted = 1024 * step, 604717056 * step
        yield (
            *counted,
            loss,
            min(1.0, step / 40),
            norm,
            update,
            speed,
            step * took,
            303271936 + 4096 * (step // 50),
        )


def _ingest(home: Path) -> tuple[int, float, float]:
    """Rows, seconds and the most memory of an ingest in a process of its own, imports and all."""
    done = subprocess.run(
        [sys.executable, "-c", INGEST, str(home)], check=True, capture_output=True, text=True
    )
    count, took, peak = map(float, done.stdout.split())
    return int(count), took, peak


def _more(home: Path) -> float:
    """Seconds to ingest ten lines more of each of four runs, as a sweep at work brings them."""
    for path in sorted(home.glob("*/attempts/001/events.jsonl"))[:4]:
        with path.open("a") as file:
            file.writelines(_lines(0, 10))
    return _seconds(lambda: store.ingest(home))


@contextmanager
def _readers(home: Path) -> Iterator[None]:
    command = [sys.executable, "-m", "tests.readers", str(home), str(READERS)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as readers:
        time.sleep(5)  # until all of them are at it
        yield
        readers.communicate()


def _slm(home: Path, runs: list[str], lines: int) -> Iterator[tuple[str, int, float, float | None]]:
    """From the files of the runs."""
    _make(home, len(runs), lines)
    count = len(runs) * lines * len(NAMES)
    yield "write", count, _seconds(lambda: store.ingest(home)), _megabytes(home, "slm.duckdb")
    yield "all results", len(runs), _often(lambda: store.results(home=home)), None
    run = store.results(home=home)["run_id"][0]
    yield (
        "one run's curves",
        lines * len(NAMES),
        _often(lambda: store.curves(home=home, run=run)),
        None,
    )


def _mlflow(
    folder: Path, runs: list[str], lines: int
) -> Iterator[tuple[str, int, float, float | None]]:
    """`log_batch` of a thousand metrics, the most that it takes, and `search_runs`; a history a name."""
    os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", MLFLOW_LOGGING_LEVEL="ERROR")
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment, made = client.create_experiment("bench", artifact_location=str(folder)), []

    def write() -> None:
        for number, _ in enumerate(runs):
            run = client.create_run(experiment).info.run_id
            made.append(run)
            steps = enumerate(_values(number, lines), 1)
            found = [
                Metric(name, each, 0, step)
                for step, values in steps
                for name, each in zip(NAMES, values)
            ]
            for start in range(0, len(found), 1000):
                client.log_batch(run, metrics=found[start : start + 1000])
            client.set_terminated(run)

    def curves() -> None:
        for name in NAMES:
            client.get_metric_history(made[0], name)

    yield "write", len(runs) * lines * len(NAMES), _seconds(write), _megabytes(folder, "mlflow.db")
    yield "all results", len(runs), _often(lambda: client.search_runs([experiment])), None
    yield "one run's curves", lines * len(NAMES), _often(curves), None


def _optuna(
    folder: Path, runs: list[str], lines: int
) -> Iterator[tuple[str, int, float, float | None]]:
    """A trial a run, added whole: one series a trial, so that all its numbers are one after another."""
    import optuna
    from optuna.distributions import FloatDistribution

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = optuna.storages.RDBStorage(f"sqlite:///{folder}/optuna.db")
    study = optuna.create_study(storage=storage)

    def write() -> None:
        for number, _ in enumerate(runs):
            values = dict(enumerate(each for line in _values(number, lines) for each in line))
            given = {"params": {"depth": 2.0}, "distributions": {"depth": FloatDistribution(1, 20)}}
            study.add_trial(optuna.create_trial(value=1.5, intermediate_values=values, **given))

    def results() -> None:
        optuna.load_study(study_name=study.study_name, storage=storage).trials_dataframe(
            ("number", "value", "params")
        )

    yield "write", len(runs) * lines * len(NAMES), _seconds(write), _megabytes(folder, "optuna.db")
    yield "all results", len(runs), _often(results), None
    yield "one run's curves", lines * len(NAMES), _often(lambda: storage.get_trial(1)), None


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _often(work: Callable[[], Any], times: int = 5) -> float:
    """Median seconds."""
    return median(_seconds(work) for _ in range(times))


def _megabytes(folder: Path, pattern: str) -> float:
    return sum(path.stat().st_size for path in folder.glob(pattern)) / 1e6
