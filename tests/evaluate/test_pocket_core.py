"""pocket-core: made of held-out text alone, at chance for models that do not read, and never called CORE."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from slm.cli.evaluate import evaluate
from slm.data import Prepared, prepare
from slm.data.loader import Rows
from slm.evaluate import bundle
from slm.evaluate import pocket_core as pocket
from slm.evaluate.batching import lanes_of
from slm.evaluate.bundle import Bundle
from slm.evaluate.core import Asked, evaluate_all, judge_by
from slm.evaluate.prompts import ordered, plan
from slm.files import read_json, write_json
from slm.model import checkpoints
from slm.model.gpt import GPT
from slm.plan import Plan, code_fingerprint
from slm.recipe import pocket as family
from tests import bundles
from tests.weights import FAMILY

ROOT = Path(__file__).parents[2]
Logits = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Sources of this repository, as the pocket family reads them."""
    corpus = tmp_path_factory.mktemp("texts")
    for path in [*ROOT.glob("slm/**/*.py"), *ROOT.glob("tests/**/*.py")]:
        (corpus / f"{path.parent.name}.{path.stem}.txt").write_text(path.read_text())
    return prepare(str(corpus), family(2, steps=70), tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def made(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return pocket.bundle_of(prepared, tmp_path_factory.mktemp("home"))


def held_out(prepared: Prepared) -> list[str]:
    """The text of each validation row."""
    rows, tokens = Rows.of(prepared, "validation"), prepared.tokenizer.tokens
    ids = torch.cat(
        [rows.pair(np.arange(len(rows)))[0], rows.pair(np.arange(len(rows)))[1][:, -1:]], dim=1
    )
    return [
        b"".join(tokens[own] for own in row if own < len(tokens)).decode(errors="replace")
        for row in ids.tolist()
    ]


def table(prepared: Prepared, pairs: bool) -> Logits:
    """A model that has counted the training rows: each token, or each token after the one before."""
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


def reached(made: Bundle, prepared: Prepared, logits: Logits, parts: Path) -> dict:
    judge = judge_by(logits, 128, torch.device("cpu"))
    return evaluate_all(Asked(made), prepared.tokenizer, judge, parts)


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
    made: Bundle, prepared: Prepared, tmp_path: Path
) -> None:
    assert pocket.bundle_of(prepared, tmp_path).id == made.id
    (found,) = (tmp_path / "data" / "core").iterdir()
    assert pocket.bundle_of(prepared, tmp_path).folder == found


def test_every_right_answer_stands_where_a_validation_row_has_it(
    made: Bundle, prepared: Prepared
) -> None:
    rows = "\0".join(held_out(prepared))
    for task in made.tasks:
        for own in made.examples(task):
            if task.kind == "language_modeling":
                passage, asked = own["context"], own["continuation"]
            elif task.kind == "multiple_choice":
                passage, asked = own["query"], own["choices"][own["gold"]]
            else:
                passage, asked = own["context_options"][own["gold"]], own["continuation"]
            assert f"{passage} {asked}" in rows


def test_each_choice_is_the_right_one_as_often_as_any_other(made: Bundle) -> None:
    for task in made.tasks:
        if task.kind == "language_modeling":
            continue
        field, examples = bundle.OPTIONS[task.kind], made.examples(task)
        assert {*Counter(own["gold"] for own in examples).values()} == {len(examples) // 4}
        for start in range(0, len(examples), 4):
            four = examples[start : start + 4]
            assert [own["gold"] for own in four] == [0, 1, 2, 3]
            assert all(own[field] == four[0][field] for own in four)
            assert len({*four[0][field]}) == 4


def test_no_question_is_cropped_by_a_context_of_128_tokens(
    made: Bundle, prepared: Prepared
) -> None:
    for task in made.tasks:
        examples = ordered(task, made.examples(task))
        planned = plan(task, examples, range(len(examples)), prepared.tokenizer)
        assert not lanes_of(planned, 128).cropped.any()
        assert planned.spans.min() > 0


def test_who_does_not_read_is_at_chance_and_who_knows_more_reaches_more(
    made: Bundle, prepared: Prepared, tmp_path: Path
) -> None:
    blind, reads = (
        reached(made, prepared, table(prepared, own), tmp_path / str(own)) for own in (False, True)
    )
    assert blind["tasks"]["which_continuation"]["accuracy"] == 0.25
    assert abs(blind["core"]) < 0.02
    assert reads["core"] - blind["core"] > 3 * np.hypot(
        reads["centred_error"], blind["centred_error"]
    )


def test_too_little_held_out_text_is_an_error_that_says_how_much_there_is(tmp_path: Path) -> None:
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


def test_changed_validation_rows_are_refused(prepared: Prepared, tmp_path: Path) -> None:
    rows = bytearray((prepared.folder / "validation.bin").read_bytes())
    rows[1000] ^= 1
    (tmp_path / "validation.bin").write_bytes(rows)
    (tmp_path / "tokenizer.json").write_bytes((prepared.folder / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match="was changed"):
        pocket.bundle_of(Prepared(tmp_path, prepared.manifest), tmp_path)


def test_a_pocket_run_is_asked_pocket_core_until_core_is_there(
    prepared: Prepared, tmp_path: Path
) -> None:
    given = family(2, steps=70)
    own = Plan("pocket", "steps=70", 0, given, prepared.identity(given), "c0de")
    first = pocket.bundle_for(own, tmp_path, None, lambda: prepared)
    assert first.name == "pocket-core"
    core = bundle.install(bundles.write(tmp_path / "bundle"), tmp_path)
    assert pocket.bundle_for(own, tmp_path, "core", lambda: prepared) == core
    assert pocket.bundle_for(own, tmp_path, None, lambda: prepared) == first
    assert pocket.bundle_for(own, tmp_path, "pocket-core", lambda: prepared) == first
    assert pocket.bundle_for(own, tmp_path, first.id[:6], lambda: prepared) == first
    assert pocket.bundle_for(replace(own, recipe="other"), tmp_path, None, lambda: prepared) == core


def test_a_mode_is_named_by_what_is_asked(made: Bundle) -> None:
    whole = Asked(made)
    assert whole.mode == Asked(made, labels=tuple(task.label for task in made.tasks)).mode == "full"
    assert Asked(made, 100).mode == "100 per task"
    assert whole.without(["which_context"]).mode == "without which_context"
    assert Asked(made, labels=("next_tokens", "which_continuation")).mode == "without which_context"
    assert Asked(made, 100).without(["next_tokens"]).mode == "100 per task, without next_tokens"
    assert Asked(made, labels=("next_tokens",)).mode == "tasks next_tokens"
    assert whole.settings()["name"] == "pocket-core"
    with pytest.raises(ValueError, match="has no task riddles: it has next_tokens"):
        whole.without(["riddles"])
    with pytest.raises(ValueError, match=r"has no task$"):
        whole.without([task.label for task in made.tasks])


def test_the_command_makes_it_for_a_pocket_run_and_never_calls_it_core(
    prepared: Prepared,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    home, given = tmp_path / "runs", family(2, steps=70)
    (home / "data").mkdir(parents=True)
    (home / "data" / prepared.folder.name).symlink_to(prepared.folder)
    own = Plan("pocket", "steps=70", 0, given, prepared.identity(given), code_fingerprint())
    (home / own.run_id).mkdir()
    write_json(home / own.run_id / "plan.json", own.document())
    model = GPT(given)
    model.initialise(0)
    tensors = {name: tensor.detach() for name, tensor in model.named_parameters()}
    digest = checkpoints.save(
        home / own.run_id / "model.safetensors", tensors, {"run_id": own.run_id}
    )
    write_json(home / own.run_id / "done.json", {"val_bpb": 3.0, "weights_sha256": digest})
    monkeypatch.setenv("SLM_HOME", str(home))
    evaluate(own.run_id, core=True, max_per_task=40)
    evaluate(own.run_id, core=True, max_per_task=40, without="which_context")
    said = capsys.readouterr()
    assert "pocket-core 0." in said.out or "pocket-core -0." in said.out
    assert "40 per task, without which_context" in said.out
    assert "CORE" not in said.out + said.err
    files = sorted((home / own.run_id / "evals").iterdir())
    assert [path.name[:22] for path in files] == ["pocket-core-000000070-"] * 2
    assert {read_json(path)["mode"] for path in files} == {
        "40 per task",
        "40 per task, without which_context",
    }
    with pytest.raises(ValueError, match="--tasks and --without: choose one"):
        evaluate(own.run_id, core=True, tasks="next_tokens", without="which_context")
