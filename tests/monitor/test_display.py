"""The display of active runs, read back from real pseudo-terminals, pipes and log files."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from slm.experiment import Experiment
from slm.files import read_json, write_json
from slm.monitor import display as display_module
from slm.monitor.display import Display
from slm.monitor.run_progress import CURVE_POINTS, LEVELS, RunProgress, last_events
from slm.plan import Plan
from slm.recipe import pocket
from tests.homes import home_of

CODE = re.compile(r"\x1b\[(\??\d*)([A-Za-z])|(\r)|(\n)|([^\x1b\r\n]+)")


class Terminal:
    """A pseudo-terminal of a size, and the text it shows."""

    def __init__(self, columns: int, lines: int = 24) -> None:
        self._master, slave = pty.openpty()
        self.file = os.fdopen(slave, "w", encoding="utf-8")
        self.resize(columns, lines)
        os.set_blocking(self._master, False)
        self.output = ""
        """All output so far."""

    def resize(self, columns: int, lines: int = 24) -> None:
        size = struct.pack("HHHH", lines, columns, 0, 0)
        fcntl.ioctl(self.file, termios.TIOCSWINSZ, size)

    def close(self) -> None:
        """Close the master side, as a terminal window does."""
        os.close(self._master)

    def read(self) -> str:
        """Return the output since the last call."""
        pieces = []
        try:
            while piece := os.read(self._master, 65536):
                pieces.append(piece)
        except BlockingIOError:
            pass
        text = b"".join(pieces).decode()
        self.output += text
        return text

    def screen(self) -> list[str]:
        """Return all lines, with those that scrolled away, after the escape sequences."""
        self.read()
        lines = [""]
        row = column = 0
        for argument, code, home, end, text in CODE.findall(self.output):
            if code == "A":
                row -= int(argument)
            elif code == "K":
                lines[row] = ""
            elif home:
                column = 0
            elif end:
                row += 1
                lines += [""] * (row + 1 - len(lines))
            elif text:
                lines[row] = (
                    f"{lines[row]:{column}}"[:column] + text + lines[row][column + len(text) :]
                )
                column += len(text)
            else:
                assert code in ("m", "h", "l"), (argument, code)
        while lines and not lines[-1].strip():
            lines.pop()
        return [line.rstrip() for line in lines]


@contextmanager
def display_on(
    terminal: Terminal, plans: list[Plan], done: set[str] | None = None
) -> Iterator[Display]:
    with terminal.file, Display(plans, done or set(), terminal.file) as display:
        yield display


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal type, and none of the variables that force or forbid colours."""
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, list[Plan]]:
    """A home of six runs on two H100s, and their plans."""
    home = home_of(tmp_path, Experiment("e", (pocket,), (2, 3, 4), seeds=(0, 1)))
    plans = [Plan.read(path) for path in home.glob("*/plan.json")]
    return home, sorted(plans, key=lambda plan: (plan.hyperparameters.depth, plan.seed))


def start(display: Display, home: Path, plan: Plan, **attempt: Any) -> None:
    folder = home / plan.run_id / "attempts" / "001"
    write_json(folder / "attempt.json", read_json(folder / "attempt.json") | attempt)
    display.run_started(plan, folder, False)


def train(step: int, seconds: float, loss: float = 3.0) -> dict[str, Any]:
    return {
        "event": "train",
        "time": 1e6 + seconds,
        "step": step,
        "loss": loss,
        "memory_bytes": 2_500_000_000,
    }


def train_runs(display: Display, home: Path, plans: list[Plan], per_second: int = 2) -> None:
    """Start runs that take so many steps a second, up to step 20."""
    for plan in plans:
        start(display, home, plan)
        for step in range(2, 21):
            display.event(plan, train(step, step / per_second, 9 / step))


