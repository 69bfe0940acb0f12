"""The commands about curves, on a home of finished runs whose losses are known."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slm.cli import main
from slm.experiment import Experiment
from slm.recipe import pocket
from tests.homes import home_of, surface

DEPTHS = (2, 3, 4, 5, 6)
FAST = replace(pocket, name="fast", matrix_lr=5 * pocket.matrix_lr)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ladder with two seeds, a grid, the ladder of a worse recipe, and the first ladder under another code."""
    home = tmp_path_factory.mktemp("swept")
    home_of(home, Experiment("ladder", (pocket,), DEPTHS, seeds=(0, 1)))
    home_of(home, Experiment("again", (pocket,), DEPTHS, seeds=(2, 3)))
    home_of(home, Experiment("grid", (pocket,), DEPTHS, flops=(3e11, 1e12), seeds=(0, 1)))
    home_of(
        home, Experiment("fast", (FAST,), DEPTHS, seeds=(0, 1)), lambda given: 1.03 * surface(given)
    )
    home_of(
        home,
        Experiment("newer", (pocket,), DEPTHS, seeds=(0, 1)),
        lambda given: 0.97 * surface(given),
        code="beef2",
    )
    return home


def slm(home: Path, *arguments: str) -> tuple[int, str, str]:
    """Run the command line in this process: exit code, standard output, standard error."""
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setenv("SLM_HOME", str(home))
        patch.setattr(sys, "argv", ["slm", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
    printed = out.buffer
    assert isinstance(printed, io.BytesIO)
    return int(ended.value.code or 0), printed.getvalue().decode(), err.getvalue()


def document(home: Path, *arguments: str) -> dict[str, Any]:
    code, out, err = slm(home, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def refusal(home: Path, *arguments: str) -> str:
    code, out, err = slm(home, *arguments)
    assert (code, out) == (2, "")
    [line] = err.splitlines()
    return line


def test_a_depth_is_predicted_by_the_recipe_and_the_law(swept: Path) -> None:
    found = document(swept, "fit-curves", "ladder", "--depth", "7,20", "--at", "2e13")
    near, far, optimum = sorted(
        found["predictions"], key=lambda own: (own["depth"] is None, own["depth"])
    )
    assert (near["flops"], near["tokens"]) == (pocket(7).flops, pocket(7).tokens)
    assert near["loss"]["low"] < surface(pocket(7)) < near["loss"]["high"]
    assert far["beyond_validated"]
    assert optimum["flops"] == 2e13


def test_experiments_are_fitted_together(swept: Path) -> None:
    found = document(swept, "fit-curves", "ladder", "grid", "--form", "additive")
    assert found["points"]["n"] == 30
    assert found["experiments"] == ["ladder", "grid"]
    assert found["parametric"]["form"] == found["selected"]["surface"] == "additive"
    assert [own["form"] for own in found["parametric"]["alternatives"]] == ["additive", "coupled"]
    assert (
        found["parametric"]["params_exponent"]["low"]
        < 0.5
        < found["parametric"]["params_exponent"]["high"]
    )


def test_what_n_counts_and_what_the_loss_is_are_chosen_and_said(swept: Path) -> None:
    plain = document(swept, "fit-curves", "grid")
    other = document(
        swept, "fit-curves", "grid", "--params", "total", "--metric", "loss", "--paper"
    )
    assert (plain["points"]["convention"], other["points"]["convention"]) == (
        "matrices+head",
        "total",
    )
    assert (plain["points"]["metric"], other["points"]["metric"]) == ("val_bpb", "loss")
    assert (other["parametric"]["delta"], other["parametric"]["form"]) == (1e-3, "additive")
    first, second = (own["isoflop"]["optima"][0] for own in (plain, other))
    assert second["params"] > first["params"]
    assert second["loss"] == pytest.approx(1.7 * first["loss"], rel=0.01)


def test_a_depth_of_a_ladder_at_a_ratio_has_that_ratio(tmp_path: Path) -> None:
    home_of(tmp_path, Experiment("short", (pocket,), DEPTHS, ratios=(4,)))
    (said,) = document(tmp_path, "fit-curves", "short", "--depth", "7")["predictions"]
    assert said["tokens"] == pocket(7, ratio=4).tokens
    home_of(tmp_path, Experiment("short", (pocket,), DEPTHS, ratios=(4, 8)))
    assert "ratio=4, ratio=8" in refusal(tmp_path, "fit-curves", "short")


def test_a_budget_beyond_all_measure_is_spent_on_few_runs(swept: Path) -> None:
    found = document(
        swept, "next", "ladder", "--target", "loss@d8", "--budget", "1e30", "--depths", "2,3"
    )
    assert 0 < len(found["picks"]) <= 24


def test_depths_that_took_other_times_are_compared_in_compute(tmp_path: Path) -> None:
    """One depth holds no slope of time: the answer in FLOPs stays, and a warning says why there is none in time."""
    lines = ["recipe,depth,flops,loss,seed,seconds"]
    lines += [
        f"{name},4,1e12,{loss},{seed},{seconds}"
        for name, seconds in (("a", 10), ("b", 13))
        for seed, loss in enumerate((2.0, 2.01))
    ]
    (tmp_path / "runs.csv").write_text("\n".join(lines))
    found = document(
        tmp_path, "compare", "--from", str(tmp_path / "runs.csv"), "--figure", str(tmp_path / "x")
    )
    assert found["wall_clock"] is None
    assert "times_not_compared" in {own["code"] for own in found["warnings"]}


def test_two_ladders_of_one_recipe_are_not_told_apart(swept: Path) -> None:
    found = document(swept, "compare", "ladder", "again")
    assert found["verdict"]["code"] in ("cannot_tell", "equal")
    assert found["compute_multiplier"]["low"] < 1 < found["compute_multiplier"]["high"]


def test_a_worse_recipe_is_worse_at_every_depth(swept: Path) -> None:
    found = document(swept, "compare", "pocket/c0de1", "fast")
    assert found["verdict"]["code"] == "worse_every_depth"
    assert [own["depth"] for own in found["per_depth"]] == list(DEPTHS)
    assert found["compute_multiplier"]["high"] < 1
    assert found["wall_clock"]["compute_multiplier"]["high"] < 1
    assert found["experiments"] == ["again", "fast", "ladder"]


def test_two_versions_of_the_code_are_compared_like_recipes(swept: Path) -> None:
    found = document(swept, "compare", "ladder/c0de1", "newer")
    assert found["verdict"]["code"] == "better_every_depth"
    assert found["compute_multiplier"]["low"] > 1
    assert "2 versions of the trainer's code" in refusal(swept, "compare", "pocket", "fast")


def test_a_comparison_is_the_table_of_a_pull_request(swept: Path) -> None:
    _, text, _ = slm(swept, "compare", "ladder", "fast", "--markdown")
    assert text.startswith("**fast is worse than ladder at every depth")
    assert len(re.findall(r"^\| d\d ", text, re.MULTILINE)) == 2 * len(DEPTHS)
    assert f"{1e10 / (2 * 989e12):.1%}" in text  # MFU of 1e10 FLOPs a second on two H100
    assert "commit abc" in text


def test_recipes_of_a_file_are_compared_base_first_and_leave_no_record(tmp_path: Path) -> None:
    lines = ["recipe,depth,flops,bpb,seed"]
    for recipe, factor in (("old", 1.0), ("new", 0.98)):
        for depth in DEPTHS:
            for seed in (0, 1):
                loss = factor * surface(pocket(depth)) * (1 + 1e-4 * (-1) ** (seed + depth))
                lines.append(f"{recipe},{depth},{pocket(depth).flops},{loss},{seed}")
    (tmp_path / "runs.csv").write_text("\n".join(lines))
    file = (
        "--from",
        str(tmp_path / "runs.csv"),
        "--map",
        "loss=bpb",
        "--figure",
        str(tmp_path / "drawn"),
    )
    found = document(tmp_path / "none", "compare", *file)
    assert (found["base"]["name"], found["candidate"]["name"]) == ("old", "new")
    assert found["verdict"]["code"] == "better_every_depth"
    assert found["wall_clock"] is None
    assert (tmp_path / "drawn.svg").exists()
    assert not (tmp_path / "none").exists()


def test_when_a_core_is_reached_is_told_in_flops_depth_hours_and_price(tmp_path: Path) -> None:
    home_of(
        tmp_path,
        Experiment("cored", (pocket,), DEPTHS),
        core=lambda given: 0.6 - 0.22 * surface(given),
    )
    found = document(
        tmp_path, "fit-curves", "cored", "--metric", "core", "--reach", "0.35", "--price", "24"
    )
    (reached,) = found["reach"]
    assert reached["low"] < reached["estimate"] < reached["high"]
    assert reached["hours"]["estimate"] == pytest.approx(reached["estimate"] / 1e10 / 3600)
    assert reached["price"]["low"] == pytest.approx(24 * reached["hours"]["low"])
    near = min(
        range(1, 40), key=lambda depth: abs(math.log(pocket(depth).flops / reached["estimate"]))
    )
    assert reached["depth"]["estimate"] == near
    assert [Path(path).stem for path in found["figures"]][-1] == "cored-core"


def test_fits_comparisons_and_designs_are_records_of_the_store(swept: Path) -> None:
    hashes = {
        kind: document(swept, *arguments)["hash"]
        for kind, arguments in {
            "fit-curves": ("fit-curves", "ladder", "--form", "power"),
            "compare": ("compare", "ladder", "again"),
            "next": ("next", "grid", "--target", "params_exponent", "--budget", "1e12"),
        }.items()
    }
    query = "select hash, json_extract_string(document, '$.kind') as kind from fits"
    rows = json.loads(slm(swept, "query", query, "--format", "json")[1])
    assert set(hashes.items()) <= {(row["kind"], row["hash"]) for row in rows}


def test_the_next_runs_are_sweeps_that_fit_the_budget(swept: Path) -> None:
    found = document(swept, "next", "ladder", "--target", "loss@d8", "--budget", "1e13")
    assert found["flops"] <= 1e13
    assert found["sd"]["after"] < found["sd"]["evenly_spaced"] < found["sd"]["before"]
    picked = {(pick["depth"], pick["horizon"]) for pick in found["picks"]}
    assert len(found["sweeps"]) <= len(picked)
    planned = [document(swept, *line.split()[1:], "--dry-run") for line in found["sweeps"]]
    assert {(run["depth"], run["horizon"]) for plan in planned for run in plan["runs"]} == picked


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("fit-curves", "grid", "--depth", "x"), "--depth x"),
        (("fit-curves", "grid", "--at", "-1"), "--at -1"),
        (("fit-curves", "grid", "--metric", "mfu"), "metric mfu"),
        (("fit-curves", "grid", "--params", "all"), "params all"),
        (("fit-curves", "grid", "--form", "cubic"), "cubic"),
        (("fit-curves", "ladder", "--form", "coupled"), "coupled"),
        (
            ("fit-curves", "grid", "fast"),
            "recipe: pocket (20 runs) against fast (10 runs); name one",
        ),
        (("fit-curves", "grid", "--metric", "core"), "core"),
        (("fit-curves", "nonesuch"), "nonesuch"),
        (("fit-curves", "grid", "--price", "2"), "price 2"),
        (("fit-curves", "grid", "--depth", ""), "--depth"),
        (("fit-curves", "grid", "--reach", "2"), "2"),
        (("compare", "ladder"), "two names"),
        (("compare", "ladder", "fast", "--markdown", "--json"), "choose one"),
        (("compare", "ladder", "ladder"), "share run"),
        (("compare", "ladder", "nonesuch"), "nonesuch"),
        (("compare", "ladder", "grid"), "grid"),
        (("compare", "--from", "none.csv"), "none.csv"),
        (("next", "ladder", "--budget", "1e13"), "--target"),
        (("next", "ladder", "--target", "loss@d8"), "--budget"),
        (("next", "ladder", "--target", "luck", "--budget", "1e13"), "luck"),
        (("next", "ladder", "--target", "loss@x", "--budget", "1e13"), "'x' is not a number"),
        (("next", "ladder", "--target", "loss@d8", "--budget", "1e3"), "1e+03"),
        (("next", "ladder", "--target", "loss@d8", "--budget", "1e12,2e12"), "1e12,2e12"),
        (("next", "ladder", "--target", "loss@1e300", "--budget", "1e13"), "loss@1e300"),
        (("next", "fast", "--target", "loss@d8", "--budget", "1e13"), "fast"),
    ],
)
def test_what_cannot_be_answered_is_one_line_that_names_it(
    swept: Path, arguments: tuple[str, ...], named: str
) -> None:
    assert named in refusal(swept, *arguments)
