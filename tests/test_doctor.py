"""`slm doctor`: every check is right where all is well, and names the fault where one is made."""

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
from slm.data import Prepared
from slm.doctor import Finding
from slm.experiment import Experiment
from slm.files import hold_lock
from slm.hardware.slot import Slot
from slm.recipe import nanochat, pocket
from tests.bundles import write as write_bundle
from tests.cli.test_fit_curves import refusal, slm
from tests.homes import home_of

LITTLE = Experiment("little", (pocket,), (2,))


def only(findings: Iterator[Finding]) -> Finding:
    (found,) = findings
    return found


def test_this_python_and_its_packages_are_as_needed() -> None:
    assert only(doctor.python()).state == only(doctor.packages()).state == "ok"


def test_a_package_of_another_version_or_none_is_named_with_the_range() -> None:
    assert (doctor.wrong_version("numpy", "<1") or "").endswith("slm wants <1")
    assert (
        doctor.wrong_version("no-such-thing", ">=2")
        == "no-such-thing is not installed, slm wants >=2"
    )
    assert doctor.wrong_version("numpy", ">=1") is None


def test_a_home_that_cannot_be_written_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    places = [
        tmp_path / "file" / "runs",
        *([Path("/sys/kernel")] if Path("/sys/kernel").is_dir() else []),
    ]
    for home in places:
        found = only(doctor.writable(home))
        assert (found.state, "SLM_HOME names another" in found.message) == ("problem", True)
        assert not list(doctor.locking(home)), "what cannot be written is told once"
    assert only(doctor.writable(tmp_path / "not" / "yet")).state == "ok"
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing is left"


def test_locks_that_do_not_keep_others_out_are_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    assert doctor.unlockable(tmp_path) is None
    for flock, said in ((refused, "refuses locks"), (lambda *_: None, "grants one lock twice")):
        monkeypatch.setattr(fcntl, "flock", flock)
        found = only(doctor.locking(tmp_path))
        assert (found.state, said in found.message) == ("problem", True)


def test_who_holds_the_home_is_named(tmp_path: Path) -> None:
    with hold_lock(tmp_path / "sweep.lock") or pytest.fail("held"):
        (_, found) = doctor.locking(tmp_path)
    assert found.message.startswith(f"process {os.getpid()} conducts a sweep")


def test_a_network_file_system_is_told_to_need_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "file_system", lambda home: "nfs4")
    assert only(doctor.locking(tmp_path)).state == "note"


def test_a_stale_store_is_a_note_and_a_damaged_one_a_problem(tmp_path: Path) -> None:
    home = home_of(tmp_path, LITTLE)
    assert "no results yet" in only(doctor.database(home)).message
    store.ingest(home)
    assert only(doctor.database(home)) == Finding("store", "ok", "runs: 1, as the files are")
    home_of(home, replace(LITTLE, depths=(3,)))
    assert only(doctor.database(home)).state == "note"
    (home / "results.duckdb").write_bytes(b"x" * 5000)
    found = only(doctor.database(home))
    assert (found.state, "slm store rebuild" in found.message) == ("problem", True)


def test_a_server_that_does_not_answer_is_a_problem_and_its_password_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("psycopg")
    nowhere = "postgresql+psycopg://me:secret@127.0.0.1:1/slm"
    for address, said in ((nowhere, "refused"), ("mysql://me:secret@h", "mysql")):
        monkeypatch.setenv("SLM_STORE", address)
        found = only(doctor.database(tmp_path))
        assert (found.state, said in found.message, "secret" in found.message) == (
            "problem",
            True,
            False,
        )


def test_a_server_that_answers_is_told_to_hold_the_files_or_not_yet(
    tmp_path: Path, postgresql: str
) -> None:
    home = home_of(tmp_path, LITTLE)
    assert only(doctor.database(home)).state == "note"
    store.ingest(home)
    found = only(doctor.database(home))
    assert (found.state, "answers, as the files are" in found.message) == ("ok", True)


def test_what_dead_processes_left_is_told(tmp_path: Path) -> None:
    home = home_of(tmp_path, replace(LITTLE, depths=(2, 3)))
    assert "2 in the home, nothing left behind" in only(doctor.leftovers(home)).message
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
        alone, dead, unfinished = doctor.leftovers(home)
    assert f"{second.name} (process {os.getpid()})" in alone.message
    assert f"without a word: {first.name};" in dead.message
    assert half.name in unfinished.message


def test_few_open_files_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit, state in ((200, "problem"), (1000, "note"), (1024, "ok")):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
        try:
            found = next(doctor.limits())
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert (found.state, str(limit) in found.message) == (state, True)


def test_without_a_compiler_runs_train_uncompiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "g++-99")
    found = only(doctor.compiler())
    assert (found.state, "no g++-99 and no clang++" in found.message) == ("note", True)


