"""Bits per dimension against the exact density of Gaussian worlds, and the bound beside them."""

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ctm_fast.analytic import Gaussian, GaussianMixture, World, model_log_prob
from ctm_fast.diffusion.adaptive import Slope, Solution, solve_adaptive
from ctm_fast.diffusion.schedule import Levels
from ctm_fast.errors import ConfigError
from ctm_fast.evaluation.likelihood import (
    Denoise,
    Likelihood,
    bits_per_dim,
    dequantise,
    evidence_bound,
    log_likelihood,
)
from ctm_fast.models import CTM, build_network
from ctm_fast.ops import serving, use_reference
from tests.snapshots import small_config
from tests.worlds import rotated_gaussian

LEVELS = Levels()
SHAPE = (1, 2, 3)


def denoiser(world: World) -> Denoise:
    return lambda x, sigma, index: world.denoise(x, sigma)


def model_density(world: World, x: Tensor) -> Tensor:
    return model_log_prob(world, x, sigma_min=LEVELS.sigma_min, sigma_max=LEVELS.sigma_max)


@pytest.mark.parametrize(
    "world", [Gaussian.isotropic(0.5, SHAPE), rotated_gaussian(SHAPE)], ids=["isotropic", "rotated"]
)
def test_the_exact_trace_gives_the_exact_density(world: Gaussian) -> None:
    x = world.sample(8, torch.Generator().manual_seed(0))
    found = log_likelihood(denoiser(world), x, LEVELS, torch.arange(8), probes="exact")
    torch.testing.assert_close(found.log_prob, model_density(world, x), rtol=0, atol=6 * 1e-3 * math.log(2))
    assert (found.probe_error == 0).all()
    assert (found.evaluations > 100).all()


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_probes_are_right_on_average_and_say_how_far_off(kind: Any) -> None:
    """A rotated covariance, whose trace a single probe does not hit; 64 probes, 5 standard errors."""
    world = rotated_gaussian(SHAPE)
    x = world.sample(4, torch.Generator().manual_seed(0))
    found = log_likelihood(denoiser(world), x, LEVELS, torch.arange(4), probes=kind, count=64, tolerance=1e-4)
    exact = bits_per_dim(model_density(world, x), 6, dequantisation="uniform")
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
    for dequantisation in ("none", "uniform"):
        found = log_likelihood(denoiser(world), x, LEVELS, torch.arange(4), dequantisation=dequantisation)
        density = world.log_prob(x, torch.full((4,), LEVELS.sigma_min))
        exact = bits_per_dim(density, 6, dequantisation=dequantisation)
        torch.testing.assert_close(found.bits_per_dim, exact, rtol=0, atol=2e-3)


