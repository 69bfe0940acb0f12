"""Runs on several axes are refused with their differences, or combined with a warning."""

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
from slm.figures import figure_names, plot_comparison, plot_fit
from slm.fits import Candidate, Goal, NotComparable, Point, Trial, fit_curves, next_runs, summary
from slm.fits.checks.misfit import lack_of_fit
from slm.fits.checks.residuals import law_residuals
from slm.fits.compare.comparison import compare
from slm.fits.ladder import columns_of
from slm.fits.points import Axes, parts_of
from slm.fits.power_law import seed_noise
from slm.recipe import pocket
from tests.cli.test_fit_curves import document, refusal, slm
from tests.figures.test_figures import texts
from tests.homes import home_of, surface

PYTHON = "data=python validation=1a2b3c4d5e6f7081 tokenizer=aa context=1024"
DOCS = "data=docs validation=3c4d5e6f70811a2b tokenizer=aa context=1024"
IMPORT = "import=0123456789ab context=2048"
FLOPS = np.geomspace(1e12, 1e15, 8).tolist()
DEPTHS = (2, 3, 4, 5, 6)


def ladder(key: str = PYTHON, name: str = "a", size: float = 1e5) -> list[Point]:
    """Eight runs of one law; a `size` of NaN stands for unknown parameters."""
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


def grid(key: str = PYTHON) -> list[Point]:
    """Return seven sizes at each of three budgets."""
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


def differences(*keys: str) -> str:
    return Axes.of_keys(keys).differences


def test_differences_are_named_part_by_part_with_the_number_of_runs() -> None:
    assert differences(PYTHON, PYTHON, DOCS) == (
        "data: python (2 runs) against docs (1 run); "
        "validation: 1a2b3c4d… (2 runs) against 3c4d5e6f… (1 run)"
    )


def test_an_import_differs_by_its_origin_and_by_parts_that_both_have() -> None:
    """Data and tokeniser, unknown to the import, are not named as differences."""
    assert differences(PYTHON, IMPORT) == (
        "context: 1024 (1 run) against 2048 (1 run); import: none (1 run) against 01234567… (1 run)"
    )


def test_fingerprints_with_equal_first_digits_are_named_in_full() -> None:
    named = differences("a=0123456789ab", "a=0123456789ac")
    assert "0123456789ab (1 run) against 0123456789ac" in named


def test_keys_that_differ_are_never_one_axis() -> None:
    """Blanks, repeated names and parts without a name hide no difference; order makes none."""
    keys = ("a=1 b=2", "a=1", "a=1 b=3", "a=1 a=2", "a=2", "x", "x y", "y", "a=1=2", "key=x y=")
    for k, key in enumerate(keys):
        different = [bool(differences(key, other)) for other in keys]
        assert different == [j != k for j in range(10)]
    assert not differences("a=1 b=2", "b=2 a=1")


def test_a_refusal_names_experiments_and_the_option() -> None:
    with pytest.raises(
        NotComparable,
        match=r"data: python \(8 runs\) against docs .* one experiment .*--allow-mixed",
    ):
        fit_curves([*ladder(), *ladder(DOCS, "b")])


def test_a_mixed_fit_is_labelled_in_document_summary_and_figures() -> None:
    optimal = [
        replace(run, params=n, tokens=n, flops=6 * n * n, loss=1 + 2 * n**-0.3)
        for run, n in zip(ladder(), np.geomspace(1e6, 8e6, 8).tolist())
    ]
    runs = [replace(run, core=0.8 - 0.5 * run.loss) for run in (*optimal, *grid(DOCS))]
    fit = fit_curves(runs, allow_mixed=True)
    assert summary(fit).startswith("Mixed axes")
    first = fit.document()["warnings"][0]
    assert first["code"] == "mixed-axes"
    assert "data: python (8 runs) against docs (21 runs)" in first["message"]
    assert [parts_of(key)["data"] for key in fit.document()["mixed"]] == ["docs", "python"]
    assert fit.document()["points"]["comparison_key"] is None
    assert figure_names(fit) == ["curve", "frontier", "residuals", "core"]
    for name in figure_names(fit):
        assert "(mixed axes)" in " ".join(plot_fit(fit, name).get_suptitle().split())


