"""gamma-sampling: jump below the next level, then add noise back up to it (CTM, arXiv 2310.02279, Alg. 3)."""

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from ctm_fast.errors import LevelError
from ctm_fast.samplers._levels import check_sigmas, full

Jump = Callable[[Tensor, Tensor, Tensor], Tensor]
"""jump(x, t, s) -> G(x, t, s), levels [B]."""

JumpRenoise = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
"""jump_renoise(x, t, s, t_next, i) -> G(x, t, s) with noise added up to ``t_next``; i counts the re-noisings."""

Noise = Callable[[int, Tensor], Tensor]
"""noise(i, x) -> N(0, I) of the shape of x, for the i-th re-noising."""


def renoise_levels(sigmas: Sequence[float], gamma: float) -> list[float]:
    """The level s that each step jumps to: s = sqrt(1 - gamma^2) (sigma' - sigma_min) + sigma_min, last sigma_min.

    gamma = 0 gives s = sigma' (deterministic), gamma = 1 gives s = sigma_min (consistency-model multistep), both
    exactly; sigma_min is the last of ``sigmas``, and no s is below it.
    """
    if not 0 <= gamma <= 1:
        raise LevelError(f"gamma: expected 0 <= gamma <= 1, got {gamma}")
    check_sigmas(sigmas)
    sigma_min = sigmas[-1]
    shrink = math.sqrt(1 - gamma**2)
    # Rounding must not lift s above sigma', not even by an ulp: the noise's variance would be negative.
    return [
        float(sigma) if gamma == 0 else min(sigma, shrink * (sigma - sigma_min) + sigma_min) for sigma in sigmas[1:]
    ]


def renoise_with(jump: Jump, noise: Noise) -> JumpRenoise:
    """A ``jump_renoise`` out of a jump and a source of noise of the caller's."""

    def jump_renoise(x: Tensor, t: Tensor, s: Tensor, t_next: Tensor, i: int) -> Tensor:
        x_s = jump(x, t, s)
        std = ((t_next - s) * (t_next + s)).sqrt()
        return x_s + std.view(-1, 1, 1, 1) * noise(i, x_s)

    return jump_renoise


def gamma_sample(
    jump: Jump,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    gamma: float = 0.0,
    jump_renoise: JumpRenoise | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Sample by len(sigmas) - 1 jumps, as many network evaluations.

    Args:
        jump: serves the steps that need no noise: all of them at gamma = 0, and the last.
        x: [B, C, H, W] float32 at level sigmas[0].
        sigmas: levels, strictly decreasing, the last is sigma_min > 0 (Python numbers; LevelError if not).
        gamma: in [0, 1]; the share of noise that is drawn anew in each step.
        jump_renoise: serves the other steps (``CTM.jump_renoise``, or :func:`renoise_with`); needed if gamma > 0
            and there is more than one step.
        callback: called as callback(i, x) after step i.

    Returns:
        [B, C, H, W] at level sigma_min. Nothing is clamped.
    """
    levels = renoise_levels(sigmas, gamma)
    if gamma > 0 and len(levels) > 1 and jump_renoise is None:
        raise ValueError(f"jump_renoise: expected a callable for gamma = {gamma} and {len(levels)} steps, got None")
    for i, (sigma, s, sigma_next) in enumerate(zip(sigmas[:-1], levels, sigmas[1:], strict=True)):
        if s == sigma_next or jump_renoise is None:
            x = jump(x, full(x, sigma), full(x, s))
        else:
            x = jump_renoise(x, full(x, sigma), full(x, s), full(x, sigma_next), i)
        if callback is not None:
            callback(i, x)
    return x
