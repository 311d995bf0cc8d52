"""Samplers against the published code, against Gaussian data, and their edges."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from ctm_fast.analytic import Gaussian
from ctm_fast.diffusion.schedule import Levels, grid_sigmas, karras_sigmas, sampler_sigmas
from ctm_fast.errors import LevelError
from ctm_fast.models import CTM
from ctm_fast.ops import Stream, gamma_step, philox_normal, precond_combine
from ctm_fast.samplers import (
    Churn,
    dpm_solver_sample,
    euler_sample,
    gamma_sample,
    generate,
    heun_sample,
    jump_sample,
    renoise_levels,
    renoise_with,
    two_time_jumps,
)
from tests.golden import Golden, assert_agree
from tests.worlds import assert_marginal, rotated_gaussian


@pytest.fixture(scope="module", params=["cifar/samplers.npz", "imagenet/samplers.npz"])
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


@pytest.fixture(scope="module")
def model(golden: Golden) -> CTM:
    return golden.student("w")


@pytest.mark.parametrize("steps", [1, 2, 4])
@torch.no_grad()
def test_exact_sampling_of_the_published_code(golden: Golden, model: CTM, steps: int) -> None:
    calls = []

    def jump(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        calls.append((t, s))
        return model.jump(x, t, s, golden["y"])

    sample = gamma_sample(jump, golden["x_T"], sampler_sigmas(steps).tolist(), gamma=0.0)
    assert len(calls) == steps
    assert_agree(sample, golden[f"exact_{steps}"], golden.tolerance)


@pytest.mark.parametrize("gamma", [0.3, 0.7, 1.0])
@torch.no_grad()
def test_gamma_sampling_is_the_published_formula(golden: Golden, model: CTM, gamma: float) -> None:
    """Written out for four steps, in float64 outside the network.

    The golden arrays cm_4 and, of cifar, gamma_*_4 are not used: they are uncorrelated with the noise z of their file
    (|r| < 0.05 where the last re-noising alone gives 0.47 for cm_4), so the noise that made them is not known.
    """
    labels, z, x = golden["y"], golden["z"].double(), golden["x_T"].double()
    tau = [80.0, 17.5278, 2.51521, 0.169754, 0.002]
    np.testing.assert_allclose(sampler_sigmas(4), tau, rtol=1e-5)
    tau = sampler_sigmas(4).tolist()

    def published_jump(x: Tensor, t: float, s: float) -> Tensor:
        levels = torch.full((4,), t), torch.full((4,), s)
        g = model.inner(x.float(), *levels, labels).double()
        return s / t * x + (1 - s / t) * g

    for step in range(4):
        s = math.sqrt(1 - gamma**2) * (tau[step + 1] - 0.002) + 0.002
        x = published_jump(x, tau[step], s)
        if step < 3:
            x = x + math.sqrt(tau[step + 1] ** 2 - s**2) * z[step]

    def jump(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return model.jump(x, t, s, labels)

    sample = gamma_sample(
        jump, golden["x_T"], tau, gamma=gamma, jump_renoise=renoise_with(jump, lambda i, x: golden["z"][i])
    )
    assert_agree(sample, x.float(), golden.tolerance)


@pytest.mark.parametrize("gamma", [0.3, 0.7])
@torch.no_grad()
def test_gamma_sampling_of_the_published_code(gamma: float) -> None:
    golden = Golden("imagenet/samplers.npz")
    model = golden.student("w")

    def jump(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return model.jump(x, t, s, golden["y"])

    sample = gamma_sample(
        jump,
        golden["x_T"],
        sampler_sigmas(4).tolist(),
        gamma=gamma,
        jump_renoise=renoise_with(jump, lambda i, x: golden["z"][i]),
    )
    assert_agree(sample, golden[f"gamma_{gamma}_4"], golden.tolerance)


@torch.no_grad()
def test_heun_of_the_published_code(golden: Golden, model: CTM) -> None:
    sample = heun_sample(
        lambda x, sigma: model.denoise(x, sigma, golden["y"]), golden["x_T"], karras_sigmas(5).tolist()
    )
    assert_agree(sample, golden["heun_5"], golden.tolerance)


def exact_jump(world: Gaussian) -> object:
    def jump(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return precond_combine(x, world.raw(x, t, s, sigma_data=0.5), t, s, sigma_data=0.5)

    return jump


@pytest.mark.parametrize("renoise", ["published", "paper"])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("isotropic", [True, False])
def test_gamma_sampling_keeps_the_marginal_of_gaussian_data(gamma: float, renoise: str, isotropic: bool) -> None:
    """Exact F*, noise of gamma_step, 20,000 samples."""
    shape = (1, 2, 2)
    world = Gaussian.isotropic(0.5, shape) if isotropic else rotated_gaussian(shape)
    n = 20_000
    x_T = world.sample(n, torch.Generator().manual_seed(0), level=80.0).float()
    seeds = torch.arange(n)

    def jump_renoise(x: Tensor, t: Tensor, s: Tensor, t_next: Tensor, i: int) -> Tensor:
        return gamma_step(x, world.raw(x, t, s, sigma_data=0.5), t, s, t_next, seeds, i, sigma_data=0.5)

    x = gamma_sample(
        exact_jump(world),
        x_T,
        sampler_sigmas(4).tolist(),
        gamma=gamma,
        renoise=renoise,  # type: ignore[arg-type]
        jump_renoise=jump_renoise,  # type: ignore[arg-type]
    )
    assert_marginal(world, x, level=0.002)


def test_renoise_levels() -> None:
    sigmas = sampler_sigmas(4).tolist()
    assert renoise_levels(sigmas, 0.0) == sigmas[1:]
    assert renoise_levels(sigmas, 1.0) == [sigmas[-1]] * 4
    between = renoise_levels(sigmas, 0.5)
    assert between[0] == pytest.approx(math.sqrt(0.75) * (sigmas[1] - 0.002) + 0.002)
    assert all(s >= sigmas[-1] for gamma in (0.1, 0.5, 0.9, 0.999) for s in renoise_levels(sigmas, gamma))
    assert between[-1] == sigmas[-1]
    paper = renoise_levels(sigmas, 0.5, renoise="paper")
    assert paper[:3] == pytest.approx([math.sqrt(0.75) * sigma for sigma in sigmas[1:4]])
    assert paper[-1] == sigmas[-1] == renoise_levels(sigmas, 0.999, renoise="paper")[-1]
    assert renoise_levels(sigmas, 0.0, renoise="paper") == sigmas[1:]
    assert renoise_levels(sigmas, 1.0, renoise="paper") == [sigmas[-1]] * 4
    with pytest.raises(ValueError, match=r"^renoise: expected one of published, paper, got 'mine'$"):
        renoise_levels(sigmas, 0.5, renoise="mine")  # type: ignore[arg-type]


def test_gamma_of_0_and_1_are_exact_and_consistency_model_sampling_to_the_bit(golden: Golden, model: CTM) -> None:
    """Both written out; the noise of gamma = 1 is the seeds' own."""
    sigmas, labels, seeds = sampler_sigmas(3).tolist(), golden["y"], torch.arange(4)
    level = [torch.full((4,), sigma) for sigma in sigmas]
    with torch.no_grad():
        exact = consistency = golden["x_T"]
        for i in range(3):
            exact = model.jump(exact, level[i], level[i + 1], labels)
            if i < 2:
                args = level[i], level[3], level[i + 1], seeds, i, labels
                consistency = model.jump_renoise(consistency, *args)
            else:
                consistency = model.jump(consistency, level[i], level[3], labels)

        def jump(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
            return model.jump(x, t, s, labels)

        def jump_renoise(x: Tensor, t: Tensor, s: Tensor, t_next: Tensor, i: int) -> Tensor:
            return model.jump_renoise(x, t, s, t_next, seeds, i, labels)

        for gamma, expected in ((0.0, exact), (1.0, consistency)):
            for renoise in ("published", "paper"):
                found = gamma_sample(
                    jump,
                    golden["x_T"],
                    sigmas,
                    gamma=gamma,
                    renoise=renoise,  # type: ignore[arg-type]
                    jump_renoise=jump_renoise,
                )
                assert torch.equal(found, expected)


def test_two_times_of_the_training_grid() -> None:
    """Jump to tau(i1), noise up to tau(i2), jump to sigma_min: the marginal of Gaussian data is kept."""
    levels, n = Levels(), 20_000
    jumps = two_time_jumps(14, 11, points=18, levels=levels)
    tau = karras_sigmas(18)
    assert jumps == [(80.0, tau[14]), (tau[11], 0.002)]
    assert two_time_jumps(9, 9, points=18, levels=levels) == [(80.0, tau[9]), (tau[9], 0.002)]
    world = rotated_gaussian((1, 2, 2))
    generator = torch.Generator().manual_seed(1)
    x = jump_sample(
        world.jump,
        world.sample(n, generator, level=80.0),
        jumps,
        jump_renoise=renoise_with(world.jump, lambda i, x: torch.randn(x.shape, generator=generator, dtype=x.dtype)),
    )
    assert_marginal(world, x, level=0.002)
    for i1, i2 in ((11, 14), (18, 3), (3, 0)):
        with pytest.raises(LevelError, match=f"^i1, i2: expected 0 < i2 <= i1 < 18, got {i1}, {i2}$"):
            two_time_jumps(i1, i2, points=18, levels=levels)


@pytest.mark.parametrize(
    ("jumps", "message"),
    [
        ([], "at least one"),
        ([(80.0, 0.0)], "positive"),
        ([(math.nan, 1.0)], "finite"),
        ([(1.0, 2.0)], r"s <= t, got \(1.0, 2.0\)"),
        ([(80.0, 2.0), (1.0, 0.002)], "at or above the level reached, got 2.0 then 1.0 at 0"),
    ],
)
def test_jumps_out_of_order(jumps: list[tuple[float, float]], message: str) -> None:
    with pytest.raises(LevelError, match=message):
        jump_sample(lambda x, t, s: x, torch.zeros(1, 1, 2, 2), jumps)


def test_grid_sigmas() -> None:
    np.testing.assert_array_equal(grid_sigmas((0, 3, 17), points=18), karras_sigmas(18)[[0, 3, 17]])
    for indices in ((0, 18), (-1, 2)):
        with pytest.raises(LevelError, match=r"^indices: expected 0\.\.17, got"):
            grid_sigmas(indices, points=18)
    with pytest.raises(LevelError, match="strictly increasing"):
        grid_sigmas((3, 3), points=18)


@pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0])
def test_the_network_never_sees_a_level_below_sigma_min(gamma: float) -> None:
    seen = []

    def jump(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        seen.extend([t, s])
        return x

    gamma_sample(
        jump,
        torch.zeros(1, 1, 2, 2),
        sampler_sigmas(5).tolist(),
        gamma=gamma,
        jump_renoise=renoise_with(jump, lambda i, x: torch.randn_like(x)),
    )
    assert min(float(level) for level in seen) >= torch.tensor(0.002).item()


@pytest.mark.parametrize("gamma", [-0.1, 1.1, math.nan])
def test_gamma_out_of_range(gamma: float) -> None:
    with pytest.raises(LevelError, match="gamma: expected 0 <= gamma <= 1"):
        renoise_levels([80.0, 0.002], gamma)


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([80.0], "at least 2"),
        ([0.002, 80.0], "strictly decreasing"),
        ([80.0, 80.0, 0.002], "strictly decreasing"),
        ([80.0, 0.0], "positive"),
        ([80.0, math.nan], "finite"),
        ([math.inf, 1.0], "finite"),
    ],
)
def test_levels_out_of_order(sigmas: list[float], message: str) -> None:
    def untouched(*args: object) -> Tensor:
        raise AssertionError("work was done before the levels were checked")

    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(LevelError, match=message):
        gamma_sample(untouched, x, sigmas)
    with pytest.raises(LevelError, match=message):
        heun_sample(untouched, x, sigmas)


