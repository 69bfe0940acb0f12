"""CORE of any weights of a run: measured once for each bundle and setting, gone on with where it was interrupted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from slm.cli.evaluate import evaluate
from slm.evaluate import bundle
from slm.evaluate import evaluator as later
from slm.evaluate.bundle import Bundle
from slm.evaluate.core import Asked, evaluate_all, judge_of
from slm.files import read_json
from slm.model import weights
from tests import bundles
from tests.conftest import slm
from tests.weights import Run, run_in

CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = run_in(tmp_path / "runs")
    run.finish()
    return run


@pytest.fixture
def counting(run: Run, tmp_path: Path) -> Bundle:
    return bundle.install(bundles.write(tmp_path / "bundle"), run.home)


def measured(run: Run, asked: Asked) -> dict:
    return read_json(later.core(weights.load_run(run.folder), run.home, asked, CPU))


def test_it_is_kept_beside_the_run_and_found_again_without_computing(
    run: Run, counting: Bundle
) -> None:
    path = later.core(weights.load_run(run.folder), run.home, Asked(counting), CPU)
    document = read_json(path)
    assert (path.parent, path.name[:15]) == (run.folder / "evals", "core-000000070-")
    assert (document["run_id"], document["step"], document["bundle"]) == (
        run.plan.run_id,
        70,
        counting.id,
    )
    assert list(document["tasks"]) == list(bundles.TASKS)
    assert document["cropped"] > 0  # the family's context is 128 tokens
    assert all(len(own["each"]["correct"]) == 40 for own in document["tasks"].values())
    shutil.rmtree(run.home / "data")
    assert later.core(weights.load_run(run.folder), run.home, Asked(counting), CPU) == path
    assert list(path.parent.iterdir()) == [path]


def test_it_is_what_the_model_in_memory_reaches(run: Run, counting: Bundle, tmp_path: Path) -> None:
    document = measured(run, Asked(counting))
    found = evaluate_all(Asked(counting), run.prepared.tokenizer, judge_of(run.model), tmp_path)
    assert document | json.loads(json.dumps(found)) == document


def test_other_settings_and_another_bundle_are_other_evaluations(
    run: Run, counting: Bundle, tmp_path: Path
) -> None:
    other = bundle.install(bundles.write(tmp_path / "other", seed=1), run.home)
    asked = [Asked(counting), Asked(counting, 20), Asked(counting, labels=("fits",)), Asked(other)]
    documents = [measured(run, own) for own in asked]
    assert len(list((run.folder / "evals").iterdir())) == 4
    assert [own["max_per_task"] for own in documents] == [None, 20, None, None]
    assert [own["asked"] for own in documents[1:3]] == [list(bundles.TASKS), ["fits"]]
    assert documents[2]["core"] is None
    with pytest.raises(
        ValueError, match="task follows shows 4 examples before each: 4 examples are too few"
    ):
        measured(run, Asked(counting, 4))


def test_an_interrupted_evaluation_goes_on_after_its_last_task(
    run: Run, counting: Bundle, tmp_path: Path
) -> None:
    own, said = weights.load_run(run.folder), []

    def interrupt(done: int, of: int) -> None:
        said.append((done, of))
        if done > 0.9 * of:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        later.core(own, run.home, Asked(counting), CPU, interrupt)
    (parts,) = (run.folder / "evals").iterdir()
    kept = {path.stem for path in parts.iterdir()}
    assert kept
    assert kept < {*bundles.TASKS}
    left: list[tuple[int, int]] = []
    document = read_json(
        later.core(own, run.home, Asked(counting), CPU, lambda *how: left.append(how))
    )
    assert left[-1][0] == left[-1][1] < said[-1][1]
    again = evaluate_all(Asked(counting), run.prepared.tokenizer, judge_of(run.model), tmp_path)
    assert document | json.loads(json.dumps(again)) == document
    assert not parts.exists()


def test_two_ranks_write_the_document_that_one_writes(run: Run, counting: Bundle) -> None:
    alone = measured(run, Asked(counting))
    (path,) = (run.folder / "evals").iterdir()
    path.unlink()
    result = slm("eval", run.plan.run_id, "--core", "--ranks", "2", home=run.home)
    assert result.returncode == 0, result.stderr
    assert "Error" not in result.stderr
    together = read_json(path)
    assert {name for name in alone if alone[name] != together[name]} == {"time", "seconds"}
    assert list(path.parent.iterdir()) == [path]


def test_what_ranks_refuse_is_one_line(
    run: Run, counting: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--core", "--ranks", "2", "--max-per-task", "4")
    result = slm("eval", run.plan.run_id, *arguments, home=run.home)
    assert result.returncode == 2
    assert result.stderr == (
        "slm: task follows shows 4 examples before each: 4 examples are too few, take at least 5 per task\n"
    )
    monkeypatch.setenv("SLM_HOME", str(run.home))
    with pytest.raises(ValueError, match=r"--ranks 99: \d+ found here"):
        evaluate(run.plan.run_id, core=True, ranks=99)


def test_the_command_prints_a_line_a_task_and_core_by_either_baseline(
    run: Run, counting: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLM_HOME", str(run.home))
    monkeypatch.setattr("slm.monitor.progress.LINE_SECONDS", 0.0)
    evaluate(run.plan.run_id, core=True, max_per_task=20)
    said = capsys.readouterr()
    document = measured(run, Asked(counting, 20))
    assert "tokens, 0 s left" in said.err
    assert all(label in said.out for label in bundles.TASKS)
    assert f"CORE {document['core']:.4f} +- {document['centred_error']:.4f}" in said.out
    assert f"bundle {counting.id}, 20 per task" in said.out
    evaluate(run.plan.run_id, core=True, max_per_task=20, tasks="fits, goes_on")
    assert "mean of these tasks" in capsys.readouterr().out


def test_a_wrong_use_of_the_command_is_one_line(run: Run) -> None:
    for arguments, complaint in (
        (("--tasks", "fits"), "add --core"),
        (("--core",), "get it with `slm data core`"),
        (("--core", "--bundle", "abc"), "no bundle abc in"),
    ):
        result = slm("eval", run.plan.run_id, *arguments, home=run.home)
        assert result.returncode == 2
        assert complaint in result.stderr
        assert result.stderr.count("\n") == 1
