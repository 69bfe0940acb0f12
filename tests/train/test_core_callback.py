"""CORE in the trainer: beside the weights and never in them, gone on with after a stop, and no reason to lose a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from slm.data import PreparedDataset
from slm.evaluate import bundle, core
from slm.evaluate import evaluator as later
from slm.evaluate.bundle import Bundle
from slm.evaluate.core import Asked, Interrupted, OutOfMemory, evaluate_all, judge_of
from slm.evaluate.request import Wanted, wanted, without_value
from slm.files import read_json, write_json
from slm.hardware.slot import MicroBatch
from slm.model import weights
from slm.monitor.run_progress import RunProgress
from slm.plan import Plan
from slm.recipe import nanochat, pocket
from slm.run import list_attempts, make_attempt
from tests import attempts, bundles
from tests.attempts import log, plan_of
from tests.conftest import slm

CPU = torch.device("cpu")
STEPS = 6


@pytest.fixture(scope="module")
def plan(prepared: PreparedDataset) -> Plan:
    return plan_of(replace(pocket(2, steps=STEPS), batch_tokens=4 * 128), prepared)


def asked(own: Bundle | str, **changes: Any) -> dict[str, Any]:
    """What an attempt.json asks of a bundle."""
    name = own if isinstance(own, str) else own.id
    return {"bundle": name, "every": None, "max_per_task": None, "without": []} | changes


def again(folder: Path) -> Path:
    """The next attempt of a run, as its first was made."""
    second = folder.with_name("002")
    second.mkdir()
    write_json(second / "attempt.json", read_json(folder / "attempt.json") | {"attempt": 2})
    return second


def done_of(folder: Path) -> dict[str, Any]:
    return read_json(folder.parent.parent / "done.json")


def test_core_is_what_slm_eval_finds_and_changes_no_weight(
    tmp_path: Path, plan: Plan, prepared: PreparedDataset
) -> None:
    alone = attempts.make_attempt(tmp_path / "alone", plan, prepared, ranks=2)
    assert attempts.train(alone, 2).returncode == 0
    home = tmp_path / "home"
    own = bundle.install(bundles.write(tmp_path / "bundle"), home)
    folder = attempts.make_attempt(home, plan, prepared, ranks=2, core=asked(own, every=4))
    assert attempts.train(folder, 2).returncode == 0
    with_core, without = done_of(folder), done_of(alone)
    same = ("run_id", "weights_sha256", "val_bpb", "val_loss", "train_loss", "tokens", "flops")
    assert {name: with_core[name] for name in same} == {name: without[name] for name in same}
    assert without["core"] is None
    told = log(folder, "core")
    assert [(event["step"], event["metric"], event["mode"]) for event in told] == [
        (4, "core", "full"),
        (STEPS, "core", "full"),
    ]
    assert told[-1]["core"] == with_core["core"]
    assert told[-1]["flops"] == with_core["flops"]
    kept = sorted((folder.parent.parent / "evals").iterdir())
    assert [path.name[:15] for path in kept] == ["core-000000004-", f"core-{STEPS:09d}-"]
    (home / "data" / prepared.folder.name).symlink_to(prepared.folder)
    found = later.core(weights.load_run(folder.parent.parent), home, Asked(own), CPU)
    assert found == kept[1]
    document = read_json(found)
    (found.parent / "kept").mkdir()
    found.rename(found.parent / "kept" / found.name)
    once_more = read_json(later.core(weights.load_run(folder.parent.parent), home, Asked(own), CPU))
    differ = {name for name in document if document[name] != once_more[name]}
    assert differ <= {"time", "seconds"}


def test_a_stop_in_core_loses_nothing_and_the_next_attempt_goes_on(
    tmp_path: Path, plan: Plan, prepared: PreparedDataset
) -> None:
    own = bundle.install(bundles.write(tmp_path / "bundle", examples=1500), tmp_path)
    folder = attempts.make_attempt(tmp_path, plan, prepared, core=asked(own, max_per_task=1000))
    attempts.train_until(folder, 1, "eval")
    [failed] = log(folder, "failed")
    assert failed["reason"] == "interrupted"
    assert "in the evaluation of CORE" in failed["message"]
    run_folder = folder.parent.parent
    assert not (run_folder / "done.json").exists()
    assert (run_folder / "model.safetensors").exists()
    changes = {
        "core": asked(own, max_per_task=10)
    }  # of which nothing is kept, so that it soon ends
    second = again(folder)
    write_json(second / "attempt.json", read_json(second / "attempt.json") | changes)
    assert attempts.train(second, 1).returncode == 0
    assert log(second, "started")[0]["resumed_from"] == STEPS
    assert not log(second, "train")
    done, [told] = done_of(folder), log(second, "core")
    assert (told["mode"], done["core"]) == ("10 per task", None)
    assert done["weights_sha256"] == weights.checkpoints.sha256(run_folder / "model.safetensors")
    assert list((run_folder / "checkpoints").iterdir()) == []


def test_a_bundle_that_is_gone_costs_the_value_and_not_the_run(
    tmp_path: Path, plan: Plan, prepared: PreparedDataset
) -> None:
    folder = attempts.make_attempt(
        tmp_path, plan, prepared, ranks=2, core=asked("0123456789abcdef", every=4)
    )
    assert attempts.train(folder, 2).returncode == 0
    assert done_of(folder)["core"] is None
    warnings = [event["message"] for event in log(folder, "warning")]
    assert [line.partition(":")[0] for line in warnings] == [
        "no CORE at step 4",
        f"no CORE at step {STEPS}",
    ]
    assert f"no bundle 0123456789abcdef in {tmp_path}" in warnings[0]
    assert f"`slm eval {plan.run_id} --core --bundle 0123456789abcdef` measures it" in warnings[0]


class Counting:
    """A small world to evaluate in."""

    def __init__(self, folder: Path) -> None:
        self.bundle = bundle.read(bundles.write(folder / "bundle"))
        self.tokenizer = bundles.tokenizer()
        self.judge = judge_of(bundles.learned(self.tokenizer, steps=3))

    def evaluated(self, parts: Path, **changes: Any) -> dict[str, Any]:
        """Everything, by a judge with changes."""
        judge = replace(self.judge, **changes)
        return evaluate_all(Asked(self.bundle), self.tokenizer, judge, parts)


def test_without_memory_a_pass_reads_half_and_half_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, sizes = Counting(tmp_path), []

    def score(batch: Any, most: int = 600) -> torch.Tensor:
        sizes.append(len(batch.ids))
        if len(batch.ids) > most:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return world.judge.score(batch)

    found, whole = (
        world.evaluated(tmp_path / "one", score=score),
        world.evaluated(tmp_path / "other"),
    )
    assert max(sizes) > 2000
    decisions = [
        [own["each"][name] for own in each["tasks"].values() for name in ("choice", "correct")]
        for each in (found, whole)
    ]
    assert decisions[0] == decisions[1]
    assert found["core"] == whole["core"]
    with pytest.raises(
        OutOfMemory, match="task follows: no memory is left for one example at a time"
    ):
        world.evaluated(tmp_path / "none", score=lambda batch: score(batch, 1))
    with pytest.raises(RuntimeError, match="another error"):
        world.evaluated(
            tmp_path / "none",
            score=lambda batch: (_ for _ in ()).throw(RuntimeError("another error")),
        )


def test_what_one_task_reached_is_kept_where_it_cannot_be_written(tmp_path: Path) -> None:
    world = Counting(tmp_path)
    (tmp_path / "file").write_text("in the way")
    assert world.evaluated(tmp_path / "file" / "parts")["core"] is not None


def test_a_report_that_interrupts_ends_it_and_finished_tasks_stay(tmp_path: Path) -> None:
    world = Counting(tmp_path)

    def stop(done: int, of: int) -> None:
        if done > of / 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        evaluate_all(
            Asked(world.bundle), world.tokenizer, world.judge, tmp_path / "parts", report=stop
        )
    assert {path.stem for path in (tmp_path / "parts").iterdir()} < {*bundles.TASKS}
    with pytest.raises(Interrupted):
        evaluate_all(
            Asked(world.bundle), world.tokenizer, world.judge, tmp_path / "none", planning=stop
        )


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ((False, None, 5, None, None), "--core-every 5: is about CORE: add --core"),
        ((False, "core", None, None, None), "--bundle core: is about CORE"),
        (
            (True, None, None, 4, None),
            "--core-max-per-task 4: a task shows 4 examples: take 5 or more",
        ),
        (
            (True, None, None, None, "other"),
            "--core-without other: bundle .* has follows, follows_zeroshot",
        ),
        ((True, None, None, None, "follows,follows_zeroshot,fits,goes_on"), "has no other task"),
        ((True, "abc", None, None, None), "no bundle abc in"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_starts(
    options: tuple[Any, ...], complaint: str, tmp_path: Path
) -> None:
    bundle.install(bundles.write(tmp_path / "bundle"), tmp_path)
    with pytest.raises(ValueError, match=complaint):
        (wanted(*options) or Wanted(None, None, None, ())).check(tmp_path, [nanochat.name])


def test_a_sweep_without_the_bundle_is_one_line_that_says_how_to_get_it(tmp_path: Path) -> None:
    result = slm(
        "sweep", "--depths", "2", "--recipe", "nanochat", "--core", "--dry-run", home=tmp_path
    )
    assert result.returncode == 2
    assert "slm data core" in result.stderr
    assert result.stderr.count("\n") == 1


def test_runs_without_the_value_are_told_from_those_that_have_it(tmp_path: Path) -> None:
    run, other = tmp_path / "a", tmp_path / "b"
    document = {
        "bundle": "x",
        "max_per_task": None,
        "asked": ["p", "q"],
        "weights": "model.safetensors",
    }
    (run / "evals").mkdir(parents=True)
    write_json(run / "evals" / "core.json", document)
    write_json(run / "evals" / "val_bpb.json", {"val_bpb": 1.0, "weights": "model.safetensors"})
    asks = {name: {"bundle": "x", "max_per_task": None, "without": []} for name in ("a", "b")}
    assert without_value([run, other], asks) == ["b"]
    assert without_value([run], {"a": asks["a"] | {"max_per_task": 500}}) == ["a"]
    assert without_value([run], {"a": asks["a"] | {"without": ["p"]}}) == ["a"]


def test_an_attempt_says_what_is_measured_and_the_plan_does_not(
    tmp_path: Path, plan: Plan, prepared: PreparedDataset
) -> None:
    own = bundle.install(bundles.write(tmp_path / "bundle"), tmp_path)
    asks = Wanted(own.id, 10, 20, ("fits",)).of(plan, tmp_path, lambda: prepared)
    assert asks == {"bundle": own.id, "every": 10, "max_per_task": 20, "without": ["fits"]}
    from slm.hardware.slot import Slot

    folder = make_attempt(
        plan, tmp_path, prepared.folder, Slot("cpu", 1, 1), MicroBatch(1), core=asks
    )
    assert list_attempts(tmp_path / plan.run_id) == [folder]
    assert read_json(folder / "attempt.json")["core"] == asks
    assert "core" not in json.dumps(plan.document())
    assert later.asked_of(tmp_path, asks).mode == "20 per task, without fits"


def test_an_evaluation_is_followed_with_its_share_and_the_time_left() -> None:
    track = RunProgress(10)
    track.update({"event": "started", "step": 10, "time": 0.0})
    for time, share in ((10.0, 0.0), (20.0, 0.25)):
        track.update({"event": "working", "what": "core", "share": share, "step": 10, "time": time})
    assert (track.activity, track.activity_seconds_left) == ("CORE 25%", 30.0)
    track.update({"event": "core", "step": 10, "core": 0.1, "time": 60.0})
    assert (track.activity, track.activity_seconds_left) == ("ending", None)
    assert track.core
    assert core.TOKENS["cpu"] > 0