def test_allowing_mixed_axes_does_not_change_a_fit_of_one_axis() -> None:
    fit = fit_curves(ladder(), allow_mixed=True)
    assert fit.document() == fit_curves(ladder()).document()
    assert fit.document()["mixed"] == []
    assert "mixed" not in texts(plot_fit(fit)).lower()


def test_a_mixed_comparison_is_labelled_in_its_verdict_and_figure() -> None:
    sides = trials(PYTHON, "b"), trials(DOCS, "c", 0.97)
    with pytest.raises(NotComparable, match=r"validation: 1a2b3c4d… .8 runs"):
        compare(*sides, ("old", "new"))
    result = compare(*sides, ("old", "new"), allow_mixed=True)
    assert result.document()["warnings"][0]["code"] == "mixed-axes"
    assert result.document()["verdict"]["sentence"].startswith("Mixed axes: new")
    assert result.document()["mixed"] == sorted(result.mixed) != []
    assert "Mixed axes" in texts(plot_comparison(result))


def test_a_mixed_design_is_labelled() -> None:
    candidates = [Candidate(20, 1e8, 1e9, 1e15, "compute-optimal")]
    points = [*ladder(), *grid(DOCS)]
    with pytest.raises(NotComparable):
        next_runs(points, candidates, Goal("loss", candidates[0]), 1e15)
    design = next_runs(points, candidates, Goal("loss", candidates[0]), 1e15, allow_mixed=True)
    assert len(design.document()["mixed"]) == 2
    assert design.document()["warnings"][0]["code"] == "mixed-axes"


def test_the_law_of_compute_needs_neither_params_nor_tokens() -> None:
    sized = fit_curves(ladder(), form="power")
    unsized = fit_curves(ladder(size=math.nan), form="power")
    same = ("power_law", "rival", "selected", "validation")
    assert {name: sized.document()[name] for name in same} == {
        name: unsized.document()[name] for name in same
    }
    auto = fit_curves(ladder(size=math.nan))
    assert auto.document()["power_law"] == sized.document()["power_law"]
    assert "no_params" in {run.code for run in auto.warnings}
    assert json.loads(json.dumps(auto.document(), allow_nan=False)) == auto.document()


