"""The estimate of memory is the allocator's peak, moves as it must, and finds the largest micro-batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from slm.evaluate import bpb
from slm.hardware import devices
from slm.hardware import memory as estimate
from slm.hardware.memory import FILLED, PROCESS, largest_micro_batch, peak_memory
from slm.model import attention, layers
from slm.recipe import Hyperparameters, nanochat, pocket
from slm.train import optimizer as optim
from tests.memory import SHAPES, shape, tensor_peak

DEVICES = ["cpu", "cuda", "mps"]


@pytest.mark.parametrize(("given", "rows"), [SHAPES[place] for place in (0, 9)])
def test_the_estimate_is_the_peak_of_the_allocator_within_15_percent(
    given: Hyperparameters, rows: int
) -> None:
    found = tensor_peak(given, rows)
    assert found > 500e6
    assert peak_memory(given, rows, "cpu") == pytest.approx(found, rel=0.15)


def test_the_estimate_knows_the_constants_of_the_trainer() -> None:
    assert estimate.EVALUATION_TOKENS == bpb.TOKENS
    assert estimate.SHARED == optim.SHARED
    assert estimate.BLOCK == attention.BLOCK
    assert estimate.FEWEST == layers.FEWEST
    assert {device: estimate.LOGITS[device] for device in layers.LOGITS} == layers.LOGITS


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", [nanochat, pocket], ids=lambda recipe: recipe.name)
def test_more_rows_and_more_depth_take_more(recipe, device: str) -> None:
    by_rows = [peak_memory(recipe(6), rows, device) for rows in (1, 2, 3, 16, 17, 512)]
    by_depth = [peak_memory(recipe(depth), 4, device) for depth in range(1, 33)]
    assert by_rows == sorted(by_rows)
    assert by_depth == sorted(by_depth)
    assert by_rows[0] < by_rows[-1]
    assert by_depth[0] < by_depth[-1]


def test_ranks_share_the_state_of_the_optimiser_and_never_the_parameters() -> None:
    given = nanochat(20)
    alone, *shared = (peak_memory(given, 1, "cuda", ranks) for ranks in (1, 2, 4, 8))
    assert sorted([alone, *shared], reverse=True) == [alone, *shared]
    assert shared[-1] < 0.9 * alone
    assert shared[-1] > given.parameters.total * 4


def test_two_ranks_on_cpus_hold_copies_of_what_they_exchange() -> None:
    given = SHAPES[9][0]
    measured = 806e6  # by gloo's two ranks of it, in a step without an evaluation
    assert estimate._held(given, "cpu", 2) + estimate._update(given, "cpu", 2) == pytest.approx(
        measured, rel=0.05
    )
    assert peak_memory(given, 1, "cpu", 8) < peak_memory(given, 1, "cpu", 2)


def test_a_gpu_takes_less_than_a_cpu_where_activations_prevail() -> None:
    given = nanochat(12)
    assert peak_memory(given, 16, "cuda") < 0.7 * peak_memory(given, 16, "cpu")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("memory", "ranks"), [(80 * 10**9, 1), (24 * 10**9, 4), (140 * 10**9, 3)])
def test_the_largest_micro_batch_fits_and_the_next_does_not(
    device: str, memory: int, ranks: int
) -> None:
    given = nanochat(12)
    share = -(-given.batch_rows // ranks)
    found = largest_micro_batch(given, memory, device, ranks)
    room = FILLED[device] * (memory - PROCESS)
    assert peak_memory(given, found, device, ranks) <= room
    assert found == share or peak_memory(given, min(2 * found, share), device, ranks) > room
    assert found == share or found.bit_count() == 1


def test_a_step_that_fits_whole_is_one_pass() -> None:
    given = pocket(4)
    assert largest_micro_batch(given, 8 * 10**9, "cpu") == given.batch_rows
    assert largest_micro_batch(given, 8 * 10**9, "cpu", ranks=3) == -(-given.batch_rows // 3)


def test_where_no_row_fits_depth_and_memory_are_named() -> None:
    with pytest.raises(ValueError, match=r"depth 24: one row of 2048 tokens needs .* there are 4"):
        largest_micro_batch(nanochat(24), 4 * 10**9, "cuda")


def test_short_windows_keep_less_than_the_square_and_more_than_none() -> None:
    short, whole = (shape(4, 256, 4096, 2048, pattern) for pattern in ("S", "L"))
    heads, window, length = whole.heads, short.windows[0], 2048
    difference = peak_memory(short, 8, "cpu") - peak_memory(whole, 8, "cpu")
    assert 0 < difference < 3 * 8 * heads * length * (window + 64) * 4
    assert peak_memory(replace(whole, windows=short.windows), 8, "cuda") == peak_memory(
        whole, 8, "cuda"
    )


def test_memory_of_the_machine_is_what_its_control_groups_allow(tmp_path: Path) -> None:
    job = tmp_path / "sys/fs/cgroup/job/step"
    job.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/old\n0::/job/step\n")
    (job / "memory.max").write_text("max\n")
    (job.parent / "memory.max").write_text("4096\n")
    assert devices._group_limits(tmp_path) == [4096]
    assert devices._group_limits(tmp_path / "elsewhere") == []
    assert 2**28 < devices.memory() < 2**50
