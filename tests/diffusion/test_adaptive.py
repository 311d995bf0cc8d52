"""The adaptive solver against closed forms, and that each sample goes at its own pace."""

import math

import pytest
import torch
from torch import Tensor

from ctm_fast.diffusion.adaptive import solve_adaptive
from ctm_fast.errors import ConfigError


@pytest.mark.parametrize("tolerance", [1e-4, 1e-7, 1e-10])
def test_an_oscillator_is_solved_to_its_tolerance(tolerance: float) -> None:
    """d2y/dt2 = -w^2 y for four frequencies: fast ones take more steps, and no one pays for another."""
    w = torch.tensor([0.5, 1.0, 5.0, 20.0], dtype=torch.float64)

    def slope(index: Tensor, y: Tensor, t: Tensor) -> Tensor:
        return torch.stack([y[:, 1], -w[index].square() * y[:, 0]], 1)

    start = torch.tensor([[1.0, 0.0]], dtype=torch.float64).repeat(4, 1)
    solution = solve_adaptive(slope, start, 0.0, 3.0, rtol=tolerance, atol=tolerance)
    exact = torch.stack([(3 * w).cos(), -w * (3 * w).sin()], 1)
    assert ((solution.y - exact).abs() / w.view(-1, 1).clamp(min=1)).max() < 300 * tolerance
    evaluations = solution.evaluations.tolist()
    assert evaluations == sorted(evaluations)
    assert evaluations[3] > 3 * evaluations[0]
    alone = solve_adaptive(lambda i, y, t: slope(i * 0, y, t), start[:1], 0.0, 3.0, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(alone.y, solution.y[:1], rtol=0, atol=1e-12)
    assert alone.evaluations == evaluations[0]


def test_it_is_of_fifth_order() -> None:
    """The step follows the tolerance's fifth root: evaluations grow as tolerance^(-1/5)."""

    def slope(index: Tensor, y: Tensor, t: Tensor) -> Tensor:
        return -y * t[:, None].cos()

    start = torch.ones(1, 1, dtype=torch.float64)
    counts = [
        int(solve_adaptive(slope, start, 0.0, 40.0, rtol=tolerance, atol=tolerance).evaluations)
        for tolerance in (1e-8, 1e-12)
    ]
    assert 4.5 < counts[1] / counts[0] < 8  # 10^(4/5) is 6.3; of fourth order it would be 10


def test_a_scalar_is_not_drowned_by_an_image() -> None:
    """The last number turns fast while a thousand others rest: without its own norm its error is averaged away."""

    def slope(index: Tensor, y: Tensor, t: Tensor) -> Tensor:
        out = torch.zeros_like(y)
        out[:, -1] = 50 * (50 * t).cos()
        return out

    start = torch.zeros(1, 1001, dtype=torch.float64)
    errors = [
        abs(float(solve_adaptive(slope, start, 0.0, 1.0, rtol=1e-6, atol=1e-6, scalars=k).y[0, -1]) - math.sin(50))
        for k in (0, 1)
    ]
    assert 10 * errors[1] < errors[0]


def test_what_cannot_be_solved_is_said() -> None:
    start = torch.ones(2, 1, dtype=torch.float64)
    with pytest.raises(ConfigError, match="got 1e-05, 1e-05, unfinished for 2 of 2 samples"):
        solve_adaptive(lambda i, y, t: (1000 * t[:, None]).sin() * 1000, start, 0.0, 10.0, max_steps=20)
    with pytest.raises(ConfigError, match="expected finite values along the ODE, got others for sample 1"):
        solve_adaptive(lambda i, y, t: torch.where(i[:, None] == 1, math.nan, y), start, 0.0, 1.0)
    empty = solve_adaptive(lambda i, y, t: y, start[:0], 0.0, 1.0)
    assert empty.y.shape == (0, 1)
