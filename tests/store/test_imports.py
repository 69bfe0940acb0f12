"""Imported results: flagged, and comparable with other runs only if the user names an axis."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import store
from tests.store.test_store import all_rows, dump, event, write_run

pytestmark = pytest.mark.usefixtures("database")

EMPTY = dict.fromkeys(
    (
        *(
            "label",
            "recipe",
            "depth",
            "seed",
            "horizon",
            "reason",
            "parameters_wte",
            "parameters_value_embeds",
        ),
        *(
            "parameters_lm_head",
            "parameters_matrices",
            "parameters_scalars",
            "parameters_scaling",
            "parameters_total",
        ),
        *(
            "flops_per_token",
            "tokens_asked",
            "batch_tokens",
            "steps",
            "tokens",
            "flops",
            "train_loss",
            "val_loss",
        ),
        *(
            "val_bpb",
            "core",
            "train_seconds",
            "wall_seconds",
            "tokens_per_second",
            "flops_per_second",
        ),
        *(
            "peak_memory_bytes",
            "host",
            "device_name",
            "ranks",
            "commit",
            "corpus",
            "tokenizer",
            "validation",
        ),
        "sequence_length",
    )
)


def row(number: int, **known: Any) -> dict[str, Any]:
    required = {
        "run_id": f"x{number:011d}",
        "row": number,
        "status": "finished",
        "flags": [],
        "usable": True,
    }
    return EMPTY | required | {"original": {"flops": "1e18"}, "val_bpb": 0.8, "flops": 1e18} | known


def write_import(home: Path, *rows: dict[str, Any], digest: str = "abc", **changed: Any) -> Path:
    """Write an import as `slm import` does."""
    document = {
        "hash": digest,
        "experiment": "old",
        "format": "nanochat",
        "source": "results.csv",
        "sha256": "s",
    }
    document |= {
        "created": 1.0,
        "strict": False,
        "axis": None,
        "mapping": {"loss": "val_bpb"},
        "rows": list(rows),
    }
    defects = [{"row": 3, "column": "core", "code": "core-zero", "message": "CORE 0.0 of a crash"}]
    folder = home / "imports" / digest
    dump(folder / "import.json", document | {"defects": defects} | changed)
    return folder


def test_an_import_becomes_runs_of_an_experiment(tmp_path: Path) -> None:
    write_run(tmp_path, "aaa")
    flagged = row(
        2, label="d12", status="failed", val_bpb=None, flags=["no-loss", "duplicate"], usable=False
    )
    write_import(tmp_path, row(1, depth=10, core=0.1), flagged)
    assert store.ingest(tmp_path).problems == []
    results = store.results("old", tmp_path)
    assert results["source"].tolist() == ["import", "import"]
    assert results["run_id"].tolist() == ["x00000000001", "x00000000002"]
    assert results["flags"].isna().tolist() == [True, False]
    assert results["flags"][1] == "no-loss,duplicate"
    assert results["usable"].tolist() == [True, False]
    assert results[["label", "status"]].iloc[1].tolist() == ["d12", "failed"]
    assert results["val_bpb"].isna().tolist() == [False, True]
    assert results["flops_planned"].isna().all()
    [row_of_run] = (
        store.sql("select source, flags, usable from results where run_id = 'aaa'", home=tmp_path)
        .to_numpy()
        .tolist()
    )
    assert row_of_run == ["run", None, True]
    [imported] = store.sql("select * from imports", home=tmp_path).to_dict("records")
    assert (imported["hash"], imported["experiment"], imported["rows"], imported["strict"]) == (
        "abc",
        "old",
        2,
        False,
    )
    assert json.loads(imported["defects"])[0]["code"] == "core-zero"
    questions = store.sql("select question from experiments", home=tmp_path)["question"].tolist()
    assert questions == ["imported from results.csv"]


@pytest.mark.parametrize(
    ("axis", "known", "key", "core_key"),
    [
        (None, {}, "import=abc", "import=abc metric=core"),
        (
            None,
            {"sequence_length": 2048},
            "import=abc context=2048",
            "import=abc metric=core context=2048",
        ),
        ("my axis", {}, "axis=my_axis", "axis=my_axis metric=core"),
        (
            "a",
            {"corpus": "fine web", "tokenizer": "t", "validation": "v"},
            "axis=a data=fine_web validation=v tokenizer=t",
            "axis=a metric=core tokenizer=t",
        ),
    ],
)
def test_comparison_keys_of_an_import_are_its_own_unless_an_axis_is_named(
    tmp_path: Path, axis: str | None, known: dict[str, Any], key: str, core_key: str
) -> None:
    write_import(tmp_path, row(1, core=0.2, **known), axis=axis)
    assert store.ingest(tmp_path).problems == []
    results = store.results("old", tmp_path)
    assert results[["comparison_key", "core_key"]].to_numpy().tolist() == [[key, core_key]]


def test_a_curve_of_an_import_is_read_without_times(tmp_path: Path) -> None:
    folder = write_import(tmp_path, row(1, depth=7))
    lines = [event(step).replace(f'"time": {10.0 + step}', '"time": null') for step in (1, 2)]
    (folder / "curves").mkdir()
    (folder / "curves" / "x00000000001.jsonl").write_text("".join(lines))
    assert store.ingest(tmp_path).metrics == 12
    curve = store.curves("old", tmp_path)
    assert curve[["run_id", "depth", "step", "loss"]].to_numpy().tolist() == [
        ["x00000000001", 7, step, 2.0] for step in (1, 2)
    ]


@pytest.mark.parametrize(
    "known",
    [
        {"val_bpb": None},
        {"val_bpb": 0.0},
        {"core": 1.5},
        {"tokens": 0},
        {"tokens": -1, "status": "failed"},
        {"train_seconds": -0.5},
        {"flops": -1e18, "status": "failed"},
        {"val_loss": float("nan")},
    ],
)
def test_an_invalid_import_is_named_and_leaves_no_row(
    tmp_path: Path, known: dict[str, Any]
) -> None:
    write_run(tmp_path, "aaa")
    folder = write_import(tmp_path, row(1), row(2, **known))
    [problem] = store.ingest(tmp_path).problems
    assert str(folder / "import.json") in problem
    assert store.results(home=tmp_path)["run_id"].tolist() == ["aaa"]
    assert store.sql("select * from experiments", home=tmp_path).empty


def test_rewritten_and_removed_imports_replace_and_remove_their_rows(
    tmp_path: Path,
) -> None:
    folder = write_import(tmp_path, row(1), row(2))
    (folder / "curves").mkdir()
    (folder / "curves" / "x00000000001.jsonl").write_text(event(1))
    store.ingest(tmp_path)
    write_import(tmp_path, row(1), row(3), experiment="new")
    store.ingest(tmp_path)
    assert store.results("new", tmp_path)["run_id"].tolist() == ["x00000000001", "x00000000003"]
    assert len(store.curves("new", tmp_path)) == 1
    with pytest.raises(store.QueryError, match="there are new"):
        store.results("old", tmp_path)
    shutil.rmtree(folder)
    store.ingest(tmp_path)
    for table in ("imports", "imported", "experiments", "memberships", "metrics"):
        assert store.sql(f"select * from {table}", home=tmp_path).empty


def test_imports_and_a_sweep_of_one_name_are_one_experiment_in_any_order(
    tmp_path: Path,
) -> None:
    write_run(tmp_path, "aaa")
    write_import(tmp_path, row(1), digest="bbb", source="b.csv")
    write_import(tmp_path, row(2), digest="aaa", source="a.csv")
    store.ingest(tmp_path)
    question = "select question from experiments"
    assert store.sql(question, home=tmp_path)["question"].tolist() == ["imported from a.csv, b.csv"]
    swept = tmp_path / "experiments" / "old.json"
    document = {
        "name": "old",
        "question": "asked",
        "recipe": "pocket",
        "declared": {},
        "created": 1.0,
    }
    for runs in (["aaa"], ["aaa"]):
        dump(swept, document | {"runs": runs})
        store.ingest(tmp_path)
        assert store.sql(question, home=tmp_path)["question"].tolist() == ["asked"]
        assert len(store.results("old", tmp_path)) == 3
    before = all_rows(tmp_path)
    store.rebuild(tmp_path)
    assert all_rows(tmp_path) == before
    swept.unlink()
    store.ingest(tmp_path)
    assert store.sql(question, home=tmp_path)["question"].tolist() == ["imported from a.csv, b.csv"]
    assert len(store.results("old", tmp_path)) == 2


def test_noise_leaves_out_unusable_runs_and_runs_without_a_seed(
    tmp_path: Path,
) -> None:
    rows = [row(1, depth=2, seed=0), row(2, depth=2, seed=1, val_bpb=0.9)]
    rows += [
        row(3, depth=2, seed=2, val_bpb=9.0, flags=["f"], usable=False),
        row(4, depth=2, seed=None, val_bpb=5.0),
    ]
    write_import(tmp_path, *rows)
    store.ingest(tmp_path)
    assert store.sql("select n, val_bpb_mean from noise", home=tmp_path).to_numpy().tolist() == [
        [2, pytest.approx(0.85)]
    ]
