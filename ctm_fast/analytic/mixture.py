"""Mixtures of Gaussians: exact denoiser, score and density; the ODE has no closed form, a solver takes the denoiser."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ctm_fast.analytic.gaussian import Gaussian


class GaussianMixture:
    """Data x0 from one of several Gaussians of the same shape, chosen with probabilities ``weights``.

        p(x; sigma)  = sum_k w_k N_k(x; sigma)
        D(x; sigma)  = sum_k r_k D_k(x; sigma),   r_k = w_k N_k / p       the components' denoisers, by responsibility

    Methods take x [B, C, H, W] and levels [B] of any float dtype on the CPU, compute in float64 and return the dtype
    of x.
    """

    def __init__(self, weights: Sequence[float], components: Sequence[Gaussian]) -> None:
        if len(weights) != len(components) or not components:
            raise ValueError(f"weights: expected one for each of {len(components)} components, got {len(weights)}")
        if min(weights) <= 0:
            raise ValueError(f"weights: expected positive numbers, got {list(weights)}")
        if len({component.shape for component in components}) > 1:
            raise ValueError(f"components: expected one shape, got {[component.shape for component in components]}")
        self.log_weights = torch.tensor(weights, dtype=torch.float64).log()
        self.log_weights -= self.log_weights.logsumexp(0)
        self.components = list(components)
        self.shape = components[0].shape

    def sample(self, batch: int, generator: torch.Generator, *, level: float = 0.0) -> Tensor:
        """[batch, C, H, W] float64 draws of x0 plus noise of std ``level``."""
        chosen = torch.multinomial(self.log_weights.exp(), batch, replacement=True, generator=generator)
        draws = torch.stack([component.sample(batch, generator, level=level) for component in self.components])
        return draws[chosen, torch.arange(batch)]

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x] at level ``sigma``."""
        joint = self._joint(x, sigma)
        responsibilities = (joint - joint.logsumexp(0)).exp().view(*joint.shape, 1, 1, 1)
        parts = torch.stack([component.denoise(x.double(), sigma) for component in self.components])
        return (responsibilities * parts).sum(0).to(x.dtype)

    def score(self, x: Tensor, sigma: Tensor) -> Tensor:
        """grad_x log p(x; sigma) = (D(x; sigma) - x) / sigma^2."""
        x64 = x.double()
        return ((self.denoise(x64, sigma) - x64) / sigma.double().square().view(-1, 1, 1, 1)).to(x.dtype)

    def log_prob(self, x: Tensor, sigma: Tensor) -> Tensor:
        """[B] float64: log density of x at level ``sigma``, in nats."""
        return self._joint(x, sigma).logsumexp(0)

    def _joint(self, x: Tensor, sigma: Tensor) -> Tensor:
        """[K, B]: log w_k N_k(x; sigma)."""
        parts = torch.stack([component.log_prob(x, sigma) for component in self.components])
        return self.log_weights[:, None] + parts
