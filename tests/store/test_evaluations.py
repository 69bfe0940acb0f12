"""Evaluations in the store: `evals` files in, one CORE value with its comparison key per run
out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import store
from tests.store.test_store import all_rows, dump, finished, write_run

pytestmark = pytest.mark.usefixtures("database")

EACH = {
    "correct": [True, None, False],
    "tie": [False, None, True],
    "choice": [1, None, 0],
    "gold_nats": [2.5, None, 3.0],
    "gold_tokens": [2, None, 3],
    "gold_greedy": [1, None, 0],
    "gold_bytes": [7, None, 9],
    "gold_probability": [0.75, None, None],
}


def task(**changed: Any) -> dict[str, Any]:
    document = {
        "kind": "multiple_choice",
        "shots": 10,
        "examples": 2,
        "cropped": 0,
        "skipped": 1,
        "ties": 1,
    }
    document |= {"accuracy": 0.5, "standard_error": 0.3, "centred": 0.25, "centred_corrected": 0.2}
    return document | {
        "bits_per_byte": 1.0,
        "greedy_share": 0.2,
        "gold_probability": 0.75,
        "each": EACH,
        **changed,
    }


def write_core(
    home: Path, value: float | None, file: str = "core", run_id: str = "aaa", **changed: Any
) -> Path:
    """Write a file of `evals` as `slm eval --core` does: of the whole bundle unless `mode`
    differs."""
    document = {
        "run_id": run_id,
        "step": 4,
        "metric": "core",
        "weights": "model.safetensors",
        "weights_sha256": "w",
    }
    document |= {
        "code": "c",
        "device": "cpu",
        "tokenizer": "t",
        "bundle": "b",
        "name": "core",
        "mode": "full",
    }
    document |= {
        "format": 1,
        "max_per_task": None,
        "asked": ["one"],
        "time": 9.0,
        "core": value,
        "centred": value,
    }
    document |= {
        "centred_error": 0.01,
        "centred_corrected": 0.2,
        "centred_corrected_error": 0.02,
        "examples": 2,
    }
    document |= {
        "core_corrected": 0.2,
        "bits_per_byte": 1.0,
        "greedy_share": 0.2,
        "cropped": 0,
        "skipped": 1,
        "ties": 1,
    }
    path = home / run_id / "evals" / f"{file}-000000004-k.json"
    dump(path, document | {"tasks": {"one": task()}} | changed)
    return path


def core_of(home: Path) -> list[Any]:
    store.ingest(home)
    [row] = store.results(home=home).to_dict("records")
    return [row[name] for name in ("core", "core_error", "core_metric", "core_mode", "core_key")]


def test_an_evaluation_becomes_a_row_its_tasks_and_its_examples(tmp_path: Path) -> None:
    write_run(tmp_path, "aaa")
    write_core(
        tmp_path, 0.25, tasks={"one": task(), "two": {"error": "no example fits"}}, core=None
    )
    assert store.ingest(tmp_path).problems == []
    columns = "metric, mode, bundle, step, core, core_error, core_corrected, examples, ties"
    query = f"select {columns} from evaluations"
    assert store.sql(query, home=tmp_path).to_numpy().tolist() == [
        ["core", "full", "b", 4, 0.25, 0.01, 0.2, 2, 1]
    ]
    tasks = store.sql(
        "select task, accuracy, shots, error from evaluation_tasks order by task", home=tmp_path
    )
    assert tasks.iloc[0, :3].tolist() == ["one", 0.5, 10]
    assert tasks.isna().to_numpy().tolist() == [
        [False, False, False, True],
        [False, True, True, False],
    ]
    assert tasks["error"][1] == "no example fits"
    [first, second] = store.sql(
        "select * from evaluation_examples order by example", home=tmp_path
    ).to_dict("records")
    whose = {
        "home": store.home_id(tmp_path),
        "run_id": "aaa",
        "evaluation": "core-000000004-k",
        "task": "one",
    }
    says = {
        "correct": True,
        "choice": 1,
        "tie": False,
        "gold_nats": 2.5,
        "gold_tokens": 2,
        "gold_greedy": 1,
    }
    assert first == whose | {"example": 0} | says | {"gold_bytes": 7, "gold_probability": 0.75}
    assert (second["example"], second["correct"], second["tie"]) == (2, False, True)


def test_val_bpb_is_an_evaluation_without_tasks(tmp_path: Path) -> None:
    write_run(tmp_path, "aaa")
    document = {
        "run_id": "aaa",
        "step": 2,
        "metric": "val_bpb",
        "weights": "step-2",
        "tokenizer": "t",
    }
    dump(
        tmp_path / "aaa" / "evals" / "val_bpb-000000002-k.json",
        document | {"validation": "v", "val_bpb": 1.7, "val_loss": 2.2, "rows": 3, "seconds": 0.5},
    )
    assert store.ingest(tmp_path).problems == []
    columns = "metric, mode, validation, val_bpb, val_loss, rows, core"
    query = f"select {columns} from evaluations where core is null"
    assert store.sql(query, home=tmp_path).iloc[0, :6].tolist() == [
        "val_bpb",
        None,
        "v",
        1.7,
        2.2,
        3,
    ]
    assert store.results(home=tmp_path)["core"].isna().all()


def test_core_prefers_the_whole_core_bundle(tmp_path: Path) -> None:
    """Each evaluation in this list takes precedence over those before it."""
    write_run(tmp_path, "aaa")
    key = "metric={} bundle=b mode={} tokenizer=t context=128"
    assert core_of(tmp_path)[2:] == [None, None, None]
    write_core(tmp_path, 0.9, "checkpoint", step=2)
    write_core(tmp_path, 0.9, "one_task", mode="tasks one", core=None)
    assert core_of(tmp_path)[2:] == [None, None, None]
    cheap = {"mode": "5 per task", "max_per_task": 5}
    for value, name, changed in (
        (0.1, "pocket-core", cheap),
        (0.2, "pocket-core", {"mode": "full"}),
        (0.3, "core", cheap),
        (0.35, "core", {"mode": "20 per task", "max_per_task": 20}),
        (0.4, "core", {"mode": "without one,two"}),
        (0.5, "core", {"mode": "full"}),
        (0.6, "core", {"mode": "full", "time": 10.0}),
    ):
        write_core(tmp_path, value, f"{name}-{value}", name=name, **changed)
        mode = str(changed["mode"])
        assert core_of(tmp_path) == [
            value,
            0.01,
            name,
            mode,
            key.format(name, mode.replace(" ", "_")),
        ]


def test_a_core_found_only_in_done_json_has_no_bundle_in_its_key(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "aaa")
    dump(folder / "done.json", finished("aaa", 4) | {"core": 0.125})
    value, _, *known = core_of(tmp_path)
    assert value == 0.125
    assert known == ["core", "full", "metric=core mode=full tokenizer=t context=128"]


@pytest.mark.parametrize(
    ("changed", "mode", "core"),
    [
        ({}, "full", 0.25),
        ({"max_per_task": 5}, "5 per task", 0.25),
        ({"core": None}, "tasks one", 0.25),
        ({"core": None, "max_per_task": 5}, "5 per task, tasks one", 0.25),
    ],
)
def test_the_mode_of_old_evaluations_is_derived(
    tmp_path: Path, changed: dict[str, Any], mode: str, core: float
) -> None:
    write_run(tmp_path, "aaa")
    write_core(tmp_path, 0.25, mode=None, **{"name": None, **changed})
    path = next((tmp_path / "aaa" / "evals").iterdir())
    document = json.loads(path.read_text())
    dump(path, {name: value for name, value in document.items() if name not in ("name", "mode")})
    assert store.ingest(tmp_path).problems == []
    assert store.sql(
        "select metric, mode, core from evaluations", home=tmp_path
    ).to_numpy().tolist() == [["core", mode, core]]


@pytest.mark.parametrize(
    "changed",
    [
        {"centred": 1.5},
        {"metric": "val_bpb", "val_bpb": None},
        {"metric": "val_bpb", "val_bpb": 0.0},
        {"step": -1},
        {"tasks": {"one": task(accuracy=None)}},
        {"tasks": {"one": task(accuracy=1.5)}},
        {"tasks": {"one": task(each=EACH | {"gold_tokens": ["many", 1, 2]})}},
        {"run_id": "bbb"},
    ],
)
def test_an_invalid_evaluation_is_named_and_leaves_no_row(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    write_run(tmp_path, "aaa")
    valid = write_core(tmp_path, 0.2, "kept")
    broken = write_core(tmp_path, 0.25, "broken")
    dump(broken, json.loads(broken.read_text()) | changed)
    [problem] = store.ingest(tmp_path).problems
    assert str(broken) in problem
    for table in ("evaluations", "evaluation_tasks", "evaluation_examples"):
        names = store.sql(f"select distinct evaluation from {table}", home=tmp_path)[
            "evaluation"
        ].tolist()
        assert names == [valid.stem]


def test_rewritten_and_removed_evaluations_replace_and_remove_their_rows(
    tmp_path: Path,
) -> None:
    write_run(tmp_path, "aaa")
    path = write_core(tmp_path, 0.2)
    store.ingest(tmp_path)
    write_core(tmp_path, 0.3, tasks={"other": task()})
    assert core_of(tmp_path)[0] == 0.3
    query = "select task, count(*) as n from evaluation_examples group by task"
    assert store.sql(query, home=tmp_path).to_numpy().tolist() == [["other", 2]]
    assert store.sql("select count(*) as n from metrics", home=tmp_path)["n"][0] == 24
    shutil.rmtree(path.parent)
    store.ingest(tmp_path)
    assert store.sql(query, home=tmp_path).empty
    assert store.results(home=tmp_path)["core"].isna().all()


def test_rebuilding_gives_the_same_evaluations(tmp_path: Path) -> None:
    for number in range(3):
        write_run(tmp_path, f"run{number}")
        write_core(tmp_path, 0.1 * number, run_id=f"run{number}")
        store.ingest(tmp_path)
    before = all_rows(tmp_path)
    assert len(before["evaluation_examples"]) == 6
    store.rebuild(tmp_path)
    assert all_rows(tmp_path) == before


def test_noise_is_over_seeds_and_mixes_no_core(tmp_path: Path) -> None:
    for seed, value in enumerate((1.0, 2.0, 3.0)):
        folder = write_run(tmp_path, f"run{seed}")
        dump(folder / "plan.json", json.loads((folder / "plan.json").read_text()) | {"seed": seed})
        dump(
            folder / "done.json", finished(f"run{seed}", 4) | {"val_bpb": value, "core": value / 10}
        )
    write_run(tmp_path, "unfinished", done=False)
    write_run(tmp_path, "alone", depth=5)
    store.ingest(tmp_path)
    columns = "depth, n, val_bpb_mean, val_bpb_sd, core_n, core_mean"
    three, alone = store.sql(f"select {columns} from noise order by depth", home=tmp_path).to_dict(
        "records"
    )
    assert [three[name] for name in ("n", "val_bpb_mean", "val_bpb_sd", "core_n")] == [
        3,
        2.0,
        1.0,
        3,
    ]
    assert three["core_mean"] == pytest.approx(0.2)
    assert alone["n"] == 1
    assert store.sql("select val_bpb_sd is null as none from noise where n = 1", home=tmp_path)[
        "none"
    ].tolist() == [True]
    write_core(tmp_path, 0.5, run_id="run0", mode="5 per task", max_per_task=5)
    store.ingest(tmp_path)
    [mixed] = (
        store.sql("select core_key, core_mean from noise where n = 3", home=tmp_path)
        .isna()
        .to_numpy()
        .tolist()
    )
    assert mixed == [True, True]
