"""The store where things go wrong: bad files, big numbers, dead writers, two writers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import store
from tests.store.test_imports import row, write_import
from tests.store.test_store import all_rows, append, dump, event, finished, metric_count, write_run

pytestmark = pytest.mark.usefixtures("database")


def test_flops_beyond_a_bigint_are_stored(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "aaa")
    plan = json.loads((folder / "plan.json").read_text())
    plan["hyperparameters"] |= {"flops_per_token": 10**10, "steps": 10**9}
    dump(folder / "plan.json", plan)
    dump(folder / "done.json", finished("aaa", 4) | {"flops": 16 * 10**19})
    assert store.ingest(tmp_path).problems == []
    assert store.results(home=tmp_path)[["flops_planned", "flops"]].to_numpy().tolist() == [
        [1.6e20, 1.6e20]
    ]


@pytest.mark.parametrize("change", [{"depth": "four"}, {"steps": -4}])
def test_a_plan_that_the_database_refuses_does_not_affect_others(
    tmp_path: Path, change: dict[str, object]
) -> None:
    for number in range(5):
        write_run(tmp_path, f"run{number}", done=False)
    path = tmp_path / "run3" / "plan.json"
    plan = json.loads(path.read_text())
    dump(path, plan | {"hyperparameters": plan["hyperparameters"] | change})
    [problem] = store.ingest(tmp_path).problems
    assert str(path) in problem
    assert store.results(home=tmp_path)["run_id"].tolist() == ["run0", "run1", "run2", "run4"]
    dump(path, plan)
    assert store.ingest(tmp_path).problems == []
    assert len(store.results(home=tmp_path)) == 5


def test_a_line_that_is_not_an_event_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "aaa")
    append(folder / "attempts" / "001", '{"event": oops}\n', event(6))
    [problem] = store.ingest(tmp_path).problems
    assert "events.jsonl: 1 of 6 new lines" in problem
    assert store.curves(home=tmp_path)["step"].tolist() == [1, 2, 3, 4, 6]


def test_removed_files_lose_their_rows(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "aaa")
    write_run(tmp_path, "bbb")
    document = {
        "name": "e",
        "question": "",
        "recipe": "p",
        "declared": {},
        "runs": ["bbb"],
        "created": 1.0,
    }
    dump(tmp_path / "experiments" / "e.json", document)
    store.ingest(tmp_path)
    (folder / "done.json").unlink()
    shutil.rmtree(tmp_path / "bbb")
    (tmp_path / "experiments" / "e.json").unlink()
    store.ingest(tmp_path)
    assert store.results(home=tmp_path)["status"].tolist() == ["running"]
    after = all_rows(tmp_path)
    store.rebuild(tmp_path)
    assert all_rows(tmp_path) == after


def test_a_run_that_ended_without_result_and_reason_has_failed(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "aaa", done=False)
    document = {
        "attempt": 1,
        "time": 9.0,
        "code": 0,
        "signal": None,
        "reason": None,
        "message": None,
    }
    dump(folder / "attempts" / "001" / "exit.json", document)
    store.ingest(tmp_path)
    assert store.results(home=tmp_path)["status"].tolist() == ["failed"]


def test_writers_of_two_threads_count_once(tmp_path: Path) -> None:
    for number in range(8):
        write_run(tmp_path, f"run{number}")
    threads = [threading.Thread(target=store.ingest, args=(tmp_path,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert metric_count(tmp_path) == 8 * 24


def test_a_writer_that_gives_up_names_the_process_that_writes(tmp_path: Path) -> None:
    holding = (
        f"import sys, time; from pathlib import Path; from store.ingest import hold_store_lock\n"
        f"with hold_store_lock(Path({str(tmp_path)!r}), 1):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holding], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(store.StoreError, match=f"process {other.pid}"):
            store.ingest(tmp_path, patience=0.1)
        other.communicate()
    store.ingest(tmp_path)


@pytest.mark.parametrize("query", ["", "create temp table t (a int)", "set threads = 1"])
def test_statements_that_are_not_queries_are_refused(tmp_path: Path, query: str) -> None:
    store.ingest(tmp_path)
    with pytest.raises(store.QueryError):
        store.sql(query, home=tmp_path)


def test_the_path_of_a_home_may_contain_a_quote(tmp_path: Path) -> None:
    home = tmp_path / "it's"
    write_run(home, "aaa")
    store.ingest(home)
    assert len(store.results(home=home)) == 1
    assert metric_count(home) == 24


def test_documents_that_no_database_can_hold_do_not_affect_others(tmp_path: Path) -> None:
    """A lone surrogate, deep nesting, a number too large for any column, an import with a run's
    id."""
    write_run(tmp_path, "aaa")
    plan = json.loads((write_run(tmp_path, "bbb") / "plan.json").read_text())
    dump(tmp_path / "bbb" / "plan.json", plan | {"recipe": "\ud800"})
    dump(write_run(tmp_path, "ccc") / "plan.json", plan | {"run_id": "ccc", "seed": 10**400})
    (tmp_path / "fits").mkdir()
    (tmp_path / "fits" / "a.json").write_text("[" * 100_000)
    write_import(tmp_path, row(1) | {"run_id": "aaa"})
    problems = store.ingest(tmp_path).problems
    for name in ("bbb/plan.json", "ccc/plan.json", "fits/a.json", "imports/abc/import.json"):
        [line] = [problem for problem in problems if problem.startswith(f"{tmp_path}/{name}: ")]
        assert "\n" not in line
    assert store.results(home=tmp_path)["run_id"].tolist() == ["aaa"]
