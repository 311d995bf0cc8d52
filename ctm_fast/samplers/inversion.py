"""From an image to the noise it comes from, and between two noises."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ctm_fast.diffusion.ode import Denoise, solve_heun
from ctm_fast.samplers._levels import check_sigmas, full


def invert(denoise: Denoise, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """x_T of an image: the probability-flow ODE solved upwards by Heun steps, NFE 2 (len(sigmas) - 1).

    Args:
        denoise: denoise(x, sigma), levels [B].
        x: [B, C, H, W] float32 at level sigmas[-1], that is, almost clean.
        sigmas: positive, strictly decreasing (LevelError if not); walked from the last to the first.

    Returns:
        [B, C, H, W] at level sigmas[0], which the same ODE takes back: by
        :func:`ctm_fast.diffusion.solve_heun` or, in one step, by a CTM's jump.
    """
    check_sigmas(sigmas)
    return solve_heun(denoise, x, [full(x, sigma) for sigma in reversed(sigmas)])


def slerp(a: Tensor, b: Tensor, fraction: float) -> Tensor:
    """Spherical interpolation between noises a and b [B, C, H, W], sample by sample: a at 0, b at 1.

    Keeps the norm that noise has in many dimensions, which linear interpolation shrinks (Shoemake 1985). Between a and
    -a there is no one arc, and the norm is not kept.
    """
    flat_a, flat_b = a.flatten(1).double(), b.flatten(1).double()
    cosine = torch.nn.functional.cosine_similarity(flat_a, flat_b, dim=1).clamp(-1, 1)
    angle = cosine.acos()
    small = angle < 1e-6  # where sin(angle) has no digits left, and the arc is its chord
    sine = torch.where(small, 1.0, angle.sin())
    weight_a = torch.where(small, 1 - fraction, ((1 - fraction) * angle).sin() / sine)
    weight_b = torch.where(small, fraction, (fraction * angle).sin() / sine)
    return (weight_a[:, None] * flat_a + weight_b[:, None] * flat_b).view(a.shape).to(a.dtype)