@pytest.mark.parametrize(
    ("columns", "visible", "dropped"),
    [
        (200, {"run", "step", "loss", "curve", "tok/s", "MFU", "GB", "left"}, set()),
        (80, {"run", "step", "loss", "curve", "left"}, {"GB", "MFU"}),
        (34, {"run", "left"}, {"GB", "MFU", "tok/s", "curve", "loss", "step"}),
    ],
)
def test_a_narrow_terminal_drops_the_least_important_columns_and_wraps_none(
    runs: tuple[Path, list[Plan]], columns: int, visible: set[str], dropped: set[str]
) -> None:
    home, plans = runs
    terminal = Terminal(columns)
    with display_on(terminal, plans) as display:
        train_runs(display, home, plans[:3])
        display.refresh()
        heading, *lines, foot = terminal.screen()
    assert visible <= set(heading.split())
    assert not dropped & set(heading.split())
    assert all(len(line) < columns for line in (heading, *lines, foot))
    assert [line.split()[:4] for line in lines] == [
        f"pocket d{depth} seed {seed}".split() for depth, seed in ((2, 0), (2, 1), (3, 0))
    ]
    assert foot.startswith("0/6 runs done")


def test_the_block_is_redrawn_in_place(runs: tuple[Path, list[Plan]]) -> None:
    home, plans = runs
    terminal = Terminal(100)
    with display_on(terminal, plans) as display:
        train_runs(display, home, plans[:3])
        display.refresh()
        first = terminal.screen()
        for _ in range(3):
            display.refresh()
        assert len(terminal.screen()) == len(first) == 5
        display.run_ended(plans[0], "interrupted", None)
        display.refresh()
        assert len(terminal.screen()) == 5  # a line above the block, and a run fewer in it


def test_ended_runs_and_messages_scroll_above_the_block(runs: tuple[Path, list[Plan]]) -> None:
    home, plans = runs
    terminal = Terminal(100)
    finished = {"event": "finished", "step": 9, "val_bpb": 1.25, "wall_seconds": 75.0}
    with display_on(terminal, plans) as display:
        train_runs(display, home, plans[:2])
        display.refresh()
        display.event(plans[0], finished)
        display.run_ended(plans[0], "finished", None)
        display.note("a note [bold]as it is[/bold] :smile:")
        sys.stderr.write("a warning of another module\n")
        display.run_ended(plans[1], "failed", "two\nlines of \x1b[31mwoe\x1b[m")
        display.refresh()
        first, note, warning, second, foot = terminal.screen()
    assert first == f"{plans[0].run_id} pocket d2 seed 0: finished, val_bpb 1.2500, 1 min 15 s"
    assert note == "a note [bold]as it is[/bold] :smile:"
    assert warning == "a warning of another module"
    assert second.startswith(f"{plans[1].run_id} pocket d2 seed 1: failed after ")
    assert second.endswith(": two lines of woe")
    assert foot.startswith("1/6 runs done")
    assert "1 failed" in foot


def test_the_last_block_stays_and_the_cursor_is_visible(runs: tuple[Path, list[Plan]]) -> None:
    home, plans = runs
    terminal = Terminal(100)
    before = sys.stderr
    with terminal.file:
        with Display(plans, set(), terminal.file) as display:
            train_runs(display, home, plans[:1])
            display.refresh()
            assert terminal.read().rfind("\x1b[?25h") > terminal.output.rfind("\x1b[?25l")
        terminal.file.write("prompt")
        terminal.file.flush()
        _heading, run, foot, prompt = terminal.screen()
    assert run.startswith("pocket d2 seed 0")
    assert foot.startswith("0/6 runs done")
    assert prompt == "prompt"
    assert terminal.output.rfind("\x1b[?25h") > terminal.output.rfind("\x1b[?25l")
    assert sys.stderr is before


def test_long_messages_are_not_broken_into_lines(runs: tuple[Path, list[Plan]]) -> None:
    _, plans = runs
    line = "a path /" + "deep/" * 40 + " and more words" * 10
    terminal = Terminal(80)
    with display_on(terminal, plans) as display:
        display.note(line)
        display.refresh()
        assert terminal.screen()[0] == line


def test_runs_beyond_the_terminals_lines_are_counted(runs: tuple[Path, list[Plan]]) -> None:
    home, plans = runs
    terminal = Terminal(100, lines=8)
    with display_on(terminal, plans) as display:
        train_runs(display, home, plans)
        display.refresh()
        _heading, *lines, more, _foot = terminal.screen()
    assert len(lines) == 3
    assert more == "… and 3 more"


