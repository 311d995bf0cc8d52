"""Bits per dimension against the exact density of Gaussian worlds, and the bound beside them."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ctm_fast.analytic import Gaussian, GaussianMixture
from ctm_fast.diffusion.schedule import Levels
from ctm_fast.errors import ConfigError
from ctm_fast.evaluation.likelihood import (
    Denoise,
    bits_per_dim,
    dequantise,
    draw_probes,
    evidence_bound,
    log_likelihood,
)
from tests.worlds import rotated_gaussian

LEVELS = Levels()
SHAPE = (1, 2, 3)


def denoiser(world: Gaussian | GaussianMixture) -> Denoise:
    return lambda x, sigma, index: world.denoise(x, sigma)


def model_log_prob(world: Gaussian, x: Tensor) -> Tensor:
    """The density that the ODE gives x: the world's, but for the model's N(0, sigma_max^2) in place of the world's."""
    bottom, top = (torch.full((len(x),), sigma) for sigma in (LEVELS.sigma_min, LEVELS.sigma_max))
    x_T = world.jump(x, bottom, top)
    prior = -0.5 * (x_T.square() / LEVELS.sigma_max**2 + math.log(2 * math.pi * LEVELS.sigma_max**2)).flatten(1).sum(1)
    return world.log_prob(x, bottom) - world.log_prob(x_T, top) + prior


@pytest.mark.parametrize(
    "world", [Gaussian.isotropic(0.5, SHAPE), rotated_gaussian(SHAPE)], ids=["isotropic", "rotated"]
)
def test_the_exact_trace_gives_the_exact_density(world: Gaussian) -> None:
    x = world.sample(8, torch.Generator().manual_seed(0))
    found = log_likelihood(denoiser(world), x, LEVELS, torch.arange(8), probes="exact")
    torch.testing.assert_close(found.log_prob, model_log_prob(world, x), rtol=0, atol=6 * 1e-3 * math.log(2))
    assert (found.probe_error == 0).all()
    assert (found.evaluations > 100).all()


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_probes_are_right_on_average_and_say_how_far_off(kind: Any) -> None:
    """A rotated covariance, whose trace a single probe does not hit; 64 probes, 5 standard errors."""
    world = rotated_gaussian(SHAPE)
    x = world.sample(4, torch.Generator().manual_seed(0))
    found = log_likelihood(denoiser(world), x, LEVELS, torch.arange(4), probes=kind, count=64, tolerance=1e-4)
    exact = bits_per_dim(model_log_prob(world, x), 6, dequantisation="uniform")
    assert (found.probe_error > 1e-3).all()
    assert ((found.bits_per_dim - exact).abs() < 5 * found.probe_error).all()


def test_isotropic_images_have_the_bits_of_the_closed_form() -> None:
    """N(0, 0.5^2): 8.0414 bits for x / 127.5 - 1 and 8.0471 for (x + u) / 128 - 1, the mean over images."""
    world = Gaussian.isotropic(0.5, SHAPE)
    entropy = 0.5 * math.log2(2 * math.pi * math.e * 0.25)
    n = torch.tensor(-entropy * 6 * math.log(2), dtype=torch.float64)
    assert float(bits_per_dim(n, 6, dequantisation="none")) == pytest.approx(8.0414, abs=5e-5)
    assert float(bits_per_dim(n, 6, dequantisation="uniform")) == pytest.approx(8.0471, abs=5e-5)
    x = world.sample(4, torch.Generator().manual_seed(0))
    found = log_likelihood(denoiser(world), x, LEVELS, torch.arange(4), dequantisation="none")
    exact = bits_per_dim(world.log_prob(x, torch.full((4,), LEVELS.sigma_min)), 6, dequantisation="none")
    torch.testing.assert_close(found.bits_per_dim, exact, rtol=0, atol=2e-3)


def test_a_mixture_against_its_density() -> None:
    world = GaussianMixture([0.3, 0.7], [Gaussian.isotropic(0.2, SHAPE), Gaussian.isotropic(0.6, SHAPE)])
    x = world.sample(8, torch.Generator().manual_seed(1))
    found = log_likelihood(denoiser(world), x, LEVELS, torch.arange(8), probes="exact", dequantisation="none")
    exact = bits_per_dim(world.log_prob(x, torch.full((8,), LEVELS.sigma_min)), 6, dequantisation="none")
    torch.testing.assert_close(found.bits_per_dim, exact, rtol=0, atol=2e-3)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    world = rotated_gaussian(SHAPE)
    x = world.sample(5, torch.Generator().manual_seed(0))
    seeds = torch.arange(10, 15)
    whole = log_likelihood(denoiser(world), x, LEVELS, seeds, count=2)
    for i in (0, 3):
        alone = log_likelihood(denoiser(world), x[i : i + 1], LEVELS, seeds[i : i + 1], count=2)
        torch.testing.assert_close(alone.bits_per_dim, whole.bits_per_dim[i : i + 1], rtol=0, atol=1e-6)
        assert alone.evaluations == whole.evaluations[i]


