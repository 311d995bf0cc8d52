"""Guidance: a denoiser or a jump out of two of them, or out of one and a classifier."""

from collections.abc import Callable

import torch
from torch import Tensor

from ctm_fast.diffusion.ode import Denoise

LogProb = Callable[[Tensor, Tensor], Tensor]
"""log_prob(x, sigma) -> [B], log p(y | x) of a classifier that knows the noise level, differentiable in x."""


def guided(strong: Callable[..., Tensor], weak: Callable[..., Tensor], *, scale: float) -> Callable[..., Tensor]:
    """Away from what the weak model says: weak + scale (strong - weak), for two denoisers or for two jumps.

    Classifier-free guidance (arXiv 2207.12598) if ``weak`` is the same network without the label, trained with label
    dropout; autoguidance (arXiv 2406.02507) if it is a smaller or less trained one. ``scale`` 1 is ``strong`` alone.
    """

    def combined(x: Tensor, *levels: Tensor) -> Tensor:
        return torch.lerp(weak(x, *levels), strong(x, *levels), scale)

    return combined


def classifier_guided(denoise: Denoise, log_prob: LogProb, *, scale: float = 1.0) -> Denoise:
    """A denoiser whose score is that of p(x) p(y | x)^scale (arXiv 2105.05233).

    D'(x; sigma) = D(x; sigma) + scale sigma^2 grad_x log p(y | x; sigma)
    """

    def denoise_given(x: Tensor, sigma: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(log_prob(leaf, sigma).sum(), leaf)
        return denoise(x, sigma) + scale * sigma.square().view(-1, 1, 1, 1) * gradient

    return denoise_given
