"""CORE and pocket-core of the runs of a home: their curve, and comparisons on the same examples."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slm import results
from slm.evaluate.records import read_records
from slm.experiment import Experiment
from slm.files import read_json, write_json
from slm.fits import CoreFit, NoCoreFit, Point, fit_curves
from slm.recipe import pocket
from tests.cli.test_fit_curves import document, refusal, slm
from tests.figures.test_figures import svg_of
from tests.homes import home_of

DEPTHS = (2, 3, 4, 5, 6)
EXAMPLES = 800
BASELINES = {"goes_on": 0.0, "which": 0.25, "fits": 0.25}
EASY = {label: np.random.default_rng(k).random(EXAMPLES) for k, label in enumerate(BASELINES)}
"""Difficulty of each example, shared by all models, so that two models agree on most."""
FAST = replace(pocket, name="fast", matrix_lr=5 * pocket.matrix_lr)
NUMBERS = dict.fromkeys(
    ("gold_nats", "gold_tokens", "gold_greedy", "gold_bytes", "gold_probability"), [1] * EXAMPLES
)
REST = {"choice": [None] * EXAMPLES, "tie": [False] * EXAMPLES, **NUMBERS}
"""Fields of an example besides whether its answer is correct."""


def evaluated(
    home: Path, experiment: str, gain: float = 0.0, depths: tuple[int, ...] = DEPTHS, **other: Any
) -> None:
    """Write an evaluation of each run as `slm eval` does; `gain` adds to the skill of its depth."""
    for run_id in read_json(home / "experiments" / f"{experiment}.json")["runs"]:
        plan = read_json(home / run_id / "plan.json")
        hp = plan["hyperparameters"]
        if hp["depth"] not in depths:
            continue
        skill, draw, tasks = (
            0.08 * hp["depth"] + gain,
            np.random.default_rng(int(run_id, 16)),
            {},
        )
        for label, baseline in BASELINES.items():
            knows = EASY[label] < skill + 0.02 * draw.standard_normal(EXAMPLES)
            correct = knows | (draw.random(EXAMPLES) < baseline)
            right = float(correct.mean())
            tasks[label] = {
                "baseline": baseline,
                "accuracy": right,
                "each": REST | {"correct": correct.tolist()},
            }
        centred = [
            (np.mean(row["each"]["correct"]) - row["baseline"]) / (1 - row["baseline"])
            for row in tasks.values()
        ]
        record = {"run_id": run_id, "step": hp["steps"], "weights": "model.safetensors"}
        record |= {
            "metric": "pocket-core",
            "name": "pocket-core",
            "examples": EXAMPLES * len(tasks),
        }
        record["weights_sha256"] = read_json(home / run_id / "done.json").get("weights_sha256")
        record |= {
            "bundle": "b1",
            "mode": "full",
            "max_per_task": None,
            "tokenizer": "tok",
            "time": 5.0,
        }
        record |= {
            "centred": float(np.mean(centred)),
            "centred_error": 0.011,
            "tasks": tasks,
        } | other
        folder = home / run_id / "evals"
        folder.mkdir(exist_ok=True)
        write_json(
            folder / f"{record['name']}-{hp['steps']:09d}-{len(list(folder.iterdir()))}.json",
            record,
        )


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Make a home with two ladders of two seeds."""
    home_of(tmp_path, Experiment("ladder", (pocket,), DEPTHS, seeds=(0, 1)))
    return home_of(tmp_path, Experiment("fast", (FAST,), DEPTHS, seeds=(0, 1)))


def points(name: str | None = "pocket-core", error: float | None = 0.01) -> list[Point]:
    flops = np.geomspace(3e10, 5e12, 6)
    losses = 28 * flops**-0.0966
    key = f"metric={name} bundle=b mode=full tokenizer=t context=128" if name else None
    return [
        Point(
            f"r{k}",
            "pocket",
            k + 2,
            1e4,
            1e6,
            compute,
            loss,
            0,
            None,
            "a",
            1.0,
            0.9 - 0.27 * loss,
            error,
            key,
        )
        for k, (compute, loss) in enumerate(zip(flops.tolist(), losses.tolist()))
    ]


def test_a_curve_of_pocket_core_has_its_name_and_its_standard_error() -> None:
    pocket_core, core = (
        fit_curves(points(name), metric="core").core for name in ("pocket-core", "core")
    )
    assert isinstance(pocket_core, CoreFit)
    assert isinstance(core, CoreFit)
    assert (pocket_core.name, core.name) == ("pocket-core", "CORE")
    assert pocket_core.evaluation == pytest.approx(0.01)
    assert (pocket_core.document()["reach"], len(core.document()["reach"])) == ({}, 4)
    assert all("CORE" not in warning.message for warning in pocket_core.warnings)


def test_larger_standard_errors_widen_the_curve() -> None:
    small, large = (fit_curves(points(error=error), metric="core").core for error in (0.003, 0.03))
    assert isinstance(small, CoreFit)
    assert isinstance(large, CoreFit)
    widths = [curve.at(1e13) for curve in (small, large)]
    assert widths[1].high - widths[1].low > 2 * (widths[0].high - widths[0].low)