@pytest.mark.parametrize("sigmas", [[], [math.nan], [math.inf], [-1.0], [0.0], [1.0, 2.0]])
def test_levels_of_euler(sigmas: list[float]) -> None:
    """One is enough, but it is checked as well."""

    def untouched(*args: object) -> Tensor:
        raise AssertionError("work was done before the levels were checked")

    with pytest.raises(LevelError, match="sigmas: expected"):
        euler_sample(untouched, torch.zeros(1, 1, 2, 2), sigmas)


def test_one_euler_step_is_the_denoiser() -> None:
    world = rotated_gaussian((1, 2, 2))
    x = world.sample(3, torch.Generator().manual_seed(0), level=80.0)
    expected = world.denoise(x, torch.full((3,), 80.0))
    torch.testing.assert_close(euler_sample(world.denoise, x, [80.0]), expected)


def test_heun_converges_on_gaussian_data() -> None:
    world = rotated_gaussian((1, 2, 2))
    x = world.sample(6, torch.Generator().manual_seed(0), level=80.0)
    exact = world.jump(x, torch.full((6,), 80.0), torch.zeros(6))
    errors = []
    for levels in (60, 120):
        seen: list[int] = []
        sampled = heun_sample(
            world.denoise, x, karras_sigmas(levels).tolist(), callback=lambda i, x, seen=seen: seen.append(i)
        )
        assert seen == list(range(levels))
        errors.append((sampled - exact).abs().max().item())
    assert errors[1] < 3e-3
    assert errors[0] / errors[1] > 3  # second order


