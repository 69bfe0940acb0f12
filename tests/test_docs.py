"""The documentation is true: its command lines run, and it names every command and module."""

from __future__ import annotations

import base64
import io
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pyarrow
import pytest
import typer
from pyarrow import parquet

import store
from slm.cli import app, main
from slm.data import PreparedDataset
from tests import forked
from tests.commands import slm
from tests.drawing import empty_figures
from tests.hub import Hub, environment, serving

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {
    path.name: path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
}
RUN = "0123456789ab"
"""The run id that the documentation writes."""
UNREACHABLE = {"slm data core": 1}
"""Commands that need a host on the internet, and their exit code without one."""


def commands(group: typer.Typer, prefix: str = "slm") -> dict[str, str]:
    """Return every command with its help."""
    helps = {
        f"{prefix} {command.name}": (command.callback.__doc__ or "").strip()
        for command in group.registered_commands
    }
    for subgroup in group.registered_groups:
        helps |= commands(subgroup.typer_instance, f"{prefix} {subgroup.name}")
    return helps


def lines_of(page: str) -> list[str]:
    """Return the `slm` command lines of a page's shell blocks, without comments."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page, re.M | re.S)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [
        shlex.join(shlex.split(line, comments=True)) for line in lines if line.startswith("slm ")
    ]


LINES = {line: name for name in sorted(PAGES) for line in lines_of(PAGES[name])}
"""Every command line, and a page that has it."""


@pytest.fixture(scope="module")
def workplace(
    tmp_path_factory: pytest.TempPathFactory, prepared: PreparedDataset
) -> tuple[Path, str]:
    """Return a folder with what the pages name, and the id of a run that has weights."""
    folder = tmp_path_factory.mktemp("docs")
    home = folder / "runs"
    shutil.copytree(ROOT / "tests" / "golden" / "home", home)
    shutil.copytree(prepared.folder.parent, home / "data", dirs_exist_ok=True)
    shutil.copytree(ROOT / "experiments", folder / "experiments")
    (folder / "texts").mkdir()
    for number, path in enumerate(sorted((ROOT / "slm").rglob("*.py"))):
        (folder / "texts" / f"{number}.txt").write_text(path.read_text() * 2)
    ranks = (f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256))
    (folder / "gpt2.tiktoken").write_text("\n".join(ranks))
    lines = [f"1e{k},2e{k + 1},1.2e{2 * k + 2},{3 * 10 ** (-0.1 * k):.4f}" for k in range(5, 10)]
    (folder / "runs.csv").write_text("\n".join(["params,tokens,flops,val_bpb", *lines]))
    shutil.copy(ROOT / "tests" / "golden" / "data" / "results.csv", folder / "results.csv")
    sweep = "sweep --recipe pocket --depths 1 --steps 2 --name tiny --cores 1"
    result = forked.slm(*sweep.split(), home=home)
    assert result.returncode == 0, result.stderr
    store.ingest(home)
    [run] = [path.parent for path in home.glob("*/model.safetensors")]
    return folder, run.name


@pytest.mark.parametrize("line", LINES, ids=[f"{name}: {line}" for line, name in LINES.items()])
def test_a_command_line_of_the_documentation_runs(
    line: str,
    workplace: tuple[Path, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Run a line as written; a sweep is planned (`--dry-run`), and removals confirmed (`--yes`)."""
    folder, run_id = workplace
    shutil.copytree(folder, tmp_path / "work", symlinks=True)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("SLM_HOME", str(tmp_path / "work" / "runs"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    command = shlex.split(line.replace(RUN, run_id))
    if command[1] == "sweep" and "--dry-run" not in command:
        command.append("--dry-run")
    if command[1] == "rm" or command[1:3] == ["data", "remove"]:
        command.append("--yes")
    if "climbmix" in command:
        code, output = run_against_a_hub(command, tmp_path)
    elif command[1] in ("status", "query"):  # a background ingest; bytes on standard output
        code, output = run_in_own_process(command)
    else:
        code, output = run_in_process(command, monkeypatch)
    assert code == UNREACHABLE.get(line, 0), output


def run_in_process(command: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Run a command line in this process, with empty figures; return its exit code and output."""
    output = io.StringIO()
    monkeypatch.setattr(sys, "argv", command)
    with empty_figures(), redirect_stdout(output), redirect_stderr(output):
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0), output.getvalue()
    return 0, output.getvalue()


def run_against_a_hub(command: list[str], folder: Path) -> tuple[int, str]:
    """Run a command line in its own process, with a hub on loopback that serves two files."""
    shards = {f"shard_{number:05d}.parquet": small_shard(number) for number in range(2)}
    with serving(Hub("karpathy/climbmix-400b-shuffle", shards)) as hub:
        return run_in_own_process(command, **environment(hub, folder / "cache"))


def run_in_own_process(command: list[str], **environment: str) -> tuple[int, str]:
    """Run a command line in its own process; return its exit code and output."""
    result = slm(*command[1:], **environment)
    return result.returncode, result.stdout + result.stderr


def small_shard(number: int) -> bytes:
    """Return a Parquet file of texts."""
    sources = sorted((ROOT / "slm").rglob("*.py"))[number::2]
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": [path.read_text() for path in sources]}), buffer)
    return buffer.getvalue()


def test_every_command_is_documented_and_has_help() -> None:
    text = "\n".join(PAGES.values())
    for command, help_text in commands(app).items():
        assert f"{command} " in text or f"{command}`" in text or f"{command}\n" in text, command
        assert help_text, command


def test_every_link_and_image_leads_somewhere() -> None:
    for name, text in PAGES.items():
        folder = ROOT if name == "README.md" else ROOT / "docs"
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
            assert target.startswith("https://") or (folder / target).exists(), (name, target)


def test_no_placeholder_is_left_in_a_page() -> None:
    for path in ROOT.rglob("*.md"):
        if not {".venv", "runs"} & set(path.relative_to(ROOT).parts):
            assert not re.search(r"@[A-Z0-9]+@", path.read_text()), path


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 120


def test_the_architecture_page_lists_the_modules_that_exist() -> None:
    listed: set[str] = set()
    for folder, names in re.findall(r"^\| `(\S+)/` \| ([^|]+) \|", PAGES["architecture.md"], re.M):
        listed |= {f"{folder}/{name}" for name in re.findall(r"`(\w+)`", names)}
    modules = {
        str(path.relative_to(ROOT).with_suffix(""))
        for package in ("slm", "store")
        for path in (ROOT / package).rglob("*.py")
        if path.name not in ("__init__.py", "__main__.py")
    }
    assert listed == modules


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
