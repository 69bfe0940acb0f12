"""A home with one run whose weights are known: the files as its trainer leaves them, without the training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from slm.data import Prepared, prepare
from slm.data.loader import Rows
from slm.evaluate.bpb import TOKENS, validation_loss
from slm.files import write_json
from slm.model import checkpoints
from slm.model.gpt import GPT
from slm.plan import Plan, code_fingerprint
from slm.recipe import pocket
from slm.train.optimizer import Optimizer

FAMILY = replace(pocket, name="tiny", validation_tokens=2**13)


@dataclass(frozen=True)
class Run:
    """A run of that home."""

    home: Path
    """The home."""
    plan: Plan
    """Its plan."""
    prepared: Prepared
    """Its data."""
    model: GPT
    """What it learned."""

    @property
    def folder(self) -> Path:
        """Its folder."""
        return self.home / self.plan.run_id

    def losses(self, tokens: int = TOKENS) -> tuple[float, float]:
        """val_bpb and val_loss as the trainer computes them, on one rank."""
        sizes = torch.tensor(self.prepared.tokenizer.token_bytes)
        return validation_loss(
            self.model, Rows.of(self.prepared, "validation"), sizes, tokens=tokens
        )

    def finish(self) -> None:
        """Write its final weights and done.json."""
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


def run_in(home: Path, seed: int = 0) -> Run:
    """A planned run of depth 2 on the texts of these tests, and a model in which no parameter is zero."""
    corpus = home.parent / f"{home.name}-texts"
    corpus.mkdir(exist_ok=True)
    for path in Path(__file__).parent.rglob("*.py"):
        (corpus / f"{path.stem}.txt").write_text(path.read_text())
    given = FAMILY(2, steps=70)
    prepared = prepare(str(corpus), given, home)
    plan = Plan("tiny", "steps=70", seed, given, prepared.identity(given), code_fingerprint())
    run = Run(home, plan, prepared, GPT(given))
    run.folder.mkdir()
    write_json(run.folder / "plan.json", plan.document())
    run.model.initialise(seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=draw)
    return run
