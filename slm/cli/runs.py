"""`slm status` and `slm show`: what became of the runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from slm.cli.options import Json, print_json, print_table, records, report_problems

LOG_LINES = 15


def status(
    experiment: Annotated[str | None, typer.Argument(help="Only this experiment's runs.")] = None, as_json: Json = False
) -> None:
    """Show every run: planned, running, finished, or why not."""
    import store
    from slm import launch

    home = store.home()
    report_problems(store.ingest(home).problems)
    frame = store.results(experiment, home=home)
    columns = ["run_id", "recipe", "depth", "horizon", "seed", "status", "val_bpb", "flops", "train_seconds"]
    rows = records(frame[columns])
    for row in rows:
        if row["status"] in ("running", "interrupted"):
            row["status"] = "running" if launch.holder(home / row["run_id"]) else "interrupted"
    if as_json:
        print_json({"home": str(home), "runs": rows})
        return
    print_table(
        [_cells(row) for row in rows], ["run", "recipe", "d", "horizon", "seed", "status", "val_bpb", "FLOPs", "s"]
    )


def _cells(row: dict[str, Any]) -> list[str | None]:
    formats = {"val_bpb": ".4f", "flops": ".3g", "train_seconds": ".1f"}
    return [None if value is None else format(value, formats.get(name, "")) for name, value in row.items()]


def show(run: Annotated[str, typer.Argument(help="A run_id, or its first digits.")], as_json: Json = False) -> None:
    """Show one run: plan, attempts and their warnings, result, and the end of its log when it failed."""
    from slm import events, launch
    from store import home

    folder = run_folder(home(), run)
    attempt = launch.last_attempt(folder)
    document = {name: events.read_json(folder / f"{name}.json") for name in ("plan", "done") if _there(folder, name)}
    document["attempts"] = [_attempt(path) for path in sorted((folder / "attempts").glob("[0-9]*"))]
    if as_json:
        print_json(document)
        return
    plan = document["plan"]
    given = plan["hyperparameters"]
    print(f"run {folder.name}: {plan['recipe']} d{given['depth']} {plan['horizon']} seed {plan['seed']}")
    print(f"  {given['steps']:,} steps of {given['batch_tokens']:,} tokens, width {given['width']}")
    for entry in document["attempts"]:
        ended = entry["exit"]
        state = "no word yet" if ended is None else "finished" if ended["reason"] is None else ended["reason"]
        print(f"  attempt {entry['attempt']} on {entry['ranks']} x {entry['device_name']}: {state}")
        for warning in entry["warnings"][-LOG_LINES:]:
            print(f"    warning: {warning}")
        if ended and ended["message"]:
            print(f"    {ended['message']}")
    if "done" in document:
        done = document["done"]
        print(f"  val_bpb {done['val_bpb']:.4f} after {done['tokens']:,} tokens, {done['flops']:.3g} FLOPs")
        print(f"  {done['train_seconds']:.1f} s of training, {done['tokens_per_second']:,.0f} tokens/s")
    elif attempt and (attempt / "log").exists():
        lines = (attempt / "log").read_text(errors="replace").splitlines()[-LOG_LINES:]
        print("\n".join([f"  end of {attempt / 'log'}:", *(f"    {line}" for line in lines)]))


def run_folder(home: Path, run: str) -> Path:
    """Folder of the run whose run_id starts with these digits. Raises ValueError unless there is exactly one."""
    found = [path.parent for path in home.glob(f"{run}*/plan.json")] if run.isalnum() else []
    if len(found) != 1:
        raise ValueError(f"run {run!r}: {'none' if not found else len(found)} in {home}; `slm status` lists them")
    return found[0]


def _there(folder: Path, name: str) -> bool:
    return (folder / f"{name}.json").exists()


def _attempt(folder: Path) -> dict[str, Any]:
    from slm import events, launch

    document = events.read_json(folder / "attempt.json")
    return {**document, "exit": launch.exit_of(folder), "warnings": _warnings(folder / "events.jsonl")}


def _warnings(path: Path) -> list[str]:
    """Messages of the warnings in an events.jsonl; that it cannot be read is one."""
    from slm import events

    try:
        return [event["message"] for event in events.Reader(path).new() if event["event"] == "warning"]
    except ValueError as error:
        return [f"{path} is damaged: {error}"]
