"""`slm fit-curves`, `compare` and `next` on a home of finished runs with known losses."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slm.cli import main
from slm.experiment import Experiment
from slm.recipe import pocket
from tests.drawing import empty_figures
from tests.homes import home_of, surface

DEPTHS = (2, 3, 4, 5, 6)
FAST = replace(pocket, name="fast", matrix_lr=5 * pocket.matrix_lr)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a home: a ladder with two seeds, a grid, a worse recipe, the ladder by other code."""
    home = tmp_path_factory.mktemp("swept")
    home_of(home, Experiment("ladder", (pocket,), DEPTHS, seeds=(0, 1)))
    home_of(home, Experiment("again", (pocket,), DEPTHS, seeds=(2, 3)))
    home_of(home, Experiment("grid", (pocket,), DEPTHS, flops=(3e11, 1e12)))
    home_of(home, Experiment("fast", (FAST,), DEPTHS, seeds=(0, 1)), lambda hp: 1.03 * surface(hp))
    home_of(
        home,
        Experiment("newer", (pocket,), DEPTHS, seeds=(0, 1)),
        lambda hp: 0.97 * surface(hp),
        code="beef2",
    )
    return home


def slm(home: Path, *arguments: str, drawn: bool = False) -> tuple[int, str, str]:
    """Run the command line in this process; return exit code, standard output and error.

    Figures are empty unless `drawn`.
    """
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setenv("SLM_HOME", str(home))
        patch.setattr(sys, "argv", ["slm", *arguments])
        with nullcontext() if drawn else empty_figures(), pytest.raises(SystemExit) as ended:
            main()
    printed = out.buffer
    assert isinstance(printed, io.BytesIO)
    return int(ended.value.code or 0), printed.getvalue().decode(), err.getvalue()


def document(home: Path, *arguments: str, drawn: bool = False) -> dict[str, Any]:
    code, out, err = slm(home, *arguments, "--json", drawn=drawn)
    assert code == 0, err
    return json.loads(out)


def refusal(home: Path, *arguments: str) -> str:
    code, out, err = slm(home, *arguments)
    assert (code, out) == (2, "")
    [line] = err.splitlines()
    return line


def test_a_depth_is_predicted_by_the_recipe_and_the_law(swept: Path) -> None:
    result = document(swept, "fit-curves", "ladder", "--depth", "7,20", "--at", "2e13")
    close, distant, optimum = sorted(
        result["predictions"], key=lambda row: (row["depth"] is None, row["depth"])
    )
    assert (close["flops"], close["tokens"]) == (pocket(7).flops, pocket(7).tokens)
    assert close["loss"]["low"] < surface(pocket(7)) < close["loss"]["high"]
    assert distant["beyond_validated"]
    assert optimum["flops"] == 2e13


def test_several_experiments_are_one_fit(swept: Path) -> None:
    result = document(swept, "fit-curves", "ladder", "grid", "--form", "additive")
    assert result["points"]["n"] == 20
    assert result["experiments"] == ["ladder", "grid"]
    assert result["parametric"]["form"] == result["selected"]["surface"] == "additive"
    assert [row["form"] for row in result["parametric"]["alternatives"]] == ["additive", "coupled"]
    assert (
        result["parametric"]["params_exponent"]["low"]
        < 0.5
        < result["parametric"]["params_exponent"]["high"]
    )


def test_params_and_metric_are_chosen_and_recorded(swept: Path) -> None:
    plain = document(swept, "fit-curves", "grid")
    changed = document(
        swept, "fit-curves", "grid", "--params", "total", "--metric", "loss", "--paper"
    )
    assert (plain["points"]["convention"], changed["points"]["convention"]) == (
        "matrices+head",
        "total",
    )
    assert (plain["points"]["metric"], changed["points"]["metric"]) == ("val_bpb", "loss")
    assert (changed["parametric"]["delta"], changed["parametric"]["form"]) == (1e-3, "additive")
    first, second = (row["isoflop"]["optima"][0] for row in (plain, changed))
    assert second["params"] > first["params"]
    assert second["loss"] == pytest.approx(1.7 * first["loss"], rel=0.01)


def test_a_predicted_depth_has_the_ratio_of_its_ladder(tmp_path: Path) -> None:
    home_of(tmp_path, Experiment("short", (pocket,), DEPTHS, ratios=(4,)))
    (prediction,) = document(tmp_path, "fit-curves", "short", "--depth", "7")["predictions"]
    assert prediction["tokens"] == pocket(7, ratio=4).tokens
    home_of(tmp_path, Experiment("short", (pocket,), DEPTHS, ratios=(4, 8)))
    assert "ratio=4, ratio=8" in refusal(tmp_path, "fit-curves", "short")


def test_a_design_has_a_bounded_number_of_runs(swept: Path) -> None:
    result = document(
        swept, "next", "ladder", "--target", "loss@d8", "--budget", "1e30", "--depths", "2,3"
    )
    assert 0 < len(result["picks"]) <= 24


