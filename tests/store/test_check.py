"""`slm store check` finds differences from the files; `slm store vacuum` changes no row."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import duckdb
import pytest

import store
from tests.store.test_store import all_rows, append, dump, event, write_run


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home of three runs, one of them unfinished, in its database."""
    for number in range(3):
        write_run(tmp_path, f"run{number}", depth=number + 1, done=number > 0)
    store.ingest(tmp_path)
    return tmp_path


def test_an_intact_home_is_clean(home: Path) -> None:
    before = sorted(path.name for path in home.iterdir())
    report = store.check(home)
    assert (report.problems, report.notes) == ([], [])
    assert report.rows["metrics"] == 3 * 24
    assert sorted(path.name for path in home.iterdir()) == before


def test_a_torn_last_line_of_an_ended_attempt_is_a_note(home: Path) -> None:
    attempt = home / "run0" / "attempts" / "001"
    append(attempt, event(5)[:9])
    dump(
        attempt / "exit.json",
        {"attempt": 1, "time": 1.0, "code": 1, "reason": "error", "message": ""},
    )
    report = store.check(home)
    assert report.problems == []
    [note] = report.notes
    assert str(attempt / "events.jsonl") in note


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (
            "delete from metrics where run_id = 'run1' and step = 2",
            "metrics of run1 1: 18 rows, the files give 24",
        ),
        (
            "insert into metrics select * from metrics where run_id = 'run1' and step = 2",
            "run1 1: 30 rows",
        ),
        (
            "update metrics set value = 9 where run_id = 'run2' and name = 'loss' and step = 3",
            "but their content differs from the files",
        ),
        (
            "update finished set val_bpb = 1.25 where run_id = 'run1'",
            "finished of run1 1: 1 rows, but their content differs",
        ),
        ("delete from runs where run_id = 'run0'", "runs of run0: 0 rows, the files give 1"),
        ("update cursors set \"offset\" = 5 where file like 'run1/%events.jsonl'", "run1"),
        ("drop view curves", "a view of curves differs from this version's"),
        ("alter table runs add column more int", "table runs differs from this version's"),
    ],
)
def test_rows_and_tables_that_differ_from_the_files_are_named_with_the_way_out(
    home: Path, damage: str, named: str
) -> None:
    with duckdb.connect(str(home / "slm.duckdb")) as connection:
        connection.execute(damage)
    problems = store.check(home).problems
    assert any(named in line for line in problems)
    assert all("`slm store rebuild`" in line for line in problems)
    store.rebuild(home)
    assert store.check(home).problems == []


def test_unreadable_files_and_lines_that_are_not_events_are_named(home: Path) -> None:
    append(home / "run0" / "attempts" / "001", "no event\n")
    (home / "run1" / "done.json").write_text("{")
    problems = store.check(home).problems
    assert any(
        str(home / "run0" / "attempts" / "001" / "events.jsonl") in line for line in problems
    )
    assert any(str(home / "run1" / "done.json") in line for line in problems)


def test_a_snapshot_that_differs_from_the_database_is_named(home: Path) -> None:
    stat = (home / "results.duckdb").stat()
    with (home / "results.duckdb").open("r+b") as file:
        file.seek(stat.st_size // 2)
        file.write(b"damaged")
    os.utime(home / "results.duckdb", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    [problem] = store.check(home).problems
    assert "results.duckdb differs from slm.duckdb" in problem


def test_a_database_of_a_newer_version_is_one_problem(home: Path) -> None:
    with duckdb.connect(str(home / "slm.duckdb")) as connection:
        connection.execute("update schema_version set version = 99")
    [problem] = store.check(home).problems
    assert "version" in problem
    assert "99" in problem


def test_vacuum_makes_the_file_smaller_and_changes_no_row(home: Path) -> None:
    append(home / "run0" / "attempts" / "001", *(event(step) for step in range(5, 5000)))
    store.ingest(home)
    shutil.rmtree(home / "run0")
    store.ingest(home)
    before, size = all_rows(home), (home / "slm.duckdb").stat().st_size
    report = store.vacuum(home)
    assert report.database == size - (home / "slm.duckdb").stat().st_size > 0
    assert all_rows(home) == before
    assert store.check(home).problems == []
    append(home / "run1" / "attempts" / "001", event(5))
    assert store.ingest(home).metrics == 6


def test_vacuum_removes_only_leftovers_of_interrupted_commands(home: Path) -> None:
    evals = home / "run1" / "evals"
    (evals / "core-1-a.parts").mkdir(parents=True)
    (evals / "core-1-b.parts").mkdir()
    (evals / "core-1-a.parts" / "task.json").write_text("12345")
    dump(evals / "core-1-a.json", {"run_id": "run1", "metric": "core", "step": 4, "tasks": {}})
    old = [
        home / ".check-x1",
        home / "run1" / ".done.json.123",
        home / "run1" / "attempts" / ".unfinished-ab",
    ]
    old[0].mkdir()
    for path in old[1:]:
        path.write_text("12345")
    (home / "experiments").mkdir()
    (home / "experiments" / ".young.json.123").touch()
    at_work = home / "data" / ".unfinished-ab"
    at_work.mkdir(parents=True)
    for path in (*old, at_work):
        os.utime(path, (time.time() - 7200,) * 2)
    report = store.vacuum(home)
    removed = [
        ".check-x1",
        "run1/.done.json.123",
        "run1/attempts/.unfinished-ab",
        "run1/evals/core-1-a.parts",
    ]
    assert (report.names, report.leftovers) == (removed, 15)
    assert (evals / "core-1-b.parts").exists()
    assert at_work.exists(), "data may be prepared for hours"
    assert (home / "experiments" / ".young.json.123").exists()
