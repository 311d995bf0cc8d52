"""What the published code integrates for its likelihood, where that differs: for comparison, not for new numbers.

    sigma(v) = a(v)^rho,  a(v) = smin^(1/rho) + v (smax^(1/rho) - smin^(1/rho)),  v from v0 = 1e-3 to 1
    x(v0)    = x + sigma(v0) z                                        z ~ N(0, I), x = x8 / 127.5 - 1, not dequantised
    bits/dim = -(log p(x(v0)) - R) / (n ln 2) + 7                     though the change of unit is log2(127.5) = 6.994
    R        = |x - D(x + sigma z; sigma)|^2 / (2 sigma^2) - n / 2    of N(D, sigma^2 I), the posterior at sigma(v0)

The published code takes R at sigma = a(v0) = 0.413 for 0.00205, the power rho being forgotten, which makes bits/dim too
low, for N(0, 0.5^2 I) by 0.29.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ctm_fast.diffusion.schedule import Levels
from ctm_fast.ops import Stream, philox_normal

Compat = Literal["published", "published-bug", "published-wrong"]
"""The formula above; with R at a(v0), as the code is; without noise and R, which the code calls the mode "wrong"."""

V0 = 1e-3
BITS = 7.0


@dataclass(frozen=True)
class Time:
    """The published v in place of ln sigma."""

    levels: Levels

    def root(self, v: Tensor) -> Tensor:
        """a(v)."""
        bottom, top = (sigma ** (1 / self.levels.rho) for sigma in (self.levels.sigma_min, self.levels.sigma_max))
        return bottom + v * (top - bottom)

    def sigma(self, v: Tensor) -> Tensor:
        """a(v)^rho."""
        return self.root(v) ** self.levels.rho

    def rate(self, v: Tensor) -> Tensor:
        """d ln sigma / dv = rho a' / a."""
        slope = self.root(torch.ones_like(v)) - self.root(torch.zeros_like(v))
        return self.levels.rho * slope / self.root(v)

    def bottom(self) -> float:
        """sigma(v0)."""
        return float(self.sigma(torch.tensor(V0, dtype=torch.float64)))

    def residual_level(self, compat: Compat) -> float:
        """Where R is taken."""
        bottom = self.bottom()
        return bottom ** (1 / self.levels.rho) if compat == "published-bug" else bottom


def posterior_noise(x: Tensor, seeds: Tensor) -> Tensor:
    """z of the formulas above, from the sample's seed; like x [B, C, H, W]."""
    return philox_normal(seeds, 1, x.shape[1:], stream=Stream.DEQUANTISE).to(x.dtype)


def residual(x: Tensor, D_x: Tensor, sigma: float) -> Tensor:
    """R [B] float64 in nats: x [B, C, H, W] clean, D_x denoised from x + sigma z."""
    n = math.prod(x.shape[1:])
    return 0.5 * ((x - D_x).flatten(1).double().square().sum(1) / sigma**2 - n)