def test_times_that_cannot_be_compared_are_a_warning(tmp_path: Path) -> None:
    """One depth gives no slope in time: FLOPs are compared, and a warning gives the reason."""
    lines = ["recipe,depth,flops,loss,seed,seconds"]
    lines += [
        f"{name},4,1e12,{loss},{seed},{seconds}"
        for name, seconds in (("a", 10), ("b", 13))
        for seed, loss in enumerate((2.0, 2.01))
    ]
    (tmp_path / "runs.csv").write_text("\n".join(lines))
    result = document(
        tmp_path, "compare", "--from", str(tmp_path / "runs.csv"), "--figure", str(tmp_path / "x")
    )
    assert result["wall_clock"] is None
    assert "times_not_compared" in {row["code"] for row in result["warnings"]}


def test_two_ladders_of_one_recipe_do_not_differ(swept: Path) -> None:
    result = document(swept, "compare", "ladder", "again")
    assert result["verdict"]["code"] in ("cannot_tell", "equal")
    assert result["compute_multiplier"]["low"] < 1 < result["compute_multiplier"]["high"]


def test_a_worse_recipe_is_worse_at_every_depth(swept: Path) -> None:
    result = document(swept, "compare", "pocket/c0de1", "fast")
    assert result["verdict"]["code"] == "worse_every_depth"
    assert [row["depth"] for row in result["per_depth"]] == list(DEPTHS)
    assert result["compute_multiplier"]["high"] < 1
    assert result["wall_clock"]["compute_multiplier"]["high"] < 1
    assert result["experiments"] == ["again", "fast", "ladder"]


def test_two_versions_of_the_code_are_compared_like_recipes(swept: Path) -> None:
    result = document(swept, "compare", "ladder/c0de1", "newer")
    assert result["verdict"]["code"] == "better_every_depth"
    assert result["compute_multiplier"]["low"] > 1
    assert "2 versions of the trainer's code" in refusal(swept, "compare", "pocket", "fast")


def test_markdown_has_two_rows_per_depth_mfu_and_commit(swept: Path) -> None:
    _, text, _ = slm(swept, "compare", "ladder", "fast", "--markdown")
    assert text.startswith("**fast is worse than ladder at every depth")
    assert len(re.findall(r"^\| d\d ", text, re.MULTILINE)) == 2 * len(DEPTHS)
    assert f"{1e10 / (2 * 989e12):.1%}" in text  # MFU of 1e10 FLOPs a second on two H100
    assert "commit abc" in text


def test_recipes_of_a_file_are_compared_in_order_and_not_recorded(tmp_path: Path) -> None:
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
    result = document(tmp_path / "none", "compare", *file, drawn=True)
    assert (result["base"]["name"], result["candidate"]["name"]) == ("old", "new")
    assert result["verdict"]["code"] == "better_every_depth"
    assert result["wall_clock"] is None
    assert (tmp_path / "drawn.svg").exists()
    assert not (tmp_path / "none").exists()


def test_reach_gives_flops_depth_hours_and_price(tmp_path: Path) -> None:
    home_of(
        tmp_path,
        Experiment("cored", (pocket,), DEPTHS),
        core=lambda hp: 0.6 - 0.22 * surface(hp),
    )
    result = document(
        tmp_path, "fit-curves", "cored", "--metric", "core", "--reach", "0.35", "--price", "24"
    )
    (reached,) = result["reach"]
    assert reached["low"] < reached["estimate"] < reached["high"]
    assert reached["hours"]["estimate"] == pytest.approx(reached["estimate"] / 1e10 / 3600)
    assert reached["price"]["low"] == pytest.approx(24 * reached["hours"]["low"])
    nearest = min(
        range(1, 40), key=lambda depth: abs(math.log(pocket(depth).flops / reached["estimate"]))
    )
    assert reached["depth"]["estimate"] == nearest
    assert [Path(path).stem for path in result["figures"]][-1] == "cored-core"


def test_fits_comparisons_and_designs_are_in_the_store(swept: Path) -> None:
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


def test_the_sweeps_of_a_design_plan_its_picks_within_the_budget(swept: Path) -> None:
    result = document(swept, "next", "ladder", "--target", "loss@d8", "--budget", "1e13")
    assert result["flops"] <= 1e13
    assert result["sd"]["after"] < result["sd"]["evenly_spaced"] < result["sd"]["before"]
    picked = {(pick["depth"], pick["horizon"]) for pick in result["picks"]}
    assert len(result["sweeps"]) <= len(picked)
    planned = [document(swept, *line.split()[1:], "--dry-run") for line in result["sweeps"]]
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
            "recipe: pocket (10 runs) against fast (10 runs); name one",
        ),
        (("fit-curves", "ladder", "--metric", "core"), "core"),
        (("fit-curves", "nonesuch"), "nonesuch"),
        (("fit-curves", "grid", "--price", "2"), "price 2"),
        (("fit-curves", "grid", "--depth", ""), "--depth"),
        (("fit-curves", "ladder", "--reach", "2"), "2"),
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
def test_a_refusal_is_one_line_that_names_the_value(
    swept: Path, arguments: tuple[str, ...], named: str
) -> None:
    assert named in refusal(swept, *arguments)
