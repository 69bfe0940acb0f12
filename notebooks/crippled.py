"""How large is the effect of a matrix learning rate five times too high?

The change that noise.ipynb compares with the noise of seeds.
"""

from dataclasses import replace

from slm.experiment import Experiment
from slm.recipe import pocket

experiment = Experiment(
    name="crippled",
    question="How large is the effect of a matrix learning rate five times too high?",
    recipes=(replace(pocket, name="pocket-fast-matrices", matrix_lr=5 * pocket.matrix_lr),),
    depths=(2, 3),
    ratios=(1,),
    seeds=(0, 1, 2),
)
