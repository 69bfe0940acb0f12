"""Readers during writes, and killed ingests: no reader is refused, nothing is lost."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import store
from tests import chaos, forked
from tests.chaos import Question
from tests.store.test_store import all_rows, write_run
from tests.train.test_train import Watcher

KILLED = """
import sys
from pathlib import Path
import pandas, store
from store import writer
writer.BATCH = 500_000
print("go", flush=True)
getattr(store, sys.argv[2])(Path(sys.argv[1]))
"""
"""An ingest or a rebuild in many transactions, which prints a line when it begins."""
WRITING = """
import os, random, select, sys
from pathlib import Path
from slm.events import FIELDS, Writer
draw = random.Random(int(sys.argv[1]))
attempts = [Path(name) for name in sys.argv[2:]]
step = 0
while not select.select([sys.stdin], [], [], draw.uniform(0, 0.02))[0]:
    step += 1
    for attempt in attempts:
        numbers = {name: draw.random() for name in FIELDS["train"]}
        Writer(attempt / "events.jsonl").write("train", **numbers | {"step": step})
"""
"""A process that writes events of several runs as trainers do, until standard input ends."""
STORE_FILES = {"home.json", "results.duckdb", "slm.duckdb", "slm.duckdb.seen", "store.lock"}
"""Files of the store in a home."""


@contextmanager
def working(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """Run a process until the block ends, which closes its standard input."""
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.communicate()
    assert process.returncode == 0


def sweep_among_readers(home: Path, question: Question) -> list[dict[str, Any]]:
    """Run ten readers during a sweep that ingests twice a second; check the sweep, return the
    tallies."""
    watcher = Watcher()
    with working([sys.executable, "-m", "tests.readers", str(home), "10"]) as readers:
        with forked.supervisors(), chaos.frequent_ingests():
            assert chaos.run_sweep(home, question, watcher).not_finished == {}
        assert watcher.notes == []  # no ingest was refused
        tallies = [json.loads(line) for line in readers.communicate()[0].splitlines()]
    lines = chaos.check_events(home)
    assert lines >= question.seeds * question.steps
    assert set(store.results(home=home)["status"]) == {"finished"}
    return tallies


def test_ten_readers_during_a_sweep_never_fail_and_see_all_metrics(home: Path) -> None:
    tallies = sweep_among_readers(home, Question((1,), seeds=1, steps=120))
    everything = int(store.sql("select count(*) as n from metrics", home=home)["n"][0])
    assert [tally["failures"] for tally in tallies] == [[]] * 10
    assert [tally["metrics"] for tally in tallies] == [everything] * 10
    assert all(tally["reads"] for tally in tallies)


@pytest.mark.soak
def test_ten_readers_during_a_long_sweep(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tallies = sweep_among_readers(home, Question((1, 2), seeds=3, steps=1500))
    assert [tally["failures"] for tally in tallies] == [[]] * 10
    assert len({tally["metrics"] for tally in tallies}) == 1
    with capsys.disabled():
        reads, slowest = (
            sum(tally["reads"] for tally in tallies),
            max(tally["slowest"] for tally in tallies),
        )
        print(f"\n{reads} reads, the slowest took {slowest:.2f} s")  # noqa: T201


@pytest.mark.soak
def test_ingests_killed_a_hundred_times_hold_every_event_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attempts = [
        write_run(tmp_path, f"run{number}", done=False) / "attempts" / "001" for number in range(8)
    ]
    commands = [
        [sys.executable, "-c", WRITING, str(seed), *map(str, attempts[seed::2])]
        for seed in range(2)
    ]
    draw = random.Random(0)
    longest = 1.0
    ends = Counter[str]()
    seen = [0]
    with working(commands[0]), working(commands[1]):
        while ends["killed"] < 100:
            work = draw.choices(["ingest", "rebuild"], [4, 1])[0]
            end = kill(tmp_path, work, draw.uniform(0, longest))
            # One in five ends by itself, however fast the machine is.
            longest *= 1.05 if end == "killed" else 0.8
            ends[end] += 1
            seen.append(look(tmp_path))
    assert seen == sorted(seen)
    assert len({*seen}) > 5
    store.ingest(tmp_path)
    lines = chaos.check_events(tmp_path)
    assert store.check(tmp_path).problems == []
    assert {path.name for path in tmp_path.iterdir()} - {
        attempt.parents[1].name for attempt in attempts
    } == STORE_FILES
    rows = all_rows(tmp_path)
    assert store.rebuild(tmp_path).events == lines
    assert all_rows(tmp_path) == rows
    with capsys.disabled():
        summary = f"{ends}, {len({*seen})} snapshots, {lines} lines of events; {longest:.2f} s"
        print(f"\n{summary}")  # noqa: T201


def kill(home: Path, work: str, after: float) -> str:
    """Kill an ingest or a rebuild some seconds after it began; return "killed", or "done" if it
    ended."""
    command = [sys.executable, "-c", KILLED, str(home), work]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with suppress(subprocess.TimeoutExpired):
            process.wait(after)
        process.kill()
    assert process.returncode in (0, -signal.SIGKILL)
    return "killed" if process.returncode else "done"


def look(home: Path) -> int:
    """Return how many numbers readers see, each once; 0 before the first snapshot."""
    if not (home / "results.duckdb").exists():
        return 0
    query = "select count(*) as n, count(distinct (run_id, time, name)) as once from metrics"
    [(count, once)] = store.sql(query, home=home).itertuples(index=False, name=None)
    assert count == once
    return int(count)
