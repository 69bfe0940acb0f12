"""CORE of any weights of a run: measured once for each bundle and setting, gone on with where it was interrupted."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slm import events, weights
from slm.cli.eval import evaluate
from slm.evaluate import bundle, later
from slm.evaluate.bundle import Bundle
from slm.evaluate.core import Asked, evaluate_all, judge_of
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
    return events.read_json(later.core(weights.of_run(run.folder), run.home, asked, CPU))


def test_it_is_kept_beside_the_run_and_found_again_without_computing(run: Run, counting: Bundle) -> None:
    path = later.core(weights.of_run(run.folder), run.home, Asked(counting), CPU)
    document = events.read_json(path)
    assert (path.parent, path.name[:15]) == (run.folder / "evals", "core-000000070-")
    assert (document["run_id"], document["step"], document["bundle"]) == (run.plan.run_id, 70, counting.id)
    assert list(document["tasks"]) == list(bundles.TASKS)
    assert document["cropped"] > 0  # the family's context is 128 tokens
    assert all(len(own["each"]["correct"]) == 40 for own in document["tasks"].values())
    shutil.rmtree(run.home / "data")
    assert later.core(weights.of_run(run.folder), run.home, Asked(counting), CPU) == path
    assert list(path.parent.iterdir()) == [path]


def test_it_is_what_the_model_in_memory_reaches(run: Run, counting: Bundle, tmp_path: Path) -> None:
    document = measured(run, Asked(counting))
    found = evaluate_all(Asked(counting), run.prepared.tokenizer, judge_of(run.model), tmp_path)
    assert document | json.loads(json.dumps(found)) == document


def test_other_settings_and_another_bundle_are_other_evaluations(run: Run, counting: Bundle, tmp_path: Path) -> None:
    other = bundle.install(bundles.write(tmp_path / "other", seed=1), run.home)
    asked = [Asked(counting), Asked(counting, 20), Asked(counting, labels=("fits",)), Asked(other)]
    documents = [measured(run, own) for own in asked]
    assert len(list((run.folder / "evals").iterdir())) == 4
    assert [own["max_per_task"] for own in documents] == [None, 20, None, None]
    assert [own["asked"] for own in documents[1:3]] == [list(bundles.TASKS), ["fits"]]
    assert documents[2]["core"] is None
    with pytest.raises(ValueError, match="task follows shows 4 examples before each: 4 examples are too few"):
        measured(run, Asked(counting, 4))


def test_an_interrupted_evaluation_goes_on_after_its_last_task(run: Run, counting: Bundle, tmp_path: Path) -> None:
    own, said = weights.of_run(run.folder), []

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
    document = events.read_json(later.core(own, run.home, Asked(counting), CPU, lambda *how: left.append(how)))
    assert left[-1][0] == left[-1][1] < said[-1][1]
    again = evaluate_all(Asked(counting), run.prepared.tokenizer, judge_of(run.model), tmp_path)
    assert document | json.loads(json.dumps(again)) == document
    assert not parts.exists()


RANK = """
import sys, json, torch
import torch.distributed as dist
from pathlib import Path
from slm import weights
from slm.evaluate import bundle
from slm.evaluate.core import Asked, evaluate_all, judge_of
home, run, meeting, rank = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
dist.init_process_group("gloo", init_method="file://" + meeting, rank=rank, world_size=2)
own = weights.of_run(home / run)
tokenizer, judge = weights.prepared_of(own.plan, home).tokenizer, judge_of(own.model(torch.device("cpu")))
print(json.dumps(evaluate_all(Asked(bundle.installed(home)), tokenizer, judge, home / "parts", rank, 2)))
dist.destroy_process_group()
"""


def test_two_ranks_find_what_one_finds(run: Run, counting: Bundle, tmp_path: Path) -> None:
    command = [sys.executable, "-c", RANK, str(run.home), run.plan.run_id, str(tmp_path / "meeting")]
    ranks = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(2)]
    first, second = (json.loads(rank.communicate(timeout=120)[0]) for rank in ranks)
    assert first == second
    alone = measured(run, Asked(counting))
    assert first["ties"] == alone["ties"] == 0
    for label, own in first["tasks"].items():
        each = own["each"], alone["tasks"][label]["each"]
        for name in ("correct", "choice", "gold_greedy"):
            assert each[0][name] == each[1][name]
        assert each[0]["gold_nats"] == pytest.approx(each[1]["gold_nats"], rel=1e-5)
    assert first["core"] == alone["core"]


def test_the_command_prints_a_line_a_task_and_core_by_either_baseline(
    run: Run, counting: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLM_HOME", str(run.home))
    monkeypatch.setattr("slm.cli.data.PAUSE_SECONDS", 0.0)
    evaluate(run.plan.run_id, core=True, max_per_task=20)
    said = capsys.readouterr()
    document = measured(run, Asked(counting, 20))
    assert "tokens, 0 s left" in said.err
    assert all(label in said.out for label in bundles.TASKS)
    assert f"CORE {document['core']:.4f} +- {document['centred_error']:.4f}" in said.out
    assert f"bundle {counting.id}, 20 examples a task at most" in said.out
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
