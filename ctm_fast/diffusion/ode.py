"""Steps of the probability-flow ODE dx/dt = (x - D(x; t)) / t, for any ``denoise(x, sigma)``."""

import itertools
from collections.abc import Callable, Sequence

from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]


def euler_step(denoise: Denoise, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """One first-order step of x [B, C, H, W] from level ``t`` [B] to ``t_next`` [B], 0 <= t_next <= t."""
    return x + _image(t_next - t) * _slope(denoise, x, t)


def heun_step(denoise: Denoise, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """One second-order step; two calls of ``denoise``, so 0 < t_next (EDM, Alg. 1)."""
    slope = _slope(denoise, x, t)
    step = _image(t_next - t)
    slope_next = _slope(denoise, x + step * slope, t_next)
    return x + step * 0.5 * (slope + slope_next)


def solve_heun(denoise: Denoise, x: Tensor, levels: Sequence[Tensor]) -> Tensor:
    """Heun steps through ``levels`` (each [B], largest first); the correction is made in the last step too."""
    for t, t_next in itertools.pairwise(levels):
        x = heun_step(denoise, x, t, t_next)
    return x


def _slope(denoise: Denoise, x: Tensor, t: Tensor) -> Tensor:
    return (x - denoise(x, t)) / _image(t)


def _image(levels: Tensor) -> Tensor:
    return levels.view(-1, 1, 1, 1)
