"""val_bpb of the weights of a run: the trainer's value, or an error for other weights or rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slm.cli.evaluate import evaluate
from slm.evaluate import evaluator
from slm.files import read_json, write_json
from slm.model import checkpoints, weights
from slm.model.weights import Weights
from slm.plan import Plan
from slm.recipe import pocket
from tests.commands import slm
from tests.weights import Run, run_in

CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return run_in(tmp_path / "runs")


@pytest.fixture
def finished(run: Run) -> Run:
    run.finish()
    return run


def evaluated(run: Run, stored: Weights | None = None) -> dict:
    stored = stored or weights.load_run(run.folder)
    return read_json(evaluator.evaluate_val_bpb(stored, run.home, CPU))


def test_final_weights_have_the_val_bpb_of_their_trainer(finished: Run) -> None:
    document = evaluated(finished)
    assert document["val_bpb"] == read_json(finished.folder / "done.json")["val_bpb"]
    assert (document["val_bpb"], document["val_loss"]) == finished.losses()
    assert (document["run_id"], document["step"], document["rows"]) == (
        finished.plan.run_id,
        70,
        64,
    )


def test_other_batches_give_the_same_value_within_rounding(finished: Run) -> None:
    assert evaluated(finished)["val_bpb"] == pytest.approx(
        finished.losses(tokens=5 * 128)[0], rel=1e-6
    )


def test_a_checkpoint_has_the_value_of_the_model_in_it(run: Run) -> None:
    path = run.checkpoint(40)
    for stored in (weights.load_run(run.folder), weights.load_file(path, run.home)):
        document = evaluated(run, stored)
        assert (document["val_bpb"], document["val_loss"]) == run.losses()
        assert (document["step"], document["weights"]) == (40, path.name)


def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(run: Run) -> None:
    first = run.checkpoint(40)
    second = run.checkpoint(50, first)
    second.write_bytes(second.read_bytes()[:-1])
    stored = weights.load_run(run.folder)
    assert stored.step == 40
    damaged, unfinished = stored.remarks()
    assert second.name in damaged
    assert (
        unfinished
        == f"run {run.plan.run_id}: unfinished weights, after step 40 of 70 ({first.name})"
    )


def test_the_same_evaluation_is_found_again_without_rows_or_computing(finished: Run) -> None:
    first = evaluated(finished)
    shutil.rmtree(finished.home / "data")
    assert evaluated(finished) == first
    copy = shutil.copy(finished.folder / "model.safetensors", finished.home / "copy")
    assert evaluated(finished, weights.load_file(Path(copy), finished.home)) == first
    assert len(list((finished.folder / "evals").iterdir())) == 1


def test_other_weights_and_other_code_are_other_evaluations(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.checkpoint(40)
    first = evaluated(run)
    with torch.no_grad():
        run.model.lm_head *= 2
    run.checkpoint(40)
    assert evaluated(run)["val_bpb"] != first["val_bpb"]
    monkeypatch.setattr(evaluator, "code_fingerprint", lambda: "another")
    assert evaluated(run)["code"] == "another"
    assert len(list((run.folder / "evals").iterdir())) == 3


def test_weights_of_another_trainer_have_a_remark(run: Run) -> None:
    run.checkpoint(40)
    stored = weights.load_run(run.folder)
    other = replace(stored, plan=replace(stored.plan, code="0123456789abcdef"))
    assert "another version of the trainer (0123456789abcdef" in other.remarks()[-1]


def in_another_folder(run: Run) -> None:
    other = run_in(run.home, seed=1)
    other.finish()
    shutil.copy(other.folder / "model.safetensors", run.folder)


def change_weights(run: Run) -> None:
    with torch.no_grad():
        run.model.lm_head += 1
    tensors = {name: tensor.detach() for name, tensor in run.model.named_parameters()}
    checkpoints.save(run.folder / "model.safetensors", tensors, {"run_id": run.plan.run_id})


def change_rows(run: Run) -> None:
    path = run.prepared.folder / "validation.bin"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)


def lose_data(run: Run) -> None:
    shutil.rmtree(run.home / "data")


def unfinish(run: Run) -> None:
    (run.folder / "done.json").unlink()


def overwrite(run: Run) -> None:
    (run.folder / "model.safetensors").write_text("weights")


def drop_a_tensor(run: Run) -> None:
    tensors = {
        name: tensor.detach() for name, tensor in run.model.named_parameters() if name != "backout"
    }
    digest = checkpoints.save(
        run.folder / "model.safetensors", tensors, {"run_id": run.plan.run_id}
    )
    write_json(run.folder / "done.json", {"weights_sha256": digest})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (in_another_folder, "belongs to run [0-9a-f]{12}, not to"),
        (change_weights, "was changed after run"),
        (change_rows, "validation.bin was changed: remove its folder"),
        (
            lose_data,
            "prepare its corpus runs-texts again, from the same texts, with `slm sweep --plan",
        ),
        (unfinish, "has no weights yet: it is not finished and has no good checkpoint"),
        (overwrite, "holds no weights"),
        (drop_a_tensor, "its tensors are not those of run .*Missing key.*backout"),
        (lambda run: (run.folder / "model.safetensors").unlink(), "model.safetensors is gone"),
    ],
)
def test_other_weights_or_rows_are_a_one_line_error(
    finished: Run, spoil: Callable[[Run], None], message: str
) -> None:
    spoil(finished)
    with pytest.raises(ValueError, match=message) as error:
        evaluated(finished)
    assert "\n" not in str(error.value)
    assert not (finished.folder / "evals").exists()


def test_missing_rows_name_the_command_that_prepares_them(run: Run) -> None:
    plan: Plan = replace(run.plan, hyperparameters=pocket(2))
    with pytest.raises(ValueError, match="with `slm data prepare FOLDER --recipe pocket`"):
        weights.find_dataset(replace(plan, data=replace(plan.data, validation="other")), run.home)


def test_a_file_without_its_run_is_an_error(finished: Run, tmp_path: Path) -> None:
    path = finished.folder / "model.safetensors"
    with pytest.raises(ValueError, match=f"belongs to run {finished.plan.run_id}, which is not in"):
        weights.load_file(path, tmp_path / "elsewhere")
    checkpoints.save(path, {"a": torch.zeros(1)}, {"format": "pt"})
    with pytest.raises(ValueError, match="does not say which run"):
        weights.load_file(path, finished.home)


def test_a_diverged_model_has_no_value(run: Run) -> None:
    with torch.no_grad():
        run.model.lm_head[0] = torch.nan
    run.checkpoint(40)
    with pytest.raises(RuntimeError, match="diverged: val_bpb is nan at step 40"):
        evaluated(run)
    assert not (run.folder / "evals").exists()


def test_the_command_prints_progress_the_value_and_unfinished_runs(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run.checkpoint(40)
    monkeypatch.setenv("SLM_HOME", str(run.home))
    monkeypatch.setattr("slm.text.LINE_SECONDS", 0.0)
    evaluate(str(path), as_json=True)
    output = capsys.readouterr()
    assert "64 of 64 rows, 0 s left" in output.err
    document = json.loads(output.out)
    assert document["val_bpb"] == run.losses()[0]
    printed = slm("eval", run.plan.run_id[:6], home=run.home)
    assert printed.returncode == 0, printed.stderr
    assert f"run {run.plan.run_id}: tiny d2, step 40 of 70" in printed.stdout
    assert (
        f"val_bpb {document['val_bpb']:.4f}, val_loss {document['val_loss']:.4f}" in printed.stdout
    )
    assert "unfinished weights, after step 40 of 70" in printed.stderr
