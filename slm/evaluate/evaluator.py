"""Evaluations of weights after training, kept as files `<run_id>/evals/<metric>-<step>-<key>.json`.

The key hashes what decides the value, so that the same evaluation of the same weights is found and not made again.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from slm.data.loader import Rows
from slm.evaluate.bpb import bytes_of, validation_loss
from slm.evaluate.bundle import installed
from slm.evaluate.core import Asked, Judge, evaluate_all, judge_of, of_first
from slm.evaluate.prompts import Known
from slm.files import read_json, write_json
from slm.model import checkpoints
from slm.model.weights import Weights, prepared_of
from slm.plan import canonical, code_fingerprint

Report = Callable[[int, int], None]
"""Told how many of how many parts are done."""


def val_bpb(
    weights: Weights, home: Path, device: torch.device, report: Report = lambda done, of: None
) -> Path:
    """val_bpb of some weights on the validation rows of their plan: the file that holds it, made if it is not there.

    On the ranks and threads of the training it is to the bit what the trainer would find. Raises ValueError where
    weights or rows are gone or changed, RuntimeError where the loss is no number.
    """
    data = weights.plan.data
    decides = {
        "weights_sha256": _sha256(weights),
        "code": code_fingerprint(),
        "device": device.type,
    }
    decides |= {"tokenizer": data.tokenizer, "validation": data.validation}
    return _kept(
        weights, "val_bpb", decides, lambda: _measure_val_bpb(weights, home, device, report)
    )


def core(
    weights: Weights,
    home: Path,
    asked: Asked,
    device: torch.device,
    report: Report = lambda done, of: None,
    planning: Report = lambda done, of: None,
    rank: int = 0,
    ranks: int = 1,
) -> Path:
    """What some weights reach on a bundle: the file that holds it, made if it is not there.

    What an interrupted evaluation finished is not done again. `planning` is told of tasks, `report` of tokens. Raises
    ValueError where weights, tokeniser or a task's file are gone or changed, or examples are too few for their shots,
    OutOfMemory where a pass of one example is too much.
    """

    def subject() -> tuple[Known, Judge]:
        return prepared_of(weights.plan, home).tokenizer, judge_of(weights.model(device))

    return core_of(weights, asked, device, subject, None, report, planning, rank, ranks)


def core_of(
    weights: Weights,
    asked: Asked,
    device: torch.device,
    subject: Callable[[], tuple[Known, Judge]],
    tokens: int | None,
    report: Report,
    planning: Report,
    rank: int,
    ranks: int,
) -> Path:
    """`core` of a tokeniser and a judge, made where nothing is on file, with so many `tokens` a pass; on every rank.

    The first rank's `weights` name the file, which it alone reads and writes. Its `seconds` are those of the last
    sitting.
    """

    def decided() -> dict[str, Any]:
        decides = {
            "weights_sha256": _sha256(weights),
            "code": code_fingerprint(),
            "device": device.type,
        }
        return decides | {"tokenizer": weights.plan.data.tokenizer, **asked.settings()}

    def measure(path: Path) -> dict[str, Any]:
        (tokenizer, judge), began = subject(), time.perf_counter()
        found = evaluate_all(
            asked, tokenizer, judge, _parts(path), rank, ranks, tokens, report, planning
        )
        return found | {"seconds": time.perf_counter() - began}

    decides = of_first(decided, rank, ranks, device)
    path = _path(weights, asked.bundle.name, decides)
    if not of_first(path.exists, rank, ranks, device):
        found = measure(path)
        if rank == 0:
            _write(weights, asked.bundle.name, decides, found, path)
    return path


def asked_of(home: Path, wanted: dict[str, Any]) -> Asked:
    """What an attempt.json asks of a home's bundles. Raises ValueError where the bundle is gone or changed."""
    asked = Asked(installed(home, wanted["bundle"]), wanted["max_per_task"])
    return asked.without(wanted["without"]) if wanted["without"] else asked


def _kept(
    weights: Weights, metric: str, decides: dict[str, Any], measure: Callable[[], dict[str, Any]]
) -> Path:
    """The file of an evaluation, made if there is none."""
    path = _path(weights, metric, decides)
    if not path.exists():
        _write(weights, metric, decides, measure(), path)
    return path


def _path(weights: Weights, metric: str, decides: dict[str, Any]) -> Path:
    """The file of an evaluation, named for what decides it."""
    key = hashlib.sha256(canonical(decides).encode()).hexdigest()[:12]
    return weights.run_folder / "evals" / f"{metric}-{weights.step:09d}-{key}.json"


def _write(
    weights: Weights, metric: str, decides: dict[str, Any], found: dict[str, Any], path: Path
) -> None:
    """Write what an evaluation is of, what decides it, and what was measured."""
    head = {
        "run_id": weights.plan.run_id,
        "step": weights.step,
        "metric": metric,
        "weights": weights.path.name,
    }
    path.parent.mkdir(exist_ok=True)
    write_json(path, head | decides | found | {"time": time.time()})
    shutil.rmtree(_parts(path), ignore_errors=True)


def _parts(path: Path) -> Path:
    """Where what an evaluation has finished lies until its file is written."""
    return path.with_suffix(".parts")


def _sha256(weights: Weights) -> str:
    """Of the file. Raises ValueError when the final weights of a run are not those that it wrote."""
    digest = checkpoints.sha256(weights.path)
    done = weights.run_folder / "done.json"
    if (
        weights.path.parent == done.parent
        and done.exists()
        and read_json(done)["weights_sha256"] != digest
    ):
        raise ValueError(f"{weights.path} was changed after run {weights.plan.run_id} wrote it")
    return digest


def _measure_val_bpb(
    weights: Weights, home: Path, device: torch.device, report: Report
) -> dict[str, Any]:
    given = weights.plan.hyperparameters
    prepared = prepared_of(weights.plan, home)
    prepared.verify_content(given, ["validation"])
    rows, token_bytes = (
        Rows.of(prepared, "validation"),
        bytes_of(prepared.tokenizer, given.vocab_size, device),
    )
    model, began = weights.model(device), time.perf_counter()
    bpb, loss = validation_loss(
        model, rows, token_bytes, report=lambda done: report(done, len(rows))
    )
    if not math.isfinite(bpb):
        raise RuntimeError(
            f"run {weights.plan.run_id} diverged: val_bpb is {bpb} at step {weights.step}"
        )
    return {
        "val_bpb": bpb,
        "val_loss": loss,
        "rows": len(rows),
        "seconds": time.perf_counter() - began,
    }
