"""CORE during training: never touches the weights, resumes after a stop, and cannot fail a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slm.cli.sweep import CoreOptions
from slm.data import PreparedDataset
from slm.evaluate import bundle
from slm.evaluate.batching import Batch
from slm.evaluate.bundle import Bundle
from slm.evaluate.core import Interrupted, OutOfMemory, Scorer, evaluate_bundle
from slm.evaluate.evaluator import evaluate_core
from slm.evaluate.records import runs_without_record
from slm.evaluate.request import TASKS, TOKENS, CoreRequest
from slm.files import read_json, sha256_of, write_json
from slm.hardware.slot import MicroBatch, Slot
from slm.model import weights
from slm.monitor.run_progress import RunProgress
from slm.plan import Plan
from slm.recipe import nanochat, pocket
from slm.run import list_attempts, make_attempt
from tests import attempts, bundles, forked
from tests.attempts import log, plan_of
from tests.commands import slm

CPU = torch.device("cpu")
STEPS = 6


@pytest.fixture(scope="module")
def plan(prepared: PreparedDataset) -> Plan:
    return plan_of(replace(pocket(2, steps=STEPS), batch_tokens=4 * 128), prepared)


def request_of(counting: Bundle, **changes: Any) -> dict[str, Any]:
    """The CORE request of an attempt.json."""
    return CoreRequest(counting.id, **changes).document()


def next_attempt(folder: Path, **changes: Any) -> Path:
    """The second attempt of a run, with the settings of the first and some changes."""
    second = folder.with_name("002")
    second.mkdir()
    document = read_json(folder / "attempt.json") | {"attempt": 2} | changes
    write_json(second / "attempt.json", document)
    return second


def done_of(folder: Path) -> dict[str, Any]:
    return read_json(folder.parent.parent / "done.json")


def test_core_is_that_of_slm_eval_and_changes_no_weight(
    tmp_path: Path, plan: Plan, prepared: PreparedDataset
) -> None:
    alone = attempts.make_attempt(tmp_path / "alone", plan, prepared, ranks=2)
    assert forked.train(alone, 2).returncode == 0
    home = tmp_path / "home"
    counting = bundle.install(bundles.write(tmp_path / "bundle"), home)
    request = request_of(counting, every=4)
    folder = attempts.make_attempt(home, plan, prepared, ranks=2, core=request)
    assert forked.train(folder, 2).returncode == 0
    with_core = done_of(folder)
    without = done_of(alone)
    equal = ("run_id", "weights_sha256", "val_bpb", "val_loss", "train_loss", "tokens", "flops")
    for name in equal:
        assert with_core[name] == without[name]
    assert without["core"] is None
    events = log(folder, "core")
    assert [(event["step"], event["metric"], event["mode"]) for event in events] == [
        (4, "core", "full"),
        (STEPS, "core", "full"),
    ]
    assert events[-1]["core"] == with_core["core"]
    assert events[-1]["flops"] == with_core["flops"]
    files = sorted((folder.parent.parent / "evals").iterdir())
    assert [path.name[:15] for path in files] == ["core-000000004-", f"core-{STEPS:09d}-"]

    def evaluate() -> Path:
        return evaluate_core(weights.load_run(folder.parent.parent), home, CoreRequest(), CPU)

    (home / "data" / prepared.folder.name).symlink_to(prepared.folder)
    assert evaluate() == files[1]
    document = read_json(files[1])
    files[1].unlink()
    repeated = read_json(evaluate())
    assert {name for name in document if document[name] != repeated[name]} <= {"time", "seconds"}


def test_a_stop_during_core_loses_nothing_and_the_next_attempt_resumes(
    tmp_path: Path, plan: Plan, prepared: PreparedDataset
) -> None:
    counting = bundle.install(bundles.write(tmp_path / "bundle", examples=1500), tmp_path)
    request = request_of(counting, max_per_task=1000)
    folder = attempts.make_attempt(tmp_path, plan, prepared, core=request)
    attempts.train_until(folder, 1, "eval")
    [failed] = log(folder, "failed")
    assert failed["reason"] == "interrupted"
    assert "in the evaluation of CORE" in failed["message"]
    run_folder = folder.parent.parent
    assert not (run_folder / "done.json").exists()
    assert (run_folder / "model.safetensors").exists()
    second = next_attempt(folder, core=request_of(counting, max_per_task=10))
    assert forked.train(second, 1).returncode == 0
    assert log(second, "started")[0]["resumed_from"] == STEPS
    assert not log(second, "train")
    [event] = log(second, "core")
    done = done_of(folder)
    assert (event["mode"], done["core"]) == ("10 per task", None)
    assert done["weights_sha256"] == sha256_of(run_folder / "model.safetensors")
    assert list((run_folder / "checkpoints").iterdir()) == []


def test_a_missing_bundle_costs_the_value_and_not_the_run(
    tmp_path: Path, plan: Plan, prepared: PreparedDataset
) -> None:
    request = CoreRequest("0123456789abcdef", every=4).document()
    folder = attempts.make_attempt(tmp_path, plan, prepared, ranks=2, core=request)
    assert forked.train(folder, 2).returncode == 0
    assert done_of(folder)["core"] is None
    warnings = [event["message"] for event in log(folder, "warning")]
    assert [line.partition(":")[0] for line in warnings] == [
        "no CORE at step 4",
        f"no CORE at step {STEPS}",
    ]
    assert f"no bundle '0123456789abcdef' in {tmp_path}" in warnings[0]
    assert f"`slm eval {plan.run_id} --core --bundle 0123456789abcdef` measures it" in warnings[0]


class LimitedScorer(Scorer):
    """Scorer that runs out of memory above some tokens."""

    limit = 600
    largest = 0

    def score(self, batch: Batch) -> Tensor:
        type(self).largest = max(self.largest, len(batch.ids))
        if len(batch.ids) > self.limit:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return super().score(batch)


class TinyScorer(LimitedScorer):
    limit = 1


class FailingScorer(Scorer):
    def score(self, batch: Batch) -> Tensor:
        raise RuntimeError("another error")


@pytest.fixture
def counting(tmp_path: Path) -> Bundle:
    return bundle.read(bundles.write(tmp_path / "bundle"))


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    tokenizer = bundles.tokenizer()
    return Scorer(bundles.learned(tokenizer, steps=3), tokenizer)


def test_batches_are_halved_until_they_fit_into_memory(
    tmp_path: Path, counting: Bundle, scorer: Scorer
) -> None:
    def evaluated(kind: type[Scorer]) -> dict[str, Any]:
        built = kind(scorer.model, scorer.tokenizer)
        return evaluate_bundle(built, counting, CoreRequest(), tmp_path / kind.__name__)

    limited = evaluated(LimitedScorer)
    free = evaluated(Scorer)
    assert LimitedScorer.largest > 2000
    for label, task in free["tasks"].items():
        for name in ("choice", "correct"):
            assert limited["tasks"][label]["each"][name] == task["each"][name]
    assert limited["core"] == free["core"]
    with pytest.raises(
        OutOfMemory, match="task follows: a single example does not fit into memory"
    ):
        evaluated(TinyScorer)
    with pytest.raises(RuntimeError, match="another error"):
        evaluated(FailingScorer)


def test_tasks_that_cannot_be_saved_still_count(
    tmp_path: Path, counting: Bundle, scorer: Scorer
) -> None:
    (tmp_path / "file").write_text("in the way")
    parts = tmp_path / "file" / "parts"
    assert evaluate_bundle(scorer, counting, CoreRequest(), parts)["core"] is not None


@pytest.mark.parametrize("unit", [TASKS, TOKENS])
def test_a_report_can_interrupt_and_finished_tasks_stay_on_disk(
    unit: str, tmp_path: Path, counting: Bundle, scorer: Scorer
) -> None:
    def stop(reported: str, done: int, total: int) -> None:
        if reported == unit and done > total / 2:
            raise Interrupted

    stopping = replace(scorer, report=stop)
    with pytest.raises(Interrupted):
        evaluate_bundle(stopping, counting, CoreRequest(), tmp_path / "parts")
    if unit == TOKENS:
        assert {path.stem for path in (tmp_path / "parts").iterdir()} < {*bundles.TASKS}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((False, None, 5, None, None), "--core-every 5: needs --core"),
        ((False, "core", None, None, None), "--bundle core: needs --core"),
        (
            (True, None, None, 4, None),
            "4 examples per task are too few: a task needs 4 shots, use 5 or more",
        ),
        (
            (True, None, None, None, "other"),
            "bundle .* has no task other: it has follows, follows_zeroshot",
        ),
        ((True, None, None, None, "follows,follows_zeroshot,fits,goes_on"), "has no task$"),
        ((True, "abc", None, None, None), "no bundle 'abc' in"),
    ],
)
def test_an_impossible_request_is_an_error_before_anything_starts(
    options: tuple[Any, ...], message: str, tmp_path: Path
) -> None:
    bundle.install(bundles.write(tmp_path / "bundle"), tmp_path)
    with pytest.raises(ValueError, match=message):
        CoreOptions(*options).request().check_installed(tmp_path, [nanochat.name])


def test_a_sweep_without_the_bundle_names_the_command_that_gets_it(tmp_path: Path) -> None:
    result = slm(
        "sweep", "--depths", "2", "--recipe", "nanochat", "--core", "--dry-run", home=tmp_path
    )
    assert result.returncode == 2
    assert "slm data core" in result.stderr
    assert result.stderr.count("\n") == 1


def test_runs_without_the_requested_record_are_found(tmp_path: Path) -> None:
    evaluated = tmp_path / "a"
    other = tmp_path / "b"
    document = {
        "bundle": "x",
        "max_per_task": None,
        "asked": ["p", "q"],
        "weights": "model.safetensors",
    }
    (evaluated / "evals").mkdir(parents=True)
    write_json(evaluated / "evals" / "core.json", document)
    write_json(
        evaluated / "evals" / "val_bpb.json", {"val_bpb": 1.0, "weights": "model.safetensors"}
    )

    def missing(**request: Any) -> list[str]:
        requests = dict.fromkeys("ab", CoreRequest("x", **request))
        return runs_without_record([evaluated, other], requests)

    assert missing() == ["b"]
    assert missing(max_per_task=500) == ["a", "b"]
    assert missing(without=("p",)) == ["a", "b"]


def test_an_attempt_has_the_request_and_the_plan_does_not(
    tmp_path: Path, plan: Plan, prepared: PreparedDataset
) -> None:
    counting = bundle.install(bundles.write(tmp_path / "bundle"), tmp_path)
    request = CoreRequest(counting.id[:6], 20, without=("fits",), every=10)
    document = request.for_run(plan, tmp_path, lambda: prepared).document()
    assert document == {
        "bundle": counting.id,
        "every": 10,
        "max_per_task": 20,
        "without": ["fits"],
    }
    slot = Slot("cpu", 1, 1)
    folder = make_attempt(plan, tmp_path, prepared.folder, slot, MicroBatch(1), core=document)
    assert list_attempts(tmp_path / plan.run_id) == [folder]
    assert read_json(folder / "attempt.json")["core"] == document
    assert "core" not in json.dumps(plan.document())
    read = CoreRequest(**document)
    assert read.document() == document
    assert read.mode(counting) == "20 per task, without fits"


def test_progress_of_core_has_its_share_and_the_time_left() -> None:
    progress = RunProgress(10)
    progress.update({"event": "started", "step": 10, "time": 0.0})
    for time, share in ((10.0, 0.0), (20.0, 0.25)):
        progress.update(
            {"event": "working", "what": "core", "share": share, "step": 10, "time": time}
        )
    assert progress.activity == "CORE 25%"
    assert progress.activity_seconds_left == 30.0
    progress.update({"event": "core", "step": 10, "core": 0.1, "time": 60.0})
    assert progress.activity == "ending"
    assert progress.activity_seconds_left is None
    assert progress.core
