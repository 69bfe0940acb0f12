"""What `slm sweep --core` has trainers measure, settled before anything starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm.cli.options import labels_of
from slm.files import read_json

if TYPE_CHECKING:
    from slm.data import Prepared
    from slm.evaluate.bundle import Bundle
    from slm.plan import Plan


@dataclass(frozen=True)
class Wanted:
    """CORE, as the options of a sweep ask for it."""

    named: str | None
    """The bundle's name or id; None: pocket-core for the recipe pocket, CORE for others."""
    every: int | None
    """Steps between two evaluations; None: at the end alone."""
    most: int | None
    """Examples of each task at most."""
    without: tuple[str, ...]
    """Tasks left out."""

    def of(self, plan: Plan, home: Path, prepared: Callable[[], Prepared]) -> dict[str, Any]:
        """What a run's attempt.json says of it.

        Raises ValueError where the bundle is not in the home, has not the tasks, or where examples are too few.
        """
        from slm.evaluate.pocket_core import bundle_for

        own = bundle_for(plan, home, self.named, prepared)
        self._check(own)
        return {
            "bundle": own.id,
            "every": self.every,
            "max_per_task": self.most,
            "without": list(self.without),
        }

    def in_words(self) -> str:
        """A line beside the plan of a sweep."""
        from slm.evaluate.pocket_core import NAME, RECIPE

        named = self.named or f"{NAME} for {RECIPE}, CORE for other recipes"
        often = f" and after every {self.every} steps" if self.every else ""
        return f"beside val_bpb: {named}, at the end of every run{often}; the times above are without it"

    def check(self, home: Path, recipes: Sequence[str]) -> None:
        """Raise ValueError, before data are prepared, where the bundle is missing that a sweep will ask for."""
        from slm.evaluate import bundle
        from slm.evaluate.pocket_core import NAME, RECIPE

        if self.named not in (None, NAME) or (
            self.named is None and any(recipe != RECIPE for recipe in recipes)
        ):
            self._check(bundle.installed(home, self.named))

    def _check(self, own: Bundle) -> None:
        labels = {task.label: task.shots for task in own.tasks}
        if unknown := [label for label in self.without if label not in labels]:
            raise ValueError(
                f"--core-without {unknown[0]}: bundle {own.id} has {', '.join(labels)}"
            )
        if not (left := labels.keys() - set(self.without)):
            raise ValueError(
                f"--core-without {','.join(self.without)}: bundle {own.id} has no other task"
            )
        if self.most is not None and self.most <= (shots := max(labels[label] for label in left)):
            raise ValueError(
                f"--core-max-per-task {self.most}: a task shows {shots} examples: take {shots + 1} or more"
            )


def wanted(
    core: bool, named: str | None, every: int | None, most: int | None, without: str | None
) -> Wanted | None:
    """The options together, None where CORE is not asked. Raises ValueError for an option that goes with --core."""
    options = {
        "--bundle": named,
        "--core-every": every,
        "--core-max-per-task": most,
        "--core-without": without,
    }
    if not core:
        if given := [f"{option} {value}" for option, value in options.items() if value is not None]:
            raise ValueError(f"{given[0]}: is about CORE: add --core")
        return None
    return Wanted(named, every, most, labels_of(without) if without else ())


def without_value(run_folders: Sequence[Path], documents: dict[str, dict[str, Any]]) -> list[str]:
    """Finished runs, by run_id, of whose final weights no evaluation says what was wanted of them."""

    def has(folder: Path, asked: dict[str, Any]) -> bool:
        for path in (folder / "evals").glob("*.json"):
            own = read_json(path)
            same = (
                own.get("bundle") == asked["bundle"]
                and own.get("max_per_task") == asked["max_per_task"]
            )
            if (
                same
                and own["weights"] == "model.safetensors"
                and not {*own["asked"]} & {*asked["without"]}
            ):
                return True
        return False

    return [folder.name for folder in run_folders if not has(folder, documents[folder.name])]
