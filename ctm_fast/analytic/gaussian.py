"""Gaussian data: exact denoiser, score, jump and density."""

import math
from collections.abc import Sequence

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

    @classmethod
    def rotated(cls, variances: Sequence[float], shape: tuple[int, int, int], *, seed: int) -> "Gaussian":
        """N(0, Q diag(variances) Q^T), the rotation Q uniform, drawn from the seed: C H W variances."""
        n = math.prod(shape)
        normal = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        basis, triangle = torch.linalg.qr(normal)
        basis = basis * triangle.diagonal().sign()  # else Q is not uniform (Mezzadri, arXiv math-ph/0609050)
        diagonal = torch.tensor(variances, dtype=torch.float64)
        return cls(torch.zeros(n, dtype=torch.float64), (basis * diagonal) @ basis.T, shape)

    def sample(self, batch: int, generator: torch.Generator, *, level: float = 0.0) -> Tensor:
        """[batch, C, H, W] float64 draws of x0 plus noise of std ``level``."""
        z = torch.randn(batch, self.mean.numel(), dtype=torch.float64, generator=generator)
        return self._from_basis(z * (self.variances + level**2).sqrt(), torch.float64)

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x] at level ``sigma``."""
        return self._from_basis(self._to_basis(x) * (self.variances / self._variance_at(sigma)), x.dtype)

    def score(self, x: Tensor, sigma: Tensor) -> Tensor:
        """grad_x log p(x; sigma) = (D(x; sigma) - x) / sigma^2, also at sigma = 0."""
        pull = -self._to_basis(x) / self._variance_at(sigma)
        return (pull @ self.basis.T).view(-1, *self.shape).to(x.dtype)

    def jump(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The exact solution of the probability-flow ODE at level ``s``, from x at level ``t``."""
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
