"""The terms of CTM's objective, per sample, and the weights between them."""

from ctm_fast.losses.distance import DISTANCES, Distance, distance
from ctm_fast.losses.dsm import dsm_loss
from ctm_fast.losses.weighting import adaptive_weight

__all__ = ["DISTANCES", "Distance", "adaptive_weight", "distance", "dsm_loss"]