def test_half_a_slurm_is_a_problem_and_none_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert only(doctor.slurm()).state == "ok"
    for name in ("sbatch", "scancel", "scontrol"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    found = only(doctor.slurm())
    assert (found.state, "no squeue beside" in found.message) == ("problem", True)


def test_a_torch_that_does_not_load_is_a_problem_with_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = only(doctor.torch_loads())
    assert (found.state, "libcudart.so.12: cannot open" in found.message) == ("problem", True)


@pytest.mark.parametrize(
    ("gpus", "built", "state", "said"),
    [
        (("NVIDIA H200",), None, "problem", "without CUDA"),
        (("NVIDIA H200",), "12.8", "ok", "1 x NVIDIA H200, 0 GB"),
        ((), "12.8", "note", "no GPU is seen"),
        ((), None, "ok", "pocket"),
    ],
)
def test_a_gpu_and_a_torch_that_do_not_match_are_told(
    monkeypatch: pytest.MonkeyPatch, gpus: tuple[str, ...], built: str | None, state: str, said: str
) -> None:
    monkeypatch.setattr("slm.hardware.devices.gpu_names", lambda: gpus)
    monkeypatch.setattr("slm.hardware.devices.apple_gpu", lambda: False)
    monkeypatch.setattr(doctor, "torch_cuda", lambda: built)
    found = only(doctor.found_devices())
    assert (found.state, said in found.message) == (state, True)


def test_what_torch_is_built_for_is_read_without_loading_it() -> None:
    import torch

    assert doctor.torch_cuda() == torch.version.cuda


def test_a_prepared_corpus_and_one_whose_manifest_is_broken(home: Path, prepared: Prepared) -> None:
    found = only(doctor.prepared(home))
    assert (
        f"{prepared.folder.name} ({prepared.train_rows * prepared.manifest['shape']['sequence_length']:,}"
        in (found.message)
    )
    (home / "data").unlink()
    (home / "data" / "x").mkdir(parents=True)
    (home / "data" / "x" / "manifest.json").write_text("{}")
    assert [own.state for own in doctor.prepared(home)] == ["problem", "ok"]


def test_the_data_of_a_plan(home: Path, tmp_path: Path) -> None:
    def said(experiment: Experiment, home: Path = home) -> Finding:
        return only(
            doctor.examine(
                [("plan: data", lambda: doctor.enough_data(experiment, experiment.requested_runs(), home))]
            )
        )

    assert said(LITTLE).state == "ok"
    assert "`slm data prepare python --recipe pocket`" in said(LITTLE, tmp_path).message
    assert said(LITTLE, tmp_path).state == "note"
    short, gone = (
        said(replace(LITTLE, ratios=(1e6,))),
        said(replace(LITTLE, data=str(tmp_path / "gone"))),
    )
    assert (short.state, "epochs" in short.message) == ("problem", True)
    assert (gone.state, str(tmp_path / "gone") in gone.message) == ("problem", True)


def test_memory_and_disk_of_a_plan(tmp_path: Path) -> None:
    large = replace(LITTLE, recipes=(nanochat,), depths=tuple(range(60, 101, 4))).requested_runs()
    checks: tuple[tuple[Callable[..., Iterator[Finding]], tuple[Any, ...]], ...]
    checks = ((doctor.enough_memory, ()), (doctor.enough_disk, (tmp_path,)))
    for check, more in checks:
        assert only(check(LITTLE.requested_runs(), *more)).state == "ok"
        found = only(check(large, *more))
        assert (found.state, "GB" in found.message) == ("problem", True)
    assert doctor.too_much(pocket(2), Slot("cpu", 1, 1, memory=10**6)) is not None
    assert doctor.too_much(pocket(2), Slot("cpu", 1, 1, memory=10**10)) is None


def test_the_bundle_of_a_plan(tmp_path: Path) -> None:
    from slm.evaluate import bundle

    assert "slm data core" in only(doctor.bundle(tmp_path)).message
    own = bundle.install(write_bundle(tmp_path / "given"), tmp_path)
    assert only(doctor.bundle(tmp_path)).state == "ok"
    with (own.folder / own.tasks[0].file).open("a") as file:
        file.write("\n")
    assert "was changed" in only(doctor.bundle(tmp_path)).message


def test_a_check_that_fails_does_not_end_the_others() -> None:
    def broken() -> Iterator[Finding]:
        raise KeyError("rows")

    checks = [("first", broken), ("python", doctor.python)]
    assert [own.state for own in doctor.examine(checks)] == ["problem", "ok"]


def test_the_exit_code_says_whether_there_is_a_problem(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is: the plan is to be evaluated, and there is no bundle."""
    code, out, _ = slm(home, "doctor", "--recipe", "pocket", "--depths", "2", "--core", "--json")
    found = json.loads(out)
    problems = [own["check"] for own in found["checks"] if own["state"] == "problem"]
    assert (code, found["problems"]) == (1, len(problems))
    assert "plan: CORE" in problems
    assert [own["check"] for own in found["checks"]][-1] == "torch"
    monkeypatch.setattr(doctor, "machine", lambda *_: [("python", doctor.python)])
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
def test_a_plan_that_is_half_named_is_refused(
    tmp_path: Path, arguments: tuple[str, ...], named: str
) -> None:
    assert named in refusal(tmp_path, "doctor", *arguments)
