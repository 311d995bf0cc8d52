"""Mixtures of Gaussians: exact denoiser, score and density; the ODE has no closed form and is solved to 1e-10."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ctm_fast.analytic.gaussian import Gaussian
from ctm_fast.diffusion.adaptive import solve_adaptive

TOLERANCE = 1e-10
"""Of a step of the ODE's solver, relative and absolute: jumps are right to about 1e-8."""


class GaussianMixture:
    """Data x0 from one of several Gaussians of the same shape, chosen with probabilities ``weights``.

        p(x; sigma)  = sum_k w_k N_k(x; sigma)
        D(x; sigma)  = sum_k r_k D_k(x; sigma),   r_k = w_k N_k / p       the components' denoisers, by responsibility
        score        = sum_k r_k score_k

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
        parts = torch.stack([component.denoise(x.double(), sigma) for component in self.components])
        return (self._responsibilities(x, sigma) * parts).sum(0).to(x.dtype)

    def score(self, x: Tensor, sigma: Tensor) -> Tensor:
        """grad_x log p(x; sigma) = (D(x; sigma) - x) / sigma^2, also at sigma = 0."""
        parts = torch.stack([component.score(x.double(), sigma) for component in self.components])
        return (self._responsibilities(x, sigma) * parts).sum(0).to(x.dtype)

    def jump(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The solution of the probability-flow ODE at level ``s``, from x at level ``t``, to :data:`TOLERANCE`.

        In place of sigma the solver steps in u, sigma = c sinh(u), c the least standard deviation of a component:
        logarithmic above c and linear below, where dx/dsigma = -sigma score is smooth down to sigma = 0.
        """
        c = min(float(component.variances.min()) for component in self.components) ** 0.5
        begin, end = ((level.double() / c).asinh() for level in (t, s))

        def slope(index: Tensor, y: Tensor, fraction: Tensor) -> Tensor:
            span = (end - begin)[index]
            u = begin[index] + fraction * span
            sigma = c * u.sinh()
            pull = self.score(y.view(-1, *self.shape), sigma).flatten(1)
            return -(span * sigma * c * u.cosh())[:, None] * pull

        solution = solve_adaptive(slope, x.double().flatten(1), 0.0, 1.0, rtol=TOLERANCE, atol=TOLERANCE)
        return solution.y.view(x.shape).to(x.dtype)

    def log_prob(self, x: Tensor, sigma: Tensor) -> Tensor:
        """[B] float64: log density of x at level ``sigma``, in nats."""
        return self._joint(x, sigma).logsumexp(0)

    def _responsibilities(self, x: Tensor, sigma: Tensor) -> Tensor:
        """[K, B, 1, 1, 1]: of which component x is."""
        joint = self._joint(x, sigma)
        return (joint - joint.logsumexp(0)).exp().view(*joint.shape, 1, 1, 1)

    def _joint(self, x: Tensor, sigma: Tensor) -> Tensor:
        """[K, B]: log w_k N_k(x; sigma)."""
        parts = torch.stack([component.log_prob(x, sigma) for component in self.components])
        return self.log_weights[:, None] + parts
