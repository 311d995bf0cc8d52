"""Samplers as plain functions of a jump or a denoiser. They print nothing and hold no state."""

from ctm_fast.samplers.gamma import JumpRenoise, gamma_sample, renoise_levels, renoise_with
from ctm_fast.samplers.generate import evaluations, generate, initial_noise
from ctm_fast.samplers.heun import euler_sample, heun_sample

__all__ = [
    "JumpRenoise",
    "euler_sample",
    "evaluations",
    "gamma_sample",
    "generate",
    "heun_sample",
    "initial_noise",
    "renoise_levels",
    "renoise_with",
]
