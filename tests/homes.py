"""Homes of finished runs with known losses: the files of trainer and launcher, without training."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slm.experiment import Experiment
from slm.plan import DataIdentity, Plan
from slm.recipe import Hyperparameters

Loss = Callable[[Hyperparameters], float]
"""Function that returns val_bpb, or CORE, of a run without noise."""


def surface(hp: Hyperparameters) -> float:
    """Return val_bpb by a surface at pocket's scale with E = 0.8 and equal exponents of N and D."""
    return 0.8 + 30 * hp.parameters.scaling**-0.35 + 55 * hp.tokens**-0.35


def home_of(
    home: Path,
    experiment: Experiment,
    loss: Loss = surface,
    noise: float = 0.002,
    code: str = "c0de1",
    core: Loss | None = None,
    validation: str = "val",
) -> Path:
    """Write every run of an experiment as finished; ln loss gets Gaussian noise, `core` none."""
    runs = []
    for run in experiment.requested_runs():
        data = DataIdentity("python", "tok", "rows", validation, 1024, 10_000, 0.5)
        plan = Plan(run.recipe, run.horizon, run.seed, run.hyperparameters, data, code)
        luck = np.random.default_rng(int(plan.run_id, 16)).standard_normal()
        measured = core(run.hyperparameters) if core else None
        _finish(
            home / plan.run_id,
            plan,
            loss(run.hyperparameters) * float(np.exp(noise * luck)),
            measured,
        )
        runs.append(plan.run_id)
    document = {
        "name": experiment.name,
        "question": "",
        "declared": experiment.declared(),
        "runs": runs,
    }
    _write(home / "experiments" / f"{experiment.name}.json", document | {"created": 1.0})
    return home


def _finish(folder: Path, plan: Plan, loss: float, core: float | None) -> None:
    hp = plan.hyperparameters
    seconds = hp.flops / 1e10
    attempt = {
        "attempt": 1,
        "created": 1.0,
        "launcher": "local",
        "host": "h",
        "platform": "p",
        "python": "3.11",
    }
    attempt |= {
        "versions": {},
        "commit": "abc",
        "diff": None,
        "device": "cuda",
        "device_name": "NVIDIA H100 80GB HBM3",
    }
    attempt |= {"ranks": 2, "threads": 1, "micro_batch": 4}
    done: dict[str, Any] = {"run_id": plan.run_id, "attempt": 1, "time": 20.0, "step": hp.steps}
    done |= {
        "tokens": hp.tokens,
        "flops": hp.flops,
        "val_bpb": loss,
        "val_loss": 1.7 * loss,
        "train_loss": 2.0,
    }
    done |= {
        "core": core,
        "train_seconds": seconds,
        "wall_seconds": seconds + 5,
        "weights_sha256": "w",
    }
    done |= {
        "tokens_per_second": hp.tokens / seconds,
        "flops_per_second": 1e10,
        "peak_memory_bytes": 7,
    }
    _write(folder / "plan.json", plan.document())
    _write(folder / "attempts" / "001" / "attempt.json", attempt)
    (folder / "attempts" / "001" / "events.jsonl").write_text(_events(hp, loss))
    _write(folder / "done.json", done)


def _events(hp: Hyperparameters, loss: float) -> str:
    steps: Sequence[int] = [max(1, hp.steps * k // 8) for k in range(1, 9)]
    lines = []
    for step in steps:
        tokens = step * hp.batch_tokens
        event: dict[str, Any] = {
            "event": "train",
            "time": 10.0 + step,
            "step": step,
            "tokens": tokens,
            "lr": 1.0,
        }
        event |= {
            "flops": tokens * hp.flops_per_token,
            "loss": 1.7 * loss * (hp.steps / step) ** 0.1,
        }
        lines.append(json.dumps(event | {"tokens_per_second": 5.0, "train_seconds": 0.5 * step}))
    return "\n".join(lines) + "\n"


def _write(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
