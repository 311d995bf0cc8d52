"""The analytic worlds against quadrature-free identities: they are the truth of other tests."""

import math

import pytest
import torch

from ctm_fast.analytic import Gaussian
from ctm_fast.ops import precond_combine
from tests.worlds import rotated_gaussian

WORLDS = [Gaussian.isotropic(0.5, (1, 2, 3)), rotated_gaussian((1, 2, 3))]


@pytest.mark.parametrize("world", WORLDS)
def test_denoiser_is_tweedies(world: Gaussian) -> None:
    """D = x + sigma^2 grad log p(x), by automatic differentiation of the density."""
    x = world.sample(4, torch.Generator().manual_seed(0), level=1.3).requires_grad_()
    sigma = torch.full((4,), 1.3, dtype=torch.float64)
    (score,) = torch.autograd.grad(world.log_prob(x, sigma).sum(), x)
    torch.testing.assert_close(world.denoise(x, sigma), x + 1.3**2 * score)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("sigma", [0.0, 0.3, 5.0])
def test_score_is_the_gradient_of_the_density(world: Gaussian, sigma: float) -> None:
    x = world.sample(4, torch.Generator().manual_seed(3), level=sigma).requires_grad_()
    level = torch.full((4,), sigma, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(world.log_prob(x, level).sum(), x)
    torch.testing.assert_close(world.score(x.detach(), level), gradient)


def test_a_rotation_keeps_the_variances_and_belongs_to_its_seed() -> None:
    variances = [0.1, 0.2, 0.5, 1.0]
    world, again, other = (Gaussian.rotated(variances, (1, 2, 2), seed=seed) for seed in (3, 3, 4))
    assert world.variances.tolist() == pytest.approx(variances)
    covariance, turned = (w.basis @ torch.diag(w.variances) @ w.basis.T for w in (world, other))
    assert (covariance - torch.diag(covariance.diagonal())).abs().max() > 0.05
    assert not torch.allclose(covariance, turned)
    assert torch.equal(world.basis, again.basis)


@pytest.mark.parametrize("world", WORLDS)
def test_jump_solves_the_ode(world: Gaussian) -> None:
    """dG/ds = (x_s - D(x_s; s)) / s, and jumps compose."""
    x = world.sample(3, torch.Generator().manual_seed(1), level=5.0)
    t, u, s = (torch.full((3,), level, dtype=torch.float64) for level in (5.0, 2.0, 0.4))
    step = 1e-6
    slope = (world.jump(x, t, s + step) - world.jump(x, t, s - step)) / (2 * step)
    x_s = world.jump(x, t, s)
    torch.testing.assert_close(slope, (x_s - world.denoise(x_s, s)) / 0.4, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(world.jump(world.jump(x, t, u), u, s), x_s)


@pytest.mark.parametrize("world", WORLDS)
def test_density_of_a_known_point(world: Gaussian) -> None:
    n = 6
    at_mean = world.mean.view(1, 1, 2, 3)
    covariance = world.basis @ torch.diag(world.variances + 0.3**2) @ world.basis.T
    expected = -0.5 * (n * math.log(2 * math.pi) + torch.logdet(covariance))
    torch.testing.assert_close(world.log_prob(at_mean, torch.tensor([0.3]))[0], expected)


@pytest.mark.parametrize("world", WORLDS)
def test_exact_network_output_gives_the_exact_jump(world: Gaussian) -> None:
    generator = torch.Generator().manual_seed(2)
    x = world.sample(5, generator, level=20.0).float()
    t = torch.tensor([20.0, 20.0, 5.0, 1.0, 80.0])
    s = torch.tensor([0.002, 3.0, 0.1, 0.9, 0.5])
    F_x = world.raw(x, t, s, sigma_data=0.5)
    jumped = precond_combine(x, F_x, t, s, sigma_data=0.5)
    torch.testing.assert_close(jumped, world.jump(x, t, s), rtol=1e-4, atol=1e-4)


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"mean, covariance: expected shapes \[4\]"):
        Gaussian(torch.zeros(3), torch.eye(4), (1, 2, 2))
    with pytest.raises(ValueError, match="positive definite"):
        Gaussian(torch.zeros(4), torch.zeros(4, 4), (1, 2, 2))
