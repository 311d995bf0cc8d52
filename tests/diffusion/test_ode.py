"""The solver against the exact trajectories of Gaussian data."""

import numpy as np
import pytest
import torch

from ctm_fast.analytic import Gaussian
from ctm_fast.diffusion.ode import euler_step, heun_step, solve_heun
from ctm_fast.diffusion.schedule import karras_sigmas
from ctm_fast.ops.reference.precond_combine import precond_combine
from tests.worlds import rotated_gaussian


@pytest.mark.parametrize("world", [Gaussian.isotropic(0.5, (1, 3, 3)), rotated_gaussian((1, 3, 3))])
def test_heun_converges_at_second_order_to_the_exact_jump(world: Gaussian) -> None:
    x = world.sample(5, torch.Generator().manual_seed(0), level=80.0)
    t, u = torch.full((5,), 80.0, dtype=torch.float64), torch.full((5,), 0.1, dtype=torch.float64)
    errors = []
    for points in (33, 65):
        fraction = torch.arange(points, dtype=torch.float64) / (points - 1)
        levels = ((80 ** (1 / 7) + fraction * (0.1 ** (1 / 7) - 80 ** (1 / 7))) ** 7)[:, None].expand(points, 5)
        solved = solve_heun(world.denoise, x, list(levels))
        errors.append((solved - world.jump(x, t, u)).abs().max().item())
    assert errors[1] < 1e-2
    assert 3.5 < errors[0] / errors[1] < 4.5


def test_euler_step_is_the_jump_of_a_network_that_returns_zero() -> None:
    """G with F = 0 is one Euler step with D = c_skip x."""
    world = Gaussian.isotropic(0.5, (1, 2, 2))
    x = world.sample(4, torch.Generator().manual_seed(0), level=3.0)
    t, s = torch.full((4,), 3.0, dtype=torch.float64), torch.full((4,), 0.7, dtype=torch.float64)
    jump = precond_combine(x, torch.zeros_like(x), t, s, 0.5)
    torch.testing.assert_close(jump, euler_step(world.denoise, x, t, s), rtol=1e-6, atol=1e-6)


def test_heun_step_calls_the_denoiser_twice_and_a_chain_2k_times() -> None:
    calls = []

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        calls.append(sigma)
        return 0.5 * x

    x = torch.randn(2, 1, 2, 2)
    levels = list(torch.from_numpy(karras_sigmas(8)).float()[:, None].expand(8, 2))
    heun_step(denoise, x, levels[0], levels[1])
    assert len(calls) == 2
    solve_heun(denoise, x, levels)
    assert len(calls) == 2 + 14
    np.testing.assert_allclose(calls[-1], 0.002)  # corrected on the last interval too
