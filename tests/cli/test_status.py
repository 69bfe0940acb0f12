"""`slm status`, `show`, `logs`, `stop`, `retry` and `rm`, on recorded homes and during a sweep."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import store
from slm import events
from slm.experiment import Experiment
from slm.files import hold_lock, read_json, write_json
from slm.monitor import follow
from slm.monitor.display import Display
from slm.plan import Plan, code_fingerprint
from slm.recipe import pocket
from slm.run import cancel_run, record_exit
from slm.sweep.orchestrator import sweep_lock
from tests import chaos
from tests.attempts import log
from tests.commands import slm
from tests.homes import home_of

PROGRAM = [sys.executable, "-c", "from slm.cli import main; main()"]
LONG_SWEEP = ("sweep", "--recipe", "pocket", "--depths", "4", "--steps", "5000", "--seeds", "2")
DEADLINE = 600.0
"""Seconds after which a state that should come is given up."""


@pytest.fixture
def recorded(tmp_path: Path) -> tuple[Path, list[Path]]:
    """Write a home of three finished runs. Return it and their folders, cheapest first."""
    home = home_of(tmp_path / "runs", Experiment("e", (pocket,), (2, 3, 4)))
    runs = read_json(home / "experiments" / "e.json")["runs"]
    return home, [home / run_id for run_id in runs]


def unfinish(folder: Path, reason: str | None = None, message: str | None = None) -> Path:
    """Make a finished run unfinished, with or without an exit.json. Return its attempt."""
    attempt = folder / "attempts" / "001"
    (folder / "done.json").unlink()
    if reason:
        record_exit(attempt, 1, reason, message)
    return attempt


def status(home: Path, *arguments: str) -> list[dict[str, Any]]:
    result = slm("status", "--json", *arguments, home=home)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)["runs"]


def test_status_shows_progress_time_left_and_reasons(recorded) -> None:
    home, (done, running, failed) = recorded
    unfinish(running)
    unfinish(failed, "error", "RuntimeError: a word\nand " + "another " * 20)
    lock = hold_lock(running / "lock")
    assert lock is not None
    with lock:
        rows = status(home)
        table = slm("status", "e", home=home).stdout
    assert [row["run_id"] for row in rows] == [done.name, running.name, failed.name]
    assert [row["status"] for row in rows] == ["finished", "running", "failed"]
    assert rows[0]["val_bpb"] == read_json(done / "done.json")["val_bpb"]
    assert rows[1]["val_bpb"] is rows[1]["flops"] is rows[0]["seconds_left"] is None
    assert rows[1]["seconds_left"] == rows[1]["steps"] - rows[1]["step"]  # a step a second
    assert (rows[2]["reason"], rows[2]["seconds_left"]) == ("error", None)
    assert "RuntimeError: a word and another" in table
    assert "…" in table
    assert "3 runs: 1 finished, 1 running, 1 failed" in table


def test_status_updates_the_database_without_loading_it(recorded) -> None:
    home, _ = recorded
    program = (
        "import sys; sys.argv = ['slm', 'status', '--json']\nfrom slm.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'duckdb', 'pandas', 'sqlalchemy', 'numpy', 'rich'} & set(sys.modules)"
    )
    env = {**os.environ, "SLM_HOME": str(home)}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=env, check=False
    )
    assert result.returncode == 0, result.stderr
    wait_for(lambda: store.is_current(home))
    assert len(store.results("e", home=home)) == 3


def test_an_ingest_reads_changes_after_a_complete_ingest(recorded) -> None:
    home, (first, second, _) = recorded
    assert not store.is_current(home)
    store.ingest(home)
    assert store.is_current(home)
    with (second / "attempts" / "001" / "events.jsonl").open("a") as file:
        file.write('{"event": "train", "step": 5, "time": 1.0, "loss": 2.5}\n')
    assert not store.is_current(home)
    assert store.ingest(home).events == 1
    (first / "plan.json").write_text("{}")
    assert len(store.ingest(home).problems) == 1
    assert len(store.ingest(home).problems) == 1  # an unreadable file is reported again
    (home / "results.duckdb").unlink()
    store.ingest(home)
    assert (home / "results.duckdb").exists()


def test_a_damaged_plan_hides_no_other_run(recorded) -> None:
    home, (damaged, *intact) = recorded
    (damaged / "plan.json").write_text("{}")
    result = slm("status", "--json", home=home)
    assert [run["run_id"] for run in json.loads(result.stdout)["runs"]] == [
        folder.name for folder in intact
    ]
    assert damaged.name in result.stderr
    result = slm("show", damaged.name, home=home)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert "'recipe'" in result.stderr


def test_show_describes_attempts_with_devices_times_and_ends(recorded) -> None:
    home, (folder, *_) = recorded
    attempt = unfinish(folder, "error", "ValueError: no such thing")
    document = read_json(attempt / "attempt.json")
    changes = {"created": time.time() - 60, "ids": ["0", "3"], "estimated_seconds": 3700.0}
    write_json(attempt / "attempt.json", document | changes)
    (attempt / "log").write_text("".join(f"line {number}\n" for number in range(100)))
    output = slm("show", folder.name, home=home).stdout
    assert "failed" in output.splitlines()[0]
    assert "attempt 1: error after 1 min" in output
    assert "estimated at 1 h 01 min" in output
    assert "2 x NVIDIA H100 80GB HBM3 (0, 3), 1 threads, 4 rows a pass, on h" in output
    assert "ValueError: no such thing" in output
    assert "line 99" in output
    assert "line 50" not in output


def test_logs_are_events_in_words_then_the_raw_log(recorded) -> None:
    home, (folder, *_) = recorded
    attempt = folder / "attempts" / "001"
    writer = events.Writer(attempt / "events.jsonl")
    core = {
        "step": 7,
        "tokens": 1,
        "flops": 1.0,
        "metric": "pocket-core",
        "bits_per_byte": 1.0,
        "seconds": 2.5,
    }
    writer.write("working", step=7, what="core", share=0.25)
    writer.write("core", **core, mode="500 per task", core=0.125, core_error=0.01)
    writer.write("core", **core, mode="full", core=None, core_error=None)
    writer.write("warning", step=7, message="free some space")
    writer.write("failed", reason="diverged", message="loss is nan")
    (attempt / "log").write_text("one\ntwo\n\x1b[31mthree\x1b[m\n")
    head, *lines = slm("logs", folder.name[:6], "-n", "5", home=home).stdout.splitlines()
    assert head.startswith(f"run {folder.name}: pocket d2")
    assert [line[10:] for line in lines[:5]] == [
        "step 7, CORE 25%",
        "step 7, pocket-core (500 per task) 0.1250 +- 0.0100 in 2.5 s",
        "step 7, pocket-core (full) without a value in 2.5 s",
        "warning: free some space",
        "diverged: loss is nan",
    ]
    assert lines[5:] == ["| one", "| two", "| three"]
    document = json.loads(slm("logs", folder.name, "--json", "-n", "1", home=home).stdout)
    assert (document["attempt"], document["events"][0]["reason"], len(document["log"])) == (
        1,
        "diverged",
        1,
    )
    assert (
        slm("logs", folder.name, "-f", home=home).stdout.splitlines()[-1]
        == f"run {folder.name}: finished"
    )


def test_rm_removes_a_run_and_its_rows(recorded) -> None:
    home, (remaining, removed, _) = recorded
    store.ingest(home)
    (removed / "model.safetensors").write_bytes(bytes(5_000_000))
    result = slm("rm", removed.name, "--json", home=home)
    assert result.returncode == 2
    assert "--yes" in result.stderr
    assert removed.exists()
    freed = json.loads(slm("rm", removed.name, "--yes", "--json", home=home).stdout)
    assert freed["runs"] == [removed.name]
    assert freed["bytes"] > 5_000_000
    assert not removed.exists()
    assert removed.name not in store.results("e", home=home)["run_id"].tolist()
    assert status(home, "e")[0]["run_id"] == remaining.name
    assert len(status(home, "e")) == 2


def test_rm_of_checkpoints_keeps_results(recorded) -> None:
    home, (folder, *_) = recorded
    (folder / "model.safetensors").write_bytes(bytes(1000))
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "step").write_bytes(bytes(500))
    freed = json.loads(slm("rm", folder.name, "--checkpoints", "--yes", "--json", home=home).stdout)
    assert freed["bytes"] == 1500
    assert not (folder / "model.safetensors").exists()
    assert not list((folder / "checkpoints").iterdir())
    assert status(home)[0]["status"] == "finished"


def test_active_runs_are_not_removed(recorded) -> None:
    home, (folder, *_) = recorded
    unfinish(folder)
    lock = hold_lock(folder / "lock")
    assert lock is not None
    with lock:
        held = slm("rm", folder.name, "--yes", home=home)
    with sweep_lock(home):
        swept = slm("rm", folder.name, "--yes", home=home)
    for result in (held, swept):
        assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
        assert "slm stop" in result.stderr
        assert str(os.getpid()) in result.stderr
    assert folder.exists()


def test_stop_does_not_signal_a_run_of_another_machine_but_names_it(recorded) -> None:
    home, (folder, *_) = recorded
    unfinish(folder)
    lock = hold_lock(folder / "lock")
    assert lock is not None
    with lock:
        result = slm("stop", folder.name, home=home)
    assert result.returncode == 1
    assert f"run {folder.name} runs on h: type `slm stop {folder.name}` there" in result.stderr


def test_retry_clears_failures_and_names_the_next_command(recorded) -> None:
    home, (first, second, _) = recorded
    unfinish(first, "error", "woe")
    unfinish(second, "diverged", "loss is nan")
    result = slm("retry", "--failed", home=home)
    assert f"1 run to retry: {first.name}" in result.stdout
    assert f"slm sweep --plan {first / 'plan.json'}" in result.stdout
    assert [row["status"] for row in status(home)] == ["interrupted", "diverged", "finished"]
    assert "no sweep is running" in result.stdout
    with sweep_lock(home):
        result = slm("retry", second.name, home=home)
    assert f"process {os.getpid()} runs a sweep" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("logs", "000000000000"), "000000000000"),
        (("logs", "RUN", "--attempt", "7"), "--attempt 7"),
        (("logs", "RUN", "-f", "--json"), "--follow --json"),
        (("stop", "../x"), "../x"),
        (("retry",), "--failed"),
        (("retry", "RUN"), "is finished"),
        (("retry", "RUN", "--failed"), "--failed"),
        (("rm", "none"), "none"),
        (("status", "nonesuch"), "nonesuch"),
        (("status", "--watch", "--json"), "--watch --json"),
        (("sweep", "--depths", "2", "--detach", "--json"), "--detach --json"),
    ],
)
def test_bad_input_is_one_line_that_names_it(
    recorded, arguments: tuple[str, ...], named: str
) -> None:
    home, (folder, *_) = recorded
    result = slm(
        *(folder.name if argument == "RUN" else argument for argument in arguments), home=home
    )
    assert (result.returncode, len(result.stderr.strip().splitlines())) == (2, 1)
    assert named in result.stderr


def test_watching_a_home_without_active_runs_ends(recorded) -> None:
    home, _ = recorded
    result = slm("status", "--watch", home=home)
    assert (result.returncode, result.stdout) == (0, "")
    assert "no run is active" in result.stderr


def test_watching_shows_the_end_of_runs_that_it_saw_last_or_never(
    recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, (seen, unseen, _) = recorded
    plans = [Plan.read(folder / "plan.json") for folder in (seen, unseen)]
    done = (seen / "done.json").read_text()
    unfinish(seen)
    lock = hold_lock(seen / "lock")
    assert lock is not None
    file = io.StringIO()
    display = Display(plans, set(), file)

    def until() -> bool:
        if display.active:
            (seen / "done.json").write_text(done)
            lock.close()
        return lock.closed

    monkeypatch.setattr(follow, "WATCH_SECONDS", 0)
    follow.watch(plans, home, display, until)
    assert display.active == 0
    ends = [line for line in file.getvalue().splitlines() if ": finished" in line]
    assert [line.split()[0] for line in ends] == [unseen.name, seen.name]


def test_a_plan_counts_cancelled_runs(tmp_path: Path) -> None:
    home = home_of(tmp_path, Experiment("e", (pocket,), (2, 3, 4)), code=code_fingerprint())
    folders = [home / run_id for run_id in read_json(home / "experiments" / "e.json")["runs"]]
    for folder in folders[1:]:
        shutil.rmtree(folder / "attempts")
        (folder / "done.json").unlink()
    cancel_run(folders[1])
    again = [part for folder in folders for part in ("--plan", str(folder))]
    result = slm("sweep", *again, "--name", "e", "--dry-run", home=home)
    assert "3 runs on" in result.stdout
    assert ": 1 done, 1 cancelled, 1 to train, " in result.stdout


def wait_for(condition: Callable[[], Any]) -> Any:
    """Call a function until its result is true, and return the result."""
    deadline = time.monotonic() + DEADLINE
    while not (result := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return result


class Observed:
    """A home with a sweep and its observers, which are processes."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._processes: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a command that SIGINT interrupts, even where the tests run in the background."""
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [*PROGRAM, *arguments],
            stdout=pipe,
            stderr=pipe,
            text=True,
            env={**os.environ, "SLM_HOME": str(self.home)},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self._processes.append(process)
        return process

    def training(self) -> list[str]:
        """Return the runs that took a step and whose attempt has not ended."""
        return [
            path.parents[2].name
            for path in self.home.glob("*/attempts/001/events.jsonl")
            if log(path.parent, "train") and not (path.parent / "exit.json").exists()
        ]

    def end(self) -> None:
        """Kill what is left of the sweep and its observers."""
        for process in self._processes:
            process.kill()
            process.communicate()
        chaos.kill_all(self.home)


