"""EDM's deterministic samplers for a denoiser (EDM, arXiv 2206.00364, Alg. 1)."""

import itertools
from collections.abc import Callable, Sequence

from torch import Tensor

from ctm_fast.diffusion.ode import Denoise, euler_step, heun_step
from ctm_fast.samplers._levels import check_sigmas, full

Callback = Callable[[int, Tensor], None]


def heun_sample(denoise: Denoise, x: Tensor, sigmas: Sequence[float], *, callback: Callback | None = None) -> Tensor:
    """Heun steps down ``sigmas``, then an Euler step to 0: 2 len(sigmas) - 1 evaluations of ``denoise(x, sigma)``.

    x [B, C, H, W] float32 at level sigmas[0]; sigmas positive, strictly decreasing (LevelError if not). Returns the
    sample at level 0; nothing is clamped. ``callback(i, x)`` is called after step i.
    """
    check_sigmas(sigmas)
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        x = heun_step(denoise, x, full(x, sigma), full(x, sigma_next))
        if callback is not None:
            callback(i, x)
    return _to_zero(denoise, x, sigmas[-1], len(sigmas) - 1, callback)


def euler_sample(denoise: Denoise, x: Tensor, sigmas: Sequence[float], *, callback: Callback | None = None) -> Tensor:
    """Euler steps down ``sigmas`` and to 0: len(sigmas) evaluations. As :func:`heun_sample`; one level is enough."""
    if len(sigmas) > 1:
        check_sigmas(sigmas)
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        x = euler_step(denoise, x, full(x, sigma), full(x, sigma_next))
        if callback is not None:
            callback(i, x)
    return _to_zero(denoise, x, sigmas[-1], len(sigmas) - 1, callback)


def _to_zero(denoise: Denoise, x: Tensor, sigma: float, i: int, callback: Callback | None) -> Tensor:
    x = euler_step(denoise, x, full(x, sigma), full(x, 0.0))
    if callback is not None:
        callback(i, x)
    return x
