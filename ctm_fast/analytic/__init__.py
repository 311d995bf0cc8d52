"""Worlds in which everything is known exactly: what solvers, samplers and losses are held to."""

from ctm_fast.analytic.gaussian import Gaussian
from ctm_fast.analytic.mixture import GaussianMixture

__all__ = ["Gaussian", "GaussianMixture"]