def test_runs_of_unknown_size_are_replicates_if_depth_and_compute_agree() -> None:
    runs = [
        replace(run, run_id=f"{run.run_id}{seed}", seed=seed, loss=run.loss * (1 + 1e-3 * seed))
        for run in ladder(size=math.nan)
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


def test_isoflop_fits_exclude_runs_of_unknown_size_by_name() -> None:
    unknown = [replace(run, tokens=math.nan) for run in ladder(name="u")]
    fit = fit_curves([*grid(), *unknown], other_counts={"total": [1.5e5] * 29})
    assert fit.document()["points"]["n"] == 21
    excluded = fit.document()["points"]["excluded"]
    unsized = [row["run_id"] for row in excluded if row["reason"] == "no params"]
    assert unsized == [run.run_id for run in unknown]
    assert fit.document()["isoflop"] == fit_curves(grid()).document()["isoflop"]
    assert "no_params" in {run.code for run in fit.warnings}
    with pytest.raises(ValueError, match="21 runs at FLOPs budgets have no params"):
        fit_curves([replace(run, params=math.nan) for run in grid()])


# Rows of imports: the columns of the view `results` that fits read.


def imported(**columns: Any) -> pandas.DataFrame:
    """Return an import of eight runs with depth, FLOPs and loss alone."""
    losses = [run.loss for run in ladder()]
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


def test_an_import_gives_the_same_fit_as_its_file(tmp_path: Path) -> None:
    usable, excluded = selection.usable_rows(imported(), ("flops", "val_bpb"))
    rows, off_ladder = selection.ladder_rows(usable)
    assert excluded == off_ladder == []
    fit = fit_curves(selection.to_points(rows)).document()
    table = imported(
        params=[run.params for run in ladder()], tokens=[run.tokens for run in ladder()]
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


def test_a_run_with_a_serious_flag_is_excluded_with_the_flag() -> None:
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


def test_a_run_without_a_needed_number_is_excluded_with_its_name() -> None:
    losses = [math.nan, *[1.0] * 7]
    flops = [1e12, math.nan, *FLOPS[2:]]
    usable, excluded = selection.usable_rows(
        imported(val_bpb=losses, flops=flops), ("flops", "val_bpb")
    )
    assert [(run["run_id"], run["reason"]) for run in excluded] == [
        ("x1", "no flops"),
        ("x0", "no val_bpb"),
    ]
    assert len(usable) == 6


def test_imported_horizons_in_flops_are_budgets_and_all_others_one_ladder() -> None:
    rows, excluded = selection.ladder_rows(
        imported(horizon=["flops=1e12", None, "compute-optimal", *[None] * 4, "steps=9"])
    )
    assert [run.budget for run in selection.to_points(rows)] == [1e12, *[None] * 6]
    assert [run["run_id"] for run in excluded] == ["x7"]


# The command line on a home of two validation sets.


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("mixed")
    home_of(home, Experiment("here", (pocket,), DEPTHS, seeds=(0, 1)))
    home_of(
        home,
        Experiment("there", (pocket,), DEPTHS),
        lambda hp: 0.98 * surface(hp),
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
def test_a_command_refuses_mixed_axes_or_labels_its_record(
    home: Path, command: tuple[str, ...]
) -> None:
    assert "validation: val (10 runs) against other (5 runs)" in refusal(home, *command)
    before = set(home.glob("fits/*.json"))
    code, output, error = slm(home, *command, "--allow-mixed")
    assert code == 0, error
    assert output.startswith("Mixed axes")
    assert "mixed-axes: 2 axes are combined" in output
    (path,) = set(home.glob("fits/*.json")) - before
    record = json.loads(path.read_text())
    assert record["warnings"][0]["code"] == "mixed-axes"
    assert len(record["mixed"]) == 2


def test_a_depth_of_mixed_families_is_refused(home: Path, tmp_path: Path) -> None:
    rows = ["params,tokens,flops,loss,recipe,depth"]
    rows += [
        f"{run.params},{run.tokens},{run.flops},{run.loss},r{run.depth % 2},{run.depth}"
        for run in ladder()
    ]
    (tmp_path / "two.csv").write_text("\n".join(rows))
    file = ("fit-curves", "--from", str(tmp_path / "two.csv"), "--figure", str(tmp_path / "x"))
    assert "recipe: r0 (4 runs) against r1 (4 runs)" in refusal(home, *file)
    assert "depth 20 takes runs of one recipe; these are of r0 and r1" in refusal(
        home, *file, "--allow-mixed", "--depth", "20"
    )
    assert document(home, *file, "--allow-mixed")["mixed"]


def test_a_file_may_have_a_column_of_comparison_keys(home: Path, tmp_path: Path) -> None:
    rows = ["params,tokens,flops,loss,comparison_key,recipe,depth"]
    rows += [
        f"{run.params},{run.tokens},{run.flops},{run.loss},{key},{run.depth % 2},{run.depth // 2}"
        for run, key in zip(ladder(), (PYTHON, DOCS) * 4)
    ]
    (tmp_path / "two.csv").write_text("\n".join(rows))
    for command in ("fit-curves", "compare"):
        message = refusal(
            home, command, "--from", str(tmp_path / "two.csv"), "--figure", str(tmp_path / "x")
        )
        assert re.search(r"data: python \(4 runs\) against docs \(4 runs\)", message)
