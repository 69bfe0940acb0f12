"""Experiment: a question, and the runs that answer it.

The runs are recipes x depths x horizons x seeds, declared in experiments/*.py or by options, or
plans of runs to repeat.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm.recipe import Hyperparameters, Recipe, check_one_horizon

if TYPE_CHECKING:
    from slm.plan import Plan


@dataclass(frozen=True)
class RequestedRun:
    """A run of an experiment, before its data are known."""

    recipe: str
    """Name of the recipe."""
    horizon: str
    """The requested horizon, e.g. "compute-optimal" or "flops=1e+12"."""
    seed: int
    hyperparameters: Hyperparameters
    plan: Plan | None = None
    """The plan to repeat; None for a run that a recipe gives."""


@dataclass(frozen=True)
class Experiment:
    """A question and the runs that answer it."""

    name: str
    """Name of the results: letters, digits, '.', '_' and '-'."""
    recipes: tuple[Recipe, ...]
    """Recipes to train; variants are `dataclasses.replace(nanochat, name=…, …)`."""
    depths: tuple[int, ...]
    """The dial."""
    flops: tuple[float, ...] = ()
    """FLOPs budgets of an isoFLOP grid."""
    ratios: tuple[float, ...] = ()
    """Tokens-per-parameter ratios. With neither budgets nor ratios nor steps, every run is
    compute-optimal."""
    steps: int | None = None
    """Optimiser steps of smoke runs."""
    seeds: tuple[int, ...] = (0,)
    """Replicates."""
    data: str = "python"
    """Corpus: a name or a folder."""
    tokenizer: str | None = None
    """Tokeniser: a file or one of tiktoken's names; None trains one on the corpus."""
    question: str = ""
    """The question that the runs answer."""
    plans: tuple[Plan, ...] = ()
    """Runs to repeat as they were planned. A plan names its recipe but not the recipe's constants,
    so no recipe is declared for it: whoever named the experiment vouches that these runs belong to
    it."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.name):
            raise ValueError(
                f"experiment name {self.name!r}: letters, digits, '.', '_' and '-' only"
            )
        check_one_horizon([name for name in ("flops", "ratios", "steps") if getattr(self, name)])
        for name in ("recipes", "depths", "seeds"):
            if not getattr(self, name) and not self.plans:
                raise ValueError(f"experiment {self.name}: no {name}")

    @property
    def families(self) -> list[str]:
        """Names of the recipes, those of plans included."""
        names = [*(recipe.name for recipe in self.recipes), *(plan.recipe for plan in self.plans)]
        return list(dict.fromkeys(names))

    def requested_runs(self) -> list[RequestedRun]:
        """Return every run, cheapest first. Raises ValueError for a depth or horizon that a recipe
        refuses.
        """
        runs = []
        grid = itertools.product(self.recipes, self.depths, self._horizons(), self.seeds)
        for recipe, depth, (label, horizon), seed in grid:
            runs.append(RequestedRun(recipe.name, label, seed, recipe(depth, **horizon)))
        for plan in self.plans:
            hp = plan.hyperparameters
            runs.append(RequestedRun(plan.recipe, plan.horizon, plan.seed, hp, plan))
        return sorted(runs, key=lambda run: run.hyperparameters.flops)

    def _horizons(self) -> list[tuple[str, dict[str, Any]]]:
        """Return each horizon's label and the arguments that give it to a recipe."""
        if self.steps is not None:
            return [(f"steps={self.steps}", {"steps": self.steps})]
        if self.flops:
            return [(f"flops={flops:g}", {"flops": flops}) for flops in self.flops]
        if self.ratios:
            return [(f"ratio={ratio:g}", {"ratio": ratio}) for ratio in self.ratios]
        return [("compute-optimal", {})]

    def declared(self) -> dict[str, Any]:
        """Return the declaration as a JSON document."""
        document = {
            "recipes": {recipe.name: asdict(recipe) for recipe in self.recipes},
            "depths": self.depths,
            "flops": self.flops,
            "ratios": self.ratios,
            "steps": self.steps,
            "seeds": self.seeds,
            "data": self.data,
            "tokenizer": self.tokenizer,
            "plans": [plan.run_id for plan in self.plans],
        }
        declared: dict[str, Any] = json.loads(json.dumps(document))
        return declared


def load(path: Path) -> Experiment:
    """Load the `experiment` that a Python file declares. Raises ValueError when there is none."""
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
