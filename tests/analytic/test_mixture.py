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


def cdf(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """Of :func:`world` at level ``sigma``."""
    parts = zip((0.25, 0.75), (-1.0, 0.5), (0.2, 0.4), strict=True)
    return sum(weight * torch.special.ndtr((x - mean) / (std**2 + sigma**2) ** 0.5) for weight, mean, std in parts)


@pytest.mark.parametrize(("t", "s"), [(80.0, 0.002), (80.0, 0.0), (0.0, 80.0), (0.002, 80.0), (2.0, 0.7), (1.0, 1.0)])
def test_in_one_dimension_the_jump_keeps_the_quantile(t: float, s: float) -> None:
    """The ODE cannot cross itself, so that on a line it carries each quantile of p(x; t) to that of p(x; s)."""
    mixture = world()
    x_t = mixture.sample(64, torch.Generator().manual_seed(5), level=t)
    x_s = mixture.jump(x_t, torch.full((64,), t, dtype=torch.float64), torch.full((64,), s, dtype=torch.float64))
    torch.testing.assert_close(cdf(x_s, s), cdf(x_t, t), rtol=0, atol=1e-9)


def plane() -> GaussianMixture:
    """Two pixels; two components of other covariances."""
    shape = (1, 1, 2)
    means = torch.tensor([[-0.5, 0.2], [0.6, -0.3]], dtype=torch.float64)
    spreads = torch.tensor([[[0.04, 0.02], [0.02, 0.09]], [[0.1, -0.03], [-0.03, 0.02]]], dtype=torch.float64)
    return GaussianMixture([0.4, 0.6], [Gaussian(m, c, shape) for m, c in zip(means, spreads, strict=True)])


def test_the_jump_solves_the_ode_and_jumps_compose() -> None:
    """dG/ds = (x_s - D(x_s; s)) / s = -s score, by differences."""
    mixture = plane()
    x = mixture.sample(5, torch.Generator().manual_seed(1), level=3.0)
    t, u, s = (torch.full((5,), level, dtype=torch.float64) for level in (3.0, 1.0, 0.3))
    step = 1e-4
    slope = (mixture.jump(x, t, s + step) - mixture.jump(x, t, s - step)) / (2 * step)
    x_s = mixture.jump(x, t, s)
    torch.testing.assert_close(slope, (x_s - mixture.denoise(x_s, s)) / 0.3, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slope, -0.3 * mixture.score(x_s, s), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mixture.jump(mixture.jump(x, t, u), u, s), x_s, rtol=0, atol=1e-8)
    torch.testing.assert_close(mixture.jump(x_s, s, t), x, rtol=0, atol=1e-8)


def test_each_sample_jumps_between_its_own_levels() -> None:
    mixture = plane()
    x = mixture.sample(3, torch.Generator().manual_seed(1), level=2.0)
    t = torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)
    s = torch.tensor([0.1, 0.5, 0.0], dtype=torch.float64)
    whole = mixture.jump(x.float(), t, s)
    assert whole.dtype == torch.float32
    for i in range(3):
        alone = mixture.jump(x[i : i + 1].float(), t[i : i + 1], s[i : i + 1])
        torch.testing.assert_close(alone, whole[i : i + 1], rtol=0, atol=1e-6)


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
