"""`slm data`: what lies there is listed, shown, verified and removed; nothing that is read goes away."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from slm.data import Prepared, prepare
from slm.experiment import Experiment
from slm.files import hold_lock
from slm.plan import Plan, code_fingerprint
from slm.recipe import pocket
from tests.conftest import slm

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "bdfgklmnprst"]


@pytest.fixture
def own(tmp_path: Path, prepared: Prepared) -> Path:
    """A home with a prepared corpus of its own, an unfinished one, one of another version, and a planned run."""
    home = tmp_path / "home"
    shutil.copytree(prepared.folder, home / "data" / prepared.folder.name)
    (home / "data" / "unfinished-0").mkdir()
    (home / "data" / "unfinished-0" / "lock").touch()
    (home / "data" / "older-0").mkdir()
    (home / "data" / "older-0" / "manifest.json").write_text('{"format": 1}')
    plan = Plan(
        "pocket",
        "steps=9",
        0,
        pocket(2, steps=9),
        prepared.identity(pocket(2, steps=9)),
        code_fingerprint(),
    )
    (home / plan.run_id).mkdir()
    (home / plan.run_id / "plan.json").write_text(json.dumps(plan.document()))
    return home


def run_of(home: Path) -> Path:
    (plan,) = home.glob("*/plan.json")
    return plan.parent


def test_everything_is_listed_with_its_state_and_who_reads_it(
    own: Path, prepared: Prepared
) -> None:
    done = slm("data", "list", "--json", home=own)
    found = {Path(row["folder"]).name: row for row in json.loads(done.stdout)["data"]}
    states = {name: row["state"] for name, row in found.items()}
    name = prepared.folder.name
    assert states == {
        name: "prepared",
        "unfinished-0": "unfinished",
        "older-0": "of another version",
    }
    assert found[name]["runs"] == [run_of(own).name]
    assert found[name]["train"]["tokens"] == prepared.train_rows * 128
    assert found[name]["bytes"] > 2 * prepared.train_rows * 129
    assert name in slm("data", "list", home=own).stdout


def test_a_corpus_is_shown_with_epochs_and_compression(
    own: Path, prepared: Prepared, tmp_path: Path
) -> None:
    shutil.copy(prepared.folder / "tokenizer.json", tmp_path / "same.json")
    arguments = (
        "data",
        "show",
        "python",
        "--depths",
        "2,9",
        "--against",
        str(tmp_path / "same.json"),
    )
    [row] = json.loads(slm(*arguments, "--json", home=own).stdout)["data"]
    assert [one["epochs"] for one in row["depths"]] == [
        pocket(depth).train_rows / prepared.train_rows for depth in (2, 9)
    ]
    reach = row["reach"]
    needs = [
        pocket(reach[key]).train_rows / prepared.train_rows for key in ("one_epoch", "at_most")
    ]
    assert needs[0] <= 1 < pocket(reach["one_epoch"] + 1).train_rows / prepared.train_rows
    assert needs[1] <= 4
    ratios = [one["bytes_per_token"] for one in row["compression"]]
    assert ratios[0] == ratios[1] > 1.5
    lines = slm(*arguments, home=own).stdout
    assert (
        f"depth 9: {pocket(9).tokens / 1e6:.4g}M tokens, {needs and row['depths'][1]['epochs']:.2f} epochs"
        in lines
    )
    assert "tokens of its own" in lines


def test_a_changed_row_is_found_wherever_it_lies(own: Path, prepared: Prepared) -> None:
    assert (
        slm("data", "verify", home=own).stdout == f"{own / 'data' / prepared.folder.name}: whole\n"
    )
    path = own / "data" / prepared.folder.name / "train-00000.bin"
    with path.open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"\x01\x00\x01")
    done = slm("data", "verify", "python", "--json", home=own)
    assert done.returncode == 1
    assert "train-00000.bin was changed" in json.loads(done.stdout)["problems"][str(path.parent)]


def test_data_are_removed_unless_a_run_at_work_reads_them(own: Path, prepared: Prepared) -> None:
    name, run = prepared.folder.name, run_of(own)
    refused = slm("data", "remove", name, home=own)
    assert refused.returncode == 2
    assert "1 runs read it" in refused.stderr
    assert "--yes removes without asking" in refused.stderr
    with hold_lock(run / "lock"):
        held = slm("data", "remove", name, "--yes", home=own)
    assert held.returncode == 2
    assert f"run {run.name} is at work on it" in held.stderr
    with hold_lock(own / "data" / name / "lock"):
        assert "is prepared by process" in slm("data", "remove", name, "--yes", home=own).stderr
    assert (own / "data" / name / "manifest.json").exists()
    assert slm("data", "remove", name, "--yes", home=own).stdout.startswith("freed ")
    assert sorted(path.name for path in (own / "data").iterdir()) == ["older-0", "unfinished-0"]
    gone = slm("data", "show", "python", home=own)
    assert (
        gone.stderr
        == f"slm: no data of 'python' in {own / 'data'}; there is older-0, unfinished-0\n"
    )


def test_a_sweep_says_that_rows_are_read_more_than_once(tmp_path: Path) -> None:
    folder, draw = tmp_path / "words", random.Random(0)
    folder.mkdir()
    for number in range(150):
        text = " ".join(draw.choice(WORDS) for _ in range(4000))
        (folder / f"{number}.md").write_text(text)
    rows = prepare(str(folder), pocket(2), tmp_path / "home").train_rows
    given = pocket(3, ratio=2.5 * rows * 128 / pocket(3).parameters.scaling)
    ratio = f"{given.tokens / given.parameters.scaling:g}"
    arguments = (
        "--depths",
        "3",
        "--recipe",
        "pocket",
        "--ratios",
        ratio,
        "--data",
        str(folder),
        "--dry-run",
    )
    done = slm("sweep", *arguments, home=tmp_path / "home")
    assert (
        f"1 of them read rows of {folder} more than once, up to {given.train_rows / rows:.2f} epochs"
        in done.stdout
    )


def test_a_sweep_takes_a_given_tokeniser_to_its_plans(tmp_path: Path, prepared: Prepared) -> None:
    shutil.copy(prepared.folder / "tokenizer.json", tmp_path / "given.json")
    home, given = tmp_path / "home", ("--tokenizer", str(tmp_path / "given.json"))
    assert slm("data", "prepare", "python", "--recipe", "pocket", *given, home=home).returncode == 0
    done = slm(
        "sweep", "--depths", "2", "--recipe", "pocket", *given, "--dry-run", "--json", home=home
    )
    [run] = json.loads(done.stdout)["runs"]
    assert run["run_id"] is not None
    other = slm("sweep", "--depths", "2", "--recipe", "pocket", "--dry-run", "--json", home=home)
    assert json.loads(other.stdout)["runs"][0]["run_id"] is None


def test_an_experiment_declares_its_tokeniser() -> None:
    experiment = Experiment("words", (pocket,), (2,), tokenizer="gpt2")
    assert experiment.declared()["tokenizer"] == "gpt2"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("prepare", "--tokens", "-1"), "-1.0 is not positive"),
        (
            ("prepare", "--tokenizer", "nothing"),
            "--tokenizer nothing: no file (.json, .tiktoken), and not one of",
        ),
        (("prepare", "hf:words"), "write hf:OWNER/NAME"),
        (("show", "nothing"), "no data of 'nothing'"),
    ],
)
def test_what_is_asked_wrong_is_one_line(
    tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    done = slm("data", *arguments, home=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