def test_a_narrower_window_is_cleared_of_its_wrapped_lines(runs: tuple[Path, list[Plan]]) -> None:
    home, plans = runs
    terminal = Terminal(160)
    with display_on(terminal, plans) as display:
        train_runs(display, home, plans[:1])
        display.refresh()
        heading, run, foot = terminal.screen()
        terminal.resize(50)
        display.refresh()
        ups = terminal.read().count("\x1b[1A")
    rows = sum(-(-len(line) // 50) for line in (heading, run, foot))
    assert rows > 3
    assert ups >= rows - 1


def test_no_color_means_no_colours(
    runs: tuple[Path, list[Plan]], monkeypatch: pytest.MonkeyPatch
) -> None:
    home, plans = runs
    coloured = re.compile(r"\x1b\[(\d+;)*[34]\d(;\d+)*m")
    for setting in ("", "1"):
        monkeypatch.setenv("NO_COLOR", setting)
        terminal = Terminal(100)
        with display_on(terminal, plans) as display:
            train_runs(display, home, plans[:1])
            display.event(plans[0], train(plans[0].hyperparameters.steps // 2, 99.0))
            display.refresh()
            assert bool(coloured.search(terminal.read())) is not bool(setting)


def test_a_closed_terminal_ends_nothing_and_later_output_is_discarded(
    runs: tuple[Path, list[Plan]],
) -> None:
    home, plans = runs
    terminal = Terminal(80)
    with display_on(terminal, plans) as display:
        train_runs(display, home, plans[:1])
        display.refresh()
        terminal.close()
        display.refresh()
        display.note("discarded")
        display.run_ended(plans[0], "finished", None)
        sys.stderr.write("discarded, too\n")
        display.refresh()


@pytest.mark.parametrize("force_color", [False, True])
def test_a_log_that_replaces_the_terminal_gets_plain_lines(
    runs: tuple[Path, list[Plan]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    force_color: bool,
) -> None:
    if force_color:
        monkeypatch.setenv("FORCE_COLOR", "1")
    home, plans = runs
    terminal = Terminal(80)
    log = tmp_path / "sweep.log"
    with display_on(terminal, plans) as display:
        train_runs(display, home, plans[:2])
        display.refresh()
        with log.open("wb") as file:  # as after SIGHUP
            os.dup2(file.fileno(), terminal.file.fileno())
        display.note("a note")
        monkeypatch.setattr(display_module, "LINE_SECONDS", -1.0)
        display.refresh()
        display.run_ended(plans[0], "failed", "out of luck")
    note, line, end = log.read_text().splitlines()
    assert note == "a note"
    assert line.startswith(f"{plans[0].run_id} pocket d2 seed 0: step 20/")
    assert end.endswith(": out of luck")
    assert "\x1b" not in log.read_text()


def test_a_closed_pipe_ends_nothing(runs: tuple[Path, list[Plan]]) -> None:
    home, plans = runs
    reading, writing = os.pipe()
    with os.fdopen(writing, "w", encoding="utf-8") as file, Display(plans, set(), file) as display:
        start(display, home, plans[0])
        assert plans[0].run_id in os.read(reading, 9999).decode()
        os.close(reading)
        display.note("discarded")
        display.note("discarded, too")


@pytest.mark.parametrize("force_color", [False, True])
def test_without_a_terminal_runs_are_reported_in_turn_in_plain_lines(
    runs: tuple[Path, list[Plan]], monkeypatch: pytest.MonkeyPatch, force_color: bool
) -> None:
    if force_color:
        monkeypatch.setenv("FORCE_COLOR", "1")
    home, plans = runs
    file = io.StringIO()
    with Display(plans, {plans[5].run_id}, file) as display:
        train_runs(display, home, plans[:2])
        display.refresh()
        assert len(file.getvalue().splitlines()) == 2  # both starts; the pause is not over
        monkeypatch.setattr(display_module, "LINE_SECONDS", -1.0)
        for _ in range(3):
            display.refresh()
    lines = file.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == [plans[n].run_id for n in (0, 1, 0, 1, 0)]
    assert "attempt 1 on 2 x NVIDIA H100 80GB HBM3 (run 1 of 6)" in lines[0]
    steps = plans[0].hyperparameters.steps
    for part in (
        f"step 20/{steps:,}, loss 0.450, tok/s ",
        ", MFU ",
        ", GB 2.50, left ",
        "; sweep 1/6 runs done",
        "elapsed",
    ):
        assert part in lines[2]
    assert "\x1b" not in file.getvalue()


def test_the_sweeps_time_left_is_its_flops_over_the_sum_of_the_rates(
    runs: tuple[Path, list[Plan]],
) -> None:
    home, plans = runs
    display = Display(plans, {plans[0].run_id}, io.StringIO())
    progress = display._progress
    train_runs(display, home, plans[2:3], per_second=2)
    train_runs(display, home, plans[4:5], per_second=3)
    flops = [plan.hyperparameters.flops for plan in plans]
    per_step = [plan.hyperparameters.flops / plan.hyperparameters.steps for plan in plans]
    remaining = sum(flops[1:]) - 20 * (per_step[2] + per_step[4])
    rate = 2 * per_step[2] + 3 * per_step[4]
    assert progress.seconds_left() == pytest.approx(remaining / rate)
    start(display, home, plans[5])  # counts with the mean rate of the other two
    assert progress.seconds_left() == pytest.approx(remaining / (1.5 * rate))
    display.run_ended(plans[2], "diverged", "loss is nan")
    remaining -= flops[2] - 20 * per_step[2]
    assert progress.seconds_left() == pytest.approx(remaining / (2 * 3 * per_step[4]))


def test_mfu_is_shown_if_the_peak_is_known(runs: tuple[Path, list[Plan]]) -> None:
    home, plans = runs
    terminal = Terminal(200)
    with display_on(terminal, plans) as display:
        train_runs(display, home, plans[:1], per_second=8_000_000)
        display.refresh()
        heading, line, _foot = terminal.screen()
        hp = plans[0].hyperparameters
        mfu = 8e6 * hp.flops / hp.steps / (2 * 989e12)
        assert f"{mfu:.1%}" in line.split()
        assert "MFU" in heading.split()
        start(display, home, plans[0], device_name="Xeon")
        display.refresh()
        assert "MFU" not in terminal.screen()[0].split()


def test_activities_other_than_training_are_named() -> None:
    progress = RunProgress(10)
    activities = []
    compilation, checkpoint, evaluation = (
        {"event": "working", "step": 3, "what": what}
        for what in ("compilation", "checkpoint", "evaluation")
    )
    for event in (
        {"event": "started", "step": 0},
        compilation,
        train(3, 1),
        checkpoint,
        {"event": "checkpoint", "step": 3},
        evaluation,
    ):
        progress.update(event)
        activities.append(progress.activity)
    assert activities == ["starting", "compiling", None, "checkpoint", None, "evaluating"]


def test_a_resumed_run_continues_from_its_checkpoint() -> None:
    progress = RunProgress(100)
    for step in range(1, 41):
        progress.update(train(step, step))
    assert (progress.steps_per_second, progress.seconds_left) == (1.0, 60.0)
    progress.update({"event": "started", "step": 30})
    assert (progress.step, progress.steps_per_second) == (30, None)
    for step in range(31, 34):
        progress.update(train(step, 100 + step / 2))
    assert progress.seconds_left == pytest.approx(67 / 2)


def test_a_sparkline_falls_with_the_loss_over_the_whole_run() -> None:
    progress = RunProgress(5000)
    assert progress.sparkline(8) == ""
    for step in range(1, 5 * CURVE_POINTS):
        progress.update(train(step, step, loss=10.0 - step / CURVE_POINTS))
    progress.update(train(5 * CURVE_POINTS, 9e9, loss=float("nan")))
    assert progress.sparkline(8) == LEVELS[::-1]
    progress = RunProgress(10)
    progress.update(train(1, 1, loss=2.0))
    assert progress.sparkline(3) == 3 * LEVELS[0]


def test_the_last_events_of_a_file_are_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert last_events(path) == []
    lines = [f'{{"event": "train", "step": {step}}}\n' for step in range(100)]
    path.write_text("".join(lines) + '{"event": ')
    assert [event["step"] for event in last_events(path, 100)] == [98, 99]
    assert [event["step"] for event in last_events(path)] == list(range(100))


def test_a_display_needs_no_thread(runs: tuple[Path, list[Plan]]) -> None:
    home, plans = runs
    terminal = Terminal(80)
    before = threading.active_count()
    with display_on(terminal, plans) as display:
        train_runs(display, home, plans[:1])
        display.refresh()
        assert threading.active_count() == before