def test_several_core_keys_have_no_curve_and_the_difference_is_named() -> None:
    mixed = points()
    mixed[0] = replace(
        mixed[0], core_key=mixed[0].core_key.replace("mode=full", "mode=100_per_task")
    )
    fit = fit_curves(mixed)
    assert isinstance(fit.core, NoCoreFit)
    assert "mode: 100_per_task (1 run) against full" in fit.core.why
    assert fit.law is not None


def test_models_at_chance_on_pocket_core_have_no_curve() -> None:
    drawn = np.random.default_rng(0)
    fit = fit_curves([replace(point, core=0.01 * drawn.standard_normal()) for point in points()])
    assert isinstance(fit.core, NoCoreFit)
    assert fit.core.code in ("chance_level", "core_flat")
    assert "pocket-core" in fit.core.warnings[0].message


def test_evaluations_of_core_on_all_examples_come_first(home: Path) -> None:
    run = home / read_json(home / "experiments" / "ladder.json")["runs"][0]
    evaluated(home, "ladder", mode="100 per task", max_per_task=100, name="core")
    evaluated(home, "ladder", time=1.0)
    evaluated(home, "ladder", time=2.0)
    evaluated(home, "ladder", step=1)
    evaluated(home, "ladder", centred=None)
    evaluated(home, "ladder", name="core", time=3.0)
    record = read_records(run)
    assert [(row.name, row.document["mode"], row.document["time"]) for row in record] == [
        ("CORE", "full", 3.0),
        ("CORE", "100 per task", 5.0),
        ("pocket-core", "full", 2.0),
        ("pocket-core", "full", 1.0),
    ]
    assert record[1].key == "metric=core bundle=b1 mode=100_per_task tokenizer=tok context=128"


def test_the_command_fits_pocket_core(home: Path) -> None:
    evaluated(home, "ladder")
    record = document(home, "fit-curves", "ladder", "--metric", "core")
    assert record["core"]["metric"] == "pocket-core"
    assert any(path.endswith("-core.svg") for path in record["figures"])
    evaluated(home, "ladder", depths=(2,), mode="without fits", time=9.0)
    assert document(home, "fit-curves", "ladder", "--metric", "core")["core"] == record["core"]


def test_the_figure_of_pocket_core_has_its_name_and_its_errors(home: Path) -> None:
    evaluated(home, "ladder")
    svg = svg_of(results.fit_curves("ladder", metric="core", home=home).plot("core"))
    assert "pocket-core" in svg
    assert "95 % over examples" in svg
    assert ">CORE" not in svg
    assert "GPT-2" not in svg


def test_a_curve_over_several_modes_is_refused(home: Path) -> None:
    evaluated(home, "ladder", depths=(2, 3, 4))
    evaluated(home, "ladder", depths=(5, 6), mode="500 per task", max_per_task=500)
    refused = refusal(home, "fit-curves", "ladder", "--metric", "core")
    assert "mode: full (6 runs) against 500_per_task (4 runs)" in refused


def test_a_comparison_pairs_examples_at_every_depth(home: Path) -> None:
    evaluated(home, "ladder")
    evaluated(home, "fast", gain=0.04, depths=(2, 3, 4, 5))
    core = document(home, "compare", "ladder", "fast")["core"]
    assert (core["metric"], [row["depth"] for row in core["per_depth"]]) == (
        "pocket-core",
        [2, 3, 4, 5],
    )
    over_all = core["difference"]
    assert over_all["low"] < 0.04 < over_all["high"]
    assert over_all["estimate"] == pytest.approx(
        np.mean([row["difference"]["estimate"] for row in core["per_depth"]]), abs=1e-12
    )
    for row in core["per_depth"]:
        assert row["difference"]["estimate"] == pytest.approx(
            row["candidate"] - row["base"], abs=1e-12
        )
        unpaired = 0.011 * math.sqrt(2)
        assert row["difference"]["standard_error"] < 0.8 * unpaired
    _, printed, _ = slm(home, "compare", "ladder", "fast")
    assert "pocket-core on the same examples" in printed
    assert f"{over_all['estimate']:+.4f} ± {over_all['standard_error']:.4f}" in printed
    _, markdown, _ = slm(home, "compare", "ladder", "fast", "--markdown")
    assert (
        f"{over_all['estimate']:+.4f} ± {over_all['standard_error']:.4f} over all depths"
        in markdown
    )
    assert "CORE" not in printed + markdown


def test_runs_evaluated_differently_are_compared_by_loss_with_a_warning(
    home: Path,
) -> None:
    assert document(home, "compare", "ladder", "fast")["core"] is None
    evaluated(home, "ladder")
    record = document(home, "compare", "ladder", "fast")
    (warning,) = [
        row["message"] for row in record["warnings"] if row["code"] == "core_not_compared"
    ]
    assert "ladder was evaluated on examples and fast was not" in warning
    evaluated(home, "fast", bundle="b2")
    record = document(home, "compare", "ladder", "fast")
    (warning,) = [
        row["message"] for row in record["warnings"] if row["code"] == "core_not_compared"
    ]
    assert "bundle: b1 (10 runs) against b2 (10 runs)" in warning
    assert record["core"] is None
    assert record["compute_multiplier"]["estimate"] is not None
    evaluated(home, "fast", mode="full", time=1.0)
    assert document(home, "compare", "ladder", "fast")["core"]["core_key"].split()[1] == "bundle=b1"
