"""Evaluations of stored weights, written to `<run_id>/evals/<metric>-<step>-<key>.json`.

The key is a hash of everything that decides the value, so an evaluation is found again and never
repeated.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slm.data.loader import Rows
from slm.evaluate.bpb import bytes_of, validation_loss
from slm.evaluate.bundle import Bundle, installed
from slm.evaluate.core import ERRORS, Scorer, evaluate_bundle
from slm.evaluate.request import ROWS, CoreRequest, Report, ignore
from slm.files import read_json, sha256_of, write_json
from slm.model.ranks import ALONE, Ranks
from slm.model.weights import Weights, find_dataset
from slm.plan import code_fingerprint, digest


@dataclass(frozen=True)
class EvaluationFile:
    """File of one evaluation, named for what decides its value."""

    path: Path
    head: dict[str, Any]
    """Run, step, weights, and what decides the value."""
    exists: bool

    @classmethod
    def locate(
        cls, weights: Weights, metric: str, device: torch.device, settings: dict[str, Any]
    ) -> EvaluationFile:
        """Return the file of some weights, metric and settings.

        Raises ValueError if the final weights of a run are not those that it wrote.
        """
        identity = {
            "weights_sha256": _checked_sha256(weights),
            "code": code_fingerprint(),
            "device": device.type,
            "tokenizer": weights.plan.data.tokenizer,
            **settings,
        }
        key = digest(identity)[:12]
        path = weights.run_folder / "evals" / f"{metric}-{weights.step:09d}-{key}.json"
        head = {
            "run_id": weights.plan.run_id,
            "step": weights.step,
            "metric": metric,
            "weights": weights.path.name,
        }
        return cls(path, head | identity, path.exists())

    @property
    def parts(self) -> Path:
        """Folder of finished tasks until the file is written."""
        return self.path.with_suffix(".parts")

    def write(self, result: dict[str, Any]) -> None:
        """Write the file, and remove its parts."""
        self.path.parent.mkdir(exist_ok=True)
        write_json(self.path, self.head | result | {"time": time.time()})
        shutil.rmtree(self.parts, ignore_errors=True)


def evaluate_val_bpb(
    weights: Weights, home: Path, device: torch.device, report: Report = ignore
) -> Path:
    """Return the file with the val_bpb of some weights on their plan's validation rows.

    On the ranks and threads of the training it equals the trainer's value to the bit. Raises
    ValueError if weights or rows are missing or changed, RuntimeError if the loss is not finite.
    """
    plan = weights.plan
    hp = plan.hyperparameters
    settings = {"validation": plan.data.validation}
    file = EvaluationFile.locate(weights, "val_bpb", device, settings)
    if file.exists:
        return file.path
    prepared = find_dataset(plan, home)
    prepared.verify_blocks(prepared.blocks("validation"))
    rows = Rows.open(prepared, "validation")
    token_bytes = bytes_of(prepared.tokenizer, hp.vocab_size, device)
    model = weights.model(device)
    start = time.perf_counter()
    bpb, loss = validation_loss(
        model, rows, token_bytes, ALONE, report=lambda read: report(ROWS, read, len(rows))
    )
    if not math.isfinite(bpb):
        raise RuntimeError(f"run {plan.run_id} diverged: val_bpb is {bpb} at step {weights.step}")
    seconds = time.perf_counter() - start
    file.write({"val_bpb": bpb, "val_loss": loss, "rows": len(rows), "seconds": seconds})
    return file.path


def evaluate_core(
    weights: Weights,
    home: Path,
    request: CoreRequest,
    device: torch.device,
    ranks: Ranks = ALONE,
    report: Report = ignore,
    load: Callable[[], Scorer] | None = None,
) -> Path:
    """Return the file with the results of some weights on the requested tasks, on every rank.

    Tasks that an interrupted evaluation finished are not repeated; `seconds` in the file are those
    since the last interruption. Only rank 0 reads and writes files, and only its `weights` count.
    `load` returns the scorer of a model in memory, and is called only if there is no file yet.

    Raises ValueError if weights, tokeniser or a task's file are missing or changed, or if examples
    are too few for the shots, OutOfMemory if a single example does not fit into memory.
    """
    bundle, file = ranks.broadcast_from_rank0(
        lambda: locate_core(weights, home, request, device), device, ERRORS
    )
    if file.exists:
        return file.path
    if load:
        scorer = load()
    else:
        tokenizer = find_dataset(weights.plan, home).tokenizer
        scorer = Scorer(weights.model(device), tokenizer, ranks, report=report)
    start = time.perf_counter()
    result = evaluate_bundle(scorer, bundle, request, file.parts)
    if ranks.is_first:
        file.write(result | {"seconds": time.perf_counter() - start})
    return file.path


def locate_core(
    weights: Weights, home: Path, request: CoreRequest, device: torch.device
) -> tuple[Bundle, EvaluationFile]:
    """Return the requested bundle, and the file of its evaluation.

    Raises ValueError as `installed` and `EvaluationFile.locate` do.
    """
    bundle = installed(home, request.bundle)
    settings = request.settings(bundle)
    return bundle, EvaluationFile.locate(weights, bundle.name, device, settings)


def _checked_sha256(weights: Weights) -> str:
    digest = sha256_of(weights.path)
    done = weights.run_folder / "done.json"
    is_final = weights.path.parent == done.parent and done.exists()
    if is_final and read_json(done)["weights_sha256"] != digest:
        raise ValueError(f"{weights.path} was changed after run {weights.plan.run_id} wrote it")
    return digest
