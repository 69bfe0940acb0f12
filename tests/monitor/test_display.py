"""What is shown of runs at work, on real terminals that are read back."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from slm.experiment import Experiment
from slm.files import read_json, write_json
from slm.monitor import display as progress
from slm.monitor.display import Display
from slm.monitor.run_progress import CURVE_POINTS, LEVELS, RunProgress, last_events
from slm.plan import Plan
from slm.recipe import pocket
from tests.homes import home_of


class Terminal:
    """A terminal of a size, and what it shows."""

    def __init__(self, columns: int, lines: int = 24) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        os.set_blocking(self._master, False)
        self.file = os.fdopen(slave, "w", encoding="utf-8")
        self._text = ""

    def close(self) -> None:
        """Close it on the side of the one who looks at it."""
        os.close(self._master)

    def shown(self) -> list[str]:
        """Every line, those above included, after all that was written."""
        try:
            while piece := os.read(self._master, 65536):
                self._text += piece.decode()
        except BlockingIOError:
            pass
        lines: list[str] = []
        for up, text in re.findall(r"\x1b\[(\d+)F\x1b\[J|((?:(?!\x1b\[\d+F).)+)", self._text, re.S):
            if up:
                del lines[len(lines) - int(up) :]
            else:
                lines += re.sub(r"\x1b\[[\d;]*m", "", text).split("\r\n")[:-1]
        return lines


@contextmanager
def shown_on(
    terminal: Terminal, plans: list[Plan], done: set[str] | None = None
) -> Iterator[Display]:
    with terminal.file, Display(plans, done or set(), terminal.file) as display:
        yield display


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


def at_work(display: Display, home: Path, plans: list[Plan], per_second: int = 2) -> None:
    """Have runs at work that take so many steps a second, up to step 20."""
    for plan in plans:
        start(display, home, plan)
        for step in range(2, 21):
            display.event(plan, train(step, step / per_second, 9 / step))


@pytest.mark.parametrize(
    ("columns", "there", "gone"),
    [
        (200, {"run", "step", "loss", "curve", "tok/s", "MFU", "GB", "left"}, set()),
        (80, {"run", "step", "loss", "curve", "left"}, {"GB", "MFU"}),
        (34, {"run", "left"}, {"GB", "MFU", "tok/s", "curve", "loss", "step"}),
    ],
)
def test_a_narrow_terminal_drops_the_least_important_columns_and_wraps_none(
    runs: tuple[Path, list[Plan]], columns: int, there: set[str], gone: set[str]
) -> None:
    home, plans = runs
    terminal = Terminal(columns)
    with shown_on(terminal, plans) as display:
        at_work(display, home, plans[:3])
        display.refresh()
        heading, *lines, foot = terminal.shown()
    assert there <= set(heading.split())
    assert not gone & set(heading.split())
    assert all(len(line) < columns for line in (heading, *lines, foot))
    assert [line.split()[:4] for line in lines] == [
        f"pocket d{d} seed {s}".split() for d, s in ((2, 0), (2, 1), (3, 0))
    ]
    assert foot.startswith("0/6 runs done")


def test_what_ended_and_what_is_said_scrolls_above_the_block(runs: tuple[Path, list[Plan]]) -> None:
    home, plans = runs
    terminal = Terminal(100)
    with shown_on(terminal, plans) as display:
        at_work(display, home, plans[:2])
        display.refresh()
        display.event(
            plans[0], {"event": "finished", "step": 9, "val_bpb": 1.25, "wall_seconds": 75.0}
        )
        display.run_ended(plans[0], "finished", None)
        display.note("a note")
        print("somebody else's line", file=sys.stderr)
        display.run_ended(plans[1], "failed", "two\nlines of \x1b[31mwoe\x1b[m")
        display.refresh()
        first, note, other, second, foot = terminal.shown()
    assert first == f"{plans[0].run_id} pocket d2 seed 0: finished, val_bpb 1.2500, 1 min 15 s"
    assert (note, other) == ("a note", "somebody else's line")
    assert second.startswith(f"{plans[1].run_id} pocket d2 seed 1: failed after ")
    assert second.endswith(": two lines of woe")
    assert foot.startswith("1/6 runs done")
    assert "1 failed" in foot


def test_runs_beyond_the_terminals_lines_are_counted(runs: tuple[Path, list[Plan]]) -> None:
    home, plans = runs
    terminal = Terminal(100, lines=8)
    with shown_on(terminal, plans) as display:
        at_work(display, home, plans)
        display.refresh()
        _heading, *lines, more, _foot = terminal.shown()
    assert len(lines) == 3
    assert more == "… and 3 more"


def test_a_window_made_narrower_is_cleared_of_its_wrapped_lines(
    runs: tuple[Path, list[Plan]],
) -> None:
    home, plans = runs
    terminal = Terminal(160)
    with shown_on(terminal, plans) as display:
        at_work(display, home, plans[:1])
        display.refresh()
        terminal.shown()
        fcntl.ioctl(terminal.file, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 50, 0, 0))
        display.refresh()
        terminal.shown()
        ups = [int(up) for up in re.findall(r"\x1b\[(\d+)F", terminal._text)]
    assert ups[-1] > 3


def test_a_terminal_that_was_closed_ends_nothing_and_is_silent(
    runs: tuple[Path, list[Plan]],
) -> None:
    home, plans = runs
    terminal = Terminal(80)
    with shown_on(terminal, plans) as display:
        at_work(display, home, plans[:1])
        display.refresh()
        terminal.close()
        display.refresh()
        display.note("nobody hears this")
        display.run_ended(plans[0], "finished", None)
        print("nor this", file=sys.stderr)
        display.refresh()


def test_a_closed_pipe_ends_nothing_either(runs: tuple[Path, list[Plan]]) -> None:
    home, plans = runs
    reading, writing = os.pipe()
    with os.fdopen(writing, "w", encoding="utf-8") as file, Display(plans, set(), file) as display:
        start(display, home, plans[0])
        assert plans[0].run_id in os.read(reading, 9999).decode()
        os.close(reading)
        display.note("nobody hears this")
        display.note("nor this")


def test_without_a_terminal_runs_take_turns_in_plain_lines(
    runs: tuple[Path, list[Plan]], monkeypatch: pytest.MonkeyPatch
) -> None:
    home, plans = runs
    file = io.StringIO()
    with Display(plans, {plans[5].run_id}, file) as display:
        at_work(display, home, plans[:2])
        display.refresh()
        assert len(file.getvalue().splitlines()) == 2  # that they started; the pause is not over
        monkeypatch.setattr(progress, "LINE_SECONDS", -1.0)
        for _ in range(3):
            display.refresh()
    lines = file.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == [plans[n].run_id for n in (0, 1, 0, 1, 0)]
    assert "attempt 1 on 2 x NVIDIA H100 80GB HBM3 (run 1 of 6)" in lines[0]
    steps = plans[0].hyperparameters.steps
    for part in (
        f"step 20 of {steps:,}",
        "loss 0.450",
        "tokens/s",
        "MFU",
        "2.50 GB",
        "left; sweep 1/6 runs done",
        "elapsed",
    ):
        assert part in lines[2]
    assert "\x1b" not in file.getvalue()


def test_the_sweeps_time_left_is_its_flops_over_the_sum_of_the_rates(
    runs: tuple[Path, list[Plan]],
) -> None:
    home, plans = runs
    display = Display(plans, {plans[0].run_id}, io.StringIO())
    at_work(display, home, plans[2:3], per_second=2)
    at_work(display, home, plans[4:5], per_second=3)
    given = [plan.hyperparameters for plan in plans]
    of_step = [one.flops / one.steps for one in given]
    left = sum(one.flops for one in given[1:]) - 20 * (of_step[2] + of_step[4])
    rate = 2 * of_step[2] + 3 * of_step[4]
    assert display._seconds_left() == pytest.approx(left / rate)
    start(display, home, plans[5])
    assert display._seconds_left() == pytest.approx(
        left / (1.5 * rate)
    )  # it counts with the mean of the others
    display.run_ended(plans[2], "diverged", "loss is nan")
    lost = given[2].flops - 20 * of_step[2]
    assert display._seconds_left() == pytest.approx((left - lost) / (2 * 3 * of_step[4]))


def test_mfu_is_shown_where_the_peak_is_known(runs: tuple[Path, list[Plan]]) -> None:
    home, plans = runs
    terminal = Terminal(200)
    with shown_on(terminal, plans) as display:
        at_work(display, home, plans[:1], per_second=8_000_000)
        display.refresh()
        heading, line, _foot = terminal.shown()
        given = plans[0].hyperparameters
        mfu = 8e6 * given.flops / given.steps / (2 * 989e12)
        assert f"{mfu:.1%}" in line.split()
        assert "MFU" in heading.split()
        start(display, home, plans[0], device_name="Xeon")
        display.refresh()
        assert "MFU" not in terminal.shown()[0].split()


def test_what_a_run_does_beside_steps_is_said() -> None:
    track = RunProgress(10)
    told = []
    started = {"event": "started", "step": 0}
    working = [
        {"event": "working", "step": 3, "what": what}
        for what in ("compilation", "checkpoint", "evaluation")
    ]
    for event in (
        started,
        working[0],
        train(3, 1),
        working[1],
        {"event": "checkpoint", "step": 3},
        working[2],
    ):
        track.take(event)
        told.append(track.doing)
    assert told == ["starting", "compiling", None, "checkpoint", None, "evaluating"]


def test_a_resumed_run_goes_on_from_its_checkpoint() -> None:
    track = RunProgress(100)
    for step in range(1, 41):
        track.take(train(step, step))
    assert (track.steps_per_second, track.seconds_left) == (1.0, 60.0)
    track.take({"event": "started", "step": 30})
    assert (track.step, track.steps_per_second) == (30, None)
    for step in range(31, 34):
        track.take(train(step, 100 + step / 2))
    assert track.seconds_left == pytest.approx(67 / 2)


def test_a_sparkline_falls_with_the_loss_over_the_whole_run() -> None:
    track = RunProgress(5000)
    assert track.sparkline(8) == ""
    for step in range(1, 5 * CURVE_POINTS):
        track.take(train(step, step, loss=10.0 - step / CURVE_POINTS))
    track.take(train(5 * CURVE_POINTS, 9e9, loss=float("nan")))
    assert track.sparkline(8) == LEVELS[::-1]
    track = RunProgress(10)
    track.take(train(1, 1, loss=2.0))
    assert track.sparkline(3) == 3 * LEVELS[0]


def test_the_last_events_of_a_file_are_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert last_events(path) == []
    path.write_text(
        "".join(f'{{"event": "train", "step": {step}}}\n' for step in range(100)) + '{"event": '
    )
    assert [event["step"] for event in last_events(path, 100)] == [98, 99]
    assert [event["step"] for event in last_events(path)] == list(range(100))


def test_a_display_needs_no_thread(runs: tuple[Path, list[Plan]]) -> None:
    import threading

    home, plans = runs
    terminal, before = Terminal(80), threading.active_count()
    with shown_on(terminal, plans) as display:
        at_work(display, home, plans[:1])
        display.refresh()
        assert threading.active_count() == before
