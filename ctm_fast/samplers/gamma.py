"""CTM's samplers: jump below the next level, then add noise back up to it (CTM, arXiv 2310.02279, Alg. 3)."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

from torch import Tensor

from ctm_fast.diffusion.schedule import Levels, grid_sigmas
from ctm_fast.errors import LevelError
from ctm_fast.samplers._levels import check_jumps, check_sigmas, full

Jump = Callable[[Tensor, Tensor, Tensor], Tensor]
"""jump(x, t, s) -> G(x, t, s), levels [B]."""

JumpRenoise = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
"""jump_renoise(x, t, s, t_next, i) -> G(x, t, s) with noise added up to ``t_next``; i counts the re-noisings."""

Noise = Callable[[int, Tensor], Tensor]
"""noise(i, x) -> N(0, I) of the shape of x, for the i-th re-noising."""

Callback = Callable[[int, Tensor], None]

Renoise = Literal["published", "paper"]


def renoise_levels(sigmas: Sequence[float], gamma: float, *, renoise: Renoise = "published") -> list[float]:
    """The level s that each step of gamma-sampling jumps to, the last sigma_min, the last of ``sigmas``.

        "published"    s = sqrt(1 - gamma^2) (sigma' - sigma_min) + sigma_min    the code behind the paper's figures
        "paper"        s = max(sqrt(1 - gamma^2) sigma', sigma_min)              Alg. 3, and never below sigma_min

    gamma = 0 gives s = sigma' (deterministic), gamma = 1 gives s = sigma_min (consistency-model multistep), both
    exactly. LevelError for a gamma outside [0, 1] or levels out of order, ValueError for another ``renoise``.
    """
    if renoise not in get_args(Renoise):
        raise ValueError(f"renoise: expected one of {', '.join(get_args(Renoise))}, got {renoise!r}")
    if not 0 <= gamma <= 1:
        raise LevelError(f"gamma: expected 0 <= gamma <= 1, got {gamma}")
    check_sigmas(sigmas)
    sigma_min = sigmas[-1]
    shift = sigma_min if renoise == "published" else 0.0
    shrink = math.sqrt(1 - gamma**2)

    def level(sigma: float) -> float:
        if gamma == 0:
            return float(sigma)
        # Rounding must not lift s above sigma', not even by an ulp: the noise's variance would be negative.
        return min(sigma, max(shrink * (sigma - shift) + shift, sigma_min))

    return [level(sigma) for sigma in sigmas[1:]]


def two_time_jumps(i1: int, i2: int, *, points: int, levels: Levels) -> list[tuple[float, float]]:
    """The jumps of the two-step sampler with times of its own, for :func:`jump_sample`.

        x_T -> tau(i1), noise up to tau(i2), -> sigma_min        0 < i2 <= i1 < points

    on the training grid tau of ``points`` levels, tau(0) = sigma_max. LevelError for indices out of order.
    """
    if not 0 < i2 <= i1 < points:
        raise LevelError(f"i1, i2: expected 0 < i2 <= i1 < {points}, got {i1}, {i2}")
    tau = grid_sigmas((0, *((i2,) if i1 == i2 else (i2, i1))), points=points, levels=levels)
    return [(float(tau[0]), float(tau[-1])), (float(tau[1]), levels.sigma_min)]


def renoise_with(jump: Jump, noise: Noise) -> JumpRenoise:
    """A ``jump_renoise`` out of a jump and a source of noise of the caller's."""

    def jump_renoise(x: Tensor, t: Tensor, s: Tensor, t_next: Tensor, i: int) -> Tensor:
        x_s = jump(x, t, s)
        std = ((t_next - s) * (t_next + s)).sqrt()
        return x_s + std.view(-1, 1, 1, 1) * noise(i, x_s)

    return jump_renoise


def jump_sample(
    jump: Jump,
    x: Tensor,
    jumps: Sequence[tuple[float, float]],
    *,
    jump_renoise: JumpRenoise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Jump from t to s for each (t, s) of ``jumps``, with noise in between up to the next t: NFE len(jumps).

    Args:
        jump: serves the steps that need no noise, the last among them.
        x: [B, C, H, W] float32 at level jumps[0][0].
        jumps: Python numbers, 0 < s <= t and the next t at or above s (LevelError if not).
        jump_renoise: serves the other steps (``CTM.jump_renoise``, or :func:`renoise_with`); needed if there are any.
        callback: called as callback(i, x) after step i.

    Returns:
        [B, C, H, W] at level jumps[-1][1]. Nothing is clamped.
    """
    check_jumps(jumps)
    targets = [t for t, _ in jumps[1:]] + [jumps[-1][1]]
    if jump_renoise is None and any(s != target for (_, s), target in zip(jumps, targets, strict=True)):
        raise ValueError("jump_renoise: expected a callable for jumps below the next level, got None")
    for i, ((t, s), target) in enumerate(zip(jumps, targets, strict=True)):
        if s == target or jump_renoise is None:
            x = jump(x, full(x, t), full(x, s))
        else:
            x = jump_renoise(x, full(x, t), full(x, s), full(x, target), i)
        if callback is not None:
            callback(i, x)
    return x


def gamma_sample(
    jump: Jump,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    gamma: float = 0.0,
    renoise: Renoise = "published",
    jump_renoise: JumpRenoise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """gamma-sampling: NFE len(sigmas) - 1.

    Args:
        x: [B, C, H, W] float32 at level sigmas[0].
        sigmas: levels, strictly decreasing, the last is sigma_min > 0 (Python numbers; LevelError if not).
        gamma: in [0, 1]; the share of noise that is drawn anew in each step: 0 is deterministic, 1 is
            consistency-model multistep sampling.
        renoise: which level each step jumps to, see :func:`renoise_levels`.
        jump, jump_renoise, callback: as for :func:`jump_sample`.

    Returns:
        [B, C, H, W] at level sigma_min. Nothing is clamped.
    """
    levels = renoise_levels(sigmas, gamma, renoise=renoise)
    jumps = list(zip(sigmas[:-1], levels, strict=True))
    return jump_sample(jump, x, jumps, jump_renoise=jump_renoise, callback=callback)
