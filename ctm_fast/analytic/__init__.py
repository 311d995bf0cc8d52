"""Worlds in which everything is known exactly: what solvers, samplers and losses are held to, and a playground."""

from ctm_fast.analytic.gaussian import Gaussian
from ctm_fast.analytic.mixture import GaussianMixture
from ctm_fast.analytic.world import World, model_log_prob, trajectory

__all__ = ["Gaussian", "GaussianMixture", "World", "model_log_prob", "trajectory"]
