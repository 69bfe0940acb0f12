"""CORE on several ranks of this machine: `torchrun -m slm.evaluate.distributed REQUEST`, and its
launch.

REQUEST is a JSON document. The result is the evaluation file; rank 0 writes progress and errors to
stdout, one JSON list per line, and whatever else torchrun prints goes to a log.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from slm.evaluate.request import CoreRequest, Report, ignore

if TYPE_CHECKING:
    import torch

    from slm.model.weights import Weights

REFUSED = "refused"
FAILED = "failed"


def evaluate_core_on_ranks(
    weights: Weights,
    home: Path,
    request: CoreRequest,
    device: torch.device,
    ranks: int,
    report: Report,
) -> Path:
    """Run `evaluator.evaluate_core` on several ranks, which share the CPU's cores.

    Raises ValueError and RuntimeError as `evaluate_core` does, and RuntimeError with the last line
    of the log if a rank died.
    """
    from slm.evaluate.evaluator import locate_core

    _, file = locate_core(weights, home, request, device)
    if not file.exists:
        arguments = {
            "home": str(home),
            "weights": str(weights.path),
            "device": device.type,
            "request": asdict(request),
        }
        with tempfile.TemporaryDirectory(prefix="slm-eval-") as folder:
            end = _launch(json.dumps(arguments), Path(folder), ranks, report)
        if not file.path.exists():
            raise RuntimeError(end)
    return file.path


def _launch(arguments: str, folder: Path, ranks: int, report: Report) -> str:
    """Run torchrun, forward progress, and return how it ended.

    No rank outlives this process when it is interrupted.
    """
    from slm.hardware.devices import cores

    command = [sys.executable, "-P", "-m", "torch.distributed.run"]
    command += ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={ranks}"]
    command += [f"--log-dir={folder}", "--module", "slm.evaluate.distributed", arguments]
    threads = max(1, cores() // ranks)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONSAFEPATH": "1"}
    log = folder / "log"
    previous = signal.signal(signal.SIGTERM, _interrupt)
    with log.open("wb") as stderr:
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, env=environment, text=True
        )
        assert child.stdout is not None
        try:
            for line in child.stdout:
                _handle(line, report)
            code = child.wait()
        finally:
            child.terminate()
            child.wait()
            signal.signal(signal.SIGTERM, previous)
    lines = log.read_text(errors="replace").split("\n")
    errors = [line for line in lines if "Error" in line and "ChildFailed" not in line]
    return f"torchrun exited with code {code}: {[*lines, *errors][-1]}"


def _handle(line: str, report: Report) -> None:
    """Forward a line of progress, raise a line that is an error, skip what libraries print."""
    if not line.startswith('["'):
        return
    kind, *values = json.loads(line)
    if kind == REFUSED:
        raise ValueError(values[0])
    if kind == FAILED:
        raise RuntimeError(values[0])
    report(kind, *values)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Evaluate on one rank."""
    import torch.distributed as dist

    from slm.evaluate.core import OutOfMemory
    from slm.evaluate.evaluator import evaluate_core
    from slm.model import weights
    from slm.model.ranks import Ranks, local_device

    arguments = json.loads(sys.argv[1])
    ranks = Ranks.from_environment()
    device = local_device(arguments["device"])
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        home = Path(arguments["home"])
        evaluate_core(
            weights.load_file(Path(arguments["weights"]), home),
            home,
            CoreRequest(**arguments["request"]),
            device,
            ranks,
            _send if ranks.is_first else ignore,
        )
    except (ValueError, OutOfMemory) as error:  # raised on every rank
        if ranks.is_first:
            _send(REFUSED if isinstance(error, ValueError) else FAILED, str(error))
    dist.destroy_process_group()


def _send(*values: Any) -> None:
    """Write a line of progress, or an error, for the process that started torchrun."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
