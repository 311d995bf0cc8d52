"""Image to noise and back, and the arc between two noises."""

import torch

from ctm_fast.diffusion import karras_sigmas, solve_heun
from ctm_fast.samplers import invert, slerp
from tests.worlds import rotated_gaussian


def test_inversion_gives_the_noise_that_the_ode_takes_back() -> None:
    """To 1e-3 of the image by the solver, and by the exact jump: the noise is the right one, not only a fixed point."""
    world = rotated_gaussian((1, 2, 2))
    x = world.sample(8, torch.Generator().manual_seed(0), level=0.002).float()
    sigmas = karras_sigmas(256).tolist()
    x_T = invert(world.denoise, x, sigmas)
    back = solve_heun(world.denoise, x_T, [torch.full((8,), sigma) for sigma in sigmas])
    assert (back - x).abs().max() < 1e-3
    top, bottom = torch.full((8,), 80.0), torch.full((8,), 0.002)
    assert (world.jump(x_T, top, bottom) - x).abs().max() < 1e-3
    torch.testing.assert_close(x_T, world.jump(x, bottom, top), rtol=2e-3, atol=0.05)


def test_slerp_keeps_the_norm_and_ends_at_both() -> None:
    a, b = torch.randn(2, 5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    a, b = (noise / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for noise in (a, b))
    middle = slerp(a, b, 0.25)
    torch.testing.assert_close(middle.flatten(1).norm(dim=1), torch.ones(5))
    cosine = (a * b).flatten(1).sum(1)
    torch.testing.assert_close((a * middle).flatten(1).sum(1), (0.25 * cosine.acos()).cos())
    torch.testing.assert_close(slerp(a, a, 0.3), a)
