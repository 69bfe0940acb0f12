"""The store: files in, the same rows out, through kills and concurrent reads."""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import NullPool, create_engine, insert
from sqlalchemy.exc import IntegrityError

import store
from store import schema

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("database")


def write_run(home: Path, run_id: str, depth: int = 2, done: bool = True, steps: int = 4) -> Path:
    """Write a run folder as the trainer does, with one attempt."""
    folder = home / run_id
    attempt = folder / "attempts" / "001"
    attempt.mkdir(parents=True)
    counts = {"wte": 8, "value_embeds": 8, "lm_head": 8, "transformer_matrices": 16, "scalars": 4}
    hyperparameters = {
        "depth": depth,
        "width": 16,
        "heads": 1,
        "head_dim": 16,
        "sequence_length": 128,
    }
    hyperparameters |= {
        "vocab_size": 512,
        "parameters": counts,
        "flops_per_token": 100,
        "tokens_asked": 70.5,
    }
    hyperparameters |= {"batch_tokens": 16, "steps": steps}
    data = {
        "corpus": "c",
        "tokenizer": "t",
        "train": "r",
        "validation": "v",
        "validation_rows": 3,
        "rows": 9,
    }
    plan = {
        "run_id": run_id,
        "recipe": "pocket",
        "seed": 0,
        "horizon": "compute-optimal",
        "code": "x",
    }
    plan |= {"hyperparameters": hyperparameters, "data": data | {"epochs": 0.5}}
    dump(folder / "plan.json", plan)
    dump(
        attempt / "attempt.json",
        {"attempt": 1, "created": 1.0, "device": "cpu", "ranks": 2, "threads": 1},
    )
    append(attempt, *(event(step) for step in range(1, steps + 1)))
    if done:
        dump(folder / "done.json", finished(run_id, steps))
    return folder


def event(step: int, loss: float = 2.0) -> str:
    fields = {
        "event": "train",
        "time": 10.0 + step,
        "step": step,
        "tokens": 16 * step,
        "flops": 1600 * step,
    }
    return (
        json.dumps(
            fields
            | {"loss": loss, "lr": 1.0, "tokens_per_second": 5.0, "train_seconds": 0.5 * step}
        )
        + "\n"
    )


def finished(run_id: str, steps: int) -> dict[str, Any]:
    done = {
        "run_id": run_id,
        "attempt": 1,
        "time": 20.0,
        "step": steps,
        "tokens": 16 * steps,
        "flops": 1600 * steps,
    }
    done |= {
        "val_bpb": 1.5,
        "val_loss": 2.0,
        "train_loss": 2.1,
        "core": None,
        "train_seconds": 3.0,
        "wall_seconds": 4.0,
    }
    return done | {
        "tokens_per_second": 5.0,
        "flops_per_second": 6.0,
        "peak_memory_bytes": 7,
        "weights_sha256": "w",
    }


def dump(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))


def append(attempt: Path, *lines: str) -> None:
    with (attempt / "events.jsonl").open("a") as file:
        file.write("".join(lines))


def all_rows(home: Path) -> dict[str, list[str]]:
    """Return every row of every table, cursors included."""
    tables = schema.Base.metadata.tables
    return {
        name: sorted(map(str, store.sql(f"select * from {name}", home=home).to_numpy().tolist()))
        for name in tables
    }


def metric_count(home: Path) -> int:
    return int(store.sql("select count(*) as n from metrics", home=home)["n"][0])


def test_results_hold_the_values_of_the_files(tmp_path: Path) -> None:
    write_run(tmp_path, "aaa", depth=3)
    assert store.ingest(tmp_path).problems == []
    [row] = store.results(home=tmp_path).to_dict("records")
    expected = {
        "run_id": "aaa",
        "depth": 3,
        "status": "finished",
        "val_bpb": 1.5,
        "tokens": 64,
        "flops": 6400,
    }
    expected |= {
        "parameters_scaling": 24,
        "parameters_total": 44,
        "tokens_asked": 70.5,
        "ranks": 2,
        "attempts": 1,
    }
    assert {name: row[name] for name in expected} == expected
    assert math.isnan(row["core"])


def test_reading_twice_counts_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "aaa")
    store.ingest(tmp_path)
    before = metric_count(tmp_path)
    assert store.ingest(tmp_path).metrics == 0
    append(folder / "attempts" / "001", event(5))
    assert store.ingest(tmp_path).metrics == 6
    assert metric_count(tmp_path) == before + 6


