"""Plan: one run, frozen. Its run_id is the hash of everything that shapes weights and validation
rows, and of nothing else.
"""

from __future__ import annotations

import ast
import hashlib
import json
from dataclasses import asdict, dataclass, is_dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from slm.recipe import Hyperparameters

TRAINER_SOURCES = (
    "hardware/block_sizes.py",
    "model/attention.py",
    "model/layers.py",
    "model/logits.py",
    "model/gpt.py",
    "model/ranks.py",
    "train/optimizer.py",
    "train/session.py",
    "train/loop.py",
    "train/trainer.py",
    "data/loader.py",
    "evaluate/bpb.py",
)
"""Files whose code decides the weights and val_bpb, relative to the package."""


@dataclass(frozen=True)
class DataIdentity:
    """Rows that a run reads, identified by content."""

    corpus: str
    """Name of the corpus; not part of the identity."""
    tokenizer: str
    """Fingerprint of the tokeniser."""
    train: str
    """Fingerprint of the row blocks that the horizon reads."""
    validation: str
    """Fingerprint of the validation rows."""
    validation_rows: int
    """Rows that val_bpb reads."""
    rows: int
    """Training rows of the dataset; not part of the identity."""
    epochs: float
    """Passes over the training rows; not part of the identity."""


@dataclass(frozen=True)
class Plan:
    """Plan of a run."""

    recipe: str
    """Name of the recipe; not part of the identity."""
    horizon: str
    """The requested horizon, e.g. "compute-optimal" or "flops=1e+12"; not part of the identity."""
    seed: int
    """Seed of the initial weights and of the order of rows."""
    hyperparameters: Hyperparameters
    data: DataIdentity
    code: str
    """Fingerprint of the trainer's sources."""

    @cached_property
    def run_id(self) -> str:
        """The first 12 hex digits of the SHA-256 of the canonical identity."""
        data = self.data
        identity = {
            "hyperparameters": asdict(self.hyperparameters),
            "seed": self.seed,
            "data": [data.tokenizer, data.train, data.validation, data.validation_rows],
            "code": self.code,
        }
        return digest(identity)[:12]

    def document(self) -> dict[str, Any]:
        """Return the plan as plan.json holds it."""
        return {"run_id": self.run_id, **asdict(self)}

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read a plan.json.

        Raises ValueError when the file holds no plan of this version, or a plan other than its
        run_id names.
        """
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            run_id = document.pop("run_id", None) if isinstance(document, dict) else None
            plan: Plan = _typed(cls, document, "plan")
            actual_id = plan.run_id
        except ValueError as error:
            raise ValueError(
                f"{path} is not a plan that this version of slm can read: {error}"
            ) from None
        if actual_id != run_id:
            raise ValueError(
                f"{path}: its content is run {actual_id}, not {run_id}: the file was changed"
            )
        return plan


def _typed(kind: Any, value: Any, path: str) -> Any:
    """Convert a JSON value to the type of a field; a dataclass has exactly its fields. Raises
    ValueError.
    """
    if isinstance(kind, type) and is_dataclass(kind):
        hints = get_type_hints(kind)
        if not isinstance(value, dict):
            raise ValueError(f"{path} is not an object")
        if wrong := sorted(hints.keys() ^ value.keys()):
            problems = (f"no {name}" if name in hints else f"an unknown {name}" for name in wrong)
            raise ValueError(f"{path} has {', '.join(problems)}")
        return kind(**{name: _typed(hints[name], value[name], f"{path}.{name}") for name in hints})
    json_type = kind
    if get_origin(kind) is tuple:
        json_type = list
    elif kind is float:
        json_type = int | float
    if not isinstance(value, json_type):
        raise ValueError(f"{path} is {value!r}")
    return tuple(value) if isinstance(value, list) else value


def canonical(value: Any) -> str:
    """Return the canonical JSON text of a value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """Return the SHA-256 of the canonical JSON text of a value, in hex."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


@cache
def code_fingerprint(package: Path = Path(__file__).parent) -> str:
    """Fingerprint the trainer's sources as syntax trees.

    Comments, layout, docstrings, imports and file names are left out, so that moving a module or
    rewording it keeps every run_id.
    """
    trees = [_tree(ast.parse((package / name).read_text())) for name in TRAINER_SOURCES]
    return digest(sorted(map(digest, trees)))[:16]


def _tree(node: Any) -> Any:
    """Return a syntax tree as JSON, the same for every Python version, without empty fields."""
    if isinstance(node, list):
        return [_tree(item) for item in node if not _is_left_out(item)]
    if not isinstance(node, ast.AST):
        return node if isinstance(node, str | int | float | bool) else repr(node)
    fields = {name: value for name, value in ast.iter_fields(node) if value not in (None, [])}
    return [type(node).__name__, {name: _tree(value) for name, value in fields.items()}]


def _is_left_out(item: Any) -> bool:
    """Whether a statement is an import or a docstring, which the fingerprint leaves out."""
    if isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant):
        return isinstance(item.value.value, str)
    return isinstance(item, ast.Import | ast.ImportFrom)
