"""What is written is true of what is there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import typer

from slm.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def commands(of: typer.Typer, prefix: str = "slm") -> dict[str, str]:
    """Every command with the first line of its help."""
    found = {
        f"{prefix} {command.name}": (command.callback.__doc__ or "").strip()
        for command in of.registered_commands
    }
    for group in of.registered_groups:
        found |= commands(group.typer_instance, f"{prefix} {group.name}")
    return found


def test_every_command_is_in_the_readme_and_has_help() -> None:
    for command, help_text in commands(app).items():
        assert f"{command} " in README, command
        assert help_text, command


def test_every_command_of_the_readme_exists() -> None:
    known = commands(app)
    for line in re.findall(r"^slm [a-z].*", README, re.M):
        assert any(line.startswith(command) for command in known), line


@pytest.mark.parametrize("path", re.findall(r"^\| `([^`]+)` \|", README, re.M))
def test_every_place_of_the_map_is_there(path: str) -> None:
    assert (ROOT / path).exists()


def test_every_image_of_the_readme_is_there_and_no_placeholder_is_left() -> None:
    for image in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / image).exists(), image
    for path in ROOT.rglob("*.md"):
        if not {".venv", "runs"} & set(path.relative_to(ROOT).parts):
            assert not re.search(r"@[A-Z0-9]+@", path.read_text()), path


def test_make_lists_every_target_with_what_it_does() -> None:
    listed = subprocess.run(
        ["make", "-C", str(ROOT)], capture_output=True, text=True, check=True
    ).stdout
    targets = "install demo check test bench soak calibrate reproduce notebooks wheel-check"
    for target in targets.split():
        assert re.search(rf"make {target} +\w+", listed), target


def test_every_experiment_is_in_the_experiments_readme_and_the_log() -> None:
    listed, log = (
        (ROOT / "experiments" / "README.md").read_text(),
        (ROOT / "experiments" / "LOG.md").read_text(),
    )
    for path in (ROOT / "experiments").glob("*.py"):
        assert f"`{path.name}`" in listed
        assert f"`{path.name}`" in log


def test_the_lock_pins_torch_without_hashes_and_names_no_index() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    assert re.search(r"^torch==[\d.]+$", lock, re.M)
    assert "://" not in lock
    assert "index" not in lock
    assert all(
        "--hash=" in block
        for block in re.split(r"\n(?=\S)", lock.strip())
        if not block.startswith("torch==")
    )
