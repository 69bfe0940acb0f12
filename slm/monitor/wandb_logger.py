"""Optional copy of a sweep on Weights & Biases, fed from the events. Nothing is read back.

wandb runs in a thread, so that a slow or failing server does not delay the sweep: a run that wandb
refuses costs one warning and is skipped. WANDB_MODE, WANDB_PROJECT (default: slm) and WANDB_DIR
(default: the home) apply.
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
from slm.monitor.follow import View
from slm.monitor.run_progress import Event
from slm.plan import Plan
from slm.run import AttemptDocument, read_attempt, run_label
from slm.text import one_line

NAMES = {
    "loss": "train/loss",
    "lr": "train/lrm",
    "tokens_per_second": "train/tok_per_sec",
    "val_bpb": "val/bpb",
    "gradient_norm": "train/gradient_norm",
    "update_size": "train/update_size",
    "core": "core_metric",
    "train_seconds": "total_training_time",
    "flops": "total_training_flops",
}
"""Event fields and their names on Weights & Biases: nanochat's where it logs the same quantity.

train/mfu is logged, too, in percent as nanochat's.
"""
EXIT_CODES = {"finished": 0, "interrupted": 255}
"""Exit codes by outcome, 255 as wandb's own at Ctrl-C; 1 (failed) for all other outcomes."""
SETTINGS: dict[str, Any] = {
    "resume": "allow",
    "reinit": "create_new",
    "finish_timeout_raises": True,
    "silent": True,
    "console": "off",
    "x_disable_stats": True,
    "x_disable_machine_info": True,
    "x_save_requirements": False,
}
"""Several runs per process, silent, no system metrics: this is not the training process."""


def check_installed() -> None:
    """Raise ValueError if wandb is not installed."""
    if find_spec("wandb") is None:
        raise ValueError("--wandb needs wandb, which is not installed: pip install 'slm[wandb]'")


class WandbLogger:
    """View that logs to Weights & Biases and forwards to another view (`follow.View`).

    The run_id is wandb's id, the experiment its group. wandb skips the steps that a resumed attempt
    repeats, since its steps cannot go back.
    """

    def __init__(self, view: View, experiment: str, home: Path, timeout: float = 30.0) -> None:
        """`timeout`: seconds for wandb to start a run, and to finish it."""
        self._view = view
        self._experiment = experiment
        self._home = home.resolve()
        self._timeout = timeout
        self._runs: dict[Plan, Any] = {}
        """wandb's run of each plan; None after an error."""
        self._attempts: dict[Plan, AttemptDocument] = {}
        self._jobs: SimpleQueue[tuple[Callable[..., None], Plan, Any] | None] = SimpleQueue()
        self._warnings: SimpleQueue[str] = SimpleQueue()
        self._thread = Thread(target=self._work, daemon=True)

    def __enter__(self) -> WandbLogger:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._jobs.put(None)
        self._thread.join(2 * self._timeout)
        self._forward_warnings()
        if self._thread.is_alive():
            self._view.note(
                f"Weights & Biases did not take everything within {2 * self._timeout:g} s: "
                "`wandb sync` uploads what is on disk"
            )

    def run_started(self, plan: Plan, attempt: Path, adopted: bool) -> None:
        """Start or continue the plan's run on Weights & Biases."""
        self._view.run_started(plan, attempt, adopted)
        self._jobs.put((self._start, plan, attempt))

    def event(self, plan: Plan, event: Event) -> None:
        """Log the values of an event."""
        self._view.event(plan, event)
        self._jobs.put((self._log, plan, event))

    def run_ended(self, plan: Plan, outcome: str, message: str | None) -> None:
        """Finish the plan's run, unless it will be retried."""
        self._view.run_ended(plan, outcome, message)
        if outcome != "retried":
            self._jobs.put((self._finish, plan, outcome))

    def note(self, line: str) -> None:
        """Forward a message about the sweep."""
        self._view.note(line)

    def refresh(self) -> None:
        """Show new warnings, and redraw."""
        self._forward_warnings()
        self._view.refresh()

    def _forward_warnings(self) -> None:
        while not self._warnings.empty():
            self._view.note(self._warnings.get())

    def _work(self) -> None:
        while job := self._jobs.get():
            self._try(*job)
        for plan in [*self._runs]:
            self._try(self._finish, plan, "interrupted")

    def _try(self, job: Callable[..., None], plan: Plan, value: Any) -> None:
        try:
            job(plan, value)
        except Exception as error:
            self._runs[plan] = None
            reason = one_line(str(error)) or type(error).__name__
            self._warnings.put(
                f"run {plan.run_id} is no longer logged to Weights & Biases: {reason}"
            )

    def _start(self, plan: Plan, attempt: Path) -> None:
        self._attempts[plan] = read_attempt(attempt)
        if plan in self._runs:
            return
        # Without a network, error reports would delay the exit.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        seconds = self._timeout
        settings = wandb.Settings(**SETTINGS, init_timeout=seconds, finish_timeout=seconds)
        wandb.setup(settings)
        config = plan.document()
        config |= config.pop("hyperparameters")
        self._runs[plan] = wandb.init(
            id=plan.run_id,
            name=run_label(plan.document()),
            group=self._experiment,
            project=os.environ.get("WANDB_PROJECT", "slm"),
            dir=os.environ.get("WANDB_DIR", str(self._home)),
            config=config,
        )

    def _log(self, plan: Plan, event: Event) -> None:
        run = self._runs[plan]
        values = {
            _name(field, event): event[field] for field in NAMES if event.get(field) is not None
        }
        if run is None or not values:
            return
        if "tokens_per_second" in event:
            attempt = self._attempts[plan]
            speed = event["tokens_per_second"] * plan.hyperparameters.flops_per_token
            mfu = devices.mfu(speed, attempt["device_name"], attempt["ranks"])
            if mfu is not None:
                values["train/mfu"] = 100 * mfu
        run.log({"step": event["step"], **values}, step=event["step"])

    def _finish(self, plan: Plan, outcome: str) -> None:
        run = self._runs.pop(plan, None)
        if not run:
            return
        if outcome == "finished":
            done = read_json(self._home / plan.run_id / "done.json")
            scores = [name for name in ("val_bpb", "core") if done[name] is not None]
            run.summary.update({NAMES[name]: done[name] for name in scores})
        run.finish(exit_code=EXIT_CODES.get(outcome, 1))


def _name(field: str, event: Event) -> str:
    """Return the name of an event's field: core_metric is CORE of all examples alone."""
    if field != "core" or (event["metric"], event["mode"]) == ("core", "full"):
        return NAMES[field]
    return f"{event['metric']}/{event['mode']}"
