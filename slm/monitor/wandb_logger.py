"""An optional mirror of a sweep on Weights & Biases, fed from the events; nothing is ever read back from it.

A thread of its own loads and calls wandb, so that no slow or failing server holds a sweep up: a run that wandb refuses
costs one line of warning and is left out. WANDB_MODE, WANDB_PROJECT (else slm), WANDB_DIR (else the home) hold.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from slm.files import read_json
from slm.hardware import devices
from slm.monitor.display import label
from slm.monitor.follow import View
from slm.plan import Plan
from slm.run import read_attempt

NAMES = {
    "loss": "train/loss",
    "lr": "train/lrm",
    "tokens_per_second": "train/tok_per_sec",
    "val_bpb": "val/bpb",
}
NAMES |= {
    "gradient_norm": "train/gradient_norm",
    "update_size": "train/update_size",
    "core": "core_metric",
}
NAMES |= {"train_seconds": "total_training_time", "flops": "total_training_flops"}
"""Fields of events and their names there: nanochat's, where it logs the same quantity; train/mfu too is in percent."""
EXIT_CODES = {"finished": 0, "interrupted": 255}
"""How runs end there: well, or as wandb ends one at Ctrl-C; by every other outcome with 1, failed."""
SETTINGS: dict[str, Any] = {
    "resume": "allow",
    "reinit": "create_new",
    "finish_timeout_raises": True,
    "silent": True,
}
SETTINGS |= {
    "console": "off",
    "x_disable_stats": True,
    "x_disable_machine_info": True,
    "x_save_requirements": False,
}
"""Many runs at once; nothing printed or asked; nothing told of this process, which is not the one that trains."""


def check_installed() -> None:
    """Raises ValueError without wandb."""
    if find_spec("wandb") is None:
        raise ValueError("--wandb needs wandb, which is not installed: pip install 'slm[wandb]'")


class WandbLogger:
    """Tells a view all that it is told (follow.View), and repeats it there: run_id as id, experiment as group.

    Steps are ours. They cannot go back there: wandb leaves out those that a resumed attempt repeats.
    """

    def __init__(self, view: View, experiment: str, home: Path, timeout: float = 30.0) -> None:
        """`timeout`: seconds to begin a run, and to end it."""
        self._view, self._experiment, self._home, self._timeout = (
            view,
            experiment,
            home.resolve(),
            timeout,
        )
        self._runs: dict[Plan, Any] = {}
        self._devices: dict[Plan, tuple[str, int]] = {}
        self._jobs: SimpleQueue[tuple[Callable[..., None], Plan, Any] | None] = SimpleQueue()
        self._warnings: SimpleQueue[str] = SimpleQueue()
        self._thread = Thread(target=self._work, daemon=True)

    def __enter__(self) -> WandbLogger:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._jobs.put(None)
        self._thread.join(2 * self._timeout)
        self._tell_warnings()
        if self._thread.is_alive():
            self._view.note(
                "Weights & Biases did not take everything in time: `wandb sync` sends what is on disk"
            )

    def run_started(self, plan: Plan, attempt: Path, adopted: bool) -> None:
        """A run goes on in an attempt."""
        self._view.run_started(plan, attempt, adopted)
        self._jobs.put((self._begin, plan, attempt))

    def event(self, plan: Plan, event: dict[str, Any]) -> None:
        """A trainer wrote an event."""
        self._view.event(plan, event)
        self._jobs.put((self._log, plan, event))

    def run_ended(self, plan: Plan, outcome: str, message: str | None) -> None:
        """A run ended, or (retried) will be tried again, which is nothing new there."""
        self._view.run_ended(plan, outcome, message)
        if outcome != "retried":
            self._jobs.put((self._end, plan, outcome))

    def note(self, line: str) -> None:
        """Something about the sweep as a whole."""
        self._view.note(line)

    def refresh(self) -> None:
        """A moment passed."""
        self._tell_warnings()
        self._view.refresh()

    def _tell_warnings(self) -> None:
        while not self._warnings.empty():
            self._view.note(self._warnings.get())

    def _work(self) -> None:
        while job := self._jobs.get():
            self._try(*job)
        for plan in [*self._runs]:
            self._try(self._end, plan, "interrupted")

    def _try(self, job: Callable[..., None], plan: Plan, given: Any) -> None:
        try:
            job(plan, given)
        except Exception as error:
            self._runs[plan] = None
            why = " ".join(str(error).split()) or type(error).__name__
            self._warnings.put(f"{plan.run_id} is not on Weights & Biases from here on: {why}")

    def _begin(self, plan: Plan, attempt: Path) -> None:
        made = read_attempt(attempt)
        self._devices[plan] = (made["device_name"], made["ranks"])
        if plan in self._runs:
            return
        os.environ.setdefault(
            "WANDB_ERROR_REPORTING", "false"
        )  # where there is no network, reports delay the exit
        import wandb

        wandb.setup(
            wandb.Settings(**SETTINGS, init_timeout=self._timeout, finish_timeout=self._timeout)
        )
        project, folder = (
            os.environ.get("WANDB_PROJECT", "slm"),
            os.environ.get("WANDB_DIR", str(self._home)),
        )
        config = plan.document()
        config |= config.pop("hyperparameters")
        self._runs[plan] = wandb.init(
            id=plan.run_id,
            name=label(plan),
            group=self._experiment,
            project=project,
            dir=folder,
            config=config,
        )

    def _log(self, plan: Plan, event: dict[str, Any]) -> None:
        values = {
            _name(field, event): event[field] for field in NAMES if event.get(field) is not None
        }
        if self._runs[plan] is None or not values:
            return
        if "tokens_per_second" in event:
            flops = event["tokens_per_second"] * plan.hyperparameters.flops_per_token
            mfu = devices.mfu(flops, *self._devices[plan])
            if mfu is not None:
                values["train/mfu"] = 100 * mfu
        self._runs[plan].log({"step": event["step"], **values}, step=event["step"])

    def _end(self, plan: Plan, outcome: str) -> None:
        if run := self._runs.pop(plan, None):
            if outcome == "finished":
                done = read_json(self._home / plan.run_id / "done.json")
                run.summary.update(
                    {
                        NAMES[name]: done[name]
                        for name in ("val_bpb", "core")
                        if done[name] is not None
                    }
                )
            run.finish(exit_code=EXIT_CODES.get(outcome, 1))


def _name(field: str, event: dict[str, Any]) -> str:
    """The name there of an event's field: CORE's is that of all its examples, and other means have their own."""
    if field != "core" or (event["metric"], event["mode"]) == ("core", "full"):
        return NAMES[field]
    return f"{event['metric']}/{event['mode']}"
