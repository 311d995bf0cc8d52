"""What every analytic world offers, and what follows from that alone."""

import itertools
import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class World(Protocol):
    """Data whose diffusion is known exactly: a sampler written against this interface runs in any world.

    Images x are [B, C, H, W] and levels [B], in any float dtype, on the CPU; results are computed in float64 and given
    in the dtype of x, densities in float64. ``denoise`` and ``jump`` are the callables that samplers and solvers take.
    """

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        ...

    def sample(self, batch: int, generator: torch.Generator, *, level: float = 0.0) -> Tensor:
        """[batch, C, H, W] float64 draws of x0 plus noise of std ``level``."""
        ...

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x] at level ``sigma``."""
        ...

    def score(self, x: Tensor, sigma: Tensor) -> Tensor:
        """grad_x log p(x; sigma) = (D(x; sigma) - x) / sigma^2, also at sigma = 0."""
        ...

    def jump(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The solution of the probability-flow ODE at level ``s``, from x at level ``t``; either may be the larger."""
        ...

    def log_prob(self, x: Tensor, sigma: Tensor) -> Tensor:
        """[B] float64: log density of x at level ``sigma``, in nats."""
        ...


def trajectory(world: World, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """The ODE's solution through ``sigmas``, from x [B, C, H, W] at sigmas[0]: [len(sigmas), B, C, H, W]."""
    way = [x]
    for t, s in itertools.pairwise(sigmas):
        way.append(world.jump(way[-1], x.new_full((len(x),), t), x.new_full((len(x),), s)))
    return torch.stack(way)


def model_log_prob(world: World, x: Tensor, *, sigma_min: float, sigma_max: float) -> Tensor:
    """[B] float64: the log density that a model gives x at ``sigma_min`` whose denoiser is the world's own.

        log p(x; sigma_min) - log p(x_T; sigma_max) + log N(x_T; 0, sigma_max^2 I)

    The model starts its ODE from N(0, sigma_max^2 I), not from the world at sigma_max; volumes change alike on the way.
    """
    bottom, top = (torch.full((len(x),), sigma, dtype=torch.float64) for sigma in (sigma_min, sigma_max))
    x = x.double()
    x_T = world.jump(x, bottom, top)
    prior = -0.5 * (x_T.square() / sigma_max**2 + math.log(2 * math.pi * sigma_max**2)).flatten(1).sum(1)
    return world.log_prob(x, bottom) - world.log_prob(x_T, top) + prior
