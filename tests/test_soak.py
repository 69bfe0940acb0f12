"""The long proofs: `make soak`."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
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
from tests.conftest import slm
from tests.train.test_train import TWO, Watcher, train

pytestmark = pytest.mark.soak
DEPTHS = "2-4"
KILLS = 12


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
def test_compiled_gradients_are_those_of_the_plain_ones() -> None:
    """With the code generator, as a long run is trained."""
    if not any(map(shutil.which, ("g++", "clang++"))):
        pytest.skip("no C++ compiler")
    given = replace(pocket, sequence_length=512)(4, steps=10)
    model = GPT(given)
    model.initialise(0)
    optimizer = Optimizer(model)
    ids = torch.randint(given.vocab_size, (4, 513), generator=torch.Generator().manual_seed(0))
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    optimizer.step(
        0
    )  # before it blocks add nothing, and the gradient of some scalars is rounding error
    found = []
    for loss in (model.loss, torch.compile(model.loss, fullgraph=True, dynamic=False)):
        optimizer.zero_grad()
        loss(ids[:, :-1], ids[:, 1:]).backward()
        found.append([part.buffer.gradients.clone() for part in optimizer._parts])
    for plain, compiled in zip(*found, strict=True):
        assert (compiled - plain).norm() <= 1e-5 * plain.norm()


def homes(tmp_path: Path, home: Path, *names: str) -> list[Path]:
    """Several homes with the prepared corpus of one."""
    folders = [tmp_path / name for name in names]
    for folder in folders:
        folder.mkdir()
        (folder / "data").symlink_to(home / "data")
    return folders


def test_a_run_killed_a_dozen_times_ends_as_an_undisturbed_one(tmp_path: Path, home: Path) -> None:
    quiet, disturbed = homes(tmp_path, home, "quiet", "disturbed")
    folder, _ = train(quiet, TWO, Watcher(), depth=3, steps=400)
    undisturbed = json.loads((folder / "done.json").read_text())
    draw = random.Random(0)
    at_steps = sorted(draw.sample(range(20, 390), KILLS))
    killed: list[str] = []

    def kill_somebody(attempt: Path, event: dict[str, Any]) -> None:
        if event["event"] == "checkpoint" and at_steps and event["step"] >= at_steps[0]:
            run = attempt.parent.parent
            holder = run_holder(run)
            assert holder is not None
            eldest = psutil.Process(holder)
            family = [eldest, *eldest.children(recursive=True)]
            victim = draw.choice(family)
            killed.append(victim.name())
            at_steps.pop(0)
            os.kill(victim.pid, signal.SIGKILL)

    folder, outcome = train(
        disturbed, TWO, Watcher(kill_somebody), depth=3, steps=400, checkpoint_seconds=0
    )
    done = json.loads((folder / "done.json").read_text())
    assert len(killed) == KILLS
    assert outcome.trained == [folder.name]
    same = ("val_bpb", "val_loss", "train_loss", "tokens", "flops", "weights_sha256")
    assert {key: done[key] for key in same} == {key: undisturbed[key] for key in same}


def test_a_sweep_killed_fifty_times_on_a_disk_that_fills_up_ends_as_a_quiet_one(
    tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    question, draw = chaos.Question(), random.Random(0)
    assert len(chaos.conduct_sweep(home, question).trained) == 6
    kinds = draw.choices(list(chaos.KINDS), list(chaos.KINDS.values()), k=50)
    with chaos.small_disk(tmp_path / "disk", "48m") as disk:
        (disturbed,) = homes(disk or tmp_path, home, "disturbed")
        tally = chaos.disturb(disturbed, question, kinds, draw, disk)
        chaos.check_nobody_left(disturbed)
        assert tally.kills.total() == 50
        assert chaos.results(disturbed) == chaos.results(home)
        lines, attempts = chaos.check_events(disturbed), chaos.check_attempts(disturbed)
        assert store.rebuild(disturbed).events == lines == chaos.check_events(disturbed)
        assert chaos.results(disturbed) == chaos.results(home)
    with capsys.disabled():
        print(f"\n{tally}, {attempts} attempts, {lines} lines of events")


def test_prose_is_swept_and_fitted_beside_the_library_and_never_pooled_with_it(
    tmp_path: Path, home: Path
) -> None:
    """The Markdown, reStructuredText and plain text of the packages that are installed, without a manual step."""
    packages, notes = Path(sysconfig.get_path("purelib")), tmp_path / "notes"
    found = [
        path
        for path in packages.rglob("*")
        if path.suffix in (".md", ".rst", ".txt") and path.is_file()
    ]
    for path in found:
        copy = notes / path.relative_to(packages)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    for name, data in (("prose", str(notes)), ("code", "python")):
        swept = slm(
            "sweep",
            "--depths",
            DEPTHS,
            "--recipe",
            "pocket",
            "--name",
            name,
            "--data",
            data,
            home=home,
        )
        assert swept.returncode == 0, swept.stderr
        fitted = slm("fit-curves", name, "--json", home=home)
        assert fitted.returncode in (0, 2), (
            fitted.stderr
        )  # three depths may hold no law, and it says so
        assert json.loads(fitted.stdout)["points"]["n"] == 3
    for refused in (
        slm("compare", "code", "prose", home=home),
        slm("fit-curves", "code", "prose", home=home),
    ):
        assert refused.returncode == 2
        assert "tokenizer: " in refused.stderr
    both = store.sql("select count(distinct comparison_key) as keys from results", home=home)
    assert both["keys"].tolist() == [2]
