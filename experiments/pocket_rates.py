"""Learning rates and batch of the pocket recipe: one depth, one change at a time.

The reference's constants hold at a batch of 2^19 tokens and depth 12; pocket re-bases them. Every
rate is halved and doubled, so is the reference batch, and the reference's rates for x0 and smear
are tried.
"""

from dataclasses import replace

from slm.experiment import Experiment
from slm.recipe import Recipe, nanochat, pocket


def rates(name: str, factor: float) -> Recipe:
    """Return pocket with every scaled rate times a factor."""
    scaled = {}
    for name_of_group in ("lm_head", "wte", "value_embeds", "resid", "x0"):
        group = getattr(pocket, name_of_group)
        scaled[name_of_group] = replace(group, lr=group.lr * factor)
    return replace(pocket, name=name, matrix_lr=pocket.matrix_lr * factor, **scaled)


experiment = Experiment(
    name="pocket_rates",
    question="Which learning rates and batch suit a pocket model?",
    recipes=(
        pocket,
        rates("pocket-half-rates", 0.5),
        rates("pocket-double-rates", 2.0),
        replace(pocket, name="pocket-half-batch", reference_batch=512),
        replace(pocket, name="pocket-double-batch", reference_batch=2048),
        replace(pocket, name="pocket-reference-x0-smear", x0=nanochat.x0, smear=nanochat.smear),
    ),
    depths=(4,),
)
