"""CORE decides as nanochat does, example by example, for the made-up tokeniser and model of the golden values."""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slm.evaluate import bundle, scores
from slm.evaluate import prompts as tasks
from slm.evaluate.batching import grouped, lanes_of
from slm.evaluate.bundle import Bundle
from slm.evaluate.core import judge_by, summed
from slm.evaluate.scores import Decision, Score, centred, decided

VOCABULARY, BOS, REACH = 1024, 0, 8
CHUNKS = re.compile(r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")


class Chunks:
    """The tokeniser of the golden values: a hash of each word."""

    bos = BOS

    def encode(self, text: str) -> list[int]:
        return [1 + zlib.crc32(chunk.encode()) % (VOCABULARY - 1) for chunk in CHUNKS.findall(text)]


def noise(seed: int) -> np.ndarray:
    """The logits of next tokens by the current one alone, hashed (V, V)."""
    token = np.arange(VOCABULARY, dtype=np.uint64)
    x = (token[:, None] * 7919 + token * 104729 + seed) % 2**32
    x = x * 2654435761 % 2**32
    x ^= x >> 15
    x = x * 2246822519 % 2**32
    x ^= x >> 13
    return ((x >> 8).astype(np.float64) / 2**24 * 4).astype(np.float32)


def induction(row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each token the later of the longest equal pasts' next token, and how long that past is (0 for none)."""
    length = len(row)
    equal = (row[:, None] == row) & np.tri(length, k=-1, dtype=bool)  # [t, s], s < t
    longest, reach = np.zeros((length, length), np.int8), equal
    for shift in range(REACH):
        longest += reach
        shifted = np.zeros_like(equal)
        shifted[shift + 1 :, shift + 1 :] = equal[: length - shift - 1, : length - shift - 1]
        reach = reach & shifted
    latest = length - 1 - longest[:, ::-1].argmax(1)
    return row[np.minimum(latest + 1, length - 1)], longest.max(1)


class Fake:
    """The model of the golden values."""

    def __init__(self, seed: int) -> None:
        self.noise = noise(seed)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self.noise[ids.numpy()]
        for row, own in zip(ids.numpy(), logits):
            following, length = induction(row)
            own[np.arange(len(row)), following] += np.where(length > 0, 2.0 + length, 0).astype(
                np.float32
            )
        return torch.from_numpy(logits)


SECTIONS = {"full": (None, None), "mpt20": (20, None), "crop384": (None, 384)}
"""Examples of each task, and the model's context."""


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Bundle]:
    """The golden values and the bundle that they are of."""
    if not (folder := os.environ.get("SLM_REFERENCE")):
        pytest.skip("SLM_REFERENCE is unset: no golden values to compare with")
    golden = json.loads(Path(folder, "core", "golden_public.json").read_text())
    return golden, bundle.install(
        Path(folder, "core", "core_bundle.zip"), tmp_path_factory.mktemp("home")
    )


@pytest.mark.parametrize("section", SECTIONS)
def test_every_published_prompt_span_loss_and_decision(
    section: str, core: tuple[dict[str, Any], Bundle]
) -> None:
    most, context = SECTIONS[section]
    golden, whole = core
    judge = judge_by(Fake(golden["sections"][section]["seed"]), context, torch.device("cpu"))
    named = {task.label: task for task in whole.tasks}
    for label, wanted in golden["sections"][section]["tasks"].items():
        task = named[label]
        examples = tasks.ordered(task, whole.examples(task), most)
        assert len(examples) == wanted["n_data"]
        plan = tasks.plan(task, examples, [each["idx"] for each in wanted["examples"]], Chunks())
        lanes = lanes_of(plan, context, shared=False)
        sums = summed(plan, grouped(lanes.lanes, 4096), judge).numpy()
        decisions = decided(task, plan, sums, lanes)
        for number, each in enumerate(wanted["examples"]):
            texts, without = tasks.texts_of(task, examples, each["idx"])
            texts = [without, *texts] if without else texts
            assert [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts] == each[
                "prompt_sha256"
            ]
            assert tasks.shots_of(task, each["idx"], len(examples)) == each["fewshot"]
            own = slice(*plan.first[number : number + 2])
            lengths = plan.lengths[own]
            crops = np.maximum(0, lengths - (context or lengths.max()))
            assert lengths.tolist() == each["n_tokens"]
            assert (plan.starts[own] - crops).tolist() == np.ravel(each["start"]).tolist()
            assert (lengths - crops).tolist() == np.ravel(each["end"]).tolist()
            assert lanes.cropped[number] == (crops.max() > 0)
            assert decisions[number].correct == bool(each["correct"])
            check_losses(decisions[number], sums[0, own] / plan.spans[own], each)


def check_losses(decision: Decision, means: np.ndarray, wanted: dict[str, Any]) -> None:
    if "mean_loss" in wanted:
        assert means == pytest.approx(wanted["mean_loss"], abs=2e-4)
        assert (decision.choice, decision.tie) == (wanted["pred"], False)
        shares = np.exp(-np.array(wanted["mean_loss"]))
        assert decision.gold_probability == pytest.approx(
            shares[wanted["gold"]] / shares.sum(), abs=1e-4
        )
    else:
        assert decision.gold_nats == pytest.approx(
            wanted["gold_nll"], rel=1e-3, abs=5e-5
        )  # it has four decimals
        assert decision.gold_greedy == np.equal(wanted["pred"], wanted["gold"]).sum()


def test_gpt2_s_published_scores_follow_from_its_tables_under_either_baseline(
    core: tuple[dict[str, Any], Bundle], reference: Path
) -> None:
    _, whole = core
    published = json.loads((reference / "core" / "reference_scores.json").read_text())
    assert len(published["gpt2_measured"]) == 4
    for model in published["gpt2_measured"]:
        shares = table(reference, model["model"])
        old = scores.core(
            centred(Score(shares[task.label], 0), task.baseline) for task in whole.tasks
        )
        new = scores.core(
            centred(Score(shares[task.label], 0), task.corrected) for task in whole.tasks
        )
        assert old.value == pytest.approx(model["core"], abs=1e-6)
        assert new.value == pytest.approx(
            published["gpt2_with_fixed_baselines"][model["model"]], abs=5e-5
        )


def test_the_standard_error_of_core_is_the_published_one(
    core: tuple[dict[str, Any], Bundle], reference: Path
) -> None:
    _, whole = core
    published = json.loads((reference / "core" / "reference_scores.json").read_text())
    shares, sizes = (
        table(reference, "gpt2-xl"),
        {task.label: len(whole.examples(task)) for task in whole.tasks},
    )
    for name, error in published["sampling_se_of_core_at_gpt2xl_accuracies"].items():
        most = 10**9 if name == "full" else int(name.partition("/")[0])
        counts = {label: min(most, size) for label, size in sizes.items()}
        reached = {
            label: scores.accuracy(shares[label] * count, count) for label, count in counts.items()
        }
        found = scores.core(centred(reached[task.label], task.baseline) for task in whole.tasks)
        assert found.error == pytest.approx(error, abs=1e-4)


def table(reference: Path, model: str) -> dict[str, float]:
    """GPT-2's accuracies by task, as the bundle's zip has them."""
    with zipfile.ZipFile(reference / "core" / "core_bundle.zip") as file:
        lines = file.read(f"eval_bundle/openai-community-{model}.csv").decode().splitlines()
    rows = [[cell.strip() for cell in line.split(",")] for line in lines[1:]]
    return {label: float(share) for label, share, _ in rows if share}
