"""A recipe compared with itself: no gain should be found.

The depths of seeds.py with three other seeds: `slm compare seeds repeat` compares a recipe with
itself.
"""

from slm.experiment import Experiment
from slm.recipe import pocket

experiment = Experiment(
    name="repeat",
    question="Does a comparison call luck a gain?",
    recipes=(pocket,),
    depths=(2, 3, 4),
    seeds=(3, 4, 5),
)
