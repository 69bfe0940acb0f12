"""The evaluations of bundles that a run has on file, and what two of them must share to be compared. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from slm.evaluate.bundle import CORE
from slm.files import read_json


@dataclass(frozen=True)
class Kept:
    """What a run's final weights reach on a bundle."""

    key: str
    """Metric, bundle, mode, tokeniser and context: values of two different keys are not one axis."""
    document: dict[str, Any]
    """As `later.core` wrote it."""

    @property
    def name(self) -> str:
        """What its mean is called."""
        return "CORE" if self.document["name"] == CORE else str(self.document["name"])


def kept(run_folder: Path) -> list[Kept]:
    """Evaluations of a run's final weights that have a mean, the one that speaks for the run first.

    CORE comes before another bundle, all examples before some, more of each task before fewer, the newest before older
    ones. Evaluations by versions that gave no mode are left out.
    """
    given = read_json(run_folder / "plan.json")["hyperparameters"]
    documents = [read_json(path) for path in sorted((run_folder / "evals").glob("*.json"))]
    known = [own for own in documents if own.get("centred") is not None and "mode" in own]
    last = sorted((own for own in known if own["step"] == given["steps"]), key=_later)
    return [Kept(_key(own, given["sequence_length"]), own) for own in last]


def _later(document: dict[str, Any]) -> tuple[Any, ...]:
    most = document["max_per_task"] or inf
    return document["name"] != CORE, document["mode"] != "full", -most, -document["time"]


def _key(document: dict[str, Any], context: int) -> str:
    parts = {
        "metric": document["name"],
        "bundle": document["bundle"],
        "mode": document["mode"].replace(" ", "_"),
    }
    parts |= {"tokenizer": document["tokenizer"], "context": context}
    return " ".join(f"{name}={value}" for name, value in parts.items())
