"""CORE requests: which bundle a run is evaluated on, which of its tasks, and when. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slm.data import PreparedDataset
    from slm.evaluate.bundle import Bundle, Task
    from slm.plan import Plan

FORMAT = 1
"""Version of rendering and spans; part of the key of tokenized tasks and of evaluation records."""
ROWS = "rows"
TASKS = "tasks planned"
TOKENS = "tokens"
Report = Callable[[str, int, int], None]
"""Called with a unit (ROWS, TASKS or TOKENS), the number done by this rank and the total."""


def ignore(unit: str, done: int, total: int) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class CoreRequest:
    """Request to measure CORE, or the mean over tasks of another bundle."""

    bundle: str | None = None
    """Name, id or first digits of an id; None for the default of the run's recipe."""
    max_per_task: int | None = None
    """Maximum examples per task; None for all."""
    tasks: Sequence[str] | None = None
    """Labels of the only tasks to evaluate; None for all."""
    without: Sequence[str] = ()
    """Labels of tasks to leave out."""
    every: int | None = None
    """Steps between two evaluations in training; None for the end only."""

    def document(self) -> dict[str, Any]:
        """Return the fields of the request that attempt.json holds."""
        return {
            "bundle": self.bundle,
            "every": self.every,
            "max_per_task": self.max_per_task,
            "without": list(self.without),
        }

    def for_run(
        self,
        plan: Plan,
        home: Path,
        prepared: Callable[[], PreparedDataset],
    ) -> CoreRequest:
        """Return the request with the id of the run's bundle, which is made if need be.

        Raises ValueError if the bundle is not in the home, lacks a task, or has too few examples.
        """
        from slm.evaluate.pocket_core import bundle_for

        bundle = bundle_for(plan, home, self.bundle, prepared)
        self.check(bundle)
        return replace(self, bundle=bundle.id)

    def check(self, bundle: Bundle) -> None:
        """Raise ValueError if the bundle lacks a task, or a task needs more examples as shots."""
        shots = max(task.shots for task in self.tasks_of(bundle))
        if self.max_per_task is not None and self.max_per_task <= shots:
            raise ValueError(
                f"{self.max_per_task} examples per task are too few: "
                f"a task needs {shots} shots, use {shots + 1} or more"
            )

    def check_installed(self, home: Path, recipes: Iterable[str]) -> None:
        """Check the bundle that runs of these recipes need, before any data is prepared.

        pocket-core is left out: it is made from that data.
        """
        from slm.evaluate import bundle as bundles
        from slm.evaluate.pocket_core import NAME, is_pocket_core

        is_named = self.bundle not in (None, NAME)
        if is_named or not all(is_pocket_core(self.bundle, recipe) for recipe in recipes):
            self.check(bundles.installed(home, self.bundle))

    def tasks_of(self, bundle: Bundle) -> list[Task]:
        """Return the requested tasks in the bundle's order.

        Raises ValueError for an unknown label, or if no task remains.
        """
        labels = [task.label for task in bundle.tasks]
        for label in (*(self.tasks or ()), *self.without):
            if label not in labels:
                raise ValueError(
                    f"bundle {bundle.id} has no task {label}: it has {', '.join(labels)}"
                )
        selected = {*(labels if self.tasks is None else self.tasks)} - {*self.without}
        if not selected:
            raise ValueError(f"without {','.join(self.without)} bundle {bundle.id} has no task")
        return [task for task in bundle.tasks if task.label in selected]

    def mode(self, bundle: Bundle) -> str:
        """Return the share of the bundle as text; values of different modes are not comparable."""
        tasks = self.tasks_of(bundle)
        excluded = [task.label for task in bundle.tasks if task not in tasks]
        parts = [f"{self.max_per_task} per task"] if self.max_per_task else []
        if excluded and len(excluded) < len(tasks):
            parts.append(f"without {','.join(excluded)}")
        elif excluded:
            parts.append(f"tasks {','.join(task.label for task in tasks)}")
        return ", ".join(parts) or "full"

    def settings(self, bundle: Bundle) -> dict[str, Any]:
        """Return the settings that an evaluation record shares with comparable ones."""
        return {
            "bundle": bundle.id,
            "name": bundle.name,
            "mode": self.mode(bundle),
            "format": FORMAT,
            "max_per_task": self.max_per_task,
            "asked": [task.label for task in self.tasks_of(bundle)],
        }

    def describe(self) -> str:
        """Return a line for the plan of a sweep."""
        from slm.evaluate.pocket_core import NAME, RECIPE

        name = self.bundle or f"{NAME} for {RECIPE}, CORE for other recipes"
        often = f" and after every {self.every} steps" if self.every else ""
        return (
            f"in addition to val_bpb: {name}, at the end of every run{often}; "
            "the times above do not include it"
        )

    def eval_command(self, run: str) -> str:
        """Return the command that measures the request on a finished run."""
        command = f"slm eval {run} --core --bundle {self.bundle}"
        if self.max_per_task:
            command += f" --max-per-task {self.max_per_task}"
        if self.without:
            command += f" --without {','.join(self.without)}"
        return command
