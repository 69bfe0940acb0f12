"""Runs that are not one axis are refused by what differs, or taken as one under a label; what rows lack is said."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest

from slm import selection
from slm.experiment import Experiment
from slm.figures import draw_comparison, draw_fit
from slm.fits import Candidate, Goal, NotComparable, Point, Trial, fit_curves, next_runs, summary
from slm.fits.checks.diagnostics import lack_of_fit
from slm.fits.checks.sensitivity import law_residuals
from slm.fits.compare.comparison import compare
from slm.fits.ladder import columns_of
from slm.fits.points import differences, parts_of
from slm.fits.power_law import seed_noise
from slm.recipe import pocket
from tests.cli.test_fit_curves import document, refusal, slm
from tests.figures.test_figures import words
from tests.homes import home_of, surface

HERE = "data=python validation=1a2b3c4d5e6f7081 tokenizer=aa context=1024"
THERE = "data=docs validation=3c4d5e6f70811a2b tokenizer=aa context=1024"
IMPORT = "import=0123456789ab context=2048"
FLOPS = np.geomspace(1e12, 1e15, 8).tolist()
DEPTHS = (2, 3, 4, 5, 6)


def ladder(key: str = HERE, name: str = "a", size: float = 1e5) -> list[Point]:
    """Eight runs of one law, noise of the run's own; `size` NaN is of runs whose parameters nobody wrote down."""
    return [
        Point(
            f"{name}{k}",
            "pocket",
            k + 2,
            size * 2**k,
            2e6 * 2**k,
            c,
            0.7 + 50 * c**-0.15,
            0,
            None,
            key,
        )
        for k, c in enumerate(FLOPS)
    ]


def grid(key: str = HERE) -> list[Point]:
    """Seven sizes at each of three budgets."""
    sizes = np.geomspace(1e5, 1e6, 7)
    return [
        Point(
            f"g{c:g}-{k}",
            "pocket",
            k + 2,
            n,
            c / 6 / n,
            c,
            1 + n**-0.3 + (c / 6 / n) ** -0.3,
            0,
            c,
            key,
        )
        for c in (1e13, 3e13, 1e14)
        for k, n in enumerate(sizes.tolist())
    ]


def trials(key: str, name: str, factor: float = 1.0) -> list[Trial]:
    return [
        Trial(f"{name}{k}", k + 2, 0, c, factor * (0.7 + 50 * c**-0.15), comparison_key=key)
        for k, c in enumerate(FLOPS)
    ]


def test_what_differs_is_named_part_by_part_with_the_runs_of_each() -> None:
    told = differences([parts_of(key) for key in (HERE, HERE, THERE)])
    assert (
        told
        == "data: python (2 runs) against docs (1 run); validation: 1a2b3c4d… (2 runs) against 3c4d5e6f… (1 run)"
    )


def test_an_import_against_runs_is_its_origin_and_what_both_say_differently() -> None:
    """What the import does not know, its data and tokeniser, is not told to be different."""
    told = differences([parts_of(key) for key in (HERE, IMPORT)])
    assert (
        told
        == "context: 1024 (1 run) against 2048 (1 run); import: none (1 run) against 01234567… (1 run)"
    )


def test_fingerprints_that_begin_alike_are_told_in_full() -> None:
    assert "0123456789ab (1 run) against 0123456789ac" in differences(
        [{"a": "0123456789ab"}, {"a": "0123456789ac"}]
    )


def test_keys_that_differ_are_never_one_axis() -> None:
    """Order of the parts apart: neither a blank, nor a name twice, nor a part without a name hides a difference."""
    keys = ("a=1 b=2", "a=1", "a=1 b=3", "a=1 a=2", "a=2", "x", "x y", "y", "a=1=2", "key=x y=")
    for k, key in enumerate(keys):
        assert [bool(differences([parts_of(key), parts_of(other)])) for other in keys] == [
            j != k for j in range(10)
        ]
    assert not differences([parts_of("a=1 b=2"), parts_of("b=2 a=1")])


def test_a_refusal_says_the_way_out() -> None:
    with pytest.raises(
        NotComparable,
        match=r"data: python \(8 runs\) against docs .* one experiment .*--allow-mixed",
    ):
        fit_curves([*ladder(), *ladder(THERE, "b")])


def test_a_mixed_fit_says_so_wherever_it_is_read(tmp_path: Path) -> None:
    points = [
        replace(own, core=max(0.0, 0.8 - 0.5 * own.loss)) for own in [*ladder(), *grid(THERE)]
    ]
    fit = fit_curves(points, allow_mixed=True)
    assert summary(fit).startswith("Mixed axes")
    first = fit.document()["warnings"][0]
    assert first["code"] == "mixed-axes"
    assert "data: python (8 runs) against docs (21 runs)" in first["message"]
    assert [parts_of(own)["data"] for own in fit.document()["mixed"]] == ["docs", "python"]
    assert fit.document()["points"]["comparison_key"] is None
    drawn = draw_fit(fit, tmp_path / "fit")[1::2]
    assert [path.stem for path in drawn] == ["fit", "fit-frontier", "fit-residuals", "fit-core"]
    assert all("(mixed axes)" in words(path) for path in drawn)


