"""Who may import whom: each rule of the house, over the syntax trees of every module, lazy imports included."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STDLIB = set(sys.stdlib_module_names)

LEAVES = {
    "slm.recipe": set(),
    "slm.events": set(),
    "slm.hardware.devices": set(),
    "slm.hardware.memory": {"slm.recipe"},
    "slm.plan": {"slm.recipe"},
    "slm.experiment": {"slm.recipe"},
    "slm.sweep.schedule": set(),
    "slm.locks": set(),
    "slm.sweep.interrupt": set(),
}
"""Modules of the standard library alone, and what of ours they may use."""
TORCH = {
    "slm.model.attention",
    "slm.model.layers",
    "slm.model",
    "slm.train.optimizer",
    "slm.model.checkpoints",
    "slm.model.weights",
    "slm.model.sample",
    "slm.evaluate.evaluator",
    "slm.evaluate.distributed",
    "slm.train",
    "slm.data.loader",
    "slm.evaluate.bpb",
    "slm.evaluate.core",
}


def modules(root: Path = ROOT) -> dict[str, Path]:
    paths = (path for package in ("slm", "store") for path in (root / package).rglob("*.py"))
    return {_name(path.relative_to(root)): path for path in paths}


def _name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def imports(name: str, path: Path, known: set[str]) -> set[str]:
    """Modules that a file imports anywhere in it, those for type checking left out."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = (name if path.name == "__init__.py" else name.rpartition(".")[0]).split(
                    "."
                )
                base = ".".join(
                    [*parents[: len(parents) - node.level + 1], *([base] if base else [])]
                )
            deeper = {f"{base}.{alias.name}" for alias in node.names} & known
            found |= deeper or {base}
    return found


def graph(root: Path = ROOT) -> dict[str, set[str]]:
    paths = modules(root)
    return {name: imports(name, path, set(paths)) for name, path in paths.items()}


def violations(graph: dict[str, set[str]]) -> list[str]:
    """Every broken rule as a sentence."""
    broken: list[str] = []
    for name, used in graph.items():
        tops = {module.partition(".")[0] for module in used}
        ours = {module for module in used if module.partition(".")[0] in ("slm", "store")}
        if name.startswith("store") and "slm" in tops:
            broken.append(f"{name} imports slm: store is a leaf")
        if name in LEAVES and (tops - STDLIB - {"slm"} or ours - LEAVES[name] - {name}):
            broken.append(f"{name} imports more than the standard library and {LEAVES[name]}")
        if name.startswith("slm.fits") and (
            tops - STDLIB - {"numpy", "scipy", "slm"} or _outside(ours, "slm.fits")
        ):
            broken.append(f"{name} imports more than numpy, scipy and fits")
        drawing, own = tops - STDLIB - {"numpy", "matplotlib", "slm"}, ("slm.fits", "slm.figures")
        if name.startswith("slm.figures") and (drawing or _outside(ours, own)):
            broken.append(f"{name} imports more than matplotlib and fits")
        if "torch" in tops and name not in TORCH:
            broken.append(f"{name} imports torch")
        if not name.startswith(("slm.cli", "slm.__main__")) and any(
            module.startswith("slm.cli") for module in ours
        ):
            broken.append(f"{name} imports cli")
        if "slm.train" in ours:
            broken.append(f"{name} imports train: only torchrun reaches it")
    return broken + [f"cycle: {' -> '.join(cycle)}" for cycle in cycles(graph)]


def _outside(ours: set[str], package: str | tuple[str, ...]) -> set[str]:
    return {module for module in ours if not module.startswith(package)}


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Import cycles between modules of ours."""
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            for used in sorted(graph[name] & set(graph)):
                visit(used, [*path, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])
    return found


def test_every_rule_holds() -> None:
    assert violations(graph()) == []


@pytest.mark.parametrize(
    ("module", "line", "complaint"),
    [
        ("store/query.py", "import slm.plan", "store is a leaf"),
        ("slm/recipe.py", "import numpy", "slm.recipe imports more"),
        ("slm/plan.py", "def f():\n    from slm import sweep", "slm.plan imports more"),
        ("slm/fits/points.py", "import pandas", "slm.fits.points imports more"),
        ("slm/figures/style.py", "from slm import store", "slm.figures.style imports more"),
        ("slm/sweep.py", "import torch.nn", "slm.sweep imports torch"),
        ("slm/sweep.py", "def f():\n    from slm.cli import app", "imports cli"),
        ("slm/launch/__init__.py", "from slm import train", "only torchrun"),
        ("slm/data/corpus.py", "def f():\n    from slm.data import prepare", "cycle"),
    ],
)
def test_each_rule_can_be_broken(tmp_path: Path, module: str, line: str, complaint: str) -> None:
    for path in modules().values():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    with (tmp_path / module).open("a") as file:
        file.write(f"\n{line}\n")
    assert any(complaint in sentence for sentence in violations(graph(tmp_path)))


def loaded_by(program: str) -> set[str]:
    """Top-level modules that a fresh process has loaded after a program."""
    source = f"import sys\n{program}\nprint(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=True
    )
    return set(result.stdout.split())


def test_the_trainer_loads_no_database_and_no_command_line() -> None:
    loaded = loaded_by("import slm.train")
    assert "torch" in loaded
    assert not {"sqlalchemy", "duckdb", "typer", "pandas", "matplotlib"} & loaded


@pytest.mark.parametrize(
    "program",
    [
        "import slm.cli",
        "import slm.sweep, slm.sweep.orchestrator, slm.sweep.forecast, slm.sweep.supervisor, slm.monitor.display, slm.experiment, slm.data",
        "import slm.evaluate.bundle, slm.evaluate.download, slm.evaluate.scores",
        "import slm.fits, slm.figures",
        "import store",
    ],
)
def test_planning_and_reading_load_no_torch(program: str) -> None:
    assert "torch" not in loaded_by(program)


def test_the_command_line_loads_nothing_heavy() -> None:
    heavy = {
        "torch",
        "numpy",
        "pandas",
        "duckdb",
        "sqlalchemy",
        "scipy",
        "matplotlib",
        "rich",
        "tiktoken",
        "pyarrow",
    }
    assert not heavy & loaded_by("import slm.cli")
