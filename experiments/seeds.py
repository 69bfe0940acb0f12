"""Noise of val_bpb between seeds.

Three seeds at three depths: the spread at equal depth is the noise that every comparison must beat.
"""

from slm.experiment import Experiment
from slm.recipe import pocket

experiment = Experiment(
    name="seeds",
    question="How much of a difference in val_bpb is luck?",
    recipes=(pocket,),
    depths=(2, 3, 4),
    seeds=(0, 1, 2),
)
