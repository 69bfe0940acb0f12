"""A home with one run of known weights: the files that a trainer writes, without the training."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from slm.data import PreparedDataset, prepare
from slm.data.loader import Rows
from slm.evaluate.bpb import validation_loss
from slm.files import write_json
from slm.hardware.block_sizes import EVALUATION_TOKENS
from slm.model import checkpoints
from slm.model.gpt import GPT
from slm.model.ranks import Ranks
from slm.plan import Plan, code_fingerprint
from slm.recipe import pocket
from slm.train.optimizer import Optimizer

FAMILY = replace(pocket, name="tiny", validation_tokens=2**13)


@dataclass(frozen=True)
class Run:
    """A run with its dataset and model."""

    home: Path
    plan: Plan
    prepared: PreparedDataset
    model: GPT

    @property
    def folder(self) -> Path:
        return self.home / self.plan.run_id

    def losses(self, tokens: int = EVALUATION_TOKENS) -> tuple[float, float]:
        """Return val_bpb and val_loss as the trainer computes them on one rank."""
        sizes = torch.tensor(self.prepared.tokenizer.token_bytes)
        rows = Rows.open(self.prepared, "validation")
        return validation_loss(self.model, rows, sizes, Ranks(), tokens)

    def finish(self) -> None:
        """Write the final weights and done.json."""
        weights = {name: tensor.detach() for name, tensor in self.model.named_parameters()}
        digest = checkpoints.save(
            self.folder / "model.safetensors", weights, {"run_id": self.plan.run_id}
        )
        write_json(
            self.folder / "done.json", {"val_bpb": self.losses()[0], "weights_sha256": digest}
        )

    def checkpoint(self, step: int, before: Path | None = None) -> Path:
        """Write a checkpoint."""
        tensors = {
            f"model.{name}": tensor.detach() for name, tensor in self.model.named_parameters()
        }
        metadata = {"run_id": self.plan.run_id, "step": repr(step)}
        state = Optimizer(self.model).state()
        return checkpoints.write(
            self.folder / "checkpoints", step, tensors | state, metadata, before
        )


HYPERPARAMETERS = FAMILY(2, steps=70)


@cache
def prepared_sources() -> tuple[TemporaryDirectory[str], PreparedDataset]:
    """Prepare the sources of the tests in a folder that lasts as long as this process."""
    folder = TemporaryDirectory(prefix="slm-weights-")
    corpus = Path(folder.name) / "runs-texts"
    corpus.mkdir()
    for path in Path(__file__).parent.rglob("*.py"):
        (corpus / f"{path.stem}.txt").write_text(path.read_text())
    return folder, prepare(str(corpus), HYPERPARAMETERS, Path(folder.name) / "home")


def run_in(home: Path, seed: int = 0) -> Run:
    """Return a planned run of depth 2 on the sources of the tests; no parameter is zero."""
    hp = HYPERPARAMETERS
    source = prepared_sources()[1].folder
    copy = home / "data" / source.name
    if not copy.exists():
        shutil.copytree(source, copy)
    prepared = PreparedDataset.read(copy)
    plan = Plan("tiny", "steps=70", seed, hp, prepared.identity(hp), code_fingerprint())
    run = Run(home, plan, prepared, GPT(hp))
    run.folder.mkdir()
    write_json(run.folder / "plan.json", plan.document())
    run.model.initialise(seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=draw)
    return run