def test_a_torn_last_line_waits_until_it_is_whole(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "aaa", done=False)
    append(folder / "attempts" / "001", event(5)[:20])
    store.ingest(tmp_path)
    assert store.curves(home=tmp_path)["step"].tolist() == [1, 2, 3, 4]
    append(folder / "attempts" / "001", event(5)[20:])
    store.ingest(tmp_path)
    assert store.curves(home=tmp_path)["step"].tolist() == [1, 2, 3, 4, 5]


def test_steps_repeated_by_a_resumed_attempt_are_shown_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "aaa")
    second = folder / "attempts" / "002"
    dump(second / "attempt.json", {"attempt": 2})
    append(second, event(3, loss=1.0), event(4, loss=1.0), event(5, loss=1.0))
    store.ingest(tmp_path)
    curve = store.curves(home=tmp_path)
    assert curve["step"].tolist() == [1, 2, 3, 4, 5]
    assert curve["loss"].tolist() == [2.0, 2.0, 1.0, 1.0, 1.0]


def test_a_diverged_loss_stays_nan_and_unfinished_runs_have_no_result(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "aaa", done=False)
    append(folder / "attempts" / "001", event(5, loss=float("nan")))
    exit_document = {
        "attempt": 1,
        "time": 9.0,
        "code": 1,
        "signal": None,
        "reason": "diverged",
        "message": "nan",
    }
    dump(folder / "attempts" / "001" / "exit.json", exit_document)
    store.ingest(tmp_path)
    value = store.sql(
        "select value = cast('nan' as double precision) as n from metrics "
        "where step = 5 and name = 'loss'",
        home=tmp_path,
    )["n"][0]
    row = store.sql(
        "select status, val_bpb is null as none, flops is null as f from results", home=tmp_path
    ).iloc[0]
    assert value
    assert row.tolist() == ["diverged", True, True]


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        ("oom", "failed"),
        ("error", "failed"),
        ("interrupted", "interrupted"),
        (None, "running"),
        ("none", "planned"),
    ],
)
def test_status_is_derived_from_files(tmp_path: Path, reason: str | None, status: str) -> None:
    folder = write_run(tmp_path, "aaa", done=False)
    attempt = folder / "attempts" / "001"
    if status == "planned":
        for path in attempt.iterdir():
            path.unlink()
    elif reason:
        dump(
            attempt / "exit.json",
            {"attempt": 1, "time": 1.0, "code": 1, "signal": None, "reason": reason, "message": ""},
        )
    store.ingest(tmp_path)
    assert store.results(home=tmp_path)["status"].tolist() == [status]


def test_a_run_of_two_experiments_is_one_row(tmp_path: Path) -> None:
    for run_id in ("aaa", "bbb"):
        write_run(tmp_path, run_id)
    for name, runs in (("one", ["aaa", "bbb"]), ("two", ["bbb"])):
        document = {
            "name": name,
            "question": "",
            "recipe": "pocket",
            "declared": {},
            "runs": runs,
            "created": 1.0,
        }
        dump(tmp_path / "experiments" / f"{name}.json", document)
    store.ingest(tmp_path)
    assert len(store.results(home=tmp_path)) == 2
    assert store.results("one", tmp_path)["run_id"].tolist() == ["aaa", "bbb"]
    assert store.curves("two", tmp_path)["run_id"].unique().tolist() == ["bbb"]
    with pytest.raises(store.StoreError, match="there are one, two"):
        store.results("three", tmp_path)


def test_a_changed_experiment_replaces_its_members(tmp_path: Path) -> None:
    path = tmp_path / "experiments" / "one.json"
    document = {"name": "one", "question": "", "recipe": "pocket", "declared": {}, "created": 1.0}
    for runs in (["aaa", "bbb", "ccc"], ["ccc", "aaa"]):
        dump(path, document | {"runs": runs})
        store.ingest(tmp_path)
        rows = store.sql("select run_id from memberships order by position", home=tmp_path)
        assert rows["run_id"].tolist() == runs


def test_rebuilding_gives_the_same_rows(tmp_path: Path) -> None:
    for number in range(5):
        folder = write_run(tmp_path, f"run{number}", depth=number + 1)
        append(folder / "attempts" / "001", event(9), event(10)[:7])
        store.ingest(tmp_path)
    dump(tmp_path / "fits" / "f.json", {"created": 1.0, "experiments": ["one"], "law": {"p": 0.1}})
    store.ingest(tmp_path)
    before = all_rows(tmp_path)
    (tmp_path / "slm.duckdb").unlink(missing_ok=True)
    store.rebuild(tmp_path)
    assert all_rows(tmp_path) == before