def output_of(process: subprocess.Popen[str]) -> tuple[str, str, int]:
    return (*process.communicate(timeout=DEADLINE), process.returncode)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, prepared) -> Iterator[dict[str, Any]]:
    """Sweep two long runs, stop the first run, then the sweep. Yield what all observers printed.

    Observers are `slm status --watch`, one that is interrupted, and `slm logs -f` of the first run.
    """
    home = tmp_path_factory.mktemp("swept")
    (home / "data").symlink_to(prepared.folder.parent)
    observed = Observed(home)
    try:
        yield {"home": home, **stop_runs(observed)}
    finally:
        observed.end()


def stop_runs(observed: Observed) -> dict[str, Any]:
    """Start the sweep and its observers, stop one after the other, and return their output."""
    home = observed.home
    results: dict[str, Any] = {}
    sweep = observed.start(*LONG_SWEEP, "--data", "python", "--cores", "1")
    wait_for(lambda: sweep.poll() is not None or observed.training())
    [first] = observed.training()
    watcher = observed.start("status", "--watch")
    logs = observed.start("logs", first, "-f", "--lines", "5000")
    interrupted = observed.start("status", "--watch")
    assert watcher.stderr is not None
    assert interrupted.stderr is not None
    first_line = watcher.stderr.readline()  # both watch from here on
    interrupted.stderr.readline()
    interrupted.send_signal(signal.SIGINT)
    results["interrupted"] = output_of(interrupted)
    results["stop one"] = slm("stop", first, "--json", home=home)
    [second] = wait_for(lambda: [run for run in observed.training() if run != first])
    results["stop all"] = slm("stop", home=home)
    results |= {"first": first, "second": second, "sweep": output_of(sweep)}
    _, lines, code = output_of(watcher)
    return results | {"watcher": (first_line + lines, code), "logs": output_of(logs)}


