"""Weights of a run, final or of a checkpoint, found again with the plan they belong to and the data it was made on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from slm.data import Prepared, all_prepared, recipe_for, row_shape
from slm.data.hub import NAMED
from slm.model import checkpoints
from slm.model.gpt import GPT, compute_dtype
from slm.plan import Plan, code_fingerprint

FINAL = "model.safetensors"


@dataclass(frozen=True)
class Weights:
    """What a run had learned after some step."""

    path: Path
    """File they are in."""
    run_folder: Path
    """Folder of their run."""
    plan: Plan
    """Plan of their run."""
    step: int
    """Steps that made them."""
    tensors: dict[str, Tensor]
    """The model's parameters by name, on the CPU: maps of the file."""
    damaged: tuple[str, ...] = ()
    """A line for each newer checkpoint that is damaged."""

    def model(self, device: torch.device) -> GPT:
        """The model on a device, computing as the trainer does there.

        Raises ValueError when the parameters are not those of the plan's model.
        """
        model = GPT(self.plan.hyperparameters)
        try:
            model.load_state_dict(self.tensors)
        except RuntimeError as error:
            raise ValueError(
                f"{self.path}: its tensors are not those of run {self.plan.run_id}'s model in this version of slm "
                f"({str(error).splitlines()[-1].strip()})"
            ) from error
        model.to(device)
        model.set_compute_dtype(compute_dtype(device))
        return model.to(model.dtype)  # once, not at every pass

    def remarks(self) -> list[str]:
        """Lines on what sets these weights apart from a finished run of this trainer."""
        run_id, steps, lines = self.plan.run_id, self.plan.hyperparameters.steps, [*self.damaged]
        if self.step < steps:
            lines.append(
                f"run {run_id}: unfinished weights, after step {self.step:,} of {steps:,} ({self.path.name})"
            )
        if self.plan.code != code_fingerprint():
            lines.append(
                f"run {run_id} was trained by another version of the trainer ({self.plan.code}; this is "
                f"{code_fingerprint()}): what it computes may differ"
            )
        return lines


def of_run(folder: Path) -> Weights:
    """The final weights of a finished run, else those of its newest good checkpoint.

    Raises ValueError when there are none, or when they are another run's.
    """
    if (folder / "done.json").exists():
        return _weights(folder / FINAL, folder, *_read(folder / FINAL))
    path, damaged = checkpoints.newest(folder / "checkpoints")
    if path is None:
        raise ValueError(
            f"run {folder.name} has no weights yet: it is not finished and has no good checkpoint"
        )
    return replace(_weights(path, folder, *_read(path)), damaged=tuple(damaged))


def of_file(path: Path, home: Path) -> Weights:
    """The weights in a file that a run of a home wrote.

    Raises ValueError when it holds none, or when its run is not there.
    """
    tensors, metadata = _read(path)
    folder = home / metadata["run_id"]
    if not (folder / "plan.json").exists():
        raise ValueError(
            f"{path} belongs to run {folder.name}, which is not in {home}: set SLM_HOME to its home"
        )
    return _weights(path, folder, tensors, metadata)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file that names its run. Raises ValueError when it is none."""
    try:
        tensors, metadata = checkpoints.read(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is gone") from None
    except SafetensorError as error:
        raise ValueError(f"{path} holds no weights: {error}") from None
    if not (metadata or {}).get("run_id", "").isalnum():
        raise ValueError(f"{path} does not say which run its weights belong to")
    return tensors, metadata


def _weights(
    path: Path, folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> Weights:
    """The model's part of a file. Raises ValueError unless it belongs to the plan in the run's folder."""
    plan = Plan.read(folder / "plan.json")
    if plan.run_id != metadata["run_id"]:
        raise ValueError(f"{path} belongs to run {metadata['run_id']}, not to {plan.run_id}")
    of_checkpoint = {
        name[len("model.") :]: tensor
        for name, tensor in tensors.items()
        if name.startswith("model.")
    }
    step = int(metadata.get("step", plan.hyperparameters.steps))
    return Weights(path, folder, plan, step, of_checkpoint or tensors)


def prepared_of(plan: Plan, home: Path) -> Prepared:
    """The prepared folder with a plan's tokeniser and validation rows.

    Raises ValueError, saying how it is prepared, when there is none.
    """
    wanted = (plan.data.tokenizer, plan.data.validation)
    for prepared in all_prepared(home):
        if (
            prepared.manifest["tokenizer"],
            prepared.manifest["validation"]["fingerprint"],
        ) == wanted:
            return prepared
    corpus, recipe = plan.data.corpus, recipe_for(row_shape(plan.hyperparameters))
    source = corpus if corpus in ("python", *NAMED) else "FOLDER"
    command = (
        f"slm data prepare {source} --recipe {recipe}"
        if recipe
        else f"slm sweep --plan {home / plan.run_id}"
    )
    raise ValueError(
        f"the tokeniser and validation rows of run {plan.run_id} are not in {home / 'data'}: prepare its corpus "
        f"{corpus} again, from the same texts, with `{command}`"
    )


def device_at_hand() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
