"""Repeating a run from its plan.json: the same bits, or an error message with the reason."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from slm.data import PreparedDataset, prepare
from slm.experiment import Experiment
from slm.plan import Plan, canonical, code_fingerprint
from slm.recipe import pocket
from slm.sweep.planning import record, repeat_plans
from tests import forked
from tests.cli.test_fit_curves import document, refusal

PLANNED = pocket(2, steps=4)
DECLARED = """
from dataclasses import replace

from slm.experiment import Experiment
from slm.recipe import pocket

crippled = replace(pocket, name="crippled", matrix_lr=0.1, validation_tokens=2**11)
experiment = Experiment("crippled", (crippled,), (2,), steps=4, seeds=(3,), data={data!r})
"""


@pytest.fixture
def plan(prepared: PreparedDataset) -> Plan:
    """Return a plan on the built-in corpus by this trainer."""
    return Plan("pocket", "steps=4", 0, PLANNED, prepared.identity(PLANNED), code_fingerprint())


def write(path: Path, plan: Plan) -> str:
    path.write_text(json.dumps(plan.document()))
    return str(path)


def texts() -> list[str]:
    """Return 300 documents of made-up words."""
    draw = random.Random(0)
    words = ["".join(draw.choice("aeioubdfgklmnprst") for _ in range(5)) for _ in range(900)]
    return [" ".join(draw.choice(words) for _ in range(draw.randint(20, 600))) for _ in range(300)]


def books(folder: Path) -> Path:
    """Write the documents as text files."""
    folder.mkdir()
    for number, text in enumerate(texts()):
        (folder / f"{number}.txt").write_text(text)
    return folder


def lines(folder: Path) -> Path:
    """Write the documents in another order, as lines of one file."""
    folder.mkdir()
    (folder / "all.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in reversed(texts()))
    )
    return folder


def sweep(home: Path, *arguments: str) -> dict[str, Any]:
    """Run `slm sweep` on one core, and return its document."""
    result = forked.slm("sweep", *arguments, "--cores", "1", "--json", home=home)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_a_run_is_repeated_bit_for_bit_from_its_plan_and_the_same_texts(tmp_path: Path) -> None:
    """Repeat it without the recipe, from texts of another name, format and order."""
    original, copy = tmp_path / "original", tmp_path / "copy"
    file = tmp_path / "declared.py"
    file.write_text(DECLARED.format(data=str(books(tmp_path / "books"))))
    [run_id] = sweep(original, str(file))["trained"]
    copied = shutil.copy(original / run_id / "plan.json", tmp_path / "plan.json")
    repeat = ("--plan", str(copied), "--data", str(lines(tmp_path / "same")))
    assert sweep(copy, *repeat)["trained"] == [run_id]
    first, second = (
        json.loads((home / run_id / "done.json").read_text()) for home in (original, copy)
    )
    same = ("run_id", "val_bpb", "val_loss", "train_loss", "tokens", "flops", "weights_sha256")
    assert {key: second[key] for key in same} == {key: first[key] for key in same}
    again = document(copy, "sweep", *repeat)
    assert (again["already_done"], again["trained"]) == ([run_id], [])
    assert [run["run_id"] for run in document(copy, "status", run_id)["runs"]] == [run_id]


def test_a_dry_run_names_the_run_before_its_data_is_prepared(
    home: Path, tmp_path: Path, plan: Plan
) -> None:
    file = write(tmp_path / "plan.json", plan)
    for folder, state in ((home, "planned"), (tmp_path / "bare", "data not prepared")):
        planned = document(folder, "sweep", "--plan", file, "--dry-run")
        assert planned["experiment"] == plan.run_id
        assert [(run["run_id"], run["state"]) for run in planned["runs"]] == [(plan.run_id, state)]
    assert not (tmp_path / "bare").exists()
    assert sorted(path.name for path in home.iterdir()) == ["data"]


def test_several_plans_need_a_name_and_a_run_folder_stands_for_its_plan(
    home: Path, tmp_path: Path, plan: Plan
) -> None:
    other = replace(plan, seed=1)
    (tmp_path / "run").mkdir()
    write(tmp_path / "run" / "plan.json", other)
    plans = ("--plan", write(tmp_path / "a.json", plan), "--plan", str(tmp_path / "run"))
    assert "--name" in refusal(home, "sweep", *plans, "--dry-run")
    planned = document(home, "sweep", *plans, "--name", "both", "--dry-run")
    assert planned["experiment"] == "both"
    assert [run["run_id"] for run in planned["runs"]] == [plan.run_id, other.run_id]


def test_texts_are_identified_by_content(tmp_path: Path) -> None:
    hp = replace(pocket, validation_tokens=2**11)(2, steps=4)
    original = prepare(str(books(tmp_path / "books")), hp, tmp_path / "there")
    same, other, home = lines(tmp_path / "same"), books(tmp_path / "other"), tmp_path / "home"
    (other / "0.txt").write_text("one document more than the plan was made on " * 40)
    for folder in (same, other):
        prepare(str(folder), hp, home)
    plan = Plan("pocket", "steps=4", 0, hp, original.identity(hp), code_fingerprint())
    arguments = ("sweep", "--plan", write(tmp_path / "plan.json", plan), "--dry-run")
    [run] = document(home, *arguments, "--data", str(same))["runs"]
    assert (run["run_id"], run["state"]) == (plan.run_id, "planned")
    assert "corpus other gives another tokeniser, other training rows" in refusal(
        home, *arguments, "--data", str(other)
    )
    message = refusal(home, *arguments)
    assert "'books'" in message
    assert "--data FOLDER" in message


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"tokenizer": "x"}, "another tokeniser"),
        ({"train": "x"}, "other training rows"),
        ({"validation": "x"}, "other validation rows"),
    ],
)
def test_other_rows_are_refused_and_named(
    home: Path, tmp_path: Path, plan: Plan, changed: dict, named: str
) -> None:
    file = write(tmp_path / "plan.json", replace(plan, data=replace(plan.data, **changed)))
    for more in ((), ("--dry-run",)):
        message = refusal(home, "sweep", "--plan", file, *more)
        assert named in message
        assert message.count("other") == 1
    assert not list(home.glob("*/plan.json"))


def test_a_plan_of_another_trainer_is_refused(home: Path, tmp_path: Path, plan: Plan) -> None:
    message = refusal(
        home,
        "sweep",
        "--plan",
        write(tmp_path / "plan.json", replace(plan, code="0123456789abcdef")),
    )
    assert "another version of the trainer" in message
    assert "0123456789abcdef" in message
    assert code_fingerprint() in message


def without(document: dict[str, Any], *path: str) -> dict[str, Any]:
    *parents, last = path
    inner = document
    for name in parents:
        inner = inner[name]
    del inner[last]
    return document


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (lambda plan: None, "no such file"),
        (lambda plan: "{", "line 1"),
        (lambda plan: "\x80", "utf-8"),
        (lambda plan: "[]", "not an object"),
        (lambda plan: json.dumps(plan.document() | {"seed": 7}), "was changed"),
        (lambda plan: json.dumps(without(plan.document(), "run_id")), "was changed"),
        (lambda plan: json.dumps(plan.document() | {"world": 1}), "plan has an unknown world"),
        (lambda plan: json.dumps(without(plan.document(), "code")), "plan has no code"),
        (
            lambda plan: json.dumps(without(plan.document(), "hyperparameters", "windows")),
            "hyperparameters has no windows",
        ),
        (
            lambda plan: json.dumps(without(plan.document(), "hyperparameters", "x0", "decay")),
            "hyperparameters.x0 has no decay",
        ),
        (lambda plan: json.dumps(plan.document() | {"data": None}), "plan.data is not an object"),
        (lambda plan: json.dumps(plan.document() | {"recipe": None}), "plan.recipe is None"),
        (lambda plan: json.dumps(plan.document() | {"seed": float("nan")}), "plan.seed is nan"),
    ],
)
def test_a_file_that_is_no_plan_is_named_in_one_line(
    home: Path, tmp_path: Path, plan: Plan, content, named: str
) -> None:
    path = tmp_path / "some.json"
    if (text := content(plan)) is not None:
        path.write_bytes(text.encode("latin-1"))
    message = refusal(home, "sweep", "--plan", str(path))
    assert str(path) in message
    assert named in message


@pytest.mark.parametrize(
    "arguments",
    [
        ("--depths", "2-4"),
        ("--recipe", "pocket"),
        ("--flops", "1e12"),
        ("--ratios", "8"),
        ("--steps", "0"),
        ("--seeds", "2"),
        ("experiments/miniseries.py",),
        ("--name", "../up"),
        ("--data", "nowhere"),
        ("--gpus", "999"),
    ],
)
def test_an_option_that_does_not_go_with_a_plan_is_named(
    home: Path, tmp_path: Path, plan: Plan, arguments: tuple[str, ...]
) -> None:
    message = refusal(home, "sweep", "--plan", write(tmp_path / "plan.json", plan), *arguments)
    assert " ".join(arguments).removeprefix("--name ").removeprefix("--data ") in message
    assert not list(home.glob("*/plan.json"))


def test_a_repeated_run_joins_an_experiment_without_changing_its_recipes(
    home: Path, tmp_path: Path, plan: Plan
) -> None:
    second = replace(plan, seed=1)
    record(Experiment("ladder", (pocket,), (2,), steps=4, seeds=(1,)), [second], home)
    record(repeat_plans([Path(write(tmp_path / "plan.json", plan))], "ladder", None), [plan], home)
    recorded = json.loads((home / "experiments" / "ladder.json").read_text())
    assert recorded["runs"] == [second.run_id, plan.run_id]
    assert recorded["declared"]["recipes"] == {"pocket": json.loads(canonical(asdict(pocket)))}
    assert recorded["declared"]["plans"] == [plan.run_id]
    edited = replace(pocket, matrix_lr=0.03)
    planned = replace(plan, hyperparameters=edited(2, steps=4))
    record(Experiment("ladder", (edited,), (2,), steps=4), [planned], home)
    assert json.loads((home / "experiments" / "ladder.json").read_text())["runs"] == [
        planned.run_id
    ]
