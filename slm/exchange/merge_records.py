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
        local = read_json(path) if path.exists() else None
        # 1) an experiment that is new here is copied
        if local is None and path.stem not in imported:
            result.counts["experiments"] += export.take(name)
            continue
        # 2) the same question has the members of both, another question gets another name
        if local and path.stem not in imported and _same_question(export.home, local, incoming):
            merged = _union(export.home, local, incoming)
            if merged == local:
                continue
            added = len(merged["runs"]) - len(local["runs"])
            result.lines.append(f"experiment {path.stem}: {added} more runs")
        else:
            new_name = f"{path.stem}@{export.home_id}"
            renamed[path.stem] = new_name
            result.lines.append(
                f"experiment {path.stem} asks another question here: theirs is {new_name}"
            )
            merged = incoming | {"name": new_name}
            path = path.with_name(f"{new_name}.json")
            if path.exists() and read_json(path) == merged:
                continue
        path.parent.mkdir(exist_ok=True)
        write_json(path, merged)
        result.counts["experiments"] += 1
    return renamed


def _same_question(home: Path, local: Json, incoming: Json) -> bool:
    """Whether two experiments of a name ask one question.

    It has the same words, recipes and data, and runs of the same trainers on the same tokens.
    """
    first = local.get("declared") or {}
    second = incoming.get("declared") or {}
    if local.get("question") != incoming.get("question"):
        return False
    if first.get("data") != second.get("data"):
        return False
    first_recipes = first.get("recipes") or {}
    second_recipes = second.get("recipes") or {}
    for name in first_recipes.keys() & second_recipes.keys():
        if first_recipes[name] != second_recipes[name]:
            return False
    first_kinds = _kinds(home, local)
    second_kinds = _kinds(home, incoming)
    return first_kinds <= second_kinds or second_kinds <= first_kinds


def _kinds(home: Path, experiment: Json) -> set[tuple[str, ...]]:
    """Return trainer code, tokeniser and validation rows of an experiment's runs."""
    kinds: set[tuple[str, ...]] = set()
    for run in experiment["runs"]:
        path = home / run / "plan.json"
        if path.exists():
            plan = read_json(path)
            data = plan["data"]
            kinds.add((plan["code"], data["tokenizer"], data["validation"]))
    return kinds


def _union(home: Path, local: Json, incoming: Json) -> Json:
    """Return the earlier of two experiments with the runs of both, cheapest first."""
    first, second = sorted(
        (local, incoming),
        key=lambda document: (float(document.get("created") or 0), canonical(document)),
    )
    declared = dict(second.get("declared") or {})
    for name, value in (first.get("declared") or {}).items():
        declared[name] = _union_values(value, declared.get(name))
    runs = {*local["runs"], *incoming["runs"]}
    cheapest_first = sorted(runs, key=lambda run: (_flops(home / run), run))
    return first | {"declared": declared, "runs": cheapest_first}


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
    flops: float = hp["flops_per_token"] * hp["batch_tokens"] * hp["steps"]
    return flops


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
        new_name = f"{experiment}@{export.home_id}"
        renamed[experiment] = new_name
        result.lines.append(f"import {experiment} is another one here: theirs is {new_name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, document | {"experiment": new_name})
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
