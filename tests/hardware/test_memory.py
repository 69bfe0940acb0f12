"""The memory estimate equals the allocator's peak and gives the largest micro-batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from slm.hardware import devices
from slm.hardware.memory import (
    PROCESS,
    USABLE_SHARE,
    RankMemory,
    largest_micro_batch,
    peak_memory,
)
from slm.recipe import Hyperparameters, Recipe, nanochat, pocket
from tests.memory import SHAPES, shape, tensor_peak

DEVICES = ["cpu", "cuda", "mps"]


@pytest.mark.parametrize(
    ("hp", "rows"), [pytest.param(*SHAPES[0], marks=pytest.mark.soak), SHAPES[9]]
)
def test_the_estimate_is_within_15_percent_of_the_allocator_s_peak(
    hp: Hyperparameters, rows: int
) -> None:
    measured = tensor_peak(hp, rows)
    assert measured > 500e6
    assert peak_memory(hp, rows, "cpu") == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", [nanochat, pocket], ids=lambda recipe: recipe.name)
def test_more_rows_and_more_depth_need_more_memory(recipe: Recipe, device: str) -> None:
    by_rows = [peak_memory(recipe(6), rows, device) for rows in (1, 2, 3, 16, 17, 512)]
    by_depth = [peak_memory(recipe(depth), 4, device) for depth in range(1, 33)]
    assert by_rows == sorted(by_rows)
    assert by_depth == sorted(by_depth)
    assert by_rows[0] < by_rows[-1]
    assert by_depth[0] < by_depth[-1]


def test_ranks_share_optimiser_state_and_not_parameters() -> None:
    hp = nanochat(20)
    alone, *shared = (peak_memory(hp, 1, "cuda", ranks) for ranks in (1, 2, 4, 8))
    assert sorted([alone, *shared], reverse=True) == [alone, *shared]
    assert shared[-1] < 0.9 * alone
    assert shared[-1] > hp.parameters.total * 4


def test_two_ranks_on_cpus_hold_copies_of_what_they_exchange() -> None:
    hp = SHAPES[9][0]
    measured = 806e6  # of gloo's two ranks, in a step without an evaluation
    estimate = RankMemory(hp, 1, "cpu", ranks=2)
    assert estimate.resident() + estimate.update() == pytest.approx(measured, rel=0.05)
    assert peak_memory(hp, 1, "cpu", 8) < peak_memory(hp, 1, "cpu", 2)


def test_a_gpu_needs_less_than_a_cpu_where_activations_prevail() -> None:
    hp = nanochat(12)
    assert peak_memory(hp, 16, "cuda") < 0.7 * peak_memory(hp, 16, "cpu")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("memory", "ranks"), [(80 * 10**9, 1), (24 * 10**9, 4), (140 * 10**9, 3)])
def test_the_largest_micro_batch_fits_and_the_next_does_not(
    device: str, memory: int, ranks: int
) -> None:
    hp = nanochat(12)
    share = -(-hp.batch_rows // ranks)
    largest = largest_micro_batch(hp, memory, device, ranks)
    usable = USABLE_SHARE[device] * (memory - PROCESS)
    assert peak_memory(hp, largest, device, ranks) <= usable
    assert largest == share or peak_memory(hp, min(2 * largest, share), device, ranks) > usable
    assert largest == share or largest.bit_count() == 1


def test_a_step_that_fits_is_one_pass() -> None:
    hp = pocket(4)
    assert largest_micro_batch(hp, 8 * 10**9, "cpu") == hp.batch_rows
    assert largest_micro_batch(hp, 8 * 10**9, "cpu", ranks=3) == -(-hp.batch_rows // 3)


def test_where_no_row_fits_the_error_names_depth_and_memory() -> None:
    with pytest.raises(ValueError, match=r"depth 24: one row of 2048 tokens needs .* there are 4"):
        largest_micro_batch(nanochat(24), 4 * 10**9, "cuda")


def test_the_weights_of_short_windows_grow_with_the_window_and_not_the_square_of_the_length() -> (
    None
):
    short = shape(4, 256, 4096, 2048, "S")
    full = shape(4, 256, 4096, 2048, "L")
    heads = full.heads
    window = short.windows[0]
    difference = peak_memory(short, 8, "cpu") - peak_memory(full, 8, "cpu")
    assert 0 < difference < 3 * 8 * heads * 2048 * (window + 64) * 4
    windowed = replace(full, windows=short.windows)
    assert peak_memory(windowed, 8, "cuda") == peak_memory(full, 8, "cuda")


def test_the_machine_s_memory_is_what_its_control_groups_allow(tmp_path: Path) -> None:
    job = tmp_path / "sys/fs/cgroup/job/step"
    job.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/old\n0::/job/step\n")
    (job / "memory.max").write_text("max\n")
    (job.parent / "memory.max").write_text("4096\n")
    assert devices._group_limits(tmp_path) == [4096]
    assert devices._group_limits(tmp_path / "elsewhere") == []
    assert 2**28 < devices.memory() < 2**50
