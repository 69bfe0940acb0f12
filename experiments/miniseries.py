"""Compute-optimal ladder of five depths, whose curve `make demo` draws."""

from slm.experiment import Experiment
from slm.recipe import pocket

experiment = Experiment(
    name="miniseries",
    question="What does a pocket model gain from more compute?",
    recipes=(pocket,),
    depths=(2, 3, 4, 5, 6),
)
