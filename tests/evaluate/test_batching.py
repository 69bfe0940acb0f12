"""Shared prefixes, sparse logits and sorted batches give what reading row by row gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from slm.data.tokenizer import Tokenizer
from slm.evaluate import bundle, core, prompts
from slm.evaluate.batching import Batch, PackedSequence, build_batch, group_sequences, pack
from slm.evaluate.bundle import Bundle, Example, Task
from slm.evaluate.core import Scorer, evaluate_bundle, evaluate_task, sum_scores
from slm.evaluate.prompts import TokenizedTask
from slm.evaluate.request import CoreRequest
from slm.evaluate.scores import TaskError
from slm.model.gpt import GPT
from tests import bundles
from tests.evaluate.row_scorer import RowScorer
from tests.one_by_one import decide


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return bundles.tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> GPT:
    return bundles.learned(tokenizer)


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle.read(bundles.write(tmp_path_factory.mktemp("bundle")))


def shorter(model: GPT, context: int) -> GPT:
    """The model with less context."""
    short = GPT(replace(model.hp, sequence_length=context))
    short.load_state_dict(model.state_dict())
    return short


def logits_of(model: GPT) -> Callable[[Tensor], Tensor]:
    return torch.no_grad()(model.forward)


def tokenized_task(
    counting: Bundle, label: str, tokenizer: Tokenizer
) -> tuple[Task, list[Example], TokenizedTask]:
    task = next(task for task in counting.tasks if task.label == label)
    examples = prompts.select_examples(task, counting.examples(task))
    return task, examples, prompts.tokenize(task, examples, range(len(examples)), tokenizer)


@pytest.mark.parametrize("label", bundles.TASKS)
@pytest.mark.parametrize("context", [bundles.CONTEXT, 40, 10])
def test_every_decision_and_loss_is_that_of_one_example_at_a_time(
    label: str, context: int, counting: Bundle, tokenizer: Tokenizer, model: GPT
) -> None:
    short = shorter(model, context)
    task, examples, tokenized = tokenized_task(counting, label, tokenizer)
    packed = pack(tokenized, context)
    scorer = Scorer(short, tokenizer, batch_tokens=700)
    document = evaluate_task(scorer, task, tokenized, packed)
    each = document["each"]
    for index in range(len(examples)):
        expected = decide(task, examples, index, tokenizer, logits_of(short), context)
        assert each["correct"][index] == expected.get("correct")
        if "correct" in expected:
            assert not each["tie"][index]
            assert each["choice"][index] == expected.get("choice")
            nats = expected["nats"][examples[index].get("gold", 0)]
            assert each["gold_nats"][index] == pytest.approx(nats, rel=1e-5, abs=1e-6)
    assert document["skipped"] == each["correct"].count(None) == packed.skipped.sum()
    # The model has learned the tasks, so these are decisions and not draws.
    assert context < 40 or document["accuracy"] > task.baseline + 0.1
    decided = [correct for correct in each["correct"] if correct is not None]
    assert document["examples"] == len(decided)
    assert document["accuracy"] == sum(decided) / len(decided)


def test_the_contexts_above_keep_all_crop_some_and_skip_some(
    counting: Bundle, tokenizer: Tokenizer
) -> None:
    cropped, skipped = {}, {}
    for context in (bundles.CONTEXT, 40, 10):
        tasks = [
            pack(tokenized_task(counting, label, tokenizer)[2], context) for label in bundles.TASKS
        ]
        cropped[context] = sum(task.cropped.sum() for task in tasks)
        skipped[context] = sum(task.skipped.sum() for task in tasks)
    assert (cropped[bundles.CONTEXT], skipped[bundles.CONTEXT]) == (0, 0)
    assert cropped[40] > 100
    assert skipped[40] == 0
    assert 0 < skipped[10] < cropped[10]


@pytest.mark.parametrize("label", bundles.TASKS)
def test_shared_prefixes_give_the_sums_of_rows_read_one_by_one(
    label: str, counting: Bundle, tokenizer: Tokenizer, model: GPT
) -> None:
    _, _, tokenized = tokenized_task(counting, label, tokenizer)
    batches = group_sequences(pack(tokenized, bundles.CONTEXT).sequences, 900)
    shared = sum_scores(Scorer(model, tokenizer), tokenized, batches)
    apart = sum_scores(RowScorer(logits_of(model), tokenizer), tokenized, batches)
    assert torch.allclose(shared, apart, rtol=1e-5, atol=1e-5)
    assert torch.equal(shared[1:], apart[1:])


@pytest.mark.parametrize("label", bundles.TASKS)
def test_masks_replace_flex_attention_without_changing_sums(
    label: str, counting: Bundle, tokenizer: Tokenizer, model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, tokenized = tokenized_task(counting, label, tokenizer)
    batches = group_sequences(pack(tokenized, bundles.CONTEXT).sequences, 900)
    scorer = Scorer(model, tokenizer)
    sums = sum_scores(scorer, tokenized, batches)
    monkeypatch.setattr(core, "kernel", lambda device, dtype: "flex")
    masked = sum_scores(scorer, tokenized, batches)
    assert torch.allclose(masked, sums, rtol=1e-5, atol=1e-5)
    is_longer_than_window = tokenized.lengths.max() > min(model.hp.windows) + 1
    assert is_longer_than_window or "zeroshot" in label or label == "fits"


def test_prefixes_are_read_once_and_last_tokens_never(
    counting: Bundle, tokenizer: Tokenizer
) -> None:
    _, _, tokenized = tokenized_task(counting, "follows", tokenizer)
    packed = pack(tokenized, 10**9)
    suffixes = np.maximum(0, tokenized.suffixes - 1)
    assert packed.tokens == tokenized.prefixes.sum() + suffixes.sum()
    assert (tokenized.lengths - 1).sum() > 2 * packed.tokens


def test_every_span_is_scored_once_in_batches_of_any_context(
    counting: Bundle, tokenizer: Tokenizer
) -> None:
    for label in bundles.TASKS:
        _, _, tokenized = tokenized_task(counting, label, tokenizer)
        for context in (10**9, 40):
            packed = pack(tokenized, context)
            groups = group_sequences(packed.sequences, 500)
            batches = [build_batch(tokenized, group) for group in groups]
            rows = np.concatenate([batch.rows for batch in batches])
            assert np.array_equal(
                np.bincount(rows, minlength=len(tokenized.spans)), tokenized.spans
            )
            for batch in batches:
                cells = batch.prefixes.size + batch.suffixes.size
                assert cells <= 500 or len(batch.prefixes) == 1
            assert sum(len(batch.ids) for batch in batches) == packed.tokens


def test_the_sums_of_ranks_add_up(counting: Bundle, tokenizer: Tokenizer, model: GPT) -> None:
    _, _, tokenized = tokenized_task(counting, "fits", tokenizer)
    scorer = Scorer(model, tokenizer)
    batches = group_sequences(pack(tokenized, scorer.context).sequences, 300)
    alone = sum_scores(scorer, tokenized, batches)
    shares = [sum_scores(scorer, tokenized, batches[rank::3]) for rank in range(3)]
    assert all(share[0].any() for share in shares)
    assert torch.equal(sum(shares), alone)


def test_a_tokenized_task_is_cached_by_tokeniser_bundle_and_maximum(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = bundle.read(bundles.write(tmp_path / "bundle"))
    task = counting.tasks[0]
    first = prompts.load_or_tokenize(counting, task, tokenizer)
    monkeypatch.setattr(prompts, "tokenize", None)  # nothing is tokenized again
    second = prompts.load_or_tokenize(counting, task, tokenizer)
    for name in prompts.TokenizedTask.__dataclass_fields__:
        assert np.array_equal(getattr(first, name), getattr(second, name))
    for arguments in ((Tokenizer(tokenizer.tokens[:270]), None), (tokenizer, 20)):
        with pytest.raises(TypeError):
            prompts.load_or_tokenize(counting, task, *arguments)


def test_a_cache_file_has_the_names_of_its_first_version(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    counting = bundle.read(bundles.write(tmp_path / "bundle"))
    tokenized = prompts.load_or_tokenize(counting, counting.tasks[0], tokenizer)
    (path,) = (counting.folder / "plans").iterdir()
    with np.load(path) as arrays:
        assert [*arrays] == ["tokens", "prompts", "tails", "starts", "first", "golds", "bytes"]
        assert np.array_equal(arrays["tails"], tokenized.suffixes)
        assert np.array_equal(arrays["bytes"], tokenized.gold_bytes)


def test_a_maximum_changes_the_shots_and_raises_if_too_small_for_them(counting: Bundle) -> None:
    task = counting.tasks[0]
    examples = counting.examples(task)
    every = prompts.select_examples(task, examples)
    cut = prompts.select_examples(task, examples, 10)
    assert cut == every[:10]
    assert prompts.render(task, cut, 0) != prompts.render(task, every, 0)
    with pytest.raises(ValueError, match="task follows needs 4 shots: 4 examples are too few"):
        prompts.select_examples(task, examples, 4)


class Letters:
    """A tokeniser of single characters that can merge one string into a token."""

    bos = 0

    def __init__(self, merged: str = "") -> None:
        self.merged = merged

    def encode(self, text: str) -> list[int]:
        marked = text.replace(self.merged, "\x01") if self.merged else text
        return [ord(letter) for letter in marked]


def task_of(kind: str, *examples: Example, shots: int = 0) -> tuple[Task, list[Example]]:
    return Task("made", kind, "made.jsonl", shots, " ", 0.0, 0.0), list(examples)


def test_a_continuation_merged_with_its_context_is_an_error() -> None:
    task, examples = task_of("language_modeling", {"context": "a", "continuation": "b"})
    assert prompts.tokenize(task, examples, [0], Letters()).spans.tolist() == [2]
    with pytest.raises(
        ValueError, match="task made, example 0: its continuation has no tokens of its own"
    ):
        prompts.tokenize(task, examples, [0], Letters("a b"))


def test_a_tokeniser_without_bos_is_an_error() -> None:
    letters = Letters()
    letters.bos = None
    task, examples = task_of("language_modeling", {"context": "a", "continuation": "b"})
    with pytest.raises(ValueError, match=r"this tokeniser has no <.bos.>"):
        prompts.tokenize(task, examples, [0], letters)


def test_a_context_of_blanks_renders_the_shots_alone() -> None:
    examples = [{"context": " ", "continuation": letter} for letter in "ab"]
    task, _ = task_of("language_modeling", shots=1)
    assert prompts.render(task, examples, 0) == ([" b\n\n a"], "b")
    with pytest.raises(ValueError, match="example 0: its continuation has no tokens of its own"):
        prompts.tokenize(task, examples, [0], Letters())


class CostScorer(RowScorer):
    """Scorer whose model maps a letter to the loss of its token."""

    def score(self, batch: Batch) -> Tensor:
        costs = torch.tensor([self.model[target - ord("a")] for target in batch.targets.tolist()])
        return torch.stack([costs, torch.zeros_like(costs), torch.zeros_like(costs)])


def choose(losses: list[float], choices: list[str], gold: int) -> dict[str, Any]:
    """The document of one question if the token of letter x costs losses[x]."""
    task, examples = task_of("multiple_choice", {"query": "q", "choices": choices, "gold": gold})
    tokenized = prompts.tokenize(task, examples, [0], Letters())
    return evaluate_task(CostScorer(losses, None), task, tokenized, pack(tokenized, 10))


def test_the_lowest_mean_loss_wins_and_the_first_of_equals() -> None:
    assert choose([1, 2, 3], ["b", "a", "c"], 1)["each"]["choice"] == [1]
    assert choose([1, 2, 3], ["b", "ac", "aaa"], 1)["each"]["choice"] == [2]
    tied = choose([1, 2, 3], ["b", "ac", "c"], 1)
    assert (tied["each"]["choice"], tied["ties"]) == ([0], 1)
    close = choose([1, 2, 1 + 5e-6], ["c", "a"], 1)
    assert (close["each"]["choice"], close["ties"]) == ([1], 1)


def test_a_choice_without_tokens_has_no_mean_and_wins_only_if_it_is_first() -> None:
    assert choose([1, 2, 3], ["a", "ab"], 1)["each"]["choice"] == [0]
    assert choose([1, 2, 3], ["ab", "a"], 1)["each"]["choice"] == [0]
    assert choose([1, 2, 3], ["ac", "a", "ab"], 1)["each"]["choice"] == [2]
    assert choose([1, 2, 3], ["a", "ab"], 1)["each"]["gold_probability"] == [None]


def test_an_infinite_loss_and_a_short_context_are_errors_of_their_task() -> None:
    with pytest.raises(TaskError, match="task made: the loss of example 0 is not finite"):
        choose([float("nan"), 1], ["a", "b"], 0)
    task, examples = task_of("language_modeling", {"context": "a", "continuation": "bcd"})
    tokenized = prompts.tokenize(task, examples, [0], Letters())
    with pytest.raises(TaskError, match="no example fits into a context of 4 tokens"):
        evaluate_task(CostScorer([], None, row_length=4), task, tokenized, pack(tokenized, 4))
    assert pack(tokenized, 5).sequences == [PackedSequence((0,), 1, 4, (0,))]


def test_bytes_are_those_of_the_scored_text() -> None:
    for kind, example, expected in (
        ("multiple_choice", {"query": "q", "choices": ["abé", "abc"], "gold": 0}, [2]),
        ("language_modeling", {"context": "a ", "continuation": "é\n"}, [4]),
        ("schema", {"context_options": ["ax", "bx"], "continuation": "c", "gold": 1}, [3]),
    ):
        task, examples = task_of(kind, example)
        assert prompts.tokenize(task, examples, [0], Letters()).gold_bytes.tolist() == expected


class BrokenScorer(Scorer):
    """Scorer whose losses are NaN in batches with long rows."""

    def score(self, batch: Batch) -> Tensor:
        return super().score(batch) * (torch.nan if batch.positions.max() > 150 else 1)


def test_core_needs_every_task_of_the_bundle(
    counting: Bundle, tokenizer: Tokenizer, model: GPT, tmp_path: Path
) -> None:
    scorer = Scorer(model, tokenizer)
    every = evaluate_bundle(scorer, counting, CoreRequest(), tmp_path / "every")
    assert every["core"] == every["centred"]
    means = [task["centred"] for task in every["tasks"].values()]
    assert every["core"] == pytest.approx(np.mean(means))
    some = evaluate_bundle(scorer, counting, CoreRequest(tasks=("fits",)), tmp_path / "every")
    assert (some["core"], some["centred"]) == (None, every["tasks"]["fits"]["centred"])
    broken = BrokenScorer(model, tokenizer)
    failed = evaluate_bundle(broken, counting, CoreRequest(), tmp_path / "failed")
    assert "is not finite" in failed["tasks"]["follows"]["error"]
    assert failed["tasks"]["fits"] == every["tasks"]["fits"]
    assert (failed["core"], failed["centred"], failed["bits_per_byte"]) == (None, None, None)
    with pytest.raises(
        ValueError, match="has no task other: it has follows, follows_zeroshot, fits, goes_on"
    ):
        evaluate_bundle(scorer, counting, CoreRequest(tasks=("other",)), tmp_path / "other")
