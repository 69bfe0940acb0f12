"""`slm.results`: the records that notebooks get are the documents that the commands print."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slm import results
from slm.experiment import Experiment
from slm.recipe import nanochat, pocket
from tests.cli.test_fit_curves import document
from tests.drawing import empty_figures
from tests.homes import home_of, surface

FAST = replace(pocket, name="fast", matrix_lr=5 * pocket.matrix_lr)
DEPTHS = (2, 3, 4, 5, 6)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a home with a ladder of two seeds and a worse recipe."""
    path = tmp_path_factory.mktemp("results")
    home_of(path, Experiment("ladder", (pocket,), DEPTHS, seeds=(0, 1)))
    return home_of(
        path, Experiment("fast", (FAST,), DEPTHS, seeds=(0, 1)), lambda hp: 1.03 * surface(hp)
    )


def without_time(record: dict[str, Any]) -> dict[str, Any]:
    """Return a document without the time of its creation."""
    return {name: value for name, value in record.items() if name != "created"}


def test_points_are_a_row_per_run(home: Path) -> None:
    runs = results.points("ladder", home=home)
    assert list(runs.table()["depth"]) == [depth for depth in DEPTHS for _ in (0, 1)]
    assert len(runs.to_json()["points"]) == len(runs.points) == 10
    assert runs.plot().axes[0].get_xlabel() == "training compute (FLOPs)"
    with pytest.raises(ValueError, match="metric mfu: unknown; there are val_bpb, loss, core"):
        results.points("ladder", metric="mfu", home=home)


def test_a_fit_is_the_document_of_the_command(home: Path) -> None:
    fit = results.fit_curves("ladder", at=[1e14], home=home)
    assert fit.plot().axes
    assert not (home / "figures").exists(), "only `save` writes figures"
    with empty_figures():
        fit.save()
    printed = document(home, "fit-curves", "ladder", "--at", "1e14")
    assert without_time(fit.to_json()) == without_time(printed)
    assert list(fit.table("prediction")["FLOPs"]) == ["1e+14"]
    with pytest.raises(ValueError, match="table 'surfaces': there are 'prediction', 'law'"):
        fit.table("surfaces")


def test_a_comparison_is_the_document_of_the_command(home: Path) -> None:
    comparison = results.compare("ladder", "fast", home=home)
    with empty_figures():
        comparison.save()
    printed = document(home, "compare", "ladder", "fast")
    assert without_time(comparison.to_json()) == without_time(printed)
    assert list(comparison.table().index) == [*(f"d{depth}" for depth in DEPTHS), "all"]
    assert comparison.sides[0].at_depth(2).mfu == pytest.approx(1e10 / (2 * 989e12))
    assert comparison.plot().axes


def test_a_design_is_the_document_of_the_command(home: Path) -> None:
    design = results.next_runs("ladder", target="loss@d8", budget=1e13, home=home)
    printed = document(home, "next", "ladder", "--target", "loss@d8", "--budget", "1e13")
    assert without_time(design.to_json()) == without_time(printed)
    assert len(design.table()) == len(printed["picks"])
    assert design.plot().axes


def test_a_report_is_the_document_of_the_command(home: Path) -> None:
    report = results.report("ladder", home=home)
    printed = document(home, "report", "ladder", drawn=True)
    for fit in (*report.to_json()["fits"], *printed["fits"]):
        del fit["created"]
    assert report.to_json()["fits"] == printed["fits"]
    assert report.html() == Path(printed["page"]).read_text(encoding="utf-8")
    assert len(report.table()) == 10
    assert report.plot().axes


def test_the_home_is_named_by_the_environment(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLM_HOME", str(home))
    assert results.points("fast").experiments == ["fast"]
    with pytest.raises(ValueError, match="name an experiment: there are fast, ladder"):
        results.points()


def test_the_nearest_model_of_a_compute_is_its_own() -> None:
    assert results.nearest_model(nanochat, float(nanochat(20).flops)) == nanochat(20)
    assert results.nearest_model(pocket, 1e300) is None


def test_importing_results_loads_nothing_heavy() -> None:
    heavy = "torch", "numpy", "scipy", "pandas", "matplotlib", "duckdb", "jinja2"
    program = f"import sys, slm.results; print(*(set({heavy}) & set(sys.modules)))"
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == ""