def test_a_fit_of_one_axis_says_nothing_of_mixing_though_it_was_allowed(tmp_path: Path) -> None:
    fit = fit_curves(ladder(), allow_mixed=True)
    assert fit.document() == fit_curves(ladder()).document()
    assert fit.document()["mixed"] == []
    assert "mixed" not in words(draw_fit(fit, tmp_path / "fit")[1]).lower()


def test_a_mixed_comparison_says_so_in_its_verdict_and_its_figure(tmp_path: Path) -> None:
    sides = trials(HERE, "b"), trials(THERE, "c", 0.97)
    with pytest.raises(NotComparable, match=r"validation: 1a2b3c4d… .8 runs"):
        compare(*sides, ("old", "new"))
    found = compare(*sides, ("old", "new"), allow_mixed=True)
    assert found.document()["warnings"][0]["code"] == "mixed-axes"
    assert found.document()["verdict"]["sentence"].startswith("Mixed axes: new")
    assert found.document()["mixed"] == sorted(found.mixed) != []
    assert "Mixed axes" in words(draw_comparison(found, tmp_path / "c")[1])


def test_a_design_on_mixed_runs_says_so() -> None:
    candidates = [Candidate(20, 1e8, 1e9, 1e15, "compute-optimal")]
    points = [*ladder(), *grid(THERE)]
    with pytest.raises(NotComparable):
        next_runs(points, candidates, Goal("loss", candidates[0]), 1e15)
    design = next_runs(points, candidates, Goal("loss", candidates[0]), 1e15, allow_mixed=True)
    assert len(design.document()["mixed"]) == 2
    assert design.document()["warnings"][0]["code"] == "mixed-axes"


def test_the_law_of_compute_takes_neither_params_nor_tokens() -> None:
    """As many values as the same runs with their sizes have, and the same."""
    sized, unsized = (
        fit_curves(ladder(), form="power"),
        fit_curves(ladder(size=math.nan), form="power"),
    )
    same = ("power_law", "rival", "selected", "validation")
    assert {name: sized.document()[name] for name in same} == {
        name: unsized.document()[name] for name in same
    }
    auto = fit_curves(ladder(size=math.nan))
    assert auto.document()["power_law"] == sized.document()["power_law"]
    assert "no_params" in {own.code for own in auto.warnings}
    assert json.loads(json.dumps(auto.document(), allow_nan=False)) == auto.document()


def test_runs_of_unknown_size_are_replicates_where_depth_and_compute_agree() -> None:
    """Not all of them together, though none has a size."""
    runs = [
        replace(own, run_id=f"{own.run_id}{seed}", seed=seed, loss=own.loss * (1 + 1e-3 * seed))
        for own in ladder(size=math.nan)
        for seed in (0, 1)
    ]
    noise = seed_noise(runs)
    assert noise is not None
    assert noise.sigma == pytest.approx(1e-3 / math.sqrt(2), rel=0.01)
    law = fit_curves(runs).law
    assert law is not None
    residuals, jacobian = law_residuals(law, *columns_of(runs))
    test = lack_of_fit(runs, residuals, len(jacobian))
    assert test is not None
    assert test.noise == pytest.approx(noise.sigma)


def test_beside_valleys_runs_of_unknown_size_are_left_out_and_named() -> None:
    unknown = [replace(own, tokens=math.nan) for own in ladder(name="u")]
    fit = fit_curves([*grid(), *unknown], other_counts={"total": [1.5e5] * 29})
    assert fit.document()["points"]["n"] == 21
    excluded = [own for own in fit.document()["points"]["excluded"] if own["reason"] == "no params"]
    assert [own["run_id"] for own in excluded] == [own.run_id for own in unknown]
    assert fit.document()["isoflop"] == fit_curves(grid()).document()["isoflop"]
    assert "no_params" in {own.code for own in fit.warnings}
    with pytest.raises(ValueError, match="21 runs at FLOPs budgets have no params"):
        fit_curves([replace(own, params=math.nan) for own in grid()])


# Rows of imports: the columns of the view `results` that fits read.


def imported(**columns: Any) -> pandas.DataFrame:
    """An import of eight runs that says depth, FLOPs and loss alone."""
    losses = [own.loss for own in ladder()]
    rows = {
        "run_id": [f"x{k}" for k in range(8)],
        "recipe": "theirs",
        "depth": range(2, 10),
        "flops": FLOPS,
    }
    missing = (
        "seed",
        "parameters_scaling",
        "tokens",
        "core",
        "val_loss",
        "train_seconds",
        "flops_per_second",
    )
    rows |= dict.fromkeys(missing, math.nan) | dict.fromkeys(("horizon", "flags", "code", "label"))
    return pandas.DataFrame(
        rows | {"val_bpb": losses, "usable": True, "comparison_key": IMPORT} | columns
    )


