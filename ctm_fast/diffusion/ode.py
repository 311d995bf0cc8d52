"""Steps of the probability-flow ODE dx/dt = (x - D(x; t)) / t, for any ``denoise(x, sigma)``."""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]


def euler_step(denoise: Denoise, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """One first-order step of x [B, C, H, W] from level ``t`` to ``t_next``.

        x + (t_next - t) (x - D) / t = D + (t_next / t) (x - D)

    t, t_next: [B] in the dtype of x, 0 <= t_next <= t.
    """
    return torch.lerp(denoise(x, t), x, _image(t_next / t))


def heun_step(denoise: Denoise, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """One second-order step; two calls of ``denoise``, so 0 < t_next (EDM, Alg. 1).

    The mean of x and of two steps on end, the second with the slope at ``t_next``; each is one pass over the image.
    """
    x_next = euler_step(denoise, x, t, t_next)
    beyond = torch.lerp(x_next, denoise(x_next, t_next), _image((t - t_next) / t_next))
    return torch.lerp(x, beyond, 0.5)


def solve_heun(denoise: Denoise, x: Tensor, levels: Sequence[Tensor]) -> Tensor:
    """Heun steps through ``levels`` (each [B], largest first); the correction is made in the last step too."""
    for t, t_next in itertools.pairwise(levels):
        x = heun_step(denoise, x, t, t_next)
    return x


def _image(levels: Tensor) -> Tensor:
    return levels.view(-1, 1, 1, 1)