@pytest.mark.parametrize("sample", [heun_sample, euler_sample])
def test_churn_keeps_the_marginal(sample: Callable[..., Tensor]) -> None:
    """EDM's stochastic sampler on Gaussian data; Euler's first-order error takes more levels to vanish."""
    world, n = rotated_gaussian((1, 2, 2)), 20_000
    generator = torch.Generator().manual_seed(2)
    sigmas = karras_sigmas(64 if sample is heun_sample else 1000).tolist()
    seen = []

    def noise(i: int, x: Tensor) -> Tensor:
        seen.append(i)
        return torch.randn(x.shape, generator=generator, dtype=x.dtype)

    x_T = world.sample(n, generator, level=80.0)
    x = sample(world.denoise, x_T, sigmas, churn=Churn(20.0, lowest=0.05, highest=50.0), noise=noise)
    assert seen == list(range(len(sigmas)))
    assert_marginal(world, x, level=0.0)


def test_churn_is_the_published_formula() -> None:
    churn = Churn(8.0, lowest=1.0, highest=10.0)
    assert churn.level(0.5, 16) == 0.5
    assert churn.level(20.0, 16) == 20.0
    assert churn.level(2.0, 40) == pytest.approx(2.4)
    assert churn.level(2.0, 4) == pytest.approx(2 * math.sqrt(2))
    world = rotated_gaussian((1, 2, 2))
    x = world.sample(3, torch.Generator().manual_seed(0), level=5.0)
    plain = heun_sample(world.denoise, x, [5.0, 1.0])
    still = heun_sample(world.denoise, x, [5.0, 1.0], churn=Churn(0.0), noise=lambda i, x: torch.ones_like(x))
    assert torch.equal(plain, still)
    seen: list[Tensor] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(x)
        return x

    heun_sample(denoise, x, [5.0, 1.0], churn=Churn(0.4, inflation=1.1), noise=lambda i, x: torch.ones_like(x))
    torch.testing.assert_close(seen[0], x + 1.1 * math.sqrt(6.0**2 - 5.0**2))
    with pytest.raises(ValueError, match=r"^noise: expected a callable with churn, got None$"):
        heun_sample(world.denoise, x, [5.0, 1.0], churn=churn)
    with pytest.raises(LevelError, match="amount, inflation"):
        Churn(-1.0)
    with pytest.raises(LevelError, match="lowest, highest"):
        Churn(1.0, lowest=2.0, highest=1.0)


