"""Sampling in production."""

from ctm_fast.serving.sampler import Sampler, load

__all__ = ["Sampler", "load"]
