"""Ingests in many transactions: the same rows as in one, and a faulty file affects no other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import store
from store import writer
from tests.store.test_store import all_rows, append, dump, event, metric_count, write_run


@pytest.mark.parametrize("size", [1, 2000])
def test_a_home_larger_than_a_batch_gives_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    for number in range(4):
        folder = write_run(tmp_path, f"run{number}", steps=3 + 10 * number)
        append(folder / "attempts" / "001", event(99)[:20])
    counts = store.ingest(tmp_path)
    before = all_rows(tmp_path)
    monkeypatch.setattr(writer, "BATCH", size)
    assert store.rebuild(tmp_path) == counts
    assert all_rows(tmp_path) == before


def test_a_refused_batch_of_a_long_file_is_named_and_later_lines_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = write_run(tmp_path, "aaa", done=False, steps=20) / "attempts" / "001"
    write_run(tmp_path, "bbb", steps=20)
    path = attempt / "events.jsonl"
    good = path.read_text()
    lines = good.splitlines(keepends=True)
    lines[9] = json.dumps(json.loads(lines[9]) | {"step": -1}) + "\n"  # which no row of metrics has
    path.write_text("".join(lines))
    monkeypatch.setattr(writer, "BATCH", 1000)
    [problem] = store.ingest(tmp_path).problems
    assert str(path) in problem
    counted = store.sql(
        "select run_id, max(step) as step from metrics group by run_id order by run_id",
        home=tmp_path,
    )
    assert counted["step"][0] < 10
    assert counted["step"][1] == 20
    lines[9] = good.splitlines(keepends=True)[9]
    path.write_text("".join(lines))
    assert store.ingest(tmp_path).problems == []
    assert metric_count(tmp_path) == 2 * 20 * 6


def test_metrics_latest_replaces_only_steps_that_a_later_attempt_repeated(tmp_path: Path) -> None:
    for name in ("aaa", "bbb"):
        folder = write_run(tmp_path, name)
    for number, loss in ((3, 1.0), (2, 1.5)):
        attempt = folder / "attempts" / f"{number:03d}"
        dump(attempt / "attempt.json", {"attempt": number})
        append(attempt, event(4, loss=loss), event(5, loss=loss))
    store.ingest(tmp_path)
    query = "select run_id, step, attempt from metrics_latest where name = 'loss' order by all"
    rows = store.sql(query, home=tmp_path).to_numpy().tolist()
    attempts = {"aaa": [1, 1, 1, 1], "bbb": [1, 1, 1, 3, 3]}
    assert rows == [
        [run, step, number]
        for run, numbers in attempts.items()
        for step, number in enumerate(numbers, 1)
    ]
    assert store.curves(home=tmp_path, run="bbb")["loss"].tolist() == [2.0, 2.0, 2.0, 1.0, 1.0]
    assert store.curves(home=tmp_path, run="ccc").empty
