"""`slm store check` finds what is not as the files say; `slm store vacuum` changes no row."""

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
def kept(tmp_path: Path) -> Path:
    """A home of three runs, one of them unfinished, in its database."""
    for number in range(3):
        write_run(tmp_path, f"run{number}", depth=number + 1, done=number > 0)
    store.ingest(tmp_path)
    return tmp_path


def test_a_home_whose_ingests_went_well_is_clean(kept: Path) -> None:
    before = sorted(path.name for path in kept.iterdir())
    found = store.check(kept)
    assert (found.problems, found.notes) == ([], [])
    assert found.rows["metrics"] == 3 * 24
    assert sorted(path.name for path in kept.iterdir()) == before


def test_a_torn_last_line_of_an_attempt_that_ended_is_noted_and_is_no_problem(kept: Path) -> None:
    attempt = kept / "run0" / "attempts" / "001"
    append(attempt, event(5)[:9])
    dump(
        attempt / "exit.json",
        {"attempt": 1, "time": 1.0, "code": 1, "reason": "error", "message": ""},
    )
    found = store.check(kept)
    assert found.problems == []
    [note] = found.notes
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
def test_what_the_files_do_not_say_is_named_with_the_way_out(
    kept: Path, damage: str, named: str
) -> None:
    with duckdb.connect(str(kept / "slm.duckdb")) as connection:
        connection.execute(damage)
    problems = store.check(kept).problems
    assert any(named in line for line in problems)
    assert all("`slm store rebuild`" in line for line in problems)
    store.rebuild(kept)
    assert store.check(kept).problems == []


def test_files_that_cannot_be_read_and_lines_that_are_no_events_are_named(kept: Path) -> None:
    append(kept / "run0" / "attempts" / "001", "no event\n")
    (kept / "run1" / "done.json").write_text("{")
    problems = store.check(kept).problems
    assert any(
        str(kept / "run0" / "attempts" / "001" / "events.jsonl") in line for line in problems
    )
    assert any(str(kept / "run1" / "done.json") in line for line in problems)


def test_a_snapshot_that_is_not_the_database_is_named(kept: Path) -> None:
    stat = (kept / "results.duckdb").stat()
    with (kept / "results.duckdb").open("r+b") as file:
        file.seek(stat.st_size // 2)
        file.write(b"damaged")
    os.utime(kept / "results.duckdb", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    [problem] = store.check(kept).problems
    assert "results.duckdb differs from slm.duckdb" in problem


def test_a_database_of_a_newer_version_is_one_problem(kept: Path) -> None:
    with duckdb.connect(str(kept / "slm.duckdb")) as connection:
        connection.execute("update schema_version set version = 99")
    [problem] = store.check(kept).problems
    assert "version" in problem
    assert "99" in problem


def test_vacuum_makes_the_file_smaller_and_changes_no_row(kept: Path) -> None:
    append(kept / "run0" / "attempts" / "001", *(event(step) for step in range(5, 5000)))
    store.ingest(kept)
    shutil.rmtree(kept / "run0")
    store.ingest(kept)
    before, size = all_rows(kept), (kept / "slm.duckdb").stat().st_size
    freed = store.vacuum(kept)
    assert freed.database == size - (kept / "slm.duckdb").stat().st_size > 0
    assert all_rows(kept) == before
    assert store.check(kept).problems == []
    append(kept / "run1" / "attempts" / "001", event(5))
    assert store.ingest(kept).metrics == 6


def test_vacuum_removes_what_interrupted_commands_left_and_nothing_else(kept: Path) -> None:
    evals = kept / "run1" / "evals"
    (evals / "core-1-a.parts").mkdir(parents=True)
    (evals / "core-1-b.parts").mkdir()
    (evals / "core-1-a.parts" / "task.json").write_text("12345")
    dump(evals / "core-1-a.json", {"run_id": "run1", "metric": "core", "step": 4, "tasks": {}})
    old = [
        kept / ".check-x1",
        kept / "run1" / ".done.json.123",
        kept / "run1" / "attempts" / ".unfinished-ab",
    ]
    old[0].mkdir()
    for path in old[1:]:
        path.write_text("12345")
    (kept / "experiments").mkdir()
    (kept / "experiments" / ".young.json.123").touch()
    at_work = kept / "data" / ".unfinished-ab"
    at_work.mkdir(parents=True)
    for path in (*old, at_work):
        os.utime(path, (time.time() - 7200,) * 2)
    freed = store.vacuum(kept)
    removed = [
        ".check-x1",
        "run1/.done.json.123",
        "run1/attempts/.unfinished-ab",
        "run1/evals/core-1-a.parts",
    ]
    assert (freed.names, freed.leftovers) == (removed, 15)
    assert (evals / "core-1-b.parts").exists()
    assert at_work.exists(), "data may be prepared for hours"
    assert (kept / "experiments" / ".young.json.123").exists()
