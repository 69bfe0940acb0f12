"""Compute wasted by a matrix learning rate that is five times too high.

The depths and seeds of seeds.py with one change: `slm compare seeds crippled` measures the waste.
"""

from dataclasses import replace

from slm.experiment import Experiment
from slm.recipe import pocket

experiment = Experiment(
    name="crippled",
    question="How much compute does a matrix learning rate five times too high waste?",
    recipes=(replace(pocket, name="pocket-fast-matrices", matrix_lr=5 * pocket.matrix_lr),),
    depths=(2, 3, 4),
    seeds=(0, 1, 2),
)
