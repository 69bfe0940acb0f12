"""The command line in separate processes: a sweep to its fit, and one line for every error."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import slm as package
from slm.experiment import Experiment
from slm.files import read_json, write_json
from slm.recipe import pocket
from tests import forked
from tests.commands import slm
from tests.homes import home_of

LADDER = (
    "sweep",
    "--recipe",
    "pocket",
    "--depths",
    "2-4",
    "--ratios",
    "0.5",
    "--name",
    "ladder",
    "--json",
)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, prepared) -> tuple[Path, dict]:
    """Sweep a ladder of short runs. Return the home and the document that the sweep printed."""
    home = tmp_path_factory.mktemp("swept")
    (home / "data").symlink_to(prepared.folder.parent)
    result = forked.slm(*LADDER, home=home)
    assert result.returncode == 0, result.stderr
    return home, json.loads(result.stdout)


def rows(home: Path, sql: str) -> list[dict]:
    result = slm("query", sql, "--format", "json", home=home)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_a_repeated_sweep_trains_nothing_and_says_so(swept) -> None:
    home, first = swept
    assert len(first["trained"]) == 3
    again = slm(*LADDER, home=home)
    assert again.returncode == 0
    document = json.loads(again.stdout)
    assert document["trained"] == []
    assert document["already_done"] == first["trained"]
    assert document["runs"] == first["runs"]
    result = slm(*LADDER[:-1], home=home)
    assert "nothing to train: all 3 runs were already done" in result.stdout


def test_results_hold_every_run_cheapest_first(swept) -> None:
    home, document = swept
    results = rows(home, "select run_id, depth, flops, val_bpb, status from results order by flops")
    assert [row["run_id"] for row in results] == document["trained"]
    assert [row["depth"] for row in results] == [2, 3, 4]
    assert [row["val_bpb"] for row in results] == [run["val_bpb"] for run in document["runs"]]
    assert {row["status"] for row in results} == {"finished"}


def test_a_deleted_database_comes_back_with_the_same_rows(swept) -> None:
    home, _ = swept
    tables = ("results", "curves", "experiments")
    before = {table: sorted(map(str, rows(home, f"select * from {table}"))) for table in tables}
    for path in home.glob("*.duckdb*"):
        path.unlink()
    result = slm("store", "rebuild", home=home)
    assert result.returncode == 0, result.stderr
    assert {
        table: sorted(map(str, rows(home, f"select * from {table}"))) for table in tables
    } == before


def test_status_and_show_print_the_result_of_a_run(swept) -> None:
    home, document = swept
    status = slm("status", "ladder", "--json", home=home)
    assert [run["status"] for run in json.loads(status.stdout)["runs"]] == ["finished"] * 3
    run = document["runs"][0]
    result = slm("show", run["run_id"][:6], home=home)
    assert result.returncode == 0
    assert f"val_bpb {run['val_bpb']:.4f}" in result.stdout


def test_fit_curves_draws_and_records_a_fit(swept) -> None:
    home, _ = swept
    result = slm("fit-curves", "ladder", "--json", home=home)
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    png, svg, *residuals = (Path(path) for path in document["figures"])
    assert png.read_bytes().startswith(b"\x89PNG")
    assert svg.read_text().lstrip().startswith("<?xml")
    assert [path.name for path in residuals] == ["ladder-residuals.png", "ladder-residuals.svg"]
    assert document["points"]["n"] == 3
    assert [row["hash"] for row in rows(home, "select hash from fits")] == [document["hash"]]


def test_smoke_runs_are_left_out_of_a_fit(tmp_path: Path) -> None:
    home_of(tmp_path, Experiment("smoke", (pocket,), (2,), steps=2))
    home_of(tmp_path, Experiment("ladder", (pocket,), (2, 3, 4)))
    path = tmp_path / "experiments" / "ladder.json"
    ladder = read_json(path)
    smoke = read_json(tmp_path / "experiments" / "smoke.json")
    write_json(path, ladder | {"runs": [*ladder["runs"], *smoke["runs"]]})
    document = json.loads(slm("fit-curves", "ladder", "--json", home=tmp_path).stdout)
    assert document["points"]["n"] == 3
    assert document["points"]["excluded"] == [
        {"run_id": smoke["runs"][0], "reason": "steps=2 is not compute-optimal"}
    ]


def test_a_csv_of_runs_is_fitted_without_a_store(tmp_path: Path, reference: Path) -> None:
    published = reference / "data/scaling/nanochat_isoflop/points_2026-01-26.csv"
    columns = "params=params_effective,budget=flops_budget,loss=val_bpb,flops=flops_budget"
    arguments = (
        "--from",
        str(published),
        "--map",
        columns,
        "--form",
        "power",
        "--figure",
        str(tmp_path / "drawn"),
        "--json",
    )
    result = slm("fit-curves", *arguments, home=tmp_path / "none")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["points"]["n"] == 28
    assert document["isoflop"]["params_exponent"]["estimate"] == pytest.approx(0.54, abs=0.01)
    assert (tmp_path / "drawn.svg").exists()
    assert not (tmp_path / "none").exists()


def test_a_dry_run_needs_no_torch_and_trains_nothing(home: Path) -> None:
    program = (
        "import sys\n"
        "sys.argv = 'slm sweep --recipe pocket --depths 2-4 --dry-run --json'.split()\n"
        "from slm.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert 'torch' not in sys.modules"
    )
    env = {**os.environ, "SLM_HOME": str(home)}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=env, check=False
    )
    assert result.returncode == 0, result.stderr
    runs = json.loads(result.stdout)["runs"]
    assert [run["depth"] for run in runs] == [2, 3, 4]
    assert {run["state"] for run in runs} == {"planned"}
    assert sorted(path.name for path in home.iterdir()) == ["data"]


def test_a_declared_experiment_is_planned_from_its_file(home: Path) -> None:
    for path in sorted((Path(__file__).parents[2] / "experiments").glob("*.py")):
        result = slm("sweep", str(path), "--dry-run", "--json", home=home)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["experiment"] == path.stem


def test_a_plan_for_absent_gpus_has_times_costs_and_a_schedule(tmp_path: Path) -> None:
    arguments = ("sweep", "--depths", "10-12", "--gpus", "8", "--price", "24/h", "--dry-run")
    document = json.loads(slm(*arguments, "--json", home=tmp_path).stdout)
    assert [run["device"] for run in document["runs"]] == ["H100"] * 3
    assert document["cost"] == pytest.approx(24 * document["seconds"] / 3600)
    assert document["cost"] >= sum(run["cost"] for run in document["runs"])
    assert max(run["start"] + run["seconds"] for run in document["runs"]) == pytest.approx(
        document["seconds"]
    )
    output = slm(*arguments, home=tmp_path).stdout
    assert all(f"\n{gpu} |" in output for gpu in range(8))


def test_size_has_the_published_counts_as_json() -> None:
    result = slm("size", "--recipe", "nanochat", "--depths", "12,24", "--json")
    models = json.loads(result.stdout)["models"]
    assert [model["parameters_total"] for model in models] == [286_261_730, 1_384_122_122]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("sweep", "--recipe", "nonesuch", "--depths", "2"), "nonesuch"),
        (("sweep", "--depths", "6-2"), "6-2"),
        (("sweep", "--depths", "banana"), "banana"),
        (("sweep", "--depths", "0"), "depth 0"),
        (("sweep",), "--depths"),
        (("sweep", "--depths", "2", "--flops", "1e12,many"), "many"),
        (("sweep", "--depths", "2", "--flops", "1e12", "--steps", "5"), "flops and steps"),
        (("sweep", "--depths", "2", "--steps", "0"), "steps 0"),
        (("sweep", "--depths", "2", "--steps", "9" * 400), "steps 999"),
        (("sweep", "--depths", "2", "--ratios", "1e305"), "ratio 1e+305"),
        (("sweep", "--depths", "2", "--flops", "1e-320"), "less than one step"),
        (("sweep", "--depths", "2", "--flops", ""), "--flops"),
        (("sweep", "--depths", "2", "--seeds", "none"), "seeds"),
        (("sweep", "--depths", "2", "--name", "../up"), "../up"),
        (("sweep", "--depths", "2", "--data", "nowhere"), "nowhere"),
        (("sweep", "--recipe", "pocket", "--depths", "20"), "epochs"),
        (
            (
                "sweep",
                "nothing.py",
            ),
            "nothing.py",
        ),
        (("sweep", "--depths", "2", "--gpus", "999"), "999"),
        (("sweep", "--depths", "2", "--gpus", "1", "--cores", "1"), "choose one"),
        (("sweep", "--depths", "2", "--cores-per-run", "0"), "--cores-per-run 0"),
        (("sweep", "--depths", "2", "--price", "much"), "much"),
        (("sweep", "--depths", "2", "--partition", "day"), "--launcher slurm"),
        (("sweep", "--depths", "2", "--launcher", "slurm", "--cores", "2"), "--cores-per-node"),
        (("sweep", "--depths", "2", "--launcher", "moon"), "moon"),
        (("size", "--recipe", "nonesuch"), "nonesuch"),
        (("fit-curves", "--from", "nothing.csv"), "nothing.csv"),
        (("fit-curves", "--map", "loss=x"), "--map"),
        (("show", "123456"), "123456"),
        (("nonsense",), "nonsense"),
    ],
)
def test_bad_input_is_one_line_that_names_it(
    home: Path, arguments: tuple[str, ...], named: str
) -> None:
    if arguments[:1] == ("sweep",) and "--recipe" not in arguments and len(arguments) > 2:
        arguments = (*arguments, "--recipe", "pocket")
    result = slm(*arguments, home=home)
    assert result.returncode == 2, result.stderr
    [line] = result.stderr.strip().splitlines()
    assert named in line
    assert result.stdout == ""
    assert not list(home.glob("*/plan.json"))


def test_an_empty_corpus_is_one_line(home: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = slm(
        "sweep", "--recipe", "pocket", "--depths", "1", "--data", str(tmp_path / "empty"), home=home
    )
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)


def test_a_full_disk_is_one_line_and_leaves_no_partial_files(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip("mounting a small disk needs rights that this user does not have")
    try:
        result = slm("data", "prepare", "--recipe", "pocket", home=disk)
        assert result.returncode == 1
        assert "the disk is full" in result.stderr.splitlines()[-1]
        assert list((disk / "data").iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_an_unreadable_store_names_the_command_that_rebuilds_it(swept, tmp_path: Path) -> None:
    home = tmp_path / "damaged"
    shutil.copytree(swept[0], home, symlinks=True)
    for path in home.glob("*.duckdb"):
        path.write_bytes(b"not a database" * 1000)
    result = slm("query", "select 1", home=home)
    assert result.returncode in (1, 2)
    [line] = result.stderr.strip().splitlines()
    assert "slm store rebuild" in line
    assert slm("store", "rebuild", home=home).returncode == 0
    assert slm("query", "select 1", home=home).returncode == 0


def test_a_second_sweep_of_a_home_names_the_first_and_starts_after_it(home: Path) -> None:
    holding = (
        "import sys; from pathlib import Path; from slm.sweep.orchestrator import sweep_lock\n"
        f"with sweep_lock(Path({str(home)!r})):\n    print('held', flush=True); sys.stdin.read()"
    )
    command = [
        sys.executable,
        "-m",
        "slm",
        "sweep",
        "--recipe",
        "pocket",
        "--depths",
        "1",
        "--steps",
        "2",
        "--json",
    ]
    with subprocess.Popen(
        [sys.executable, "-c", holding], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"held\n"
        with subprocess.Popen(
            command,
            env={**os.environ, "SLM_HOME": str(home)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as second:
            assert second.stderr is not None
            assert any(f"being swept by process {first.pid}" in line for line in second.stderr)
            assert not list(home.glob("*/attempts"))
            first.communicate()
            output, _ = second.communicate(timeout=300)
    assert second.returncode == 0
    assert len(json.loads(output)["trained"]) == 1


def test_version_help_and_completion() -> None:
    assert slm("--version").stdout.strip() == f"slm {package.__version__}"
    help_text = slm("--help").stdout
    assert all(
        name in help_text for name in ("sweep", "fit-curves", "status", "--install-completion")
    )
