"""CORE decides like nanochat, example by example, for a synthetic tokeniser and model."""

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

from slm.evaluate import bundle, prompts, scores
from slm.evaluate.batching import group_sequences, pack
from slm.evaluate.bundle import Bundle, Example, Task
from slm.evaluate.core import sum_scores
from slm.evaluate.scores import Decision, Score, centred, decide
from tests.evaluate.row_scorer import RowScorer

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
    """Return what followed the latest of the longest equal pasts of each token, and its length."""
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
        for row, row_logits in zip(ids.numpy(), logits):
            following, length = induction(row)
            bonus = np.where(length > 0, 2.0 + length, 0).astype(np.float32)
            row_logits[np.arange(len(row)), following] += bonus
        return torch.from_numpy(logits)


SECTIONS = {"full": (None, 10**9), "mpt20": (20, 10**9), "crop384": (None, 384)}
"""Maximum examples per task, and the model's context."""


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Bundle]:
    """The golden values and their bundle."""
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
    maximum, context = SECTIONS[section]
    golden, installed = core
    fake = Fake(golden["sections"][section]["seed"])
    scorer = RowScorer(fake, None, row_length=context)
    tasks = {task.label: task for task in installed.tasks}
    for label, expected in golden["sections"][section]["tasks"].items():
        task = tasks[label]
        examples = prompts.select_examples(task, installed.examples(task), maximum)
        assert len(examples) == expected["n_data"]
        indices = [each["idx"] for each in expected["examples"]]
        tokenized = prompts.tokenize(task, examples, indices, Chunks())
        packed = pack(tokenized, context)
        batches = group_sequences(packed.sequences, 4096)
        sums = sum_scores(scorer, tokenized, batches).numpy()
        decisions = decide(task, tokenized, sums, packed)
        for number, each in enumerate(expected["examples"]):
            check_prompts(task, examples, each)
            rows = tokenized.rows_of(number)
            lengths = tokenized.lengths[rows]
            crops = np.maximum(0, lengths - context)
            assert lengths.tolist() == each["n_tokens"]
            assert (tokenized.starts[rows] - crops).tolist() == np.ravel(each["start"]).tolist()
            assert (lengths - crops).tolist() == np.ravel(each["end"]).tolist()
            assert packed.cropped[number] == (crops.max() > 0)
            assert decisions[number].correct == bool(each["correct"])
            check_losses(decisions[number], sums[0, rows] / tokenized.spans[rows], each)


def check_prompts(task: Task, examples: list[Example], each: dict[str, Any]) -> None:
    texts, context = prompts.render(task, examples, each["idx"])
    texts = [context, *texts] if context else texts
    hashes = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts]
    assert hashes == each["prompt_sha256"]
    assert prompts.draw_shots(task, each["idx"], len(examples)) == each["fewshot"]


def check_losses(decision: Decision, means: np.ndarray, expected: dict[str, Any]) -> None:
    if "mean_loss" in expected:
        assert means == pytest.approx(expected["mean_loss"], abs=2e-4)
        assert (decision.choice, decision.tie) == (expected["pred"], False)
        weights = np.exp(-np.array(expected["mean_loss"]))
        share = weights[expected["gold"]] / weights.sum()
        assert decision.gold_probability == pytest.approx(share, abs=1e-4)
    else:  # golden losses have four decimals
        assert decision.gold_nats == pytest.approx(expected["gold_nll"], rel=1e-3, abs=5e-5)
        assert decision.gold_greedy == np.equal(expected["pred"], expected["gold"]).sum()


def test_gpt2_s_published_scores_follow_from_its_tables_with_either_baseline(
    core: tuple[dict[str, Any], Bundle], reference: Path
) -> None:
    _, installed = core
    published = json.loads((reference / "core" / "reference_scores.json").read_text())
    assert len(published["gpt2_measured"]) == 4
    for model in published["gpt2_measured"]:
        shares = table(reference, model["model"])
        old = scores.mean_score(
            centred(Score(shares[task.label], 0), task.baseline) for task in installed.tasks
        )
        new = scores.mean_score(
            centred(Score(shares[task.label], 0), task.corrected) for task in installed.tasks
        )
        assert old.value == pytest.approx(model["core"], abs=1e-6)
        assert new.value == pytest.approx(
            published["gpt2_with_fixed_baselines"][model["model"]], abs=5e-5
        )


def test_the_standard_error_of_core_is_the_published_one(
    core: tuple[dict[str, Any], Bundle], reference: Path
) -> None:
    _, installed = core
    published = json.loads((reference / "core" / "reference_scores.json").read_text())
    shares = table(reference, "gpt2-xl")
    sizes = {task.label: len(installed.examples(task)) for task in installed.tasks}
    for name, error in published["sampling_se_of_core_at_gpt2xl_accuracies"].items():
        maximum = 10**9 if name == "full" else int(name.partition("/")[0])
        counts = {label: min(maximum, size) for label, size in sizes.items()}
        reached = {
            label: scores.accuracy(shares[label] * count, count) for label, count in counts.items()
        }
        score = scores.mean_score(
            centred(reached[task.label], task.baseline) for task in installed.tasks
        )
        assert score.error == pytest.approx(error, abs=1e-4)


def table(reference: Path, model: str) -> dict[str, float]:
    """Accuracies of a GPT-2 by task, from the bundle's zip."""
    with zipfile.ZipFile(reference / "core" / "core_bundle.zip") as file:
        lines = file.read(f"eval_bundle/openai-community-{model}.csv").decode().splitlines()
    rows = [[cell.strip() for cell in line.split(",")] for line in lines[1:]]
    return {label: float(share) for label, share, _ in rows if share}
