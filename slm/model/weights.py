"""Weights of a run, final or of a checkpoint, with the plan and the dataset they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from slm.data import PreparedDataset, list_datasets, recipe_for, row_shape
from slm.data.hub import NAMED
from slm.model import checkpoints
from slm.model.gpt import GPT, compute_dtype
from slm.plan import Plan, code_fingerprint

Device = torch.device
FINAL = "model.safetensors"
"""File of a finished run's weights, in the run folder."""


@dataclass(frozen=True)
class Weights:
    """Weights of a run after some step."""

    path: Path
    run_folder: Path
    plan: Plan
    step: int
    """Steps that made them."""
    tensors: Mapping[str, Tensor]
    """The model's parameters by name, on the CPU: maps of the file."""
    damaged: tuple[str, ...] = ()
    """A line for each newer checkpoint that is damaged."""

    def model(self, device: torch.device) -> GPT:
        """Return the model on a device, with the dtype of the trainer's computation there.

        Raises ValueError when the parameters are not those of the plan's model.
        """
        model = GPT(self.plan.hyperparameters)
        try:
            model.load_state_dict(self.tensors)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise ValueError(
                f"{self.path}: its tensors are not those of run {self.plan.run_id}'s model in this "
                f"version of slm ({reason})"
            ) from error
        model.to(device)
        model.set_compute_dtype(compute_dtype(device))
        return model.to(model.dtype)  # cast once, not at every pass

    def remarks(self) -> list[str]:
        """Return a line on each difference from the weights of a finished run of this trainer."""
        run_id = self.plan.run_id
        steps = self.plan.hyperparameters.steps
        lines = [*self.damaged]
        if self.step < steps:
            lines.append(
                f"run {run_id}: unfinished weights, after step {self.step:,} of {steps:,} "
                f"({self.path.name})"
            )
        if self.plan.code != code_fingerprint():
            lines.append(
                f"run {run_id} was trained by another version of the trainer ({self.plan.code}; "
                f"this is {code_fingerprint()}): its results may differ"
            )
        return lines


def load_run(folder: Path) -> Weights:
    """Load the final weights of a finished run, else those of its newest good checkpoint.

    Raises ValueError when there are none, or when they are another run's.
    """
    path: Path | None = folder / FINAL
    damaged: list[str] = []
    if not (folder / "done.json").exists():
        path, damaged = checkpoints.newest(folder / "checkpoints")
    if path is None:
        raise ValueError(
            f"run {folder.name} has no weights yet: it is not finished and has no good checkpoint"
        )
    return replace(_of_run(path, folder, *_read(path)), damaged=tuple(damaged))


def load_file(path: Path, home: Path) -> Weights:
    """Load the weights in a file that a run of a home wrote.

    Raises ValueError when it holds none, or when its run is not in the home.
    """
    tensors, metadata = _read(path)
    folder = home / metadata["run_id"]
    if not (folder / "plan.json").exists():
        raise ValueError(
            f"{path} belongs to run {folder.name}, which is not in {home}: set SLM_HOME to its home"
        )
    return _of_run(path, folder, tensors, metadata)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and metadata. Raises ValueError for a file that does not name its run."""
    try:
        tensors, metadata = checkpoints.read(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is gone") from None
    except SafetensorError as error:
        raise ValueError(f"{path} holds no weights: {error}") from None
    if not (metadata or {}).get("run_id", "").isalnum():
        raise ValueError(f"{path} does not say which run its weights belong to")
    return tensors, metadata


def _of_run(
    path: Path, folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> Weights:
    """Return the model's tensors of a file. Raises ValueError unless it belongs to the run."""
    plan = Plan.read(folder / "plan.json")
    if plan.run_id != metadata["run_id"]:
        raise ValueError(f"{path} belongs to run {metadata['run_id']}, not to {plan.run_id}")
    prefix = "model."  # checkpoints hold the optimiser's state too
    parameters = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    step = int(metadata.get("step", plan.hyperparameters.steps))
    return Weights(path, folder, plan, step, parameters or tensors)


def find_dataset(plan: Plan, home: Path) -> PreparedDataset:
    """Return the dataset with a plan's tokeniser and validation rows.

    Raises ValueError with the command that prepares it when there is none.
    """
    for prepared in list_datasets(home):
        if prepared.has_rows_of(plan.data):
            return prepared
    corpus = plan.data.corpus
    recipe = recipe_for(row_shape(plan.hyperparameters))
    source = corpus if corpus in ("python", *NAMED) else "FOLDER"
    command = f"slm sweep --plan {home / plan.run_id}"
    if recipe:
        command = f"slm data prepare {source} --recipe {recipe}"
    raise ValueError(
        f"the tokeniser and validation rows of run {plan.run_id} are not in {home / 'data'}: "
        f"prepare its corpus {corpus} again, from the same texts, with `{command}`"
    )


def default_device() -> torch.device:
    """Return the GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
