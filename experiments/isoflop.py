"""IsoFLOP grid: a fixed compute budget shared between parameters and tokens in different ways.

Two budgets, five depths each, two seeds: the deeper the model, the fewer tokens it sees.
"""

from slm.experiment import Experiment
from slm.recipe import pocket

experiment = Experiment(
    name="isoflop",
    question="At a fixed compute budget, how should a pocket model share it between parameters and "
    "tokens?",
    recipes=(pocket,),
    depths=(2, 3, 4, 5, 6),
    flops=(3e11, 1e12),
    seeds=(0, 1),
)
