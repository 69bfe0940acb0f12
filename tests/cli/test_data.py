"""`slm data`: list, show, verify and remove; data of running runs cannot be removed."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from slm.data import PreparedDataset, prepare
from slm.experiment import Experiment
from slm.files import hold_lock
from slm.plan import Plan, code_fingerprint
from slm.recipe import pocket
from tests.commands import slm

ROOT = Path(__file__).parents[2]
WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "bdfgklmnprst"]


@pytest.fixture
def data_home(tmp_path: Path, prepared: PreparedDataset) -> Path:
    """A home with prepared, unfinished and older data, and a planned run."""
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


def test_data_are_listed_with_their_state_and_runs(
    data_home: Path, prepared: PreparedDataset
) -> None:
    done = slm("data", "list", "--json", home=data_home)
    rows = {Path(row["folder"]).name: row for row in json.loads(done.stdout)["data"]}
    states = {name: row["state"] for name, row in rows.items()}
    name = prepared.folder.name
    assert states == {
        name: "prepared",
        "unfinished-0": "unfinished",
        "older-0": "of another version",
    }
    assert rows[name]["runs"] == [run_of(data_home).name]
    assert rows[name]["train"]["tokens"] == prepared.train_rows * 128
    assert rows[name]["bytes"] > 2 * prepared.train_rows * 129
    assert name in slm("data", "list", home=data_home).stdout


def test_show_gives_epochs_and_compression(
    data_home: Path, prepared: PreparedDataset, tmp_path: Path
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
    [row] = json.loads(slm(*arguments, "--json", home=data_home).stdout)["data"]
    assert [entry["epochs"] for entry in row["depths"]] == [
        pocket(depth).train_rows / prepared.train_rows for depth in (2, 9)
    ]
    reach = row["reach"]
    needs = [
        pocket(reach[key]).train_rows / prepared.train_rows for key in ("one_epoch", "at_most")
    ]
    assert needs[0] <= 1 < pocket(reach["one_epoch"] + 1).train_rows / prepared.train_rows
    assert needs[1] <= 4
    ratios = [entry["bytes_per_token"] for entry in row["compression"]]
    assert ratios[0] == ratios[1] > 1.5
    lines = slm(*arguments, home=data_home).stdout
    epochs = row["depths"][1]["epochs"]
    assert f"depth 9: {pocket(9).tokens / 1e6:.4g}M tokens, {epochs:.2f} epochs" in lines
    assert "relative tokens" in lines


def test_verify_finds_a_changed_row(data_home: Path, prepared: PreparedDataset) -> None:
    assert (
        slm("data", "verify", home=data_home).stdout
        == f"{data_home / 'data' / prepared.folder.name}: unchanged\n"
    )
    path = data_home / "data" / prepared.folder.name / "train-00000.bin"
    with path.open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"\x01\x00\x01")
    done = slm("data", "verify", "python", "--json", home=data_home)
    assert done.returncode == 1
    assert "train-00000.bin was changed" in json.loads(done.stdout)["problems"][str(path.parent)]


def test_data_are_removed_unless_a_running_run_reads_them(
    data_home: Path, prepared: PreparedDataset
) -> None:
    name, run = prepared.folder.name, run_of(data_home)
    refused = slm("data", "remove", name, home=data_home)
    assert refused.returncode == 2
    assert "1 runs read it" in refused.stderr
    assert "use --yes" in refused.stderr
    with hold_lock(run / "lock"):
        held = slm("data", "remove", name, "--yes", home=data_home)
    assert held.returncode == 2
    assert f"run {run.name} reads it" in held.stderr
    with hold_lock(data_home / "data" / name / "lock"):
        assert (
            "is being prepared by process"
            in slm("data", "remove", name, "--yes", home=data_home).stderr
        )
    assert (data_home / "data" / name / "manifest.json").exists()
    assert slm("data", "remove", name, "--yes", home=data_home).stdout.startswith("freed ")
    assert sorted(path.name for path in (data_home / "data").iterdir()) == [
        "older-0",
        "unfinished-0",
    ]
    missing = slm("data", "show", "python", home=data_home)
    assert (
        missing.stderr
        == f"slm: no data of 'python' in {data_home / 'data'}; there is older-0, unfinished-0\n"
    )


def test_a_sweep_reports_rows_that_are_read_more_than_once(tmp_path: Path) -> None:
    folder, draw = tmp_path / "words", random.Random(0)
    folder.mkdir()
    for number in range(150):
        text = " ".join(draw.choice(WORDS) for _ in range(4000))
        (folder / f"{number}.md").write_text(text)
    rows = prepare(str(folder), pocket(2), tmp_path / "home").train_rows
    hp = pocket(3, ratio=2.5 * rows * 128 / pocket(3).parameters.scaling)
    ratio = f"{hp.tokens / hp.parameters.scaling:g}"
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
        f"1 of them read rows of {folder} more than once, up to {hp.train_rows / rows:.2f} epochs"
        in done.stdout
    )


def test_a_sweep_uses_a_given_tokeniser(tmp_path: Path, prepared: PreparedDataset) -> None:
    shutil.copy(prepared.folder / "tokenizer.json", tmp_path / "given.json")
    home, texts = tmp_path / "home", tmp_path / "texts"
    texts.mkdir()
    for number, path in enumerate(sorted((ROOT / "slm").rglob("*.py"))):
        (texts / f"{number}.txt").write_text(path.read_text())
    option = ("--tokenizer", str(tmp_path / "given.json"))
    made = slm("data", "prepare", str(texts), "--recipe", "pocket", *option, home=home)
    assert made.returncode == 0, made.stderr
    sweep = ("sweep", "--depths", "2", "--recipe", "pocket", "--steps", "2", "--data", str(texts))
    done = slm(*sweep, *option, "--dry-run", "--json", home=home)
    [run] = json.loads(done.stdout)["runs"]
    assert run["run_id"] is not None
    other = slm(*sweep, "--dry-run", "--json", home=home)
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