def test_an_import_is_fitted_as_its_file_is(tmp_path: Path) -> None:
    usable, excluded = selection.usable_rows(imported(), ("flops", "val_bpb"))
    rows, beside = selection.ladder_rows(usable)
    assert excluded == beside == []
    fit = fit_curves(selection.to_points(rows)).document()
    table = imported(
        params=[own.params for own in ladder()], tokens=[own.tokens for own in ladder()]
    )
    table.to_csv(tmp_path / "theirs.csv", index=False)
    command = (
        "fit-curves",
        "--from",
        str(tmp_path / "theirs.csv"),
        "--map",
        "loss=val_bpb,run=run_id",
    )
    other = document(tmp_path, *command, "--figure", str(tmp_path / "drawn"))
    assert (fit["power_law"], fit["validation"]) == (other["power_law"], other["validation"])


def test_a_run_that_a_flag_forbids_is_left_out_with_the_flag() -> None:
    flags = [None, "zero_loss,failed,recomputed", "recomputed,unlabelled-seed", *["recomputed"] * 5]
    usable, excluded = selection.usable_rows(
        imported(flags=flags, usable=[True, False, *[True] * 6]), ("val_bpb",)
    )
    assert excluded == [{"run_id": "x1", "reason": "flagged zero_loss,failed"}]
    assert selection.describe_excluded(excluded) == ["1 run, flagged zero_loss,failed: x1"]
    (warning,) = selection.flag_warnings(usable)
    assert warning["code"] == "flagged_runs"
    assert "1 of 7 runs" in warning["message"]
    assert "x2 (unlabelled-seed)" in warning["message"]
    assert selection.flag_warnings(imported()) == []


def test_a_run_without_a_number_that_is_needed_is_left_out_by_its_name() -> None:
    losses = [math.nan, *[1.0] * 7]
    flops = [1e12, math.nan, *FLOPS[2:]]
    usable, excluded = selection.usable_rows(
        imported(val_bpb=losses, flops=flops), ("flops", "val_bpb")
    )
    assert [(own["run_id"], own["reason"]) for own in excluded] == [
        ("x1", "no flops"),
        ("x0", "no val_bpb"),
    ]
    assert len(usable) == 6


def test_horizons_of_an_import_are_budgets_where_they_say_so_else_one_ladder() -> None:
    rows, excluded = selection.ladder_rows(
        imported(horizon=["flops=1e12", None, "compute-optimal", *[None] * 4, "steps=9"])
    )
    assert [own.budget for own in selection.to_points(rows)] == [1e12, *[None] * 6]
    assert [own["run_id"] for own in excluded] == ["x7"]


# The command line on a home of two validation sets.


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("mixed")
    home_of(home, Experiment("here", (pocket,), DEPTHS, seeds=(0, 1)))
    home_of(
        home,
        Experiment("there", (pocket,), DEPTHS),
        lambda given: 0.98 * surface(given),
        validation="other",
    )
    return home


@pytest.mark.parametrize(
    "command",
    [
        ("fit-curves", "here", "there"),
        ("compare", "here", "there"),
        ("next", "here", "there", "--target", "loss@d8", "--budget", "1e13"),
    ],
)
def test_a_command_refuses_in_one_line_or_labels_its_record(
    home: Path, command: tuple[str, ...]
) -> None:
    assert "validation: val (10 runs) against other (5 runs)" in refusal(home, *command)
    found = document(home, *command, "--allow-mixed")
    kept = json.loads((home / "fits" / f"{found['hash']}.json").read_text())
    assert kept["warnings"][0]["code"] == "mixed-axes"
    assert len(kept["mixed"]) == 2
    _, said, _ = slm(home, *command, "--allow-mixed")
    assert said.startswith("Mixed axes")
    assert "mixed-axes: 2 axes are taken as one" in said


def test_a_depth_of_mixed_families_is_refused(home: Path, tmp_path: Path) -> None:
    rows = ["params,tokens,flops,loss,recipe,depth"]
    rows += [
        f"{own.params},{own.tokens},{own.flops},{own.loss},r{own.depth % 2},{own.depth}"
        for own in ladder()
    ]
    (tmp_path / "two.csv").write_text("\n".join(rows))
    file = ("fit-curves", "--from", str(tmp_path / "two.csv"), "--figure", str(tmp_path / "x"))
    assert "recipe: r0 (4 runs) against r1 (4 runs)" in refusal(home, *file)
    assert "--depth 20: the runs are of recipes r0 and r1" in refusal(
        home, *file, "--allow-mixed", "--depth", "20"
    )
    assert document(home, *file, "--allow-mixed")["mixed"]


def test_a_column_of_a_file_is_its_key(home: Path, tmp_path: Path) -> None:
    rows = ["params,tokens,flops,loss,comparison_key,recipe,depth"]
    rows += [
        f"{own.params},{own.tokens},{own.flops},{own.loss},{key},{own.depth % 2},{own.depth // 2}"
        for own, key in zip(ladder(), (HERE, THERE) * 4)
    ]
    (tmp_path / "two.csv").write_text("\n".join(rows))
    for command in ("fit-curves", "compare"):
        said = refusal(
            home, command, "--from", str(tmp_path / "two.csv"), "--figure", str(tmp_path / "x")
        )
        assert re.search(r"data: python \(4 runs\) against docs \(4 runs\)", said)
