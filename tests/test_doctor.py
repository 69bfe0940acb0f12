"""`slm doctor`: checks pass on a sound machine, and name each fault that a test makes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import store
from slm import doctor
from slm.data import PreparedDataset
from slm.doctor import Finding, Outcome
from slm.experiment import Experiment
from slm.files import hold_lock
from slm.hardware.slot import Slot
from slm.recipe import nanochat, pocket
from tests.bundles import write as write_bundle
from tests.cli.test_fit_curves import refusal, slm
from tests.homes import home_of

LITTLE = Experiment("little", (pocket,), (2,))


def only(outcomes: Iterator[Outcome]) -> Outcome:
    (outcome,) = outcomes
    return outcome


def test_this_python_and_its_packages_are_supported() -> None:
    assert only(doctor.python_version()).state == only(doctor.package_versions()).state == "ok"


def test_a_missing_or_wrong_package_is_named_with_the_range() -> None:
    assert (doctor.version_error("numpy", "<1") or "").endswith("slm requires <1")
    assert (
        doctor.version_error("no-such-thing", ">=2")
        == "no-such-thing is not installed, slm requires >=2"
    )
    assert doctor.version_error("numpy", ">=1") is None


def test_a_home_that_cannot_be_written_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    homes = [
        tmp_path / "file" / "runs",
        *([Path("/sys/kernel")] if Path("/sys/kernel").is_dir() else []),
    ]
    for home in homes:
        outcome = only(doctor.writable(home))
        assert (outcome.state, "SLM_HOME names another" in outcome.message) == ("problem", True)
        assert not list(doctor.locks(home)), "a home that is not writable is reported once"
    assert only(doctor.writable(tmp_path / "not" / "yet")).state == "ok"
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing is left"


def test_locks_that_do_not_keep_others_out_are_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    assert doctor.lock_error(tmp_path) is None
    for flock, words in ((refused, "refuses locks"), (lambda *_: None, "grants one lock twice")):
        monkeypatch.setattr(fcntl, "flock", flock)
        outcome = only(doctor.locks(tmp_path))
        assert (outcome.state, words in outcome.message) == ("problem", True)


def test_the_process_that_sweeps_the_home_is_named(tmp_path: Path) -> None:
    with hold_lock(tmp_path / "sweep.lock") or pytest.fail("held"):
        (_, outcome) = doctor.locks(tmp_path)
    assert outcome.message.startswith(f"process {os.getpid()} sweeps this home")


def test_a_network_file_system_is_a_note_about_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "file_system", lambda home: "nfs4")
    assert only(doctor.locks(tmp_path)).state == "note"


def test_a_stale_store_is_a_note_and_a_damaged_one_a_problem(tmp_path: Path) -> None:
    home = home_of(tmp_path, LITTLE)
    assert "no results yet" in only(doctor.database(home)).message
    store.ingest(home)
    assert only(doctor.database(home)) == Outcome("ok", "runs: 1, up to date")
    home_of(home, replace(LITTLE, depths=(3,)))
    assert only(doctor.database(home)).state == "note"
    (home / "results.duckdb").write_bytes(b"x" * 5000)
    outcome = only(doctor.database(home))
    assert (outcome.state, "slm store rebuild" in outcome.message) == ("problem", True)


def test_an_unreachable_server_is_a_problem_that_shows_no_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("psycopg")
    nowhere = "postgresql+psycopg://me:secret@127.0.0.1:1/slm"
    for address, words in ((nowhere, "refused"), ("mysql://me:secret@h", "mysql")):
        monkeypatch.setenv("SLM_STORE", address)
        outcome = only(doctor.database(tmp_path))
        assert (outcome.state, words in outcome.message, "secret" in outcome.message) == (
            "problem",
            True,
            False,
        )


def test_a_server_is_reported_as_stale_or_up_to_date(tmp_path: Path, postgresql: str) -> None:
    home = home_of(tmp_path, LITTLE)
    assert only(doctor.database(home)).state == "note"
    store.ingest(home)
    outcome = only(doctor.database(home))
    assert (outcome.state, "answers, up to date" in outcome.message) == ("ok", True)


def test_leftovers_of_dead_processes_are_listed(tmp_path: Path) -> None:
    home = home_of(tmp_path, replace(LITTLE, depths=(2, 3)))
    assert "2 runs, nothing left behind" in only(doctor.leftovers(home)).message
    first, second = sorted(path.parent for path in home.glob("*/plan.json"))
    for folder in (first, second):
        path = folder / "attempts" / "001" / "attempt.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"host": socket.gethostname()}))
        (folder / "done.json").unlink()
    half = home / "data" / "texts-1"
    half.mkdir(parents=True)
    (half / "lock").touch()
    (half / "lock").touch()
    with hold_lock(second / "train.lock") or pytest.fail("held"):
        orphans, dead, unfinished = doctor.leftovers(home)
    assert f"{second.name} (process {os.getpid()})" in orphans.message
    assert f"without an exit.json: {first.name};" in dead.message
    assert half.name in unfinished.message


def test_a_low_limit_of_open_files_is_a_note_or_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit, state in ((200, "problem"), (1000, "note"), (1024, "ok")):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
        try:
            outcome = next(doctor.limits())
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert (outcome.state, str(limit) in outcome.message) == (state, True)


def test_without_a_compiler_runs_train_uncompiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "g++-99")
    outcome = only(doctor.compiler())
    assert (outcome.state, "no g++-99 and no clang++" in outcome.message) == ("note", True)


def test_an_incomplete_slurm_is_a_problem_and_none_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert only(doctor.slurm()).state == "ok"
    for name in ("sbatch", "scancel", "scontrol"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    outcome = only(doctor.slurm())
    assert (outcome.state, "no squeue, unlike" in outcome.message) == ("problem", True)


def test_a_torch_that_does_not_load_is_a_problem_with_its_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    outcome = only(doctor.torch_loads())
    assert (outcome.state, "libcudart.so.12: cannot open" in outcome.message) == ("problem", True)


@pytest.mark.parametrize(
    ("gpus", "built", "state", "words"),
    [
        (("NVIDIA H200",), None, "problem", "without CUDA"),
        (("NVIDIA H200",), "12.8", "ok", "1 x NVIDIA H200, 0 GB"),
        ((), "12.8", "note", "no GPU found"),
        ((), None, "ok", "pocket"),
    ],
)
def test_gpus_and_the_build_of_torch_are_compared(
    monkeypatch: pytest.MonkeyPatch,
    gpus: tuple[str, ...],
    built: str | None,
    state: str,
    words: str,
) -> None:
    monkeypatch.setattr("slm.hardware.devices.gpu_names", lambda: gpus)
    monkeypatch.setattr("slm.hardware.devices.apple_gpu", lambda: False)
    monkeypatch.setattr(doctor, "torch_cuda", lambda: built)
    outcome = only(doctor.gpus())
    assert (outcome.state, words in outcome.message) == (state, True)


def test_the_cuda_version_of_torch_is_read_without_importing_it() -> None:
    import torch

    assert doctor.torch_cuda() == torch.version.cuda


def test_prepared_corpora_are_listed_and_broken_manifests_are_problems(
    home: Path, prepared: PreparedDataset
) -> None:
    outcome = only(doctor.prepared(home))
    tokens = prepared.train_rows * prepared.manifest["shape"]["sequence_length"]
    assert f"{prepared.folder.name} ({tokens:,}" in outcome.message
    (home / "data").unlink()
    (home / "data" / "x").mkdir(parents=True)
    (home / "data" / "x" / "manifest.json").write_text("{}")
    assert [finding.state for finding in doctor.prepared(home)] == ["problem", "ok"]


def test_missing_unprepared_and_short_data_of_a_plan_are_named(home: Path, tmp_path: Path) -> None:
    def check(experiment: Experiment, home: Path = home) -> Finding:
        runs = experiment.requested_runs()
        check = lambda: doctor.plan_data(experiment, runs, home)  # noqa: E731
        (finding,) = doctor.examine([("plan: data", check)])
        return finding

    assert check(LITTLE).state == "ok"
    assert "`slm data prepare python --recipe pocket`" in check(LITTLE, tmp_path).message
    assert check(LITTLE, tmp_path).state == "note"
    short = check(replace(LITTLE, ratios=(1e6,)))
    assert (short.state, "epochs" in short.message) == ("problem", True)
    missing = check(replace(LITTLE, data=str(tmp_path / "missing")))
    assert (missing.state, str(tmp_path / "missing") in missing.message) == ("problem", True)


def test_plans_too_large_for_memory_or_disk_are_problems(tmp_path: Path) -> None:
    large = replace(LITTLE, recipes=(nanochat,), depths=tuple(range(60, 101, 4))).requested_runs()
    checks: tuple[tuple[Callable[..., Iterator[Outcome]], tuple[Any, ...]], ...]
    checks = ((doctor.plan_memory, ()), (doctor.plan_disk, (tmp_path,)))
    for check, more in checks:
        assert only(check(LITTLE.requested_runs(), *more)).state == "ok"
        outcome = only(check(large, *more))
        assert (outcome.state, "GB" in outcome.message) == ("problem", True)
    assert doctor.memory_error(pocket(2), Slot("cpu", 1, 1, memory=10**6)) is not None
    assert doctor.memory_error(pocket(2), Slot("cpu", 1, 1, memory=10**10)) is None


def test_missing_and_changed_bundles_are_problems(tmp_path: Path) -> None:
    from slm.evaluate import bundle

    assert "slm data core" in only(doctor.plan_bundle(tmp_path)).message
    installed = bundle.install(write_bundle(tmp_path / "source"), tmp_path)
    assert only(doctor.plan_bundle(tmp_path)).state == "ok"
    with (installed.folder / installed.tasks[0].file).open("a") as file:
        file.write("\n")
    assert "was changed" in only(doctor.plan_bundle(tmp_path)).message


def test_a_failing_check_does_not_stop_the_others() -> None:
    def broken() -> Iterator[Outcome]:
        raise KeyError("rows")

    checks = [("first", broken), ("python", doctor.python_version)]
    assert [finding.state for finding in doctor.examine(checks)] == ["problem", "ok"]


def test_the_exit_code_is_1_exactly_when_there_is_a_problem(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The problem: the plan is to be evaluated with CORE, and there is no bundle."""
    code, out, _ = slm(home, "doctor", "--recipe", "pocket", "--depths", "2", "--core", "--json")
    document = json.loads(out)
    problems = [row["check"] for row in document["checks"] if row["state"] == "problem"]
    assert (code, document["problems"]) == (1, len(problems))
    assert "plan: CORE" in problems
    assert document["checks"][-1]["check"] == "torch"
    monkeypatch.setattr(doctor, "machine_checks", lambda *_: [("python", doctor.python_version)])
    code, out, _ = slm(home, "doctor")
    assert (code, out.splitlines()[-1]) == (0, "0 problems, 0 notes, 2 ok")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--core",), "--core"),
        (("--recipe", "pocket"), "--depths"),
        (("x.py", "--depths", "2"), "x.py declares"),
    ],
)
def test_an_incomplete_plan_is_refused(
    tmp_path: Path, arguments: tuple[str, ...], named: str
) -> None:
    assert named in refusal(tmp_path, "doctor", *arguments)
