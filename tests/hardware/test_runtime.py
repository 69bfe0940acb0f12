"""Estimated run times agree with measured ones, learn from them, and withstand outliers; prices
parse.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slm.experiment import Experiment
from slm.hardware import devices
from slm.hardware.runtime import (
    PRIORS,
    STARTUP_SECONDS,
    FinishedRun,
    Price,
    RuntimeModel,
    Throughput,
    median_error,
    parse_price,
)
from slm.recipe import nanochat, pocket
from tests.homes import home_of

H100 = "NVIDIA H100 80GB HBM3"
MEASURED = {
    "one core": (1, (5.47, 14.03, 37.25, 99.08)),
    "two cores": (2, (4.76, 9.01, 24.60, 62.76, 100.75)),
    "two busy cores": (2, (5.68, 10.94, 31.72, 86.04, 133.55)),
    "two cores, another trainer": (2, (5.36, 10.72, 26.46, 61.98, 112.11)),
}
"""Ranks, and the wall seconds of pocket's depths from 2 on: sweeps on an AVX-512 machine of two
cores."""


def pocket_runs(sweep: str) -> list[FinishedRun]:
    ranks, seconds = MEASURED[sweep]
    return [finished(depth, wall, ranks) for depth, wall in enumerate(seconds, 2)]


def finished(
    depth: int,
    wall: float,
    ranks: int = 1,
    recipe: Callable[..., Any] = pocket,
    name: str = "a CPU",
) -> FinishedRun:
    hp = recipe(depth)
    return FinishedRun(
        hp.flops, hp.width, depth, hp.batch_tokens, hp.steps, name, ranks, 1, wall, None
    )


def miniseries(reference: Path) -> list[FinishedRun]:
    """The published first miniseries: eleven depths on eight H100s, by their whole times."""
    text = (reference / "data/nanochat/karpathy/miniseries_v1_2026-01-07.csv").read_text()
    return [_published(row) for row in csv.DictReader(text.splitlines())]


def _published(row: dict[str, str]) -> FinishedRun:
    depth, width, tokens = int(row["depth"]), int(row["model_dim"]), 1e9 * float(row["tokens_B"])
    flops = tokens * (6 * (12 * width**2 * depth + 32768 * width) + 12 * width * 2048 * depth)
    wall = 60 * float(row["train_time_min"]) - STARTUP_SECONDS
    return FinishedRun(flops, width, depth, 2**19, round(tokens / 2**19), H100, 8, 1, wall, None)


def with_estimates(runs: list[FinishedRun], device: str) -> list[FinishedRun]:
    """Return the runs, each with the estimate that the runs before it give."""
    estimates = [
        Throughput(runs[:count]).seconds(run, device, run.device_name, run.ranks, run.threads)
        for count, run in enumerate(runs)
    ]
    return [replace(run, estimated_seconds=seconds) for run, seconds in zip(runs, estimates)]


@pytest.mark.parametrize("sweep", MEASURED)
def test_after_two_measured_runs_the_median_error_of_a_pocket_sweep_is_below_10_percent(
    sweep: str,
) -> None:
    error = median_error(with_estimates(pocket_runs(sweep), "cpu")[2:])
    assert error is not None
    assert error < 0.1


def test_after_two_published_runs_the_median_error_of_the_miniseries_is_below_10_percent(
    reference: Path,
) -> None:
    estimated = with_estimates(miniseries(reference), "cuda")
    error, worst = (
        median_error(estimated[2:]),
        max(median_error([run]) or 0.0 for run in estimated[2:]),
    )
    assert error is not None
    assert error < 0.1
    assert worst < 0.2


@pytest.mark.parametrize("slow", range(11))
def test_one_run_on_a_busy_machine_does_not_spoil_the_other_estimates(
    reference: Path, slow: int
) -> None:
    runs = miniseries(reference)
    runs[slow] = replace(runs[slow], wall_seconds=10 * runs[slow].wall_seconds)
    rest = [
        run for index, run in enumerate(with_estimates(runs, "cuda")) if index > 1 and index != slow
    ]
    error = median_error(rest)
    assert error is not None
    assert error < 0.2


@pytest.mark.parametrize(
    ("depth", "ranks", "mfu"), [(12, 8, 0.41), (18, 8, 0.46), (24, 8, 0.509), (16, 1, 0.53)]
)
def test_the_prior_of_an_h100_gives_its_published_mfu(depth: int, ranks: int, mfu: float) -> None:
    hp = nanochat(depth)
    steps = (
        Throughput([]).seconds(hp, "cuda", H100, ranks) - STARTUP_SECONDS - PRIORS["cuda"].warm_up
    )
    assert hp.flops / steps / (ranks * 989e12) == pytest.approx(mfu, rel=0.1)


def test_the_prior_of_a_cpu_estimates_pocket_sweeps_within_a_third() -> None:
    for run in (run for sweep in MEASURED for run in pocket_runs(sweep)):
        guessed = Throughput([]).seconds(pocket(run.depth), "cpu", "another CPU", run.ranks)
        assert guessed == pytest.approx(STARTUP_SECONDS + run.wall_seconds, rel=0.35)


@pytest.mark.parametrize("device", PRIORS)
def test_longer_and_deeper_runs_take_longer_and_more_ranks_take_less(device: str) -> None:
    def seconds(hp: Any, ranks: int = 1) -> float:
        return Throughput([]).seconds(hp, device, "unknown device", ranks)

    by_steps = [seconds(replace(nanochat(12), steps=steps)) for steps in (1, 10, 100, 1000, 10_000)]
    by_depth = [seconds(nanochat(depth)) for depth in range(2, 27)]
    by_ranks = [seconds(nanochat(12), ranks) for ranks in (8, 4, 2, 1)]
    assert by_steps[0] > STARTUP_SECONDS
    for times in (by_steps, by_depth, by_ranks):
        assert times == sorted(set(times))


@pytest.mark.parametrize("off", [0.05, 0.5, 3.0, 20.0])
def test_one_run_shifts_every_estimate_of_its_device_and_its_own_most(off: float) -> None:
    guessed = {
        depth: Throughput([]).seconds(pocket(depth), "cpu", "a CPU", 1) - STARTUP_SECONDS
        for depth in (2, 4, 6)
    }
    learned = Throughput([finished(2, off * guessed[2])])
    factors = [
        (learned.seconds(pocket(depth), "cpu", "a CPU", 1) - STARTUP_SECONDS) / guessed[depth]
        for depth in guessed
    ]
    assert factors[0] == pytest.approx(off, rel=0.02)
    assert sorted(factors, key=lambda factor: abs(factor - off)) == factors
    assert all((factor - 1) * (off - 1) > 0 for factor in factors)


def test_a_second_size_fits_how_speed_depends_on_size() -> None:
    def slower_when_wide(depth: int) -> FinishedRun:
        guessed = Throughput([]).seconds(pocket(depth), "cpu", "a CPU", 1) - STARTUP_SECONDS
        return finished(depth, guessed * pocket(depth).width / 16)

    truth = slower_when_wide(6).wall_seconds
    one = Throughput([slower_when_wide(2)]).seconds(pocket(6), "cpu", "a CPU", 1)
    two = Throughput([slower_when_wide(2), slower_when_wide(4)]).seconds(
        pocket(6), "cpu", "a CPU", 1
    )
    assert one < 0.5 * truth
    assert two == pytest.approx(truth, rel=0.15)


def test_runs_of_similar_size_weigh_most_where_speed_bends_with_size() -> None:
    slower = {2: 1.4, 3: 1.2, 5: 1.0, 8: 1.2, 12: 1.4}
    guessed = {
        depth: Throughput([]).seconds(pocket(depth), "cpu", "a CPU", 1) - STARTUP_SECONDS
        for depth in slower
    }
    throughput = Throughput(
        [finished(depth, factor * guessed[depth]) for depth, factor in slower.items()]
    )
    for end in (2, 12):
        at_work = throughput.seconds(pocket(end), "cpu", "a CPU", 1) - STARTUP_SECONDS
        assert at_work == pytest.approx(slower[end] * guessed[end], rel=0.1)


def test_runs_with_other_ranks_correct_the_speed_up_by_ranks() -> None:
    def seconds(sweep: list[FinishedRun], ranks: int) -> float:
        return Throughput(sweep).seconds(pocket(5), "cpu", "a CPU", ranks)

    alone = [finished(depth, wall) for depth, wall in ((3, 10.0), (4, 30.0))]
    guessed = seconds(alone, 1) / seconds(alone, 2)
    useless = [*alone, *(replace(run, ranks=2) for run in alone)]
    assert 1.2 < guessed < 2**0.7
    assert seconds(useless, 1) / seconds(useless, 2) == pytest.approx(1, abs=0.1)


def test_runs_on_other_devices_do_not_count() -> None:
    runs = [finished(depth, 1000.0) for depth in (2, 3, 4)]
    estimate = Throughput(runs).seconds(pocket(4), "cpu", "another CPU", 1)
    assert estimate == Throughput([]).seconds(pocket(4), "cpu", "another CPU", 1)
    assert devices.name("mps") != devices.name("cpu")


def test_the_basis_names_the_runs_the_peak_or_a_guess() -> None:
    throughput = Throughput(
        [finished(2, 5.0), finished(3, 9.0), finished(12, 400.0, 8, nanochat, "Tesla T4")]
    )
    bases = [
        ("cpu", "a CPU"),
        ("cuda", "Tesla T4"),
        ("cuda", H100),
        ("cuda", "GeForce"),
        ("cpu", "another CPU"),
    ]
    assert [throughput.basis(*base) for base in bases] == [
        "2 runs",
        "1 run",
        "its peak",
        "a guess",
        "a guess",
    ]


def test_the_error_is_the_median_over_runs_with_an_estimate() -> None:
    runs = [finished(depth, 100 - STARTUP_SECONDS) for depth in (2, 3, 4, 5)]
    estimated = [
        replace(run, estimated_seconds=seconds) for run, seconds in zip(runs, (110.0, 70.0, 101.0))
    ]
    assert median_error([*estimated, runs[3]]) == pytest.approx(0.1)
    assert median_error(runs) is None
    assert median_error([]) is None


@pytest.fixture
def four(tmp_path: Path) -> tuple[Path, list[Path]]:
    """A home of four finished runs, and their folders by depth."""
    home = home_of(tmp_path / "runs", Experiment("four", (pocket,), (2, 3, 4, 5)))
    plans = [json.loads(path.read_text()) for path in home.glob("*/plan.json")]
    plans.sort(key=lambda plan: plan["hyperparameters"]["depth"])
    return home, [home / plan["run_id"] for plan in plans]


def _change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_finished_runs_are_read_from_the_files_of_a_home(
    four: tuple[Path, list[Path]],
) -> None:
    home, folders = four
    _change(folders[0] / "attempts/001/attempt.json", estimated_seconds=12.5)
    runs = sorted(RuntimeModel(home).runs, key=lambda run: run.depth)
    wall = pocket(2).flops / 1e10 + 5
    assert runs[0] == replace(finished(2, wall, 2, name=H100), estimated_seconds=12.5)
    assert [run.depth for run in runs] == [2, 3, 4, 5]
    assert [run.estimated_seconds for run in runs[1:]] == [None] * 3
    assert median_error(runs) == pytest.approx(12.5 / (STARTUP_SECONDS + wall) - 1)
    assert RuntimeModel(home / "nowhere").runs == []


def test_a_run_of_two_attempts_counts_for_speed_and_not_for_the_error(
    four: tuple[Path, list[Path]],
) -> None:
    home, folders = four
    first, second = (folders[0] / f"attempts/00{number}/attempt.json" for number in (1, 2))
    _change(first, estimated_seconds=12.5)
    second.parent.mkdir()
    second.write_text(first.read_text())
    _change(folders[0] / "done.json", attempt=2)
    runs = RuntimeModel(home).runs
    assert len(runs) == 4
    assert median_error(runs) is None
    _change(second, ranks=1)  # went on estimate: its time is of neither
    assert sorted(run.depth for run in RuntimeModel(home).runs) == [3, 4, 5]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("done.json", '{"attempt": 1'),
        ("done.json", '{"attempt": 1, "flops": 1e9, "wall_seconds": null}'),
        ("done.json", '{"attempt": 1, "flops": 1e9, "wall_seconds": 0}'),
        ("done.json", '{"attempt": 2, "flops": 1e9, "wall_seconds": 9}'),
        ("plan.json", "[]"),
        ("attempts/001/attempt.json", '{"device_name": null}'),
    ],
)
def test_unreadable_runs_are_left_out(four: tuple[Path, list[Path]], name: str, text: str) -> None:
    home, folders = four
    (folders[1] / name).write_text(text)
    (folders[2] / "done.json").unlink()
    assert sorted(run.depth for run in RuntimeModel(home).runs) == [2, 5]


@pytest.mark.parametrize(
    ("text", "price", "cost"),
    [
        ("24/h", Price(24, False), 12.0),
        (" 24 ", Price(24, False), 12.0),
        ("3/gpu/h", Price(3, True), 12.0),
        (".5/gpu/h", Price(0.5, True), 2.0),
        ("0", Price(0, False), 0.0),
    ],
)
def test_a_price_is_for_the_machine_or_for_a_device(text: str, price: Price, cost: float) -> None:
    assert parse_price(text) == price
    assert price.of(2 * 3600, 2, 8) == pytest.approx(cost)


@pytest.mark.parametrize(
    "text", ["", "free", "-3/h", "24/day", "3/h/gpu", "24 / h", "1e400", "nan"]
)
def test_an_invalid_price_is_refused_with_the_valid_forms(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"--price '.*': write 24/h for the whole machine, or 3/gpu/h"
    ):
        parse_price(text)
