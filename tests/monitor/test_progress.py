"""Progress of long commands: bars in a pseudo-terminal, plain lines elsewhere."""

from __future__ import annotations

import sys

import pytest

from slm.monitor import progress
from slm.monitor.progress import ProgressBars, report_line
from tests.monitor.test_display import Terminal


def test_a_terminal_shows_a_bar_for_each_unit_and_clears_them_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "DRAW_SECONDS", 0.0)
    terminal = Terminal(80)
    monkeypatch.setattr(sys, "stderr", terminal.file)
    with terminal.file, ProgressBars() as bars:
        files, tables = bars.add("files"), bars.add("tables")
        files(0, 2000)
        files(1500, 2000)
        assert [line.split("━")[0].strip() for line in terminal.screen()] == [
            "1,500 of 2,000 files"
        ]
        tables(1, 4)
        report_line("a note")
        note, *lines = terminal.screen()
        bars.__exit__()
        assert terminal.screen() == ["a note"]
    assert note == "a note"
    assert [line.split()[3] for line in lines] == ["files", "tables"]
    assert all(len(line) <= 80 for line in lines)


def test_without_a_terminal_lines_have_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("slm.text.LINE_SECONDS", -1.0)
    with ProgressBars() as bars:
        report = bars.add("files")
        report(0, 2000)
        report(2000, 2000)
    assert capsys.readouterr().err == "2,000 of 2,000 files, 0 s left\n"
