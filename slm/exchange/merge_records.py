"""Merge the experiments, imports and fits of an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slm.exchange.archive import Json
from slm.exchange.importers import imported_experiments
from slm.exchange.incoming import Export, MergeResult
from slm.files import read_json, write_json
from slm.plan import canonical


def merge_experiments(export: Export, result: MergeResult) -> dict[str, str]:
    """Take experiments; return the new name of each whose name has another question here."""
    renamed = {}
    imported = set(imported_experiments(export.home).values())
    for name in export.names["experiments"]:
        path = export.home / name
        incoming = read_json(export.folder / name)
        local: Json | None = read_json(path) if path.exists() else None
        # 1) an experiment that is new here is copied
        is_other = path.stem in imported or (
            local and not _same_question(export.home, local, incoming)
        )
        if not is_other and local is None:
            result.counts["experiments"] += export.take(name)
            continue
        # 2) another question gets another name, the same question the members of both
        if is_other or local is None:
            renamed[path.stem] = f"{path.stem}@{export.home_id}"
            result.lines.append(
                f"experiment {path.stem} asks another question here: theirs is {renamed[path.stem]}"
            )
            merged = incoming | {"name": renamed[path.stem]}
            path = path.with_name(f"{renamed[path.stem]}.json")
        else:
            merged = _union(export.home, local, incoming)
        if path.exists() and read_json(path) == merged:
            continue
        if local is not None and not is_other:
            added = len(merged["runs"]) - len(local["runs"])
            result.lines.append(f"experiment {path.stem}: {added} more runs")
        path.parent.mkdir(exist_ok=True)
        write_json(path, merged)
        result.counts["experiments"] += 1
    return renamed


def _same_question(home: Path, local: Json, incoming: Json) -> bool:
    """Whether two experiments of a name ask one question.

    It has the same words, recipes and data, and runs of the same trainers on the same tokens.
    """
    our_declaration = local.get("declared") or {}
    their_declaration = incoming.get("declared") or {}
    if local.get("question") != incoming.get("question"):
        return False
    if our_declaration.get("data") != their_declaration.get("data"):
        return False
    our_recipes = our_declaration.get("recipes") or {}
    their_recipes = their_declaration.get("recipes") or {}
    shared = our_recipes.keys() & their_recipes.keys()
    if any(our_recipes[name] != their_recipes[name] for name in shared):
        return False
    our_kinds = _kinds(home, local)
    their_kinds = _kinds(home, incoming)
    return our_kinds <= their_kinds or their_kinds <= our_kinds


def _kinds(home: Path, experiment: Json) -> set[tuple[str, ...]]:
    """Return trainer code, tokeniser and validation rows of an experiment's runs."""
    kinds: set[tuple[str, ...]] = set()
    for run in experiment["runs"]:
        path = home / run / "plan.json"
        if path.exists():
            plan = read_json(path)
            kinds.add((plan["code"], plan["data"]["tokenizer"], plan["data"]["validation"]))
    return kinds


def _union(home: Path, local: Json, incoming: Json) -> Json:
    """Return the earlier of two experiments with the runs of both, cheapest first."""
    first, second = sorted(
        (local, incoming),
        key=lambda document: (float(document.get("created") or 0), canonical(document)),
    )
    first_declared = first.get("declared") or {}
    second_declared = second.get("declared") or {}
    declared = second_declared | first_declared
    for name in first_declared.keys() & second_declared.keys():
        declared[name] = _union_values(first_declared[name], second_declared[name])
    runs = sorted({*local["runs"], *incoming["runs"]}, key=lambda run: (_flops(home / run), run))
    return first | {"declared": declared, "runs": runs}


def _union_values(first: Any, second: Any) -> Any:
    """Return the union of two lists or dictionaries (the first wins), else the first value."""
    if isinstance(first, list) and isinstance(second, list):
        return sorted({*first, *second})
    if isinstance(first, dict) and isinstance(second, dict):
        return second | first
    return first


def _flops(run_folder: Path) -> float:
    path = run_folder / "plan.json"
    if not path.exists():
        return float("inf")
    hp = read_json(path)["hyperparameters"]
    return float(hp["flops_per_token"]) * float(hp["batch_tokens"]) * float(hp["steps"])


def merge_imports(export: Export, result: MergeResult) -> dict[str, str]:
    """Take imports by hash, keeping this home's; return new names where a name is taken."""
    renamed = {}
    names = set(imported_experiments(export.home).values())
    names |= {path.stem for path in export.home.glob("experiments/*.json")}
    for name in export.names["imports"]:
        path = export.home / name
        if path.exists():
            continue
        if path.name != "import.json":
            export.take(name)
            continue
        result.counts["imports"] += 1
        document = read_json(export.folder / name)
        experiment = document["experiment"]
        if experiment not in names:
            export.take(name)
            continue
        renamed[experiment] = f"{experiment}@{export.home_id}"
        result.lines.append(
            f"import {experiment} is another one here: theirs is {renamed[experiment]}"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, document | {"experiment": renamed[experiment]})
    return renamed


def merge_fits(export: Export, renamed: dict[str, str], result: MergeResult) -> None:
    """Take fits by hash, keeping this home's."""
    for name in export.names["fits"]:
        path = export.home / name
        if path.exists():
            continue
        document = read_json(export.folder / name)
        names = [renamed.get(experiment, experiment) for experiment in document["experiments"]]
        if names == document["experiments"]:
            export.take(name)
        else:
            path.parent.mkdir(exist_ok=True)
            write_json(path, document | {"experiments": names})
        result.counts["fits"] += 1
