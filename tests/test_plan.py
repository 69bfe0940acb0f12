"""A plan's identity is everything that shapes the weights, and nothing else."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import slm.plan
from slm.plan import TRAINER_SOURCES, DataIdentity, Plan, code_fingerprint
from slm.recipe import pocket

DATA = DataIdentity("python", "aa", "bb", "cc", 1024, 40_000, 0.5)
PACKAGE = Path(slm.plan.__file__).parent
PLAN = Plan("pocket", "steps=20", 0, pocket(2, steps=20), DATA, "code")


def test_names_are_not_part_of_the_identity() -> None:
    same = replace(
        PLAN, recipe="other", horizon="other", data=replace(DATA, corpus="x", rows=1, epochs=2.0)
    )
    assert same.run_id == PLAN.run_id


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"code": "other"},
        {"hyperparameters": pocket(2, steps=21)},
        {"hyperparameters": replace(pocket, matrix_lr=0.03)(2, steps=20)},
        {"data": replace(DATA, train="xx")},
        {"data": replace(DATA, validation="xx")},
        {"data": replace(DATA, tokenizer="xx")},
    ],
)
def test_everything_that_shapes_the_weights_is_part_of_the_identity(change) -> None:
    assert replace(PLAN, **change).run_id != PLAN.run_id


def test_plan_json_gives_the_same_plan(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(PLAN.document()))
    assert Plan.read(tmp_path / "plan.json") == PLAN


def test_an_edited_plan_is_refused(tmp_path: Path) -> None:
    document = PLAN.document() | {"seed": 7}
    (tmp_path / "plan.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="was changed"):
        Plan.read(tmp_path / "plan.json")


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Copy the trainer's sources."""
    for name in TRAINER_SOURCES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(PACKAGE / name, tmp_path / name)
    return tmp_path


def test_every_trainer_source_exists_once() -> None:
    assert len(set(TRAINER_SOURCES)) == len(TRAINER_SOURCES)
    assert [name for name in TRAINER_SOURCES if not (PACKAGE / name).is_file()] == []


@pytest.mark.parametrize("name", TRAINER_SOURCES)
def test_imports_comments_and_docstrings_do_not_change_the_code_fingerprint(
    sources: Path, name: str
) -> None:
    tree = ast.parse((sources / name).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = "Other words."
    text = ast.unparse(tree)  # which drops comments and layout
    assert "Other words." in text
    text = text.replace("from __future__ import annotations", "import another.module as other")
    (sources / name).write_text(f"# a comment\n{text}")
    assert code_fingerprint(sources) == code_fingerprint()


def test_moving_a_trainer_source_does_not_change_the_code_fingerprint(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *others = TRAINER_SOURCES
    (sources / first).rename(sources / "moved.py")
    monkeypatch.setattr("slm.plan.TRAINER_SOURCES", (*others, "moved.py"))
    assert code_fingerprint(sources) == code_fingerprint()


def test_a_changed_constant_changes_the_code_fingerprint(sources: Path) -> None:
    logits = sources / "model" / "logits.py"
    logits.write_text(logits.read_text().replace("SOFTCAP = 15.0", "SOFTCAP = 30.0"))
    assert code_fingerprint(sources) != code_fingerprint()


def test_the_run_id_is_the_same_in_another_process() -> None:
    program = "import tests.test_plan as t; print(t.PLAN.run_id)"
    root = Path(__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=root, check=True
    )
    assert result.stdout.strip() == PLAN.run_id
