"""CORE of the weights of a run: measured once per bundle and settings, and resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from slm.cli.evaluate import evaluate
from slm.evaluate import bundle
from slm.evaluate.bundle import Bundle
from slm.evaluate.core import Scorer, evaluate_bundle
from slm.evaluate.evaluator import evaluate_core
from slm.evaluate.request import TOKENS, CoreRequest
from slm.files import read_json
from slm.model import weights
from tests import bundles
from tests.commands import slm
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


def core_file(run: Run, request: CoreRequest, **options: Any) -> Path:
    return evaluate_core(weights.load_run(run.folder), run.home, request, CPU, **options)


def measured(run: Run, request: CoreRequest) -> dict[str, Any]:
    return read_json(core_file(run, request))


def in_memory(run: Run, counting: Bundle, folder: Path) -> dict[str, Any]:
    """CORE of the run's model, without its file."""
    scorer = Scorer(run.model, run.prepared.tokenizer)
    return json.loads(json.dumps(evaluate_bundle(scorer, counting, CoreRequest(), folder)))


def test_a_result_is_stored_with_the_run_and_found_again_without_computing(
    run: Run, counting: Bundle
) -> None:
    path = core_file(run, CoreRequest())
    document = read_json(path)
    assert (path.parent, path.name[:15]) == (run.folder / "evals", "core-000000070-")
    assert (document["run_id"], document["step"], document["bundle"]) == (
        run.plan.run_id,
        70,
        counting.id,
    )
    assert list(document["tasks"]) == list(bundles.TASKS)
    assert document["cropped"] > 0  # the context is 128 tokens
    assert all(len(task["each"]["correct"]) == 40 for task in document["tasks"].values())
    shutil.rmtree(run.prepared.folder)
    assert core_file(run, CoreRequest()) == path
    assert list(path.parent.iterdir()) == [path]


def test_the_weights_on_disk_reach_what_the_model_in_memory_reaches(
    run: Run, counting: Bundle, tmp_path: Path
) -> None:
    document = measured(run, CoreRequest())
    assert document | in_memory(run, counting, tmp_path) == document


def test_other_settings_and_another_bundle_are_other_evaluations(
    run: Run, counting: Bundle, tmp_path: Path
) -> None:
    other = bundle.install(bundles.write(tmp_path / "other", seed=1), run.home)
    requests = [
        CoreRequest(counting.id),
        CoreRequest(counting.id, 20),
        CoreRequest(counting.id, tasks=("fits",)),
        CoreRequest(other.id),
    ]
    documents = [measured(run, request) for request in requests]
    assert len(list((run.folder / "evals").iterdir())) == 4
    assert [document["max_per_task"] for document in documents] == [None, 20, None, None]
    assert [document["asked"] for document in documents[1:3]] == [list(bundles.TASKS), ["fits"]]
    assert documents[2]["core"] is None
    with pytest.raises(ValueError, match="task follows needs 4 shots: 4 examples are too few"):
        measured(run, CoreRequest(counting.id, 4))


def test_an_interrupted_evaluation_resumes_after_its_last_task(
    run: Run, counting: Bundle, tmp_path: Path
) -> None:
    reports: list[tuple[int, int]] = []

    def interrupt(unit: str, done: int, total: int) -> None:
        if unit == TOKENS:
            reports.append((done, total))
            if done > 0.9 * total:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        core_file(run, CoreRequest(), report=interrupt)
    (parts,) = (run.folder / "evals").iterdir()
    finished = {path.stem for path in parts.iterdir()}
    assert finished
    assert finished < {*bundles.TASKS}
    resumed: list[tuple[str, int, int]] = []
    path = core_file(run, CoreRequest(), report=lambda *values: resumed.append(values))
    _, done, total = resumed[-1]
    assert done == total < reports[-1][1]
    document = read_json(path)
    assert document | in_memory(run, counting, tmp_path) == document
    assert not parts.exists()


@pytest.mark.soak
def test_two_ranks_write_the_document_that_one_writes(run: Run, counting: Bundle) -> None:
    alone = measured(run, CoreRequest())
    (path,) = (run.folder / "evals").iterdir()
    path.unlink()
    result = slm("eval", run.plan.run_id, "--core", "--ranks", "2", home=run.home)
    assert result.returncode == 0, result.stderr
    assert "Error" not in result.stderr
    together = read_json(path)
    assert {name for name in alone if alone[name] != together[name]} == {"time", "seconds"}
    assert list(path.parent.iterdir()) == [path]


def test_an_error_of_ranks_is_one_line(
    run: Run, counting: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--core", "--bundle", counting.id, "--ranks", "2")
    (run.prepared.folder / "manifest.json").unlink()
    result = slm("eval", run.plan.run_id, *arguments, home=run.home)
    assert result.returncode == 2
    assert result.stderr.startswith(
        f"slm: the tokeniser and validation rows of run {run.plan.run_id}"
    )
    assert result.stderr.count("\n") == 1
    result = slm("eval", run.plan.run_id, *arguments, "--max-per-task", "4", home=run.home)
    assert result.returncode == 2
    assert result.stderr == (
        "slm: 4 examples per task are too few: a task needs 4 shots, use 5 or more\n"
    )
    monkeypatch.setenv("SLM_HOME", str(run.home))
    with pytest.raises(ValueError, match=r"--ranks 99: this machine has \d+"):
        evaluate(run.plan.run_id, core=True, ranks=99)


def test_the_command_prints_a_row_per_task_and_core(
    run: Run, counting: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLM_HOME", str(run.home))
    monkeypatch.setattr("slm.text.LINE_SECONDS", 0.0)
    evaluate(run.plan.run_id, core=True, max_per_task=20)
    output = capsys.readouterr()
    document = measured(run, CoreRequest(counting.id, 20))
    assert "tokens, 0 s left" in output.err
    assert all(label in output.out for label in bundles.TASKS)
    assert f"CORE {document['core']:.4f} +- {document['centred_error']:.4f}" in output.out
    assert f"bundle {counting.id}, 20 per task" in output.out
    evaluate(run.plan.run_id, core=True, max_per_task=20, tasks="fits, goes_on")
    assert "mean of these tasks" in capsys.readouterr().out


def test_a_named_bundle_is_checked_before_any_data_for_repeated_plans_too(tmp_path: Path) -> None:
    """A sweep of plans alone has no recipes."""
    with pytest.raises(ValueError, match="nonesuch"):
        CoreRequest(bundle="nonesuch").check_installed(tmp_path, [])


def test_wrong_options_are_one_line_errors(run: Run) -> None:
    for arguments, message in (
        (("--tasks", "fits"), "need --core"),
        (("--core",), "get it with `slm data core`"),
        (("--core", "--bundle", "abc"), "no bundle 'abc' in"),
    ):
        result = slm("eval", run.plan.run_id, *arguments, home=run.home)
        assert result.returncode == 2
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
