"""Samplers as plain functions of a jump or a denoiser. They print nothing and hold no state."""

from ctm_fast.samplers.dpm_solver import dpm_solver_sample
from ctm_fast.samplers.editing import Colourisation, Inpainting, Operator, SuperResolution, from_stroke, restore
from ctm_fast.samplers.gamma import (
    JumpRenoise,
    gamma_sample,
    jump_sample,
    renoise_levels,
    renoise_with,
    two_time_jumps,
)
from ctm_fast.samplers.generate import evaluations, generate, generate_from, generation_sigmas, initial_noise
from ctm_fast.samplers.guidance import classifier_guided, guided
from ctm_fast.samplers.heun import Churn, euler_sample, heun_sample
from ctm_fast.samplers.inversion import invert, slerp
from ctm_fast.samplers.rejection import Kept, rejection_sample
from ctm_fast.samplers.search import Found, Trial, search_schedules

__all__ = [
    "Churn",
    "Colourisation",
    "Found",
    "Inpainting",
    "JumpRenoise",
    "Kept",
    "Operator",
    "SuperResolution",
    "Trial",
    "classifier_guided",
    "dpm_solver_sample",
    "euler_sample",
    "evaluations",
    "from_stroke",
    "gamma_sample",
    "generate",
    "generate_from",
    "generation_sigmas",
    "guided",
    "heun_sample",
    "initial_noise",
    "invert",
    "jump_sample",
    "rejection_sample",
    "renoise_levels",
    "renoise_with",
    "restore",
    "search_schedules",
    "slerp",
    "two_time_jumps",
]
