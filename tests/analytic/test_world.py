"""One interface: whatever is written against it runs in every world."""

import pytest
import torch
from torch import Tensor

from ctm_fast.analytic import Gaussian, GaussianMixture, World, model_log_prob, trajectory
from ctm_fast.diffusion.schedule import Levels, karras_sigmas
from ctm_fast.samplers import gamma_sample, heun_sample, renoise_with
from tests.worlds import rotated_gaussian

SHAPE = (1, 1, 2)
TIGHT = 0.04 * torch.eye(2, dtype=torch.float64)
MIXTURE = GaussianMixture(
    [1.0, 3.0], [Gaussian(torch.tensor(mean), TIGHT, SHAPE) for mean in ([-0.7, 0.0], [0.5, 0.4])]
)
WORLDS: list[World] = [Gaussian.isotropic(0.5, SHAPE), rotated_gaussian(SHAPE), MIXTURE]
IDS = ["isotropic", "rotated", "mixture"]


@pytest.mark.parametrize("world", WORLDS, ids=IDS)
def test_a_trajectory_is_jumps_from_its_start(world: World) -> None:
    sigmas = [5.0, 1.0, 0.1, 0.002]
    x = world.sample(3, torch.Generator().manual_seed(0), level=sigmas[0])
    way = trajectory(world, x, sigmas)
    assert way.shape == (4, 3, *world.shape)
    assert torch.equal(way[0], x)
    for sigma, x_s in zip(sigmas, way, strict=True):
        levels = (torch.full((3,), level, dtype=torch.float64) for level in (sigmas[0], sigma))
        torch.testing.assert_close(x_s, world.jump(x, *levels), rtol=0, atol=1e-8)


@pytest.mark.parametrize("world", WORLDS, ids=IDS)
def test_a_sampler_of_denoisers_arrives_where_the_jump_does(world: World) -> None:
    levels = Levels(sigma_max=10.0)
    x = world.sample(16, torch.Generator().manual_seed(0), level=levels.sigma_max)
    found = heun_sample(world.denoise, x, karras_sigmas(200, levels).tolist())
    exact = world.jump(x, torch.full((16,), 10.0), torch.zeros(16))
    torch.testing.assert_close(found, exact, rtol=0, atol=2e-3)


@pytest.mark.parametrize("world", WORLDS, ids=IDS)
def test_a_sampler_of_jumps_keeps_the_marginal(world: World) -> None:
    """gamma-sampling with the exact jump: mean and covariance at sigma_min within 5 standard errors of 4,000 draws."""
    n, generator = 4000, torch.Generator().manual_seed(0)

    def noise(i: int, x: Tensor) -> Tensor:
        return torch.randn(x.shape, dtype=x.dtype, generator=generator)

    x = world.sample(n, generator, level=5.0)
    x = gamma_sample(world.jump, x, [5.0, 0.5, 0.002], gamma=0.7, jump_renoise=renoise_with(world.jump, noise))
    expected = world.sample(40 * n, generator, level=0.002).flatten(1)
    found = x.flatten(1)
    error = (expected.var(0) / n * (1 + 1 / 40)).sqrt()
    assert ((found.mean(0) - expected.mean(0)).abs() < 5 * error).all()
    squares, others = found.square(), expected.square()
    error = (others.var(0) / n * (1 + 1 / 40)).sqrt()
    assert ((squares.mean(0) - others.mean(0)).abs() < 5 * error).all()


def test_model_density_against_change_of_variables() -> None:
    """In two dimensions: log N(x_T; 0, sigma_max^2) + log |det dx_T / dx|, the Jacobian by central differences."""
    x = MIXTURE.sample(4, torch.Generator().manual_seed(2))
    bottom, top = torch.full((4,), 0.05, dtype=torch.float64), torch.full((4,), 3.0, dtype=torch.float64)
    columns, step = [], 1e-4
    for unit in torch.eye(2, dtype=torch.float64).view(2, 1, *SHAPE):
        ahead, behind = (MIXTURE.jump(x + sign * step * unit, bottom, top) for sign in (1, -1))
        columns.append((ahead - behind).flatten(1) / (2 * step))
    x_T = MIXTURE.jump(x, bottom, top).flatten(1)
    prior = torch.distributions.Normal(0, 3.0).log_prob(x_T).sum(1)
    expected = prior + torch.stack(columns, 2).det().abs().log()
    found = model_log_prob(MIXTURE, x, sigma_min=0.05, sigma_max=3.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
