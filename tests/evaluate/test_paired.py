"""CORE, and what stands in its place, of the runs of a home: in their curve, and side by side on the same examples."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slm.evaluate.records import kept
from slm.experiment import Experiment
from slm.files import read_json, write_json
from slm.fits import CoreFit, NoCoreFit, Point, fit_curves
from slm.recipe import pocket
from tests.cli.test_fit_curves import document, refusal, slm
from tests.homes import home_of

DEPTHS = (2, 3, 4, 5, 6)
EXAMPLES = 800
BASELINES = {"goes_on": 0.0, "which": 0.25, "fits": 0.25}
EASY = {label: np.random.default_rng(k).random(EXAMPLES) for k, label in enumerate(BASELINES)}
"""How easy each example is: two models agree on most."""
FAST = replace(pocket, name="fast", matrix_lr=5 * pocket.matrix_lr)
NUMBERS = dict.fromkeys(
    ("gold_nats", "gold_tokens", "gold_greedy", "gold_bytes", "gold_probability"), [1] * EXAMPLES
)
REST = {"choice": [None] * EXAMPLES, "tie": [False] * EXAMPLES, **NUMBERS}
"""What is kept of each example beside whether it was answered rightly."""


def evaluated(
    home: Path, experiment: str, gain: float = 0.0, depths: tuple[int, ...] = DEPTHS, **other: Any
) -> None:
    """Give each run of an experiment an evaluation as `slm eval` writes it, better by `gain` than its depth has it."""
    for run_id in read_json(home / "experiments" / f"{experiment}.json")["runs"]:
        plan = read_json(home / run_id / "plan.json")
        given = plan["hyperparameters"]
        if given["depth"] not in depths:
            continue
        skill, draw, tasks = (
            0.08 * given["depth"] + gain,
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
            (np.mean(own["each"]["correct"]) - own["baseline"]) / (1 - own["baseline"])
            for own in tasks.values()
        ]
        found = {"run_id": run_id, "step": given["steps"], "weights": "model.safetensors"}
        found |= {"metric": "pocket-core", "name": "pocket-core", "examples": EXAMPLES * len(tasks)}
        found["weights_sha256"] = read_json(home / run_id / "done.json").get("weights_sha256")
        found |= {
            "bundle": "b1",
            "mode": "full",
            "max_per_task": None,
            "tokenizer": "tok",
            "time": 5.0,
        }
        found |= {
            "centred": float(np.mean(centred)),
            "centred_error": 0.011,
            "tasks": tasks,
        } | other
        folder = home / run_id / "evals"
        folder.mkdir(exist_ok=True)
        write_json(
            folder / f"{found['name']}-{given['steps']:09d}-{len(list(folder.iterdir()))}.json",
            found,
        )


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Two ladders of two seeds."""
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
            own,
            loss,
            0,
            None,
            "a",
            1.0,
            0.9 - 0.27 * loss,
            error,
            key,
        )
        for k, (own, loss) in enumerate(zip(flops.tolist(), losses.tolist()))
    ]


def test_a_curve_of_pocket_core_has_its_name_and_the_error_of_its_evaluations() -> None:
    own, core = (fit_curves(points(name), metric="core").core for name in ("pocket-core", "core"))
    assert isinstance(own, CoreFit)
    assert isinstance(core, CoreFit)
    assert (own.name, core.name) == ("pocket-core", "CORE")
    assert own.evaluation == pytest.approx(0.01)
    assert (own.document()["reach"], len(core.document()["reach"])) == ({}, 4)
    assert all("CORE" not in caution.message for caution in own.warnings)


def test_runs_of_large_error_hold_a_curve_less() -> None:
    near, far = (fit_curves(points(error=error), metric="core").core for error in (0.003, 0.03))
    assert isinstance(near, CoreFit)
    assert isinstance(far, CoreFit)
    widths = [own.at(1e13) for own in (near, far)]
    assert widths[1].high - widths[1].low > 2 * (widths[0].high - widths[0].low)


def test_several_core_keys_are_no_curve_and_what_differs_is_named() -> None:
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
    fit = fit_curves([replace(own, core=0.01 * drawn.standard_normal()) for own in points()])
    assert isinstance(fit.core, NoCoreFit)
    assert fit.core.code in ("chance_level", "core_flat")
    assert "pocket-core" in fit.core.warnings[0].message