def test_the_denoiser_is_told_whose_images_it_gets() -> None:
    """Two worlds by label: each sample's likelihood is that of its own."""
    worlds = [Gaussian.isotropic(0.3, SHAPE), Gaussian.isotropic(0.8, SHAPE)]
    labels = torch.tensor([0, 1, 1, 0])

    def denoise(x: Tensor, sigma: Tensor, index: Tensor) -> Tensor:
        both = torch.stack([world.denoise(x, sigma) for world in worlds])
        return both[labels[index], torch.arange(len(x))]

    x = torch.cat([worlds[int(label)].sample(1, torch.Generator().manual_seed(i)) for i, label in enumerate(labels)])
    found = log_likelihood(denoise, x, LEVELS, torch.arange(4), probes="exact")
    expected = torch.cat([model_log_prob(worlds[int(label)], x[i : i + 1]) for i, label in enumerate(labels)])
    torch.testing.assert_close(found.log_prob, expected, rtol=0, atol=1e-2)


def test_the_bound_of_gaussian_data_is_tight() -> None:
    """With the exact score the reverse SDE's bound is the likelihood: equal on average within 5 standard errors."""
    world, n = Gaussian.isotropic(0.5, SHAPE), 64
    x = world.sample(n, torch.Generator().manual_seed(0), level=LEVELS.sigma_min)
    bound, error = evidence_bound(denoiser(world), x, LEVELS, torch.arange(n), draws=64)
    gap = (model_log_prob(world, x) - bound).mean()
    assert abs(float(gap)) < 5 * float((error.square().sum()).sqrt()) / n
    assert (error > 0).all()


def test_a_worse_denoiser_has_the_lower_bound() -> None:
    world, other = Gaussian.isotropic(0.5, SHAPE), Gaussian.isotropic(0.25, SHAPE)
    x = world.sample(64, torch.Generator().manual_seed(0), level=LEVELS.sigma_min)
    good, bad = (evidence_bound(denoiser(w), x, LEVELS, torch.arange(64), draws=32)[0].mean() for w in (world, other))
    assert good - bad > 1


def test_dequantised_images_round_back_and_are_uniform() -> None:
    images = torch.arange(256, dtype=torch.uint8).repeat(64).view(4, 1, 64, 64)
    seeds = torch.arange(4)
    x = dequantise(images, seeds)
    assert x.dtype == torch.float32
    fraction = (x.double() + 1) * 128 - images
    assert fraction.min() >= 0
    assert fraction.max() < 1
    assert float(fraction.mean()) == pytest.approx(0.5, abs=5 / math.sqrt(12 * fraction.numel()))
    assert float(fraction.var()) == pytest.approx(1 / 12, rel=0.05)
    assert torch.equal(dequantise(images[2:], seeds[2:]), x[2:])
    torch.testing.assert_close(dequantise(images, seeds, dequantisation="none"), images / 127.5 - 1)


def test_probes_belong_to_the_seed() -> None:
    seeds = torch.tensor([3, 4, 5])
    probes = draw_probes(seeds, SHAPE, kind="rademacher", count=4)
    assert probes.shape == (4, 3, 6)
    assert (probes.abs() == 1).all()
    assert torch.equal(draw_probes(seeds[1:2], SHAPE, kind="rademacher", count=4), probes[:, 1:2])
    assert not torch.equal(probes[0], probes[1])
    assert torch.equal(draw_probes(seeds, SHAPE, kind="exact", count=1)[:, 1], torch.eye(6, dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"probes": "normal"}, "probes: expected one of rademacher, gaussian, exact, got 'normal'"),
        ({"count": 0}, "count: expected a positive integer, got 0"),
        ({"tolerance": 0.0}, "rtol: expected a number between 0 and 1, got 0.0"),
        ({"dequantisation": "some"}, "dequantisation: expected one of uniform, none, got 'some'"),
        ({"x": torch.full((2, 1, 2, 3), math.nan)}, "x: expected finite images, got NaN or infinity"),
        ({"x": torch.zeros(2, 3, dtype=torch.uint8)}, r"x: expected float \[B, C, H, W\], got torch.uint8 \[2, 3\]"),
        ({"x": torch.zeros(2, 3, 16, 16), "probes": "exact"}, "at most 256 numbers for the exact trace, got 768"),
    ],
)
def test_messages(arguments: dict[str, Any], message: str) -> None:
    def never(*args: object) -> Tensor:
        raise AssertionError("the network was called before the arguments were checked")

    with pytest.raises(ConfigError, match=message):
        log_likelihood(never, **{"x": torch.zeros(2, *SHAPE), "levels": LEVELS, "seeds": torch.arange(2), **arguments})


def test_a_denoiser_that_is_not_finite_is_named_by_its_sample() -> None:
    def denoise(x: Tensor, sigma: Tensor, index: Tensor) -> Tensor:
        return x * torch.where(index == 1, math.nan, 0.5).view(-1, 1, 1, 1).to(x)

    with pytest.raises(ConfigError, match="denoise: expected finite values along the ODE, got others for sample 1"):
        log_likelihood(denoise, torch.zeros(3, *SHAPE), LEVELS, torch.arange(3))
