"""Gaussian data: exact denoiser, ODE trajectory, jump and density."""

import math

import torch
from torch import Tensor

from ctm_fast.ops.reference.precond_combine import coefficients


class Gaussian:
    """Data x0 ~ N(mean, covariance), for flattened images of ``shape`` (C, H, W).

    In the eigenbasis of the covariance every direction is a Gaussian of its own variance v:

        D(x; t)    = mean + v / (v + t^2) (x - mean)
        G(x, t, s) = mean + sqrt((v + s^2) / (v + t^2)) (x - mean)      the exact ODE from t to s

    Args:
        mean: [n] float64, n = C H W.
        covariance: [n, n] float64, symmetric, positive definite.
        shape: (C, H, W).

    Methods take x [B, C, H, W] and levels [B] of any float dtype on the CPU, compute in float64 and return the dtype
    of x.
    """

    def __init__(self, mean: Tensor, covariance: Tensor, shape: tuple[int, int, int]) -> None:
        n = math.prod(shape)
        if mean.shape != (n,) or covariance.shape != (n, n):
            raise ValueError(
                f"mean, covariance: expected shapes [{n}] and [{n}, {n}] for images {shape}, "
                f"got {list(mean.shape)} and {list(covariance.shape)}"
            )
        self.mean = mean.double()
        self.variances, self.basis = torch.linalg.eigh(covariance.double())
        if self.variances.min() <= 0:
            raise ValueError(f"covariance: expected a positive definite matrix, got eigenvalue {self.variances.min()}")
        self.shape = shape

    @classmethod
    def isotropic(cls, std: float, shape: tuple[int, int, int]) -> "Gaussian":
        """N(0, std^2 I)."""
        n = math.prod(shape)
        return cls(torch.zeros(n, dtype=torch.float64), std**2 * torch.eye(n, dtype=torch.float64), shape)

    def sample(self, batch: int, generator: torch.Generator, *, level: float = 0.0) -> Tensor:
        """[batch, C, H, W] float64 draws of x0 plus noise of std ``level``."""
        z = torch.randn(batch, self.mean.numel(), dtype=torch.float64, generator=generator)
        return self._from_basis(z * (self.variances + level**2).sqrt(), torch.float64)

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x] at level ``sigma``."""
        return self._from_basis(self._to_basis(x) * (self.variances / self._variance_at(sigma)), x.dtype)

    def jump(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The exact solution of the probability-flow ODE at ``s``, from x at ``t``."""
        scale = (self._variance_at(s) / self._variance_at(t)).sqrt()
        return self._from_basis(self._to_basis(x) * scale, x.dtype)

    def raw(self, x: Tensor, t: Tensor, s: Tensor, *, sigma_data: float) -> Tensor:
        """F*: the network output that :func:`ctm_fast.ops.precond_combine` turns into :meth:`jump`.

        For s < t; at s = t any output gives the jump, and this one is NaN.
        """
        a, b = coefficients(t.double(), s.double(), sigma_data)
        return ((self.jump(x.double(), t, s) - a * x.double()) / b).to(x.dtype)

    def log_prob(self, x: Tensor, sigma: Tensor) -> Tensor:
        """[B] float64: log density of x at level ``sigma``, in nats."""
        variance = self._variance_at(sigma)
        return -0.5 * (self._to_basis(x).square() / variance + (2 * math.pi * variance).log()).sum(1)

    def _variance_at(self, sigma: Tensor) -> Tensor:
        return self.variances + sigma.double().square().view(-1, 1)

    def _to_basis(self, x: Tensor) -> Tensor:
        return (x.double().flatten(1) - self.mean) @ self.basis

    def _from_basis(self, z: Tensor, dtype: torch.dtype) -> Tensor:
        return (self.mean + z @ self.basis.T).view(-1, *self.shape).to(dtype)
