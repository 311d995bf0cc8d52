"""Noise levels, their draws in training, and the solver of the probability-flow ODE."""

from ctm_fast.diffusion.images import to_float, to_uint8
from ctm_fast.diffusion.ode import euler_step, heun_step, solve_heun
from ctm_fast.diffusion.schedule import grid_sigmas, karras_sigmas, sampler_sigmas

__all__ = [
    "euler_step",
    "grid_sigmas",
    "heun_step",
    "karras_sigmas",
    "sampler_sigmas",
    "solve_heun",
    "to_float",
    "to_uint8",
]
