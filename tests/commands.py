"""Commands in processes of their own, forked from one that has imported their packages."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from typing import Any

PACKAGES = [
    "duckdb",
    "duckdb_sqlalchemy",
    "jinja2",
    "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_svg",
    "matplotlib.figure",
    "pandas",
    "pyarrow.parquet",
    "pydantic",
    "pytest",
    "rich.live",
    "scipy.optimize",
    "scipy.stats",
    "sqlalchemy.orm",
    "tabulate",
    "torch",
    "torch.fx.experimental.symbolic_shapes",
    "slm.cli",
    "slm.data.inventory",
    "slm.doctor",
    "slm.evaluate.paired",
    "slm.exchange",
    "slm.figures",
    "slm.fits.curve",
    "slm.report",
    "slm.results",
    "slm.sweep.orchestrator",
    "slm.sweep.planning",
    "slm.sweep.preview",
    "slm.sweep.slurm",
    "slm.sweep.supervisor",
    "slm.train.trainer",
    "store.ingest",
    "store.query",
    "store.writer",
]
"""Modules that take seconds to import; with them loaded a command runs in a tenth of the time."""
SECONDS = 300.0

forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(PACKAGES)
server: Any = forkserver._forkserver  # type: ignore[attr-defined]
"""The process that forks commands. Python has no public way to share it with a forked command."""


def slm(*arguments: str, home: Path | None = None, **environment: str) -> CompletedProcess[str]:
    """Run a command line; return its exit code and output."""
    if home:
        environment["SLM_HOME"] = str(home)
    return run(command_line, arguments, **environment)


def command_line(arguments: tuple[str, ...]) -> None:
    """Run a command line in this process."""
    from slm.cli import main

    sys.argv = ["slm", *arguments]
    main()


def run(
    function: Callable[..., int | None], *arguments: Any, **environment: str
) -> CompletedProcess[str]:
    """Call a function in a forked process, with changes to the environment.

    Return its exit code, which is the function's result, and its output.
    """
    values = {**os.environ, **environment}
    with tempfile.TemporaryDirectory() as folder:
        outputs = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        server.ensure_running()
        address = server._forkserver_address
        process = forks.Process(target=_call, args=(function, arguments, values, outputs, address))
        process.start()
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
            raise TimeoutExpired(str(arguments), SECONDS)
        texts = [Path(output).read_text() for output in outputs]
    return CompletedProcess([function.__name__, *arguments], process.exitcode, *texts)


def _call(
    function: Callable[..., int | None],
    arguments: tuple[Any, ...],
    environment: dict[str, str],
    outputs: list[str],
    address: str,
) -> None:
    """Call a function in this process, with its output in two files.

    Processes that it forks come from the server at the address; a new one would take five seconds
    to import the packages.
    """
    server._forkserver_address = address
    server.ensure_running = lambda: None
    for descriptor, output in enumerate(outputs, start=1):
        file = os.open(output, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    sys.exit(function(*arguments))
