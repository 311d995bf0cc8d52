"""Guidance on Gaussian data, where the guided density is a Gaussian again."""

import pytest
import torch
from torch import Tensor

from ctm_fast.analytic import Gaussian
from ctm_fast.diffusion.schedule import karras_sigmas
from ctm_fast.samplers import classifier_guided, guided, heun_sample
from tests.worlds import assert_marginal, rotated_gaussian


def test_guided_extrapolates_denoisers_and_jumps() -> None:
    strong, weak = rotated_gaussian((1, 2, 2)), Gaussian.isotropic(0.5, (1, 2, 2))
    x = strong.sample(3, torch.Generator().manual_seed(0), level=2.0)
    t, s = torch.full((3,), 2.0), torch.full((3,), 0.5)
    for a, b, levels in ((strong.denoise, weak.denoise, (t,)), (strong.jump, weak.jump, (t, s))):
        found = guided(a, b, scale=2.5)(x, *levels)
        torch.testing.assert_close(found, b(x, *levels) + 2.5 * (a(x, *levels) - b(x, *levels)))
        torch.testing.assert_close(guided(a, b, scale=1.0)(x, *levels), a(x, *levels))


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
def test_classifier_guidance_samples_the_posterior(scale: float) -> None:
    """p(x0) = N(0, v), p(y | x0) = N(y; x0, r): the posterior at ``scale`` is Gaussian, and so is p(y | x_sigma)."""
    prior, r, y = 0.25, 0.5, 0.7
    world = Gaussian.isotropic(prior**0.5, (1, 1, 2))

    def log_prob(x: Tensor, sigma: Tensor) -> Tensor:
        """Of the tempered likelihood exp(scale log p(y | x0)) averaged over p(x0 | x): r / scale takes r's place."""
        sigma = sigma.double().view(-1, 1)
        mean = prior / (prior + sigma**2) * x.flatten(1)
        spread = r / scale + prior * sigma**2 / (prior + sigma**2)
        return (-0.5 * (y - mean).square() / spread).sum(1)

    denoise = world.denoise if scale == 0 else classifier_guided(world.denoise, log_prob)
    precision = 1 / prior + scale / r
    posterior = Gaussian(
        torch.full((2,), scale * y / r / precision, dtype=torch.float64),
        torch.eye(2, dtype=torch.float64) / precision,
        (1, 1, 2),
    )
    x = posterior.sample(20_000, torch.Generator().manual_seed(0), level=80.0)
    with torch.no_grad():
        assert_marginal(posterior, heun_sample(denoise, x, karras_sigmas(48).tolist()), level=0.0)


def test_the_scale_of_classifier_guidance_multiplies_the_gradient() -> None:
    world = Gaussian.isotropic(0.5, (1, 2, 2))
    x = world.sample(2, torch.Generator().manual_seed(0), level=3.0)
    sigma = torch.tensor([3.0, 3.0])
    pull = classifier_guided(world.denoise, lambda x, sigma: x.flatten(1).sum(1), scale=0.1)(x, sigma)
    torch.testing.assert_close(pull, world.denoise(x, sigma) + 0.1 * 9.0)
