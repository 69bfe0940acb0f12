"""Prompts read once, logits only where they are asked, sorted batches: what CORE finds is what it finds row by row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from slm.data.tokenizer import Tokenizer
from slm.evaluate import bundle, core
from slm.evaluate import prompts as tasks
from slm.evaluate.batching import Batches, Lane, grouped, lanes_of
from slm.evaluate.bundle import Bundle, Task
from slm.evaluate.core import Asked, Judge, evaluate, evaluate_all, judge_by, judge_of, summed
from slm.evaluate.prompts import Planned
from slm.evaluate.scores import Unanswered
from slm.model.gpt import GPT
from tests import bundles
from tests.one_by_one import decide

CPU = torch.device("cpu")


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
    short = GPT(replace(model.given, sequence_length=context))
    short.load_state_dict(model.state_dict())
    return short


def whole(model: GPT) -> Callable[[Tensor], Tensor]:
    return torch.no_grad()(model.forward)


def planned(
    counting: Bundle, label: str, tokenizer: Tokenizer
) -> tuple[Task, list[bundle.Example], Planned]:
    task = next(task for task in counting.tasks if task.label == label)
    examples = tasks.ordered(task, counting.examples(task))
    return task, examples, tasks.plan(task, examples, range(len(examples)), tokenizer)


@pytest.mark.parametrize("label", bundles.TASKS)
@pytest.mark.parametrize("context", [bundles.CONTEXT, 40, 10])
def test_every_decision_and_loss_is_that_of_one_example_at_a_time(
    label: str, context: int, counting: Bundle, tokenizer: Tokenizer, model: GPT
) -> None:
    own = shorter(model, context)
    task, examples, plan = planned(counting, label, tokenizer)
    judge = judge_of(own)
    lanes = lanes_of(plan, judge.context)
    found = evaluate(task, plan, lanes, judge, tokens=700)
    each = found["each"]
    for index in range(len(examples)):
        wanted = decide(task, examples, index, tokenizer, whole(own), context)
        assert each["correct"][index] == wanted.get("correct")
        if "correct" in wanted:
            assert not each["tie"][index]
            assert each["choice"][index] == wanted.get("choice")
            nats = wanted["nats"][examples[index].get("gold", 0)]
            assert each["gold_nats"][index] == pytest.approx(nats, rel=1e-5, abs=1e-6)
    assert found["skipped"] == each["correct"].count(None) == lanes.skipped.sum()
    assert (
        context < 40 or found["accuracy"] > task.baseline + 0.1
    )  # it has learned: these are decisions, not draws
    right = [correct for correct in each["correct"] if correct is not None]
    assert (found["examples"], found["accuracy"]) == (len(right), sum(right) / len(right))


def test_the_contexts_above_hold_all_crop_some_and_skip_some(
    counting: Bundle, tokenizer: Tokenizer
) -> None:
    counts = {}
    for context in (bundles.CONTEXT, 40, 10):
        every = [
            lanes_of(planned(counting, label, tokenizer)[2], context) for label in bundles.TASKS
        ]
        counts[context] = tuple(
            sum(getattr(own, name).sum() for own in every) for name in ("cropped", "skipped")
        )
    assert counts[bundles.CONTEXT] == (0, 0)
    assert counts[40][0] > 100
    assert counts[40][1] == 0
    assert 0 < counts[10][1] < counts[10][0]


@pytest.mark.parametrize("label", bundles.TASKS)
def test_a_callable_row_by_row_and_the_model_with_shared_prompts_agree_on_every_sum(
    label: str, counting: Bundle, tokenizer: Tokenizer, model: GPT
) -> None:
    _, _, plan = planned(counting, label, tokenizer)
    found = []
    for judge in (judge_of(model), judge_by(whole(model), bundles.CONTEXT, CPU)):
        lanes = lanes_of(plan, judge.context, judge.shares)
        found.append(summed(plan, grouped(lanes.lanes, 900), judge))
    assert torch.allclose(*found, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[0][1:], found[1][1:])


@pytest.mark.parametrize("label", bundles.TASKS)
def test_where_attention_must_not_be_compiled_for_every_length_masks_give_the_same(
    label: str, counting: Bundle, tokenizer: Tokenizer, model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, plan = planned(counting, label, tokenizer)
    groups = grouped(lanes_of(plan, bundles.CONTEXT).lanes, 900)
    found = summed(plan, groups, judge_of(model))
    monkeypatch.setattr(core, "kernel", lambda device, dtype: "flex")
    masked = summed(plan, groups, judge_of(model))
    assert torch.allclose(masked, found, rtol=1e-5, atol=1e-5)
    assert (
        plan.lengths.max() > min(model.given.windows) + 1 or "zeroshot" in label or label == "fits"
    )


def test_prompts_are_read_once_and_last_tokens_never(
    counting: Bundle, tokenizer: Tokenizer
) -> None:
    _, _, plan = planned(counting, "follows", tokenizer)
    lanes = lanes_of(plan, None)
    assert lanes.tokens == (plan.prompts.sum() + np.maximum(0, plan.tails - 1).sum())
    apart = lanes_of(plan, None, shared=False)
    assert apart.tokens == (plan.lengths - 1).sum() > 2 * lanes.tokens


def test_every_token_asked_is_asked_once_in_whatever_batches(
    counting: Bundle, tokenizer: Tokenizer
) -> None:
    for label in bundles.TASKS:
        _, _, plan = planned(counting, label, tokenizer)
        for context, shared in ((None, True), (None, False), (40, True)):
            lanes = lanes_of(plan, context, shared)
            asked = [Batches(plan).batch(group) for group in grouped(lanes.lanes, 500)]
            rows = np.concatenate([batch.rows for batch in asked])
            assert np.array_equal(np.bincount(rows, minlength=len(plan.spans)), plan.spans)
            assert all(
                batch.prompts.size + batch.tails.size <= 500 or len(batch.prompts) == 1
                for batch in asked
            )
            assert sum(len(batch.ids) for batch in asked) == lanes.tokens


def test_what_ranks_find_adds_up(counting: Bundle, tokenizer: Tokenizer, model: GPT) -> None:
    _, _, plan = planned(counting, "fits", tokenizer)
    judge = judge_of(model)
    lanes = lanes_of(plan, judge.context)
    groups = grouped(lanes.lanes, 300)
    alone = summed(plan, groups, judge)
    shares = [summed(plan, groups[rank::3], judge) for rank in range(3)]
    assert all(share[0].any() for share in shares)
    assert torch.equal(sum(shares), alone)


def test_a_plan_is_kept_for_its_tokeniser_bundle_and_cut(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = bundle.read(bundles.write(tmp_path / "bundle"))
    task = own.tasks[0]
    first = tasks.planned(own, task, tokenizer)
    monkeypatch.setattr(tasks, "plan", None)  # nothing is planned again
    again = tasks.planned(own, task, tokenizer)
    assert all(
        np.array_equal(one, other) for one, other in zip(vars(first).values(), vars(again).values())
    )
    for other in ((Tokenizer(tokenizer.tokens[:270]), None), (tokenizer, 20)):
        with pytest.raises(TypeError):
            tasks.planned(own, task, *other)


def test_a_cut_changes_the_shots_and_one_too_short_for_them_is_refused(counting: Bundle) -> None:
    task = counting.tasks[0]
    examples = counting.examples(task)
    every, cut = tasks.ordered(task, examples), tasks.ordered(task, examples, 10)
    assert cut == every[:10]
    assert tasks.texts_of(task, cut, 0) != tasks.texts_of(task, every, 0)
    with pytest.raises(
        ValueError, match="task follows shows 4 examples before each: 4 examples are too few"
    ):
        tasks.ordered(task, examples, 4)


class Letters:
    """A tokeniser of single characters that merges what it is told to."""

    bos = 0

    def __init__(self, merged: str = "") -> None:
        self.merged = merged

    def encode(self, text: str) -> list[int]:
        marked = text.replace(self.merged, "\x01") if self.merged else text
        return [ord(letter) for letter in marked]


def made(kind: str, *examples: bundle.Example, shots: int = 0) -> tuple[Task, list[bundle.Example]]:
    return Task("made", kind, "made.jsonl", shots, " ", 0.0, 0.0), list(examples)


def test_a_continuation_that_a_tokeniser_joins_to_its_context_is_refused() -> None:
    task, examples = made("language_modeling", {"context": "a", "continuation": "b"})
    assert tasks.plan(task, examples, [0], Letters()).spans.tolist() == [2]
    with pytest.raises(
        ValueError, match="task made, example 0: its continuation is no tokens of its own"
    ):
        tasks.plan(task, examples, [0], Letters("a b"))


def test_a_tokeniser_without_bos_is_refused() -> None:
    nameless = Letters()
    nameless.bos = None
    with pytest.raises(ValueError, match=r"this tokeniser has no <.bos.>"):
        tasks.plan(*made("language_modeling", {"context": "a", "continuation": "b"}), [0], nameless)


def test_a_context_of_blanks_leaves_the_shots() -> None:
    task, examples = made(
        "language_modeling", *[{"context": " ", "continuation": letter} for letter in "ab"], shots=1
    )
    assert tasks.texts_of(task, examples, 0) == ([" b\n\n a"], "b")
    with pytest.raises(ValueError, match="example 0: its continuation is no tokens of its own"):
        tasks.plan(task, examples, [0], Letters())


def choose(losses: list[float], choices: list[str], gold: int) -> dict:
    """The document of one question, of a judge for whom the token of letter x costs losses[x]."""
    task, examples = made("multiple_choice", {"query": "q", "choices": choices, "gold": gold})
    plan = tasks.plan(task, examples, [0], Letters())

    def score(batch: tasks.Any) -> Tensor:
        costs = torch.tensor([losses[target - ord("a")] for target in batch.targets.tolist()])
        return torch.stack([costs, torch.zeros_like(costs), torch.zeros_like(costs)])

    return evaluate(task, plan, lanes_of(plan, 10), Judge(score, 10, True, CPU))


def test_the_lowest_mean_loss_wins_and_the_first_of_equals() -> None:
    assert choose([1, 2, 3], ["b", "a", "c"], 1)["each"]["choice"] == [1]
    assert choose([1, 2, 3], ["b", "ac", "aaa"], 1)["each"]["choice"] == [2]
    tied = choose([1, 2, 3], ["b", "ac", "c"], 1)
    assert (tied["each"]["choice"], tied["ties"]) == ([0], 1)
    near = choose([1, 2, 1 + 5e-6], ["c", "a"], 1)
    assert (near["each"]["choice"], near["ties"]) == ([1], 1)


def test_a_choice_without_tokens_of_its_own_has_no_mean_and_wins_only_where_it_is_first() -> None:
    assert choose([1, 2, 3], ["a", "ab"], 1)["each"]["choice"] == [0]
    assert choose([1, 2, 3], ["ab", "a"], 1)["each"]["choice"] == [0]
    assert choose([1, 2, 3], ["ac", "a", "ab"], 1)["each"]["choice"] == [2]
    assert choose([1, 2, 3], ["a", "ab"], 1)["each"]["gold_probability"] == [None]


def test_a_loss_that_is_no_number_and_a_context_for_nothing_are_errors_of_their_task() -> None:
    with pytest.raises(Unanswered, match="task made: the loss of example 0 is no number"):
        choose([float("nan"), 1], ["a", "b"], 0)
    task, examples = made("language_modeling", {"context": "a", "continuation": "bcd"})
    plan = tasks.plan(task, examples, [0], Letters())
    with pytest.raises(Unanswered, match="no example fits into a context of 4 tokens"):
        evaluate(task, plan, lanes_of(plan, 4), Judge(lambda batch: torch.zeros(0), 4, True, CPU))
    assert lanes_of(plan, 5).lanes == [Lane((0,), 1, 4, (0,))]


def test_bytes_are_those_of_the_text_that_is_scored() -> None:
    task, examples = made("multiple_choice", {"query": "q", "choices": ["abé", "abc"], "gold": 0})
    assert tasks.plan(task, examples, [0], Letters()).bytes.tolist() == [2]
    task, examples = made("language_modeling", {"context": "a ", "continuation": "é\n"})
    assert tasks.plan(task, examples, [0], Letters()).bytes.tolist() == [4]
    task, examples = made(
        "schema", {"context_options": ["ax", "bx"], "continuation": "c", "gold": 1}
    )
    assert tasks.plan(task, examples, [0], Letters()).bytes.tolist() == [3]


def test_over_all_tasks_one_that_failed_leaves_no_core_and_a_choice_of_tasks_is_no_core(
    counting: Bundle, tokenizer: Tokenizer, model: GPT, tmp_path: Path
) -> None:
    judge = judge_of(model)
    every = evaluate_all(Asked(counting), tokenizer, judge, tmp_path)
    assert every["core"] == every["centred"]
    assert every["core"] == pytest.approx(
        np.mean([own["centred"] for own in every["tasks"].values()])
    )
    some = evaluate_all(Asked(counting, labels=("fits",)), tokenizer, judge, tmp_path)
    assert (some["core"], some["centred"]) == (None, every["tasks"]["fits"]["centred"])
    for kept in tmp_path.iterdir():
        kept.unlink()
    broken = replace(
        judge,
        score=lambda batch: judge.score(batch) * (torch.nan if batch.places.max() > 150 else 1),
    )
    failed = evaluate_all(Asked(counting), tokenizer, broken, tmp_path)
    assert "is no number" in failed["tasks"]["follows"]["error"]
    assert failed["tasks"]["fits"] == every["tasks"]["fits"]
    assert (failed["core"], failed["centred"], failed["bits_per_byte"]) == (None, None, None)
    with pytest.raises(
        ValueError, match="has no task other: it has follows, follows_zeroshot, fits, goes_on"
    ):
        evaluate_all(Asked(counting, labels=("other",)), tokenizer, judge, tmp_path)
