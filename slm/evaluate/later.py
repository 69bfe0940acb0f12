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

from slm import checkpoints, events
from slm.data.loader import Rows
from slm.evaluate.bpb import bytes_of, validation_loss
from slm.evaluate.core import Asked, evaluate_all, judge_of
from slm.plan import canonical, code_fingerprint
from slm.weights import Weights, prepared_of

Report = Callable[[int, int], None]
"""Told how many of how many parts are done."""


def val_bpb(weights: Weights, home: Path, device: torch.device, report: Report = lambda done, of: None) -> Path:
    """val_bpb of some weights on the validation rows of their plan: the file that holds it, made if it is not there.

    On the ranks and threads of the training it is to the bit what the trainer would find. Raises ValueError where
    weights or rows are gone or changed, RuntimeError where the loss is no number.
    """
    data = weights.plan.data
    decides = {"weights_sha256": _sha256(weights), "code": code_fingerprint(), "device": device.type}
    decides |= {"tokenizer": data.tokenizer, "validation": data.validation}
    return _kept(weights, "val_bpb", decides, lambda _: _measure_val_bpb(weights, home, device, report))


def core(
    weights: Weights,
    home: Path,
    asked: Asked,
    device: torch.device,
    report: Report = lambda done, of: None,
    planning: Report = lambda done, of: None,
) -> Path:
    """What some weights reach on a bundle: the file that holds it, made if it is not there.

    What an interrupted evaluation finished is not done again. `planning` is told of tasks, `report` of tokens. Raises
    ValueError where weights, tokeniser or a task's file are gone or changed, or examples are too few for their shots.
    """
    decides = {"weights_sha256": _sha256(weights), "code": code_fingerprint(), "device": device.type}
    decides |= {"tokenizer": weights.plan.data.tokenizer, **asked.settings()}

    def measure(path: Path) -> dict[str, Any]:
        tokenizer, judge = prepared_of(weights.plan, home).tokenizer, judge_of(weights.model(device))
        return evaluate_all(asked, tokenizer, judge, _parts(path), report=report, planning=planning)

    return _kept(weights, "core", decides, measure)


def _kept(weights: Weights, metric: str, decides: dict[str, Any], measure: Callable[[Path], dict[str, Any]]) -> Path:
    """The file of an evaluation, made if there is none: what it is of, what decides it, and what was measured."""
    key = hashlib.sha256(canonical(decides).encode()).hexdigest()[:12]
    path = weights.run_folder / "evals" / f"{metric}-{weights.step:09d}-{key}.json"
    if not path.exists():
        head = {"run_id": weights.plan.run_id, "step": weights.step, "metric": metric, "weights": weights.path.name}
        document = head | decides | measure(path) | {"time": time.time()}
        path.parent.mkdir(exist_ok=True)
        events.write_json(path, document)
        shutil.rmtree(_parts(path), ignore_errors=True)
    return path


def _parts(path: Path) -> Path:
    """Where what an evaluation has finished lies until its file is written."""
    return path.with_suffix(".parts")


def _sha256(weights: Weights) -> str:
    """Of the file. Raises ValueError when the final weights of a run are not those that it wrote."""
    digest = checkpoints.sha256(weights.path)
    done = weights.run_folder / "done.json"
    if weights.path.parent == done.parent and done.exists() and events.read_json(done)["weights_sha256"] != digest:
        raise ValueError(f"{weights.path} was changed after run {weights.plan.run_id} wrote it")
    return digest


def _measure_val_bpb(weights: Weights, home: Path, device: torch.device, report: Report) -> dict[str, Any]:
    given = weights.plan.hyperparameters
    prepared = prepared_of(weights.plan, home)
    prepared.verify_content(given, ["validation"])
    rows, token_bytes = Rows.of(prepared, "validation"), bytes_of(prepared.tokenizer, given.vocab_size, device)
    model, began = weights.model(device), time.perf_counter()
    bpb, loss = validation_loss(model, rows, token_bytes, report=lambda done: report(done, len(rows)))
    if not math.isfinite(bpb):
        raise RuntimeError(f"run {weights.plan.run_id} diverged: val_bpb is {bpb} at step {weights.step}")
    return {"val_bpb": bpb, "val_loss": loss, "rows": len(rows), "seconds": time.perf_counter() - began}
