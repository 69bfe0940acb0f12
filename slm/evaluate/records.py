"""Evaluation records: results of a run's weights on bundles, and the keys that compare them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from slm.evaluate.bundle import CORE
from slm.evaluate.request import CoreRequest
from slm.files import read_json


@dataclass(frozen=True)
class EvaluationRecord:
    """Result of a run's final weights on a bundle."""

    key: str
    """Metric, bundle, mode, tokeniser and context: only values of equal keys share an axis."""
    document: dict[str, Any]
    """Content of the file that `evaluator.evaluate_core` writes."""

    @property
    def name(self) -> str:
        """Name of the mean over tasks: CORE, or the bundle's name."""
        return "CORE" if self.document["name"] == CORE else str(self.document["name"])


def read_records(run_folder: Path) -> list[EvaluationRecord]:
    """Return the evaluations of a run's final weights that have a mean, in order of preference.

    CORE comes before other bundles, all examples before some, more per task before fewer, newer
    before older. Records of versions that wrote no mode are left out.
    """
    hp = read_json(run_folder / "plan.json")["hyperparameters"]
    documents = [
        document
        for document in _documents(run_folder)
        if document.get("centred") is not None
        and "mode" in document
        and document["step"] == hp["steps"]
    ]
    documents.sort(key=_preference)
    return [
        EvaluationRecord(_key(document, hp["sequence_length"]), document) for document in documents
    ]


def runs_without_record(
    run_folders: Iterable[Path], requests: Mapping[str, CoreRequest]
) -> list[str]:
    """Return the run_ids without an evaluation of the final weights as requested."""
    return [
        folder.name
        for folder in run_folders
        if not any(_answers(document, requests[folder.name]) for document in _documents(folder))
    ]


def _documents(run_folder: Path) -> list[dict[str, Any]]:
    return [read_json(path) for path in sorted((run_folder / "evals").glob("*.json"))]


def _answers(document: dict[str, Any], request: CoreRequest) -> bool:
    return (
        document.get("bundle") == request.bundle
        and document.get("max_per_task") == request.max_per_task
        and document["weights"] == "model.safetensors"
        and not {*document["asked"]} & {*request.without}
    )


def _preference(document: dict[str, Any]) -> tuple[Any, ...]:
    maximum = document["max_per_task"] or inf
    return document["name"] != CORE, document["mode"] != "full", -maximum, -document["time"]


def _key(document: dict[str, Any], context: int) -> str:
    parts = {
        "metric": document["name"],
        "bundle": document["bundle"],
        "mode": document["mode"].replace(" ", "_"),
        "tokenizer": document["tokenizer"],
        "context": context,
    }
    return " ".join(f"{name}={value}" for name, value in parts.items())