def test_the_evaluation_of_core_on_all_examples_speaks_for_a_run(home: Path) -> None:
    run = home / read_json(home / "experiments" / "ladder.json")["runs"][0]
    evaluated(home, "ladder", mode="100 per task", max_per_task=100, name="core")
    evaluated(home, "ladder", time=1.0)
    evaluated(home, "ladder", time=2.0)
    evaluated(home, "ladder", step=1)
    evaluated(home, "ladder", centred=None)
    evaluated(home, "ladder", name="core", time=3.0)
    found = kept(run)
    assert [(own.name, own.document["mode"], own.document["time"]) for own in found] == [
        ("CORE", "full", 3.0),
        ("CORE", "100 per task", 5.0),
        ("pocket-core", "full", 2.0),
        ("pocket-core", "full", 1.0),
    ]
    assert found[1].key == "metric=core bundle=b1 mode=100_per_task tokenizer=tok context=128"


def test_pocket_core_is_fitted_by_the_command_and_drawn_with_its_errors(home: Path) -> None:
    evaluated(home, "ladder")
    found = document(home, "fit-curves", "ladder", "--metric", "core")
    assert found["core"]["metric"] == "pocket-core"
    svg = next(Path(path) for path in found["figures"] if path.endswith("-core.svg")).read_text()
    assert "pocket-core" in svg
    assert "95 % over examples" in svg
    assert ">CORE" not in svg
    assert "GPT-2" not in svg
    evaluated(home, "ladder", depths=(2,), mode="without fits", time=9.0)
    assert document(home, "fit-curves", "ladder", "--metric", "core")["core"] == found["core"]


def test_a_curve_over_several_modes_is_refused(home: Path) -> None:
    evaluated(home, "ladder", depths=(2, 3, 4))
    evaluated(home, "ladder", depths=(5, 6), mode="500 per task", max_per_task=500)
    refused = refusal(home, "fit-curves", "ladder", "--metric", "core")
    assert "mode: full (6 runs) against 500_per_task (4 runs)" in refused


def test_a_comparison_pairs_the_examples_of_every_depth(home: Path) -> None:
    evaluated(home, "ladder")
    evaluated(home, "fast", gain=0.04, depths=(2, 3, 4, 5))
    core = document(home, "compare", "ladder", "fast")["core"]
    assert (core["metric"], [own["depth"] for own in core["per_depth"]]) == (
        "pocket-core",
        [2, 3, 4, 5],
    )
    over_all = core["difference"]
    assert over_all["low"] < 0.04 < over_all["high"]
    assert over_all["estimate"] == pytest.approx(
        np.mean([own["difference"]["estimate"] for own in core["per_depth"]]), abs=1e-12
    )
    for own in core["per_depth"]:
        assert own["difference"]["estimate"] == pytest.approx(
            own["candidate"] - own["base"], abs=1e-12
        )
        unpaired = 0.011 * math.sqrt(2)
        assert own["difference"]["standard_error"] < 0.8 * unpaired
    _, printed, _ = slm(home, "compare", "ladder", "fast")
    assert "pocket-core on the same examples" in printed
    assert f"{over_all['estimate']:+.4f} ± {over_all['standard_error']:.4f}" in printed
    _, markdown, _ = slm(home, "compare", "ladder", "fast", "--markdown")
    assert (
        f"{over_all['estimate']:+.4f} ± {over_all['standard_error']:.4f} over all depths"
        in markdown
    )
    assert "CORE" not in printed + markdown


def test_runs_that_were_asked_other_things_are_compared_by_loss_alone_and_what_differs_is_said(
    home: Path,
) -> None:
    assert document(home, "compare", "ladder", "fast")["core"] is None
    evaluated(home, "ladder")
    found = document(home, "compare", "ladder", "fast")
    (warning,) = [own["message"] for own in found["warnings"] if own["code"] == "core_not_compared"]
    assert "ladder was evaluated on examples and fast was not" in warning
    evaluated(home, "fast", bundle="b2")
    found = document(home, "compare", "ladder", "fast")
    (warning,) = [own["message"] for own in found["warnings"] if own["code"] == "core_not_compared"]
    assert "bundle: b1 (10 runs) against b2 (10 runs)" in warning
    assert found["core"] is None
    assert found["compute_multiplier"]["estimate"] is not None
    evaluated(home, "fast", mode="full", time=1.0)
    assert document(home, "compare", "ladder", "fast")["core"]["core_key"].split()[1] == "bundle=b1"
