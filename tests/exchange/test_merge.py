"""Exports and merges: two homes become one; nothing is doubled, lost or unsafe."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas
import pytest
from pyarrow import parquet

import store
from slm import exchange
from slm.exchange.archive import exported_files
from slm.files import hold_lock, sha256_of
from slm.monitor.progress import ProgressBars
from tests.commands import slm
from tests.store.test_imports import row, write_import
from tests.store.test_store import all_rows, append, dump, event, finished, write_run

ONE, TWO, THREE, FOUR = ("a" * 12, "b" * 12, "c" * 12, "d" * 12)

ATTEMPT = ("attempts/001/attempt.json", "attempts/001/events.jsonl")


def write_home(home: Path, runs: dict[str, int], host: str, done: bool = True) -> Path:
    """Write a home of runs by depth, trained on one machine, and an experiment of them."""
    for run, depth in runs.items():
        folder = write_run(home, run, depth=depth, done=done)
        dump(
            folder / "attempts" / "001" / "attempt.json",
            {"attempt": 1, "created": 1.0, "host": host},
        )
    write_experiment(home, "ladder", list(runs))
    return home


def write_experiment(
    home: Path, name: str, runs: list[str], question: str = "why?", created: float = 1.0
) -> None:
    declared = {
        "recipes": {"pocket": {"width": 8}},
        "depths": [2],
        "seeds": [0],
        "data": "c",
        "steps": None,
    }
    document = {
        "name": name,
        "question": question,
        "recipe": "pocket",
        "declared": declared,
        "runs": runs,
    }
    dump(home / "experiments" / f"{name}.json", document | {"created": created})


def exported(home: Path, **asked: Any) -> Path:
    """A fresh export of a home."""
    folder = home.parent / f"export-{len(list(home.parent.glob('export-*')))}"
    exchange.export(home, folder, **asked)
    return folder


def seen(home: Path) -> list[str]:
    """The results of a home, but for whose they are."""
    rows = store.results(home=home).sort_values("run_id")
    return (
        rows.drop(columns="home", errors="ignore")
        .to_json(orient="records", lines=True)
        .splitlines()
    )


def truth(home: Path) -> dict[str, bytes]:
    return {name: (home / name).read_bytes() for name in exported_files(home)}


def test_a_merged_home_has_the_same_files_and_rebuilds_to_the_same_results(tmp_path: Path) -> None:
    one, other = write_home(tmp_path / "one", {ONE: 2, TWO: 3}, "here"), tmp_path / "other"
    dump(
        one / "fits" / "0123456789ab.json",
        {"created": 1.0, "experiments": ["ladder"], "law": {"p": 0.1}},
    )
    dump(
        one / ONE / "evals" / "val_bpb-000000004-0123.json",
        {
            "run_id": ONE,
            "metric": "val_bpb",
            "step": 4,
            "time": 3.0,
            "val_bpb": 1.5,
            "val_loss": 2.0,
            "rows": 3,
        },
    )
    append(one / TWO / "attempts" / "001", event(9)[:12])
    merged = exchange.merge(exported(one), other)
    assert merged.counts["new"] == 2
    assert seen(other) == seen(one)
    torn = {f"{TWO}/attempts/001/events.jsonl": truth(other)[f"{TWO}/attempts/001/events.jsonl"]}
    assert truth(other) == truth(one) | torn
    before = all_rows(other)
    store.rebuild(other)
    assert all_rows(other) == before
    assert exchange.merge(exported(one), other).lines == ["2 same runs"]


def test_the_order_of_merges_does_not_change_the_results(tmp_path: Path) -> None:
    """One run is finished in both, one in each, and one is begun in both."""
    one, two = (
        write_home(tmp_path / host, {ONE: 2, TWO: 3, THREE: 4, FOUR: 5}, host)
        for host in ("one", "two")
    )
    dump(two / ONE / "done.json", finished(ONE, 4) | {"time": 19.0, "train_seconds": 9.0})
    for lost in (one / TWO, two / THREE, one / FOUR, two / FOUR):
        (lost / "done.json").unlink()
    append(one / FOUR / "attempts" / "001", event(5))
    exports = [exported(one), exported(two)]
    for name, order in (("third", exports), ("fourth", exports[::-1])):
        for folder in order:
            exchange.merge(folder, tmp_path / name)
    exchange.merge(exports[1], one)
    exchange.merge(exports[0], two)
    assert len({tuple(seen(tmp_path / name)) for name in ("third", "fourth", "one", "two")}) == 1
    rows = {row["run_id"]: row for row in map(json.loads, seen(one))}
    assert [rows[run]["host"] for run in (ONE, TWO, THREE, FOUR)] == ["two", "two", "one", "one"]
    assert rows[ONE]["train_seconds"] == 9.0


def test_a_replaced_run_is_moved_aside_complete(tmp_path: Path) -> None:
    one, two = (write_home(tmp_path / host, {ONE: 2}, host) for host in ("one", "two"))
    (one / ONE / "done.json").unlink()
    (one / ONE / "checkpoints").mkdir()
    (one / ONE / "checkpoints" / "step-000000003.safetensors").write_text("w")
    own = {
        path.relative_to(one / ONE): path.read_bytes()
        for path in (one / ONE).rglob("*")
        if path.is_file()
    }
    merged = exchange.merge(exported(two), one)
    assert merged.counts["replaced"] == 1
    [line] = merged.lines[1:]
    assert "finished with val_bpb 1.5 there, unfinished at step 4 here" in line
    aside = one / ONE / "aside" / "001"
    assert str(aside) in line
    assert {
        path.relative_to(aside): path.read_bytes() for path in aside.rglob("*") if path.is_file()
    } == own
    assert json.loads(seen(one)[0])["host"] == "two"


def test_an_unfinished_run_that_can_resume_here_is_kept(
    tmp_path: Path,
) -> None:
    one, two = (write_home(tmp_path / host, {ONE: 2}, host, done=False) for host in ("one", "two"))
    append(two / ONE / "attempts" / "001", event(5))
    (one / ONE / "checkpoints").mkdir()
    (one / ONE / "checkpoints" / "step-000000003.safetensors").write_text("w")
    before = truth(one)
    merged = exchange.merge(exported(two), one)
    assert "it can resume here; this home's record is kept" in merged.lines[1]
    assert truth(one) == before


def test_a_run_continued_elsewhere_is_updated_unless_it_is_running_here(tmp_path: Path) -> None:
    one, two = write_home(tmp_path / "one", {ONE: 2}, "one", done=False), tmp_path / "two"
    exchange.merge(exported(one), two)
    append(one / ONE / "attempts" / "001", event(5))
    dump(one / ONE / "done.json", finished(ONE, 5))
    later = exported(one)
    lock = hold_lock(two / ONE / "lock")
    assert lock is not None
    merged = exchange.merge(later, two)
    assert (merged.counts["waiting"], "running here" in merged.lines[1]) == (1, True)
    lock.close()
    assert exchange.merge(later, two).counts["further"] == 1
    assert seen(two) == seen(one)
    assert store.curves(home=two)["step"].tolist() == [1, 2, 3, 4, 5]


def test_an_older_export_does_not_change_a_newer_home(tmp_path: Path) -> None:
    one = write_home(tmp_path / "one", {ONE: 2}, "one", done=False)
    older = exported(one)
    append(one / ONE / "attempts" / "001", event(5))
    before = truth(one)
    exchange.merge(older, one)
    assert truth(one) == before


def test_a_killed_merge_is_completed_by_the_next_one(tmp_path: Path) -> None:
    one, two = (write_home(tmp_path / host, {ONE: 2, TWO: 3}, host) for host in ("one", "two"))
    for run in (ONE, TWO):
        (two / run / "done.json").unlink()
    folder = exported(one)
    program = (
        "import os, sys; from pathlib import Path; from slm import exchange\n"
        "left, rename = int(sys.argv[3]), Path.replace\n"
        "def replace(path, target):\n"
        "    global left\n    left -= 1\n"
        "    os.kill(os.getpid(), 9) if left < 0 else None\n    return rename(path, target)\n"
        "Path.replace = replace\n"
        "exchange.merge(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    for files in (0, 2, 4):
        home = tmp_path / f"killed-{files}"
        shutil.copytree(two, home)
        command = [sys.executable, "-c", program, str(folder), str(home), str(files)]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
        exchange.merge(folder, home)
        assert seen(home) == seen(one)
        assert store.check(home).problems == []


def test_equal_experiments_are_merged_into_one_with_the_runs_of_both(tmp_path: Path) -> None:
    one, two = (
        write_home(tmp_path / "one", {TWO: 3}, "h"),
        write_home(tmp_path / "two", {ONE: 3, TWO: 3}, "h"),
    )
    write_experiment(two, "ladder", [TWO, ONE], created=0.5)
    exports = [exported(one), exported(two)]
    exchange.merge(exports[1], one)
    exchange.merge(exports[0], two)
    documents = [
        json.loads((home / "experiments" / "ladder.json").read_text()) for home in (one, two)
    ]
    assert documents[0] == documents[1]
    assert documents[0]["runs"] == [ONE, TWO]


def test_a_different_experiment_of_the_same_name_is_renamed_by_its_home(
    tmp_path: Path,
) -> None:
    one, two = (
        write_home(tmp_path / "one", {ONE: 2}, "h"),
        write_home(tmp_path / "two", {TWO: 3}, "h"),
    )
    write_experiment(two, "ladder", [TWO], question="why not?")
    dump(two / "fits" / "0123456789ab.json", {"created": 1.0, "experiments": ["ladder"]})
    folder = exported(two)
    their = json.loads((two / "home.json").read_text())["id"]
    for _ in range(2):
        exchange.merge(folder, one)
        assert store.results("ladder", one)["run_id"].tolist() == [ONE]
        assert store.results(f"ladder@{their}", one)["run_id"].tolist() == [TWO]
    assert json.loads((one / "fits" / "0123456789ab.json").read_text())["experiments"] == [
        f"ladder@{their}"
    ]


def test_an_export_of_an_experiment_has_only_its_own_files(tmp_path: Path) -> None:
    home = write_home(tmp_path / "one", {ONE: 2, TWO: 3}, "h")
    write_experiment(home, "other", [TWO])
    for number, names in enumerate((["ladder"], ["other"], ["ladder", "other"])):
        dump(home / "fits" / f"{number:012d}.json", {"created": 1.0, "experiments": names})
    folder = exported(home, experiments=["other"])
    of_the_run = {f"{TWO}/{name}" for name in ("plan.json", "done.json", *ATTEMPT)}
    assert set(truth(folder / "runs")) == {
        *of_the_run,
        "experiments/other.json",
        f"fits/{1:012d}.json",
    }
    for table in ("runs", "metrics", "results", "memberships", "attempts"):
        assert set(
            parquet.read_table(folder / "tables" / f"{table}.parquet")["run_id"].to_pylist()
        ) == {TWO}
    assert parquet.read_table(folder / "tables" / "experiments.parquet")["name"].to_pylist() == [
        "other"
    ]
    with pytest.raises(ValueError, match="no experiment 'third'; there are ladder, other"):
        exported(home, experiments=["third"])


def test_every_table_is_exported_with_descriptions_of_its_columns(tmp_path: Path) -> None:
    home = write_home(tmp_path / "one", {ONE: 2}, "h")
    folder = exported(home)
    described = {
        table["name"]: table for table in json.loads((folder / "columns.json").read_text())
    }
    assert set(all_rows(home)) < set(described)
    for name, table in described.items():
        rows = parquet.read_table(folder / "tables" / f"{name}.parquet")
        assert rows.schema.names == [column["name"] for column in table["columns"]]
        assert rows.num_rows == table["rows"]
        assert all(column["meaning"] for column in table["columns"]) or name == "latest_attempts"
    results = parquet.read_table(folder / "tables" / "results.parquet").to_pylist()
    assert (results[0]["depth"], results[0]["val_bpb"], results[0]["core"]) == (2, 1.5, None)


def test_weights_are_exported_on_request_and_only_with_their_result(tmp_path: Path) -> None:
    home = write_home(tmp_path / "one", {ONE: 2, TWO: 3}, "h")
    for run in (ONE, TWO):
        (home / run / "model.safetensors").write_text("weights")
    digest = sha256_of(home / ONE / "model.safetensors")
    dump(home / ONE / "done.json", finished(ONE, 4) | {"weights_sha256": digest})
    assert exchange.merge(exported(home), tmp_path / "two").counts["weights"] == 0
    assert exchange.merge(exported(home, weights=True), tmp_path / "two").counts["weights"] == 1
    assert [(tmp_path / "two" / run / "model.safetensors").exists() for run in (ONE, TWO)] == [
        True,
        False,
    ]


def test_an_export_to_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    home = write_home(tmp_path / "one", {ONE: 2}, "h")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(ValueError, match="not empty"):
        exchange.export(home, tmp_path / "full")
    (tmp_path / "empty").mkdir()
    exchange.export(home, tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full", "one"]


def test_files_that_no_export_has_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = exported(write_home(tmp_path / "one", {ONE: 2}, "h"))
    document = json.loads((folder / "export.json").read_text())
    for name in (
        *(
            "/etc/passwd",
            "../x",
            "runs/../../x",
            f"runs/{ONE}/../../x.json",
            "runs/x/plan.json",
            "home.json",
            "",
        ),
        *(
            f"runs/{ONE}/lock",
            f"runs/{ONE}/attempts/\uff11\uff12\uff13/exit.json",
            "runs/experiments/.hidden.json",
        ),
        *(
            "runs/slm.duckdb",
            "runs/imports/0123456789ab/original/../../x",
            "runs\\..\\x",
            "tables/../x.parquet",
        ),
        *(f"runs/{ONE}/evals/..json", f"runs/{ONE}/plan.json\n"),
    ):
        files = [*document["files"], {"name": name, "bytes": 0, "sha256": ""}]
        dump(folder / "export.json", document | {"files": files})
        refused(folder, tmp_path / "two", "not the name of an exported file")


def refused(folder: Path, home: Path, why: str) -> None:
    """A merge of this folder is refused in one line, and leaves no trace."""
    with pytest.raises(ValueError, match=why) as caught:
        exchange.merge(folder, home)
    assert "\n" not in str(caught.value)
    assert not home.exists()


def test_changed_truncated_missing_or_linked_files_are_refused(tmp_path: Path) -> None:
    home = write_home(tmp_path / "one", {ONE: 2}, "h")
    damages = {
        "not what was exported": lambda path: path.write_bytes(path.read_bytes()[:-1] + b" "),
        "is missing": lambda path: path.unlink(),
        "is a link": lambda path: (
            os.rename(path, tmp_path / "x") or path.symlink_to(tmp_path / "x")
        ),
    }
    for why, damage in damages.items():
        folder = exported(home)
        damage(folder / "runs" / ONE / "done.json")
        refused(folder, tmp_path / "two", why)
    folder = exported(home)
    (folder / "runs" / ONE).rename(tmp_path / "elsewhere")
    (folder / "runs" / ONE).symlink_to(tmp_path / "elsewhere")
    refused(folder, tmp_path / "two", "is a link")
    (folder / "export.json").write_text("{}")
    refused(folder, tmp_path / "two", "not the manifest of an export: it has no 'format'")


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    folder = exported(write_home(tmp_path / "one", {ONE: 2}, "h"))
    path = folder / "runs" / ONE / "plan.json"
    path.unlink()
    path.symlink_to(path)
    refused(folder, tmp_path / "two", "is a link")


def forge(folder: Path, name: str, document: Any) -> None:
    """Put a document into an export, as though it had always been there."""
    path = folder / "runs" / name
    dump(path, document)
    known = json.loads((folder / "export.json").read_text())
    files = [row for row in known["files"] if row["name"] != f"runs/{name}"]
    row = {"name": f"runs/{name}", "bytes": path.stat().st_size, "sha256": sha256_of(path)}
    dump(folder / "export.json", known | {"files": [*files, row]})


def test_a_document_about_another_run_is_refused(tmp_path: Path) -> None:
    folder = exported(write_home(tmp_path / "one", {ONE: 2}, "h"))
    forge(folder, f"{ONE}/done.json", finished(TWO, 4))
    refused(folder, tmp_path / "two", f"it is about '{TWO}'")


def test_documents_with_names_outside_the_home_are_refused(tmp_path: Path) -> None:
    """Names become folders of runs, and files of figures and reports."""
    home = write_home(tmp_path / "one", {ONE: 2}, "h")
    kept = dict.fromkeys(
        ("format", "source", "sha256", "created", "strict", "axis", "mapping", "defects"), ""
    )
    kept |= {"hash": "0123456789ab", "experiment": "old", "rows": []}
    for name, document in (
        ("experiments/e.json", {"name": "e", "runs": ["../../x"]}),
        ("experiments/e.json", {"name": "e", "runs": [7]}),
        ("experiments/e.json", {"name": "e", "runs": [], "declared": [1]}),
        ("fits/0123456789ab.json", {"created": 1.0, "experiments": ["../x"]}),
        ("imports/0123456789ab/import.json", kept | {"experiment": "/etc/x"}),
        (f"{ONE}/done.json", finished(ONE, 4) | {"time": [1]}),
    ):
        folder = exported(home)
        forge(folder, name, document)
        refused(folder, tmp_path / "two", f"{name}: ")


def test_an_import_is_merged_although_a_source_file_has_the_name_of_a_document(
    tmp_path: Path,
) -> None:
    home = write_home(tmp_path / "one", {ONE: 2}, "h")
    write_import(home, row(1), digest="0123456789ab")
    (home / "imports" / "0123456789ab" / "original").mkdir()
    (home / "imports" / "0123456789ab" / "original" / "floor-plan.json").write_text("[]")
    assert exchange.merge(exported(home), tmp_path / "two").counts["imports"] == 1
    assert truth(tmp_path / "two") == truth(home)


def test_a_merge_has_no_dry_run_and_prints_what_it_merged(tmp_path: Path) -> None:
    folder = exported(write_home(tmp_path / "one", {ONE: 2}, "h"))
    asked = slm("import", str(folder), "--dry-run", home=tmp_path / "two")
    assert (asked.returncode, "--dry-run" in asked.stderr) == (2, True)
    assert not (tmp_path / "two" / ONE).exists()
    told = slm("import", str(folder), home=tmp_path / "two").stdout.splitlines()
    assert told == [f"{folder.name}: merged: 1 new run, 1 experiments"]


def test_an_unreadable_document_is_reported_and_not_exported(tmp_path: Path) -> None:
    home = write_home(tmp_path / "one", {ONE: 2, TWO: 3}, "h")
    (home / TWO / "plan.json").write_text("{")
    folder = exported(home)
    [problem] = json.loads((folder / "export.json").read_text())["problems"]
    assert str(home / TWO / "plan.json") in problem
    exchange.merge(folder, tmp_path / "two")
    assert store.results(home=tmp_path / "two")["run_id"].tolist() == [ONE]


def test_progress_of_an_export_and_a_merge_is_reported_without_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slm.text.LINE_SECONDS", 0.0)
    home = write_home(tmp_path / "one", {ONE: 2}, "h")
    bars = ProgressBars()
    folder = exported(home, report_files=bars.add("files"), report_tables=bars.add("tables"))
    assert exchange.merge(folder, tmp_path / "two", bars.add("files and runs")).counts["new"] == 1


def test_an_import_whose_name_exists_is_renamed_by_its_home(tmp_path: Path) -> None:
    one, two = write_home(tmp_path / "one", {ONE: 2}, "h"), write_home(tmp_path / "two", {}, "h")
    shutil.rmtree(two / "experiments")
    for home, name, digest in (
        (one, "theirs", "a" * 12),
        (two, "theirs", "b" * 12),
        (two, "ladder", "c" * 12),
    ):
        write_import(home, row(1, run_id=f"x{digest[:11]}"), digest=digest, experiment=name)
    exports = [exported(home) for home in (one, two)]
    for home, folder in ((one, exports[1]), (two, exports[0])):
        exchange.merge(folder, home)
        theirs = json.loads((folder / "export.json").read_text())["home"]["id"]
        names = store.sql(
            "select experiment, count(*) n from memberships group by 1 order by 1", home=home
        )
        assert names["experiment"].tolist() == [
            "ladder",
            f"ladder@{theirs}",
            "theirs",
            f"theirs@{theirs}",
        ]
        assert names["n"].tolist() == [1, 1, 1, 1]
        assert exchange.merge(folder, home).counts["imports"] == 0
        assert len(store.results(f"theirs@{theirs}", home=home)) == 1


def test_of_two_equal_evaluations_the_earlier_is_kept_in_both_homes(tmp_path: Path) -> None:
    homes = [write_home(tmp_path / host, {ONE: 2}, "h") for host in ("one", "two")]
    name = f"{ONE}/evals/core-000000004-0123.json"
    for home, time in zip(homes, (3.0, 2.0)):
        dump(
            home / name,
            {
                "run_id": ONE,
                "metric": "core",
                "step": 4,
                "time": time,
                "core": time / 10,
                "tasks": {},
            },
        )
    exports = [exported(home) for home in homes]
    exchange.merge(exports[1], homes[0])
    exchange.merge(exports[0], homes[1])
    assert [json.loads((home / name).read_text())["time"] for home in homes] == [2.0, 2.0]
    assert (
        json.loads((homes[0] / ONE / "aside" / "evals" / Path(name).name).read_text())["time"]
        == 3.0
    )


def test_the_exported_results_are_the_rows_of_the_store(tmp_path: Path) -> None:
    home = write_home(tmp_path / "one", {ONE: 2, TWO: 3}, "h")
    folder = exported(home)
    read = pandas.read_parquet(folder / "tables" / "results.parquet").sort_values("run_id")
    mine = store.results(home=home).sort_values("run_id")
    assert (
        read[["run_id", "val_bpb", "tokens"]].to_numpy().tolist()
        == mine[["run_id", "val_bpb", "tokens"]].to_numpy().tolist()
    )
