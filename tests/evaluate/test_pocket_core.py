"""pocket-core: made from held-out text, at chance for blind models, never called CORE."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from slm.cli.evaluate import evaluate
from slm.data import PreparedDataset, prepare
from slm.data.loader import Rows
from slm.evaluate import bundle
from slm.evaluate import pocket_core as pocket
from slm.evaluate.batching import pack
from slm.evaluate.bundle import Bundle
from slm.evaluate.core import evaluate_bundle
from slm.evaluate.prompts import select_examples, tokenize
from slm.evaluate.request import CoreRequest
from slm.files import read_json, write_json
from slm.model import checkpoints
from slm.model.gpt import GPT
from slm.plan import Plan, code_fingerprint
from slm.recipe import pocket as family
from tests import bundles
from tests.evaluate.row_scorer import RowScorer
from tests.weights import FAMILY

ROOT = Path(__file__).parents[2]
Logits = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    """Sources of this repository as a dataset of the pocket recipe."""
    corpus = tmp_path_factory.mktemp("texts")
    for path in [*ROOT.glob("slm/**/*.py"), *ROOT.glob("tests/**/*.py")]:
        (corpus / f"{path.parent.name}.{path.stem}.txt").write_text(path.read_text())
    return prepare(str(corpus), family(2, steps=70), tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def made(prepared: PreparedDataset, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return pocket.bundle_of(prepared, tmp_path_factory.mktemp("home"))


def held_out(prepared: PreparedDataset) -> list[str]:
    """Return the text of each validation row."""
    rows, tokens = Rows.open(prepared, "validation"), prepared.tokenizer.tokens
    ids = torch.cat(
        [rows.pair(np.arange(len(rows)))[0], rows.pair(np.arange(len(rows)))[1][:, -1:]], dim=1
    )
    return [
        b"".join(tokens[id] for id in row if id < len(tokens)).decode(errors="replace")
        for row in ids.tolist()
    ]


def table(prepared: PreparedDataset, pairs: bool) -> Logits:
    """Return a model of the counts of training tokens, or of training pairs of tokens."""
    vocab = family(2).vocab_size
    rows = np.fromfile(prepared.folder / prepared.files("train")[0]["file"], "<u2").astype(np.int64)
    counts = (
        np.bincount(rows[:-1] * vocab + rows[1:], minlength=vocab**2)
        .reshape(vocab, vocab)
        .astype(float)
    )
    chances = counts + 0.1 if pairs else np.broadcast_to(counts.sum(0) + 0.1, (vocab, vocab))
    logits = torch.from_numpy(np.log(chances / chances.sum(1, keepdims=True)).astype(np.float32))
    return lambda ids: logits[ids]


def reached(made: Bundle, prepared: PreparedDataset, logits: Logits, parts: Path) -> dict:
    scorer = RowScorer(logits, prepared.tokenizer, row_length=128)
    return evaluate_bundle(scorer, made, CoreRequest(), parts)


def test_it_is_a_bundle_of_three_types_with_its_name_and_chance_levels(made: Bundle) -> None:
    assert made.name == "pocket-core"
    assert bundle.read(made.folder) == made
    assert {task.kind: task.baseline for task in made.tasks} == {
        "language_modeling": 0.0,
        "multiple_choice": 0.25,
        "schema": 0.25,
    }
    assert all(len(made.examples(task)) >= 500 for task in made.tasks)


def test_the_same_rows_and_tokeniser_give_the_same_bundle(
    made: Bundle, prepared: PreparedDataset, tmp_path: Path
) -> None:
    assert pocket.bundle_of(prepared, tmp_path).id == made.id
    (folder,) = (tmp_path / "data" / "core").iterdir()
    assert pocket.bundle_of(prepared, tmp_path).folder == folder


def test_every_correct_answer_follows_its_passage_in_a_validation_row(
    made: Bundle, prepared: PreparedDataset
) -> None:
    rows = "\0".join(held_out(prepared))
    for task in made.tasks:
        for example in made.examples(task):
            if task.kind == "language_modeling":
                passage, answer = example["context"], example["continuation"]
            elif task.kind == "multiple_choice":
                passage, answer = example["query"], example["choices"][example["gold"]]
            else:
                passage = example["context_options"][example["gold"]]
                answer = example["continuation"]
            assert f"{passage} {answer}" in rows


def test_each_choice_is_correct_equally_often(made: Bundle) -> None:
    for task in made.tasks:
        if task.kind == "language_modeling":
            continue
        field, examples = bundle.OPTIONS[task.kind], made.examples(task)
        assert {*Counter(example["gold"] for example in examples).values()} == {len(examples) // 4}
        for start in range(0, len(examples), 4):
            four = examples[start : start + 4]
            assert [example["gold"] for example in four] == [0, 1, 2, 3]
            assert all(example[field] == four[0][field] for example in four)
            assert len({*four[0][field]}) == 4


def test_no_question_is_cropped_by_a_context_of_128_tokens(
    made: Bundle, prepared: PreparedDataset
) -> None:
    for task in made.tasks:
        examples = select_examples(task, made.examples(task))
        tokenized = tokenize(task, examples, range(len(examples)), prepared.tokenizer)
        assert not pack(tokenized, 128).cropped.any()
        assert tokenized.spans.min() > 0


def test_a_blind_model_is_at_chance_and_a_better_model_scores_more(
    made: Bundle, prepared: PreparedDataset, tmp_path: Path
) -> None:
    blind, reads = (
        reached(made, prepared, table(prepared, pairs), tmp_path / str(pairs))
        for pairs in (False, True)
    )
    assert blind["tasks"]["which_continuation"]["accuracy"] == 0.25
    assert abs(blind["core"]) < 0.02
    assert reads["core"] - blind["core"] > 3 * np.hypot(
        reads["centred_error"], blind["centred_error"]
    )


def test_too_little_held_out_text_is_an_error_with_its_size(tmp_path: Path) -> None:
    corpus = tmp_path / "texts"
    corpus.mkdir()
    for path in ROOT.glob("tests/**/test_*.py"):
        (corpus / f"{path.stem}.txt").write_text(path.read_text())
    small = prepare(str(corpus), FAMILY(2, steps=70), tmp_path)
    with pytest.raises(
        ValueError, match=r"too little text for pocket-core: its 64 validation rows give .* 500 are"
    ):
        pocket.bundle_of(small, tmp_path)
    assert not (tmp_path / "data" / "core").exists()


def test_changed_validation_rows_are_an_error(prepared: PreparedDataset, tmp_path: Path) -> None:
    rows = bytearray((prepared.folder / "validation.bin").read_bytes())
    rows[1000] ^= 1
    (tmp_path / "validation.bin").write_bytes(rows)
    (tmp_path / "tokenizer.json").write_bytes((prepared.folder / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match="was changed"):
        pocket.bundle_of(PreparedDataset(tmp_path, prepared.manifest), tmp_path)


def test_pocket_core_is_the_default_of_pocket_runs(
    prepared: PreparedDataset, tmp_path: Path
) -> None:
    hp = family(2, steps=70)
    plan = Plan("pocket", "steps=70", 0, hp, prepared.identity(hp), "c0de")
    first = pocket.bundle_for(plan, tmp_path, None, lambda: prepared)
    assert first.name == "pocket-core"
    core = bundle.install(bundles.write(tmp_path / "bundle"), tmp_path)
    assert pocket.bundle_for(plan, tmp_path, "core", lambda: prepared) == core
    assert pocket.bundle_for(plan, tmp_path, None, lambda: prepared) == first
    assert pocket.bundle_for(plan, tmp_path, "pocket-core", lambda: prepared) == first
    assert pocket.bundle_for(plan, tmp_path, first.id[:6], lambda: prepared) == first
    assert (
        pocket.bundle_for(replace(plan, recipe="other"), tmp_path, None, lambda: prepared) == core
    )


def test_the_mode_names_the_requested_examples(made: Bundle) -> None:
    labels = tuple(task.label for task in made.tasks)

    def mode(**request: Any) -> str:
        return CoreRequest(**request).mode(made)

    assert mode() == mode(tasks=labels) == "full"
    assert mode(max_per_task=100) == "100 per task"
    assert mode(without=("which_context",)) == "without which_context"
    assert mode(tasks=("next_tokens", "which_continuation")) == "without which_context"
    assert mode(max_per_task=100, without=("next_tokens",)) == "100 per task, without next_tokens"
    assert mode(tasks=("next_tokens",)) == "tasks next_tokens"
    assert CoreRequest().settings(made)["name"] == "pocket-core"
    with pytest.raises(ValueError, match="has no task riddles: it has next_tokens"):
        mode(without=("riddles",))
    with pytest.raises(ValueError, match=r"has no task$"):
        mode(without=labels)


def test_the_command_makes_it_for_a_pocket_run_and_never_prints_core(
    prepared: PreparedDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    home = tmp_path / "runs"
    hp = family(2, steps=70)
    (home / "data").mkdir(parents=True)
    (home / "data" / prepared.folder.name).symlink_to(prepared.folder)
    plan = Plan("pocket", "steps=70", 0, hp, prepared.identity(hp), code_fingerprint())
    (home / plan.run_id).mkdir()
    write_json(home / plan.run_id / "plan.json", plan.document())
    model = GPT(hp)
    model.initialise(0)
    tensors = {name: tensor.detach() for name, tensor in model.named_parameters()}
    digest = checkpoints.save(
        home / plan.run_id / "model.safetensors", tensors, {"run_id": plan.run_id}
    )
    write_json(home / plan.run_id / "done.json", {"val_bpb": 3.0, "weights_sha256": digest})
    monkeypatch.setenv("SLM_HOME", str(home))
    evaluate(plan.run_id, core=True, max_per_task=40)
    evaluate(plan.run_id, core=True, max_per_task=40, without="which_context")
    output = capsys.readouterr()
    assert "pocket-core 0." in output.out or "pocket-core -0." in output.out
    assert "40 per task, without which_context" in output.out
    assert "CORE" not in output.out + output.err
    files = sorted((home / plan.run_id / "evals").iterdir())
    assert [path.name[:22] for path in files] == ["pocket-core-000000070-"] * 2
    assert {read_json(path)["mode"] for path in files} == {
        "40 per task",
        "40 per task, without which_context",
    }
    with pytest.raises(ValueError, match="--tasks and --without: choose one"):
        evaluate(plan.run_id, core=True, tasks="next_tokens", without="which_context")