def test_a_broken_file_is_named_and_does_not_affect_others(tmp_path: Path) -> None:
    write_run(tmp_path, "aaa")
    broken = write_run(tmp_path, "bbb") / "plan.json"
    broken.write_text('{"recipe": ')
    [problem] = store.ingest(tmp_path).problems
    assert str(broken) in problem
    assert store.results(home=tmp_path)["run_id"].tolist() == ["aaa"]


@pytest.mark.parametrize("change", [{"tokens": -1}, {"val_bpb": None}, {"val_bpb": 0.0}])
def test_a_done_json_without_a_valid_result_is_named_and_refused(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    folder = write_run(tmp_path, "aaa")
    dump(folder / "done.json", finished("aaa", 4) | change)
    [problem] = store.ingest(tmp_path).problems
    assert str(folder / "done.json") in problem
    assert store.results(home=tmp_path)["val_bpb"].isna().all()


@pytest.mark.parametrize("change", [{"tokens": -1}, {"val_bpb": None}, {"val_bpb": 0.0}])
def test_the_database_itself_refuses_such_rows(tmp_path: Path, change: dict[str, Any]) -> None:
    engine = create_engine(
        os.environ.get("SLM_STORE") or f"duckdb:///{tmp_path}/x.duckdb", poolclass=NullPool
    )
    schema.Base.metadata.create_all(engine)
    row = {"home": "0", **finished("aaa", 4), **change}
    with pytest.raises(IntegrityError), engine.begin() as connection:
        connection.execute(insert(schema.Finished), [row])


def test_ingests_killed_at_any_moment_lose_and_repeat_nothing(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, f"run{number}") for number in range(6)]
    program = (
        "import store; from pathlib import Path\nprint('go', flush=True)\n"
        f"store.ingest(Path({str(tmp_path)!r}))"
    )
    draw = random.Random(0)
    for step in range(5, 11):
        for folder in folders:
            append(folder / "attempts" / "001", event(step))
        with subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(draw.uniform(0.0, 0.8))
            os.kill(process.pid, signal.SIGKILL)
    store.ingest(tmp_path)
    assert metric_count(tmp_path) == 6 * 10 * 6
    before = all_rows(tmp_path)
    store.rebuild(tmp_path)
    assert all_rows(tmp_path) == before


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("select * from nowhere", "nowhere"),
        ("selekt", "selekt"),
        ("delete from runs", "read-only"),
        ("create table t (a int)", "read-only"),
        ("select 1; delete from runs", "read-only|multiple"),
        (
            "with gone as (delete from runs returning *) select * from gone",
            "read-only|A CTE needs a SELECT",
        ),
    ],
)
def test_a_bad_query_is_one_line(tmp_path: Path, query: str, named: str) -> None:
    write_run(tmp_path, "aaa")
    store.ingest(tmp_path)
    with pytest.raises(store.StoreError, match=named) as caught:
        store.sql(query, home=tmp_path)
    assert "\n" not in str(caught.value)


def test_parameters_are_bound(tmp_path: Path) -> None:
    write_run(tmp_path, "aaa")
    store.ingest(tmp_path)
    assert store.sql("select run_id from runs where run_id = ?", ["' or 1=1 --"], tmp_path).empty


def test_a_home_without_results_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(store.StoreError, match="slm sweep"):
        store.sql("select 1", home=tmp_path)


def test_the_data_dictionary_lists_exactly_the_columns(tmp_path: Path) -> None:
    write_run(tmp_path, "aaa")
    store.ingest(tmp_path)
    columns = store.sql(
        """select table_name, column_name from information_schema.columns
           where table_catalog = 'snapshot' or table_schema = 'slm_v3'""",
        home=tmp_path,
    )
    actual = {(row.table_name, row.column_name) for row in columns.itertuples()}
    documented = set()
    for section in re.split(r"\n## (?=View|Table)", (ROOT / "store" / "README.md").read_text())[1:]:
        [table] = re.findall(r"^(?:View|Table) `(\w+)`", section)
        documented |= {
            (table, column)
            for column in re.findall(r"^\| (\w+) \|", section, re.M)
            if column != "column"
        }
    documented |= {("latest_attempts", column) for table, column in actual if table == "attempts"}
    assert documented == actual
