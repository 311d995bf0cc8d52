"""Worlds that several tests share."""

import torch
from torch import Tensor

from ctm_fast.analytic import Gaussian


def rotated_gaussian(shape: tuple[int, int, int]) -> Gaussian:
    """Anisotropic, in a rotated basis, with a mean: what an isotropic one cannot catch."""
    generator = torch.Generator().manual_seed(7)
    n = shape[0] * shape[1] * shape[2]
    basis, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    variances = torch.linspace(0.05, 1.0, n, dtype=torch.float64)
    mean = torch.randn(n, dtype=torch.float64, generator=generator) * 0.3
    return Gaussian(mean, basis @ torch.diag(variances) @ basis.T, shape)


def assert_marginal(world: Gaussian, x: Tensor, *, level: float) -> None:
    """Mean and covariance of the samples ``x`` are the world's at ``level``, each number within 5 standard errors."""
    flat = x.double().flatten(1)
    n = len(flat)
    expected = world.basis @ torch.diag(world.variances + level**2) @ world.basis.T
    deviation = (flat.mean(0) - world.mean).abs() / (expected.diagonal() / n).sqrt()
    assert deviation.max() < 5
    products = expected.diagonal()[:, None] * expected.diagonal()[None, :]
    standard_error = ((products + expected.square()) / n).sqrt()
    assert ((torch.cov(flat.T) - expected).abs() / standard_error).max() < 5
