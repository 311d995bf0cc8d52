"""Worlds that several tests share."""

import torch

from ctm_fast.analytic import Gaussian


def rotated_gaussian(shape: tuple[int, int, int]) -> Gaussian:
    """Anisotropic, in a rotated basis, with a mean: what an isotropic one cannot catch."""
    generator = torch.Generator().manual_seed(7)
    n = shape[0] * shape[1] * shape[2]
    basis, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    variances = torch.linspace(0.05, 1.0, n, dtype=torch.float64)
    mean = torch.randn(n, dtype=torch.float64, generator=generator) * 0.3
    return Gaussian(mean, basis @ torch.diag(variances) @ basis.T, shape)
