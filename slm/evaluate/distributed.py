"""CORE of some weights on several ranks: `torchrun -m slm.evaluate.distributed FOLDER`, and how that is started.

In the folder are a request and then an answer, the path of the evaluation or what is wrong with it. The first rank says
on its output how far it is, a line each; what torchrun has to say goes to a log.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from slm.files import read_json, write_json

if TYPE_CHECKING:
    import torch

Report = Callable[[int, int], None]
"""Told how many of how many parts are done."""
SAY_SECONDS = 0.5
"""Pause between two lines on how far it is."""


def core(
    request: dict[str, Any], ranks: int, threads: int, report: Report, planning: Report
) -> Path:
    """`later.core` on so many ranks of this machine, each with so many threads.

    The request: home, weights (a file), bundle (an id), most, labels, device. Raises ValueError and RuntimeError as
    `later.core` does, and RuntimeError with the last words of ranks that died.
    """
    with tempfile.TemporaryDirectory(prefix="slm-eval-") as name:
        folder = Path(name)
        write_json(folder / "request.json", request)
        code = _torchrun(folder, ranks, threads, {"tokens": report, "tasks": planning})
        if not (folder / "answer.json").exists():
            lines = (folder / "log").read_text(errors="replace").split("\n")
            errors = [line for line in lines if "Error" in line and "ChildFailed" not in line]
            raise RuntimeError(f"torchrun ended with code {code}: {[*lines, *errors][-1]}")
        answer = read_json(folder / "answer.json")
    if answer["error"]:
        raise (ValueError if answer["refused"] else RuntimeError)(answer["error"])
    return Path(answer["path"])


def _torchrun(folder: Path, ranks: int, threads: int, reports: dict[str, Report]) -> int:
    """Its exit code. No rank outlives this process when it is asked to end."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr=127.0.0.1",
    ]
    command += [
        f"--nproc-per-node={ranks}",
        f"--log-dir={folder}",
        "--module",
        "slm.evaluate.distributed",
        str(folder),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONSAFEPATH": "1"}
    before = signal.signal(signal.SIGTERM, _interrupt)
    with (folder / "log").open("wb") as log:
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, env=environment, text=True
        )
        assert child.stdout is not None
        try:
            for line in child.stdout:
                unit, *counts = line.split() or [""]
                if unit in reports:  # what is not a report a library says
                    reports[unit](*map(int, counts))
            return child.wait()
        finally:
            child.terminate()
            child.wait()
            signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """One rank; the first writes the answer."""
    import torch.distributed as dist

    from slm.evaluate.core import OutOfMemory

    folder, rank, ranks = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    request = read_json(folder / "request.json")
    device = _device(request["device"])
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        answer: dict[str, Any] = {
            "path": str(_measured(request, device, rank, ranks)),
            "error": None,
        }
    except (ValueError, OutOfMemory) as error:  # every rank's; what one alone meets ends them all
        answer = {"error": str(error), "refused": isinstance(error, ValueError)}
    if rank == 0:
        write_json(folder / "answer.json", answer)
    dist.destroy_process_group()


def _device(kind: str) -> torch.device:
    import torch

    if kind != "cuda":
        return torch.device(kind)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def _measured(request: dict[str, Any], device: torch.device, rank: int, ranks: int) -> Path:
    from slm.evaluate import evaluator as later
    from slm.evaluate.bundle import installed
    from slm.evaluate.core import Asked
    from slm.model import weights

    home = Path(request["home"])
    own = weights.of_file(Path(request["weights"]), home)
    labels = request["labels"] and tuple(request["labels"])
    asked = Asked(installed(home, request["bundle"]), request["most"], labels)
    reports = _saying("tokens", rank), _saying("tasks", rank)
    return later.core(own, home, asked, device, *reports, rank, ranks)


def _saying(unit: str, rank: int) -> Report:
    """Says now and then, and at the end, how far it is, on the first rank."""
    said = 0.0

    def report(done: int, of: int) -> None:
        nonlocal said
        if rank == 0 and (done == of or time.monotonic() - said > SAY_SECONDS):
            said = time.monotonic()
            sys.stdout.write(f"{unit} {done} {of}\n")
            sys.stdout.flush()

    return report


if __name__ == "__main__":
    main()