def test_a_mixture_against_quadrature() -> None:
    """p(x; sigma_min) = E p(x + sigma_min z), p the mixture's formula, by Gauss and Hermite's rule in both pixels.

    Its mean is 0, so that at sigma_max it is the model's N(0, sigma_max^2 I) but for 1e-4 bits.
    """
    shape, means, stds, weights = (1, 1, 2), (-0.7, 0.3), (0.1, 0.3), (0.3, 0.7)
    parts = [
        Gaussian(torch.full((2,), mean), std**2 * torch.eye(2), shape) for mean, std in zip(means, stds, strict=True)
    ]
    world = GaussianMixture(weights, parts)
    x = world.sample(8, torch.Generator().manual_seed(1))
    nodes, shares = (torch.from_numpy(array) for array in np.polynomial.hermite_e.hermegauss(20))
    shares = shares / shares.sum()
    moved = x.view(8, 2, 1) + LEVELS.sigma_min * nodes

    def density(mean: float, std: float) -> Tensor:
        return torch.exp(-0.5 * ((moved - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))

    terms = [w * density(m, s).matmul(shares).prod(1) for w, m, s in zip(weights, means, stds, strict=True)]
    exact = bits_per_dim(torch.stack(terms).sum(0).log(), 2, dequantisation="none")
    found = log_likelihood(denoiser(world), x, LEVELS, torch.arange(8), probes="exact", dequantisation="none")
    torch.testing.assert_close(found.bits_per_dim, exact, rtol=0, atol=2e-3)


@dataclass(frozen=True)
class Mix:
    """28 easy images, of N(0, 0.5^2 I), and 4 hard ones: beside the modes, 0.01 wide, of a mixture of four.

    ``exact``: bits/dim of the densities that these worlds' denoisers give.
    """

    easy: World
    hard: World
    x: Tensor
    is_hard: Tensor
    exact: Tensor

    def denoise(self, x: Tensor, sigma: Tensor, index: Tensor) -> Tensor:
        hard = self.is_hard[index].view(-1, 1, 1, 1)
        return torch.where(hard, self.hard.denoise(x, sigma), self.easy.denoise(x, sigma))


@pytest.fixture(scope="module")
def mix() -> Mix:
    shape, means = (1, 1, 2), (-0.6, -0.2, 0.2, 0.6)
    easy = Gaussian.isotropic(0.5, shape)
    spread = 0.01**2 * torch.eye(2, dtype=torch.float64)
    hard = GaussianMixture([1.0] * 4, [Gaussian(torch.full((2,), mean), spread, shape) for mean in means])
    generator = torch.Generator().manual_seed(1)
    beside = hard.sample(4, generator) + 0.1 * torch.randn(4, *shape, dtype=torch.float64, generator=generator)
    x = easy.sample(28, generator)
    exact = torch.cat([model_density(easy, x), model_density(hard, beside)])
    is_hard = torch.arange(32) >= 28
    return Mix(easy, hard, torch.cat([x, beside]), is_hard, bits_per_dim(exact, 2, dequantisation="uniform"))


def in_one_step(
    slope: Slope, y: Tensor, t_begin: float, t_end: float, *, rtol: float, atol: float, **_: Any
) -> Solution:
    """The same solver with one step for the whole batch, as solvers of one vector take it."""
    batch, numbers = y.shape
    index = torch.arange(batch)

    def whole(_: Tensor, flat: Tensor, t: Tensor) -> Tensor:
        return slope(index, flat.view(batch, numbers), t.expand(batch)).view(1, -1)

    found = solve_adaptive(whole, y.view(1, -1), t_begin, t_end, rtol=rtol, atol=atol)
    return Solution(found.y.view(batch, numbers), found.evaluations.expand(batch))


def test_easy_images_do_not_wait_for_hard_ones(mix: Mix, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 1 / 1.5 of a shared step's evaluations, its tolerance being the largest that is as accurate everywhere.

    Measured: 1 / 2.4 (1 / 3.4 with six pixels). These denoisers cost next to nothing, so that rounds take the time and
    not evaluations: the shared step took 0.6 to 1.0 times as long. A network's time goes with its evaluations.
    """

    def measure(tolerance: float) -> tuple[Likelihood, float]:
        start = time.perf_counter()
        found = log_likelihood(mix.denoise, mix.x, LEVELS, torch.arange(32), probes="exact", tolerance=tolerance)
        return found, time.perf_counter() - start

    def worst(found: Likelihood) -> float:
        return float((found.bits_per_dim - mix.exact).abs().max())

    own, own_time = measure(1e-5)
    monkeypatch.setattr("ctm_fast.evaluation.likelihood.solve_adaptive", in_one_step)
    for power in range(20, 40):
        shared, shared_time = measure(10 ** (-power / 4))
        if worst(shared) <= worst(own):
            break
    else:
        raise AssertionError("a shared step was never as accurate")
    ratio = float(shared.evaluations.sum() / own.evaluations.sum())
    print(f"worst {worst(own):.1e} and {worst(shared):.1e} bits/dim, {ratio:.2f} x evaluations, ", end="")
    print(f"{shared_time / own_time:.2f} x time of {own_time:.2f} s, at tolerance {10 ** (-power / 4):.1e}")
    assert ratio > 1.5


def test_a_sample_alone_is_that_of_a_mixed_batch(mix: Mix) -> None:
    seeds = torch.arange(100, 132)
    whole = log_likelihood(mix.denoise, mix.x, LEVELS, seeds)
    for i in (0, 28, 30):
        alone = log_likelihood(
            lambda x, sigma, index, i=i: mix.denoise(x, sigma, index + i), mix.x[i : i + 1], LEVELS, seeds[i : i + 1]
        )
        torch.testing.assert_close(alone.bits_per_dim, whole.bits_per_dim[i : i + 1], rtol=0, atol=1e-6)
        assert alone.evaluations == whole.evaluations[i]


def test_forward_mode_gives_what_reverse_mode_gives() -> None:
    world = rotated_gaussian(SHAPE)
    x = world.sample(4, torch.Generator().manual_seed(0))
    reverse, forward = (
        log_likelihood(denoiser(world), x, LEVELS, torch.arange(4), count=2, tolerance=1e-4, mode=mode)
        for mode in ("reverse", "forward")
    )
    torch.testing.assert_close(forward.bits_per_dim, reverse.bits_per_dim, rtol=0, atol=1e-9)


def test_a_network_in_forward_mode_under_the_reference() -> None:
    """Attention and group norms among its ops; with the fused ones it raises."""
    config = small_config(3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CTM(build_network(config.network, s_branch=True)).eval().requires_grad_(False)
    labels = torch.tensor([0, 2])

    def denoise(x: Tensor, sigma: Tensor, index: Tensor) -> Tensor:
        return model.denoise(x, sigma, labels[index])

    x = 0.5 * torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with use_reference():
        reverse, forward = (
            log_likelihood(denoise, x, LEVELS, torch.arange(2), tolerance=1e-3, mode=mode)
            for mode in ("reverse", "forward")
        )
    torch.testing.assert_close(forward.bits_per_dim, reverse.bits_per_dim, rtol=0, atol=1e-3)
    if serving("group_norm_silu", "cpu") != "reference":
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            log_likelihood(denoise, x, LEVELS, torch.arange(2), mode="forward")


def test_progress_is_told() -> None:
    world, seen = Gaussian.isotropic(0.5, SHAPE), []
    x = world.sample(3, torch.Generator().manual_seed(0))
    log_likelihood(denoiser(world), x, LEVELS, torch.arange(3), callback=lambda t: seen.append(t.clone()))
    ways = torch.stack(seen)
    assert (ways[1:] >= ways[:-1]).all()
    assert (ways[-1] == 1).all()


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
    expected = torch.cat([model_density(worlds[int(label)], x[i : i + 1]) for i, label in enumerate(labels)])
    torch.testing.assert_close(found.log_prob, expected, rtol=0, atol=1e-2)


def test_the_bound_of_gaussian_data_is_tight() -> None:
    """With the exact score the reverse SDE's bound is the likelihood: equal on average within 5 standard errors."""
    world, n = Gaussian.isotropic(0.5, SHAPE), 64
    x = world.sample(n, torch.Generator().manual_seed(0), level=LEVELS.sigma_min)
    bound, error = evidence_bound(denoiser(world), x, LEVELS, torch.arange(n), draws=64)
    gap = (model_density(world, x) - bound).mean()
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"probes": "normal"}, "probes: expected one of rademacher, gaussian, exact, got 'normal'"),
        ({"mode": "backward"}, "mode: expected one of reverse, forward, got 'backward'"),
        ({"count": 0}, "count: expected a positive integer, got 0"),
        ({"tolerance": 0.0}, "tolerance: expected a number between 0 and 1, got 0.0"),
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
