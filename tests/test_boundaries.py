"""Import rules: who may import whom, checked on the syntax trees of every module.

Lazy imports and imports for type checking count.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STDLIB = set(sys.stdlib_module_names)

STDLIB_ONLY = {
    "slm.recipe": set(),
    "slm.events": set(),
    "slm.files": set(),
    "slm.text": set(),
    "slm.plan": {"slm.recipe"},
    "slm.experiment": {"slm.recipe", "slm.plan"},
}
"""Modules of the standard library alone, and the modules of the project they may import."""
HARDWARE = {"slm.recipe", "slm.events", "slm.files", "slm.text"}
"""What `slm.hardware` may import beside itself, the standard library, numpy and psutil."""
FITS = {"slm.text"}
"""What `slm.fits` may import beside itself, numpy and scipy."""
TORCH = (
    "slm.model",
    "slm.train",
    "slm.data.loader",
    "slm.evaluate.bpb",
    "slm.evaluate.core",
    "slm.evaluate.evaluator",
    "slm.evaluate.distributed",
)
"""Modules and packages that may import torch."""
CLI_BODY_LINES = 40
"""Longest body of a function in slm/cli: commands parse, call and print."""
HEAVY = {
    "torch",
    "yaml",
    "numpy",
    "pandas",
    "duckdb",
    "sqlalchemy",
    "scipy",
    "matplotlib",
    "rich",
    "jinja2",
    "tiktoken",
    "pyarrow",
}

Graph = dict[str, set[str]]


def modules() -> dict[str, Path]:
    """Return every module of slm and store by name."""
    paths = (path for package in ("slm", "store") for path in (ROOT / package).rglob("*.py"))
    return {module_name(path.relative_to(ROOT)): path for path in paths}


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def imports_of(name: str, path: Path, source: str, known: set[str]) -> set[str]:
    """Return the modules that the source of a file imports anywhere in it."""
    imported: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name if path.name == "__init__.py" else name.rpartition(".")[0]
                parents = package.split(".")
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            submodules = {f"{base}.{alias.name}" for alias in node.names} & known
            imported |= submodules or {base}
    return imported


@cache
def graph() -> Graph:
    """Return the modules that each module imports."""
    paths = modules()
    return {
        name: imports_of(name, path, path.read_text(), set(paths)) for name, path in paths.items()
    }


def inside(module: str, *packages: str) -> bool:
    """Whether a module is one of the packages or below one."""
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def violations(graph: Graph) -> list[str]:
    """Return every broken rule as a sentence."""
    broken: list[str] = []
    for name, imported in graph.items():
        tops = {module.partition(".")[0] for module in imported} - STDLIB
        project = {module for module in imported if inside(module, "slm", "store")}
        libraries = tops - {"slm", "store"}
        if inside(name, "store") and "slm" in tops:
            broken.append(f"{name} imports slm: store is a leaf")
        if name in STDLIB_ONLY and (libraries or project - STDLIB_ONLY[name] - {name}):
            broken.append(f"{name} imports more than the standard library")
        if inside(name, "slm.hardware") and (
            libraries - {"numpy", "psutil"}
            or any(not inside(module, "slm.hardware", *HARDWARE) for module in project)
        ):
            broken.append(f"{name} imports more than the standard library and the recipe")
        if inside(name, "slm.fits") and (
            libraries - {"numpy", "scipy"}
            or any(not inside(module, "slm.fits", *FITS) for module in project)
        ):
            broken.append(f"{name} imports more than numpy, scipy and fits")
        if inside(name, "slm.figures") and (
            libraries - {"numpy", "matplotlib"}
            or any(not inside(module, "slm.fits", "slm.figures", *FITS) for module in project)
        ):
            broken.append(f"{name} imports more than matplotlib and fits")
        if "torch" in tops and not inside(name, *TORCH):
            broken.append(f"{name} imports torch")
        if not inside(name, "slm.cli", "slm.__main__"):
            if any(inside(module, "slm.cli") for module in project):
                broken.append(f"{name} imports cli")
            if "typer" in tops:
                broken.append(f"{name} imports typer")
        if not inside(name, "slm.train") and any(inside(module, "slm.train") for module in project):
            broken.append(f"{name} imports train: only torchrun reaches it")
    return broken + [f"cycle: {' -> '.join(cycle)}" for cycle in cycles(graph)]


def cycles(graph: Graph) -> list[list[str]]:
    """Return the import cycles between modules of the project."""
    result: list[list[str]] = []
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            result.append([*path[path.index(name) :], name])
        elif name not in done:
            for imported in sorted(graph[name] & set(graph)):
                visit(imported, [*path, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])
    return result


def test_every_rule_holds() -> None:
    assert violations(graph()) == []


@pytest.mark.parametrize(
    ("module", "line", "complaint"),
    [
        ("store/query.py", "import slm.plan", "store is a leaf"),
        ("slm/recipe.py", "import numpy", "slm.recipe imports more"),
        ("slm/plan.py", "def f():\n    from slm import results", "slm.plan imports more"),
        ("slm/hardware/slot.py", "import torch", "slm.hardware.slot imports more"),
        ("slm/fits/points.py", "import pandas", "slm.fits.points imports more"),
        ("slm/figures/style.py", "import store", "slm.figures.style imports more"),
        ("slm/sweep/planning.py", "import torch.nn", "slm.sweep.planning imports torch"),
        ("slm/sweep/planning.py", "def f():\n    from slm.cli import app", "imports cli"),
        ("slm/results.py", "import typer", "imports typer"),
        ("slm/run.py", "from slm.train import trainer", "only torchrun"),
        ("slm/data/corpus.py", "def f():\n    from slm.data import prepare", "cycle"),
        (
            "slm/sweep/launcher.py",
            "if TYPE_CHECKING:\n    from slm.sweep.orchestrator import Orchestrator",
            "cycle",
        ),
    ],
)
def test_each_rule_can_be_broken(module: str, line: str, complaint: str) -> None:
    """Check the modules as they would be with one more line at the end of one of them."""
    path = ROOT / module
    name = module_name(Path(module))
    source = f"{path.read_text()}\n{line}\n"
    imported = imports_of(name, path, source, set(modules()))
    assert any(complaint in sentence for sentence in violations(graph() | {name: imported}))


def loaded_by(program: str) -> set[str]:
    """Return the modules that a fresh process has loaded after a program."""
    source = f"import sys\n{program}\nprint(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=True
    )
    return set(result.stdout.split())


def test_the_trainer_loads_no_database_and_no_command_line() -> None:
    loaded = loaded_by("import slm.train.trainer")
    assert "torch" in loaded
    assert not {"sqlalchemy", "duckdb", "typer", "pandas", "matplotlib", "rich"} & loaded


@pytest.mark.parametrize(
    "program",
    [
        "import slm.cli",
        "import slm.sweep.orchestrator, slm.sweep.preview, slm.sweep.supervisor",
        "import slm.monitor.display, slm.experiment, slm.data, slm.run",
        "import slm.evaluate.bundle, slm.evaluate.request, slm.evaluate.records",
        "import slm.fits, slm.figures, slm.report, slm.results, store",
    ],
)
def test_planning_and_reading_load_no_torch(program: str) -> None:
    assert "torch" not in loaded_by(program)


def test_the_command_line_loads_nothing_heavy() -> None:
    assert not HEAVY & loaded_by("import slm.cli")


def test_commands_are_thin() -> None:
    for path in (ROOT / "slm" / "cli").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or 0) - node.body[0].lineno + 1
                assert lines <= CLI_BODY_LINES, f"{path.name}: {node.name} has {lines} lines"
