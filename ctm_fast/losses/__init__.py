"""The terms of CTM's objective, per sample, and the weights between them."""

from ctm_fast.losses.distance import ALL_DISTANCES, DISTANCES, PERCEPTUAL_DISTANCES, Distance, distance
from ctm_fast.losses.dsm import dsm_loss
from ctm_fast.losses.gan import AdversarialLoss, Judgement
from ctm_fast.losses.perceptual import PerceptualDistance
from ctm_fast.losses.weighting import WEIGHTINGS, Weighting, adaptive_weight, weighting

__all__ = [
    "ALL_DISTANCES",
    "DISTANCES",
    "PERCEPTUAL_DISTANCES",
    "WEIGHTINGS",
    "AdversarialLoss",
    "Distance",
    "Judgement",
    "PerceptualDistance",
    "Weighting",
    "adaptive_weight",
    "distance",
    "dsm_loss",
    "weighting",
]