def test_a_cancelled_run_ends_and_the_sweep_trains_the_next(swept) -> None:
    document = json.loads(swept["stop one"].stdout)
    [run] = document["runs"]
    assert (run["run_id"], run["status"]) == (swept["first"], "cancelled")
    assert 0 < run["step"] < run["steps"]
    assert swept["second"] != swept["first"]
    assert f"asked to checkpoint and stop: {swept['first']}" in swept["stop one"].stderr


def test_stop_without_a_run_ends_the_sweep_after_a_checkpoint(swept) -> None:
    assert swept["stop all"].returncode == 0
    assert f"{swept['second']} at step" in swept["stop all"].stdout
    assert "the same `slm sweep` resumes it" in swept["stop all"].stdout
    assert swept["sweep"][2] == 130
    assert list((swept["home"] / swept["second"] / "checkpoints").iterdir())
    assert {row["run_id"]: row["status"] for row in status(swept["home"])} == {
        swept["first"]: "cancelled",
        swept["second"]: "interrupted",
    }


def test_a_watcher_sees_both_runs_and_ends_with_the_sweep(swept) -> None:
    lines, code = swept["watcher"]
    assert code == 0
    assert f"{swept['first']} pocket d4 steps=5000 seed" in lines
    assert "already running" in lines
    assert "cancelled after" in lines
    assert f"{swept['second']} pocket d4" in lines
    assert lines.splitlines()[-1] == "no run is active"


def test_an_interrupted_watcher_ends_and_the_runs_continue(swept) -> None:
    _, lines, code = swept["interrupted"]
    assert code == 0
    assert lines.splitlines()[-1] == "stopped watching; the runs continue"


def test_followed_logs_end_with_their_run(swept) -> None:
    out, _, code = swept["logs"]
    assert code == 0
    assert "started on 1 x cpu" in out
    assert "tokens/s" in out
    assert out.splitlines()[-1] == f"run {swept['first']}: cancelled"
