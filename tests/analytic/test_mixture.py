"""The mixture against quadrature and finite differences."""

import pytest
import torch

from ctm_fast.analytic import Gaussian, GaussianMixture


def world() -> GaussianMixture:
    shape = (1, 1, 1)
    means = (-1.0, 0.5)
    parts = [
        Gaussian(torch.tensor([mean], dtype=torch.float64), torch.tensor([[std**2]], dtype=torch.float64), shape)
        for mean, std in zip(means, (0.2, 0.4), strict=True)
    ]
    return GaussianMixture([1.0, 3.0], parts)


@pytest.mark.parametrize("sigma", [0.1, 1.0, 5.0])
def test_density_and_denoiser_against_quadrature(sigma: float) -> None:
    """p(x; sigma) = int p(x0) N(x - x0; sigma^2) dx0, D = int x0 p(x0 | x) dx0."""
    mixture = world()
    x0 = torch.linspace(-6, 6, 20001, dtype=torch.float64)
    clean = mixture.log_prob(x0.view(-1, 1, 1, 1), torch.zeros(len(x0))).exp()
    assert float(torch.trapezoid(clean, x0)) == pytest.approx(1, abs=1e-9)
    x = torch.tensor([-2.0, -0.3, 0.1, 1.7], dtype=torch.float64)
    kernel = torch.exp(-0.5 * ((x[:, None] - x0) / sigma) ** 2) / (sigma * (2 * torch.pi) ** 0.5)
    density = torch.trapezoid(clean * kernel, x0)
    level = torch.full((4,), sigma, dtype=torch.float64)
    images = x.view(-1, 1, 1, 1)
    torch.testing.assert_close(mixture.log_prob(images, level), density.log(), rtol=0, atol=1e-8)
    mean = torch.trapezoid(x0 * clean * kernel, x0) / density
    torch.testing.assert_close(mixture.denoise(images, level).flatten(), mean, rtol=0, atol=1e-8)
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(mixture.log_prob(leaf, level).sum(), leaf)
    torch.testing.assert_close(mixture.score(images, level), gradient)


def test_samples_have_its_moments() -> None:
    x = world().sample(40_000, torch.Generator().manual_seed(0), level=0.3).flatten()
    mean = 0.25 * -1.0 + 0.75 * 0.5
    variance = 0.25 * (0.04 + (-1 - mean) ** 2) + 0.75 * (0.16 + (0.5 - mean) ** 2) + 0.09
    assert float(x.mean()) == pytest.approx(mean, abs=5 * (variance / 40_000) ** 0.5)
    assert float(x.var()) == pytest.approx(variance, rel=0.05)


def test_messages() -> None:
    one = Gaussian.isotropic(1.0, (1, 1, 1))
    with pytest.raises(ValueError, match="weights: expected one for each of 1 components, got 2"):
        GaussianMixture([1.0, 2.0], [one])
    with pytest.raises(ValueError, match="weights: expected positive numbers"):
        GaussianMixture([0.0], [one])
    with pytest.raises(ValueError, match="components: expected one shape"):
        GaussianMixture([1.0, 1.0], [one, Gaussian.isotropic(1.0, (1, 1, 2))])