def test_dpm_solver_converges_on_gaussian_data_with_one_evaluation_a_step() -> None:
    world = rotated_gaussian((1, 2, 2))
    x = world.sample(6, torch.Generator().manual_seed(0), level=80.0)
    errors = []
    for levels in (80, 160):
        calls = []

        def denoise(x: Tensor, sigma: Tensor, calls: list[Tensor] = calls) -> Tensor:
            calls.append(sigma)
            return world.denoise(x, sigma)

        sigmas = karras_sigmas(levels).tolist()
        found = dpm_solver_sample(denoise, x, sigmas)
        assert [float(sigma[0]) for sigma in calls] == pytest.approx(sigmas)
        errors.append((found - world.jump(x, torch.full((6,), 80.0), torch.zeros(6))).abs().max().item())
    assert errors[1] < 5e-3
    assert errors[0] / errors[1] > 3  # second order
    few = karras_sigmas(20).tolist()
    exact = world.jump(x, torch.full((6,), 80.0), torch.zeros(6))
    by_euler, by_dpm = (s(world.denoise, x, few) for s in (euler_sample, dpm_solver_sample))
    assert (by_dpm - exact).abs().max() < 0.5 * (by_euler - exact).abs().max()


def test_renoising_needs_a_source_of_noise() -> None:
    with pytest.raises(ValueError, match=r"^jump_renoise: expected a callable"):
        gamma_sample(lambda x, t, s: x, torch.zeros(1, 1, 2, 2), [80.0, 1.0, 0.002], gamma=0.5)


def test_generated_noise_is_the_seeds_own_unless_overridden(model: CTM) -> None:
    levels, seeds, labels = Levels(), torch.tensor([7, 2**62]), torch.tensor([1, 2])

    def own(i: int, x: Tensor) -> Tensor:
        return philox_normal(seeds, i, x.shape[1:], stream=Stream.RENOISE)

    sample = generate(model, levels, seeds, labels, steps=3, gamma=0.6)
    torch.testing.assert_close(generate(model, levels, seeds, labels, steps=3, gamma=0.6, noise=own), sample)
    other = generate(model, levels, seeds, labels, steps=3, gamma=0.6, noise=lambda i, x: torch.zeros_like(x))
    assert (other - sample).abs().max() > 0.1
    alone = generate(model, levels, seeds[1:], labels[1:], steps=3, gamma=0.6)
    torch.testing.assert_close(alone, sample[1:], rtol=0, atol=1e-4)
