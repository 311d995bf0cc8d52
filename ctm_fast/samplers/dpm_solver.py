"""DPM-Solver++(2M): a multistep solver of second order, one evaluation a step (Lu et al., arXiv 2211.01095, Alg. 2)."""

import itertools
import math
from collections.abc import Sequence

from torch import Tensor

from ctm_fast.diffusion.ode import Denoise
from ctm_fast.samplers._levels import check_sigmas, full
from ctm_fast.samplers.gamma import Callback


def dpm_solver_sample(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], *, callback: Callback | None = None
) -> Tensor:
    """Steps down ``sigmas``, then one to 0: NFE len(sigmas).

        x' = (sigma' / sigma) x + (1 - sigma' / sigma) D~       exponential Euler in lambda = -ln(sigma)
        D~ = D_i + (h_i / (2 h_(i-1))) (D_i - D_(i-1))          h_i = ln(sigma_i / sigma_(i+1))

    The first step and that to 0 take D~ = D_i.

    Args:
        denoise: denoise(x, sigma), levels [B].
        x: [B, C, H, W] float32 at level sigmas[0].
        sigmas: positive, strictly decreasing (LevelError if not).
        callback: called as callback(i, x) after step i.

    Returns:
        [B, C, H, W] at level 0; nothing is clamped.
    """
    check_sigmas(sigmas)
    before: tuple[Tensor, float] | None = None
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise((*sigmas, 0.0))):
        D_x = denoise(x, full(x, sigma))
        ahead = D_x
        if sigma_next > 0:
            h = math.log(sigma / sigma_next)
            if before is not None:
                D_before, h_before = before
                ahead = D_x + h / (2 * h_before) * (D_x - D_before)
            before = D_x, h
        ratio = sigma_next / sigma
        x = ratio * x + (1 - ratio) * ahead
        if callback is not None:
            callback(i, x)
    return x
