"""Long tests: `make soak`."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import store
from slm.model.gpt import GPT
from slm.recipe import pocket
from slm.run import run_holder
from slm.train.optimizer import Optimizer
from tests import chaos
from tests.commands import slm
from tests.train.test_train import TWO, Watcher, train

pytestmark = pytest.mark.soak
DEPTHS = "2-4"
KILLS = 12


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in torch's own compiler
def test_compiled_gradients_equal_eager_ones() -> None:
    """Compare them with the code generator that long runs use."""
    if not any(map(shutil.which, ("g++", "clang++"))):
        pytest.skip("no C++ compiler")
    hp = replace(pocket, sequence_length=512)(4, steps=10)
    model = GPT(hp)
    model.initialise(0)
    optimizer = Optimizer(model)
    ids = torch.randint(hp.vocab_size, (4, 513), generator=torch.Generator().manual_seed(0))
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    # Before the first step blocks add nothing, and the gradient of some scalars is rounding error.
    optimizer.step(0)
    gradients = []
    for loss in (model.loss, torch.compile(model.loss, fullgraph=True, dynamic=False)):
        optimizer.zero_grad()
        loss(ids[:, :-1], ids[:, 1:]).backward()
        gradients.append([update.buffer.gradients.clone() for update in optimizer._updates])
    for plain, compiled in zip(*gradients, strict=True):
        assert (compiled - plain).norm() <= 1e-5 * plain.norm()


def homes(tmp_path: Path, home: Path, *names: str) -> list[Path]:
    """Create homes that share the prepared corpus of another."""
    folders = [tmp_path / name for name in names]
    for folder in folders:
        folder.mkdir()
        (folder / "data").symlink_to(home / "data")
    return folders


def test_a_run_killed_a_dozen_times_ends_with_the_same_result(tmp_path: Path, home: Path) -> None:
    quiet, disturbed = homes(tmp_path, home, "quiet", "disturbed")
    folder, _ = train(quiet, TWO, Watcher(), depth=3, steps=400)
    undisturbed = json.loads((folder / "done.json").read_text())
    draw = random.Random(0)
    at_steps = sorted(draw.sample(range(20, 390), KILLS))
    killed: list[str] = []

    def kill_a_process(attempt: Path, event: dict[str, Any]) -> None:
        if event["event"] == "checkpoint" and at_steps and event["step"] >= at_steps[0]:
            run = attempt.parent.parent
            holder = run_holder(run)
            assert holder is not None
            supervisor = psutil.Process(holder)
            victim = draw.choice([supervisor, *supervisor.children(recursive=True)])
            killed.append(victim.name())
            at_steps.pop(0)
            os.kill(victim.pid, signal.SIGKILL)

    folder, outcome = train(
        disturbed, TWO, Watcher(kill_a_process), depth=3, steps=400, checkpoint_seconds=0
    )
    done = json.loads((folder / "done.json").read_text())
    assert len(killed) == KILLS
    assert outcome.trained == [folder.name]
    same = ("val_bpb", "val_loss", "train_loss", "tokens", "flops", "weights_sha256")
    assert {key: done[key] for key in same} == {key: undisturbed[key] for key in same}


def test_a_sweep_killed_fifty_times_on_a_full_disk_ends_with_the_same_results(
    tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    question = chaos.Question()
    draw = random.Random(0)
    assert len(chaos.run_sweep(home, question).trained) == 6
    kinds = draw.choices(list(chaos.KINDS), list(chaos.KINDS.values()), k=50)
    with chaos.small_disk(tmp_path / "disk", "48m") as disk:
        (disturbed,) = homes(disk or tmp_path, home, "disturbed")
        tally = chaos.disturb(disturbed, question, kinds, draw, disk)
        chaos.check_no_process_left(disturbed)
        assert tally.kills.total() == 50
        assert chaos.results(disturbed) == chaos.results(home)
        lines = chaos.check_events(disturbed)
        attempts = chaos.check_attempts(disturbed)
        assert store.rebuild(disturbed).events == lines == chaos.check_events(disturbed)
        assert chaos.results(disturbed) == chaos.results(home)
    with capsys.disabled():
        sys.stdout.write(f"\n{tally}, {attempts} attempts, {lines} lines of events\n")


def test_prose_and_code_are_swept_and_fitted_but_never_pooled(tmp_path: Path, home: Path) -> None:
    """Use the Markdown, reStructuredText and plain text of the installed packages as prose."""
    packages, notes = Path(sysconfig.get_path("purelib")), tmp_path / "notes"
    for path in packages.rglob("*"):
        if path.suffix not in (".md", ".rst", ".txt") or not path.is_file():
            continue
        copy = notes / path.relative_to(packages)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    for name, data in (("prose", str(notes)), ("code", "python")):
        options = ("--depths", DEPTHS, "--recipe", "pocket", "--name", name, "--data", data)
        swept = slm("sweep", *options, home=home)
        assert swept.returncode == 0, swept.stderr
        fitted = slm("fit-curves", name, "--json", home=home)
        # Three depths may determine no law, which is a refusal.
        assert fitted.returncode in (0, 2), fitted.stderr
        assert json.loads(fitted.stdout)["points"]["n"] == 3
    for refused in (
        slm("compare", "code", "prose", home=home),
        slm("fit-curves", "code", "prose", home=home),
    ):
        assert refused.returncode == 2
        assert "tokenizer: " in refused.stderr
    both = store.sql("select count(distinct comparison_key) as keys from results", home=home)
    assert both["keys"].tolist() == [2]
