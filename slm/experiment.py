"""Experiment: what is asked, as recipes x depths x horizons x seeds; declared in experiments/*.py or from flags.

Or as plans, which hold whole runs.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm.recipe import Hyperparameters, Recipe

if TYPE_CHECKING:
    from slm.plan import Plan


@dataclass(frozen=True)
class RequestedRun:
    """One run of an experiment, before its data are known."""

    recipe: str
    """Name of the recipe."""
    horizon: str
    """How the horizon was asked for."""
    seed: int
    """Seed of the run."""
    hyperparameters: Hyperparameters
    """What the recipe gave."""
    plan: Plan | None = None
    """The plan that asks for it, made elsewhere; None where a recipe does."""


@dataclass(frozen=True)
class Experiment:
    """A question and the runs that answer it."""

    name: str
    """What results are found under: letters, digits, '.', '_' and '-'."""
    recipes: tuple[Recipe, ...]
    """The families to train; variants are `dataclasses.replace(nanochat, name=…, …)`."""
    depths: tuple[int, ...]
    """The dial."""
    flops: tuple[float, ...] = ()
    """FLOPs budgets of an isoFLOP grid."""
    ratios: tuple[float, ...] = ()
    """Tokens-per-parameter ratios. With neither budgets nor ratios nor steps, every run is compute-optimal."""
    steps: int | None = None
    """Optimiser steps of smoke runs."""
    seeds: tuple[int, ...] = (0,)
    """Replicates."""
    data: str = "python"
    """Corpus: a name or a folder."""
    tokenizer: str | None = None
    """Tokeniser: a file or one of tiktoken's names; None: one is trained on the corpus."""
    question: str = ""
    """What it is to find out."""
    plans: tuple[Plan, ...] = ()
    """Runs to repeat as they were planned. A plan names its recipe but not the recipe's constants, so none is declared
    for it: that these runs belong to the experiment is the word of whoever named it."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.name):
            raise ValueError(
                f"experiment name {self.name!r}: letters, digits, '.', '_' and '-' only"
            )
        given = [name for name in ("flops", "ratios", "steps") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} given together: choose one horizon")
        for name in ("recipes", "depths", "seeds"):
            if not getattr(self, name) and not self.plans:
                raise ValueError(f"experiment {self.name}: no {name}")

    @property
    def families(self) -> list[str]:
        """Names of the recipes, those of plans included."""
        names = [*(recipe.name for recipe in self.recipes), *(plan.recipe for plan in self.plans)]
        return list(dict.fromkeys(names))

    def requested_runs(self) -> list[RequestedRun]:
        """Every run, cheapest first. Raises ValueError for what a recipe refuses."""
        runs = [
            RequestedRun(recipe.name, label, seed, recipe(depth, **horizon))
            for recipe in self.recipes
            for depth in self.depths
            for label, horizon in self._horizons()
            for seed in self.seeds
        ]
        runs += [
            RequestedRun(plan.recipe, plan.horizon, plan.seed, plan.hyperparameters, plan)
            for plan in self.plans
        ]
        return sorted(runs, key=lambda run: run.hyperparameters.flops)

    def _horizons(self) -> Iterator[tuple[str, dict[str, Any]]]:
        if self.steps is not None:
            yield f"steps={self.steps}", {"steps": self.steps}
        elif self.flops:
            yield from ((f"flops={flops:g}", {"flops": flops}) for flops in self.flops)
        elif self.ratios:
            yield from ((f"ratio={ratio:g}", {"ratio": ratio}) for ratio in self.ratios)
        else:
            yield "compute-optimal", {}

    def declared(self) -> dict[str, Any]:
        """What was asked, for the record."""
        return {
            "recipes": {
                recipe.name: json.loads(json.dumps(asdict(recipe))) for recipe in self.recipes
            },
            "depths": list(self.depths),
            "flops": list(self.flops),
            "ratios": list(self.ratios),
            "steps": self.steps,
            "seeds": list(self.seeds),
            "data": self.data,
            "tokenizer": self.tokenizer,
            "plans": [plan.run_id for plan in self.plans],
        }


def load(path: Path) -> Experiment:
    """The `experiment` that a Python file declares. Raises ValueError when there is none."""
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ValueError(f"{path}: no such experiment file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path} does not load: {type(error).__name__}: {error}") from error
    experiment = getattr(module, "experiment", None)
    if not isinstance(experiment, Experiment):
        raise ValueError(f"{path} declares no `experiment = Experiment(...)`")
    return experiment
