"""The paper's experiments at a scale that a preset sets: each trains what it needs and writes a page of results."""

from ctm_fast.experiments import ablations, capacity, gamma, likelihood, one_step, robustness
from ctm_fast.experiments.lab import Experiment, Finding, Lab
from ctm_fast.experiments.trainings import Trainings

EXPERIMENTS: dict[str, Experiment] = {
    "one-step": one_step.EXPERIMENT,
    "likelihood": likelihood.EXPERIMENT,
    "gamma": gamma.EXPERIMENT,
    "ablations": ablations.EXPERIMENT,
    "capacity": capacity.EXPERIMENT,
    "robustness": robustness.EXPERIMENT,
}

__all__ = ["EXPERIMENTS", "Experiment", "Finding", "Lab", "Trainings"]
