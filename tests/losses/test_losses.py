"""Losses and weights against closed forms."""

import pytest
import torch

from ctm_fast.analytic import Gaussian
from ctm_fast.losses import WEIGHTINGS, adaptive_weight, distance, dsm_loss, weighting
from ctm_fast.ops import precond_combine


@pytest.mark.parametrize("sigma", [0.05, 0.5, 3.0, 80.0])
def test_dsm_is_one_per_pixel_where_the_network_returns_zero(sigma: float) -> None:
    """On N(0, sigma_data^2 I) a zero network is the exact denoiser (4 standard errors of 160,000 pixels)."""
    world = Gaussian.isotropic(0.5, (1, 4, 4))
    generator = torch.Generator().manual_seed(0)
    x0 = world.sample(10_000, generator).float()
    levels = torch.full((10_000,), sigma)
    x = x0 + sigma * torch.randn(x0.shape, generator=generator)
    D_x = precond_combine(x, torch.zeros_like(x), levels, torch.zeros_like(levels), sigma_data=0.5)
    torch.testing.assert_close(D_x, world.denoise(x, levels), rtol=1e-4, atol=1e-5)
    loss = dsm_loss(D_x, x0, levels, sigma_data=0.5)
    assert loss.shape == (10_000,)
    assert loss.mean().item() == pytest.approx(1.0, abs=4 * (2 / 160_000) ** 0.5)


def test_distances() -> None:
    a, b = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2)
    b[1] = 0
    torch.testing.assert_close(distance("l2", c=0.03)(a, b), torch.tensor([1.0, 0.0]))
    huber = distance("pseudo-huber", c=0.03)(a, b)
    torch.testing.assert_close(huber, torch.tensor([(4 + 0.03**2) ** 0.5 - 0.03, 0.0]))
    a.requires_grad_()
    distance("pseudo-huber", c=0.03)(a, b).sum().backward()
    assert a.grad is not None
    assert torch.isfinite(a.grad).all()


def test_unknown_distance() -> None:
    with pytest.raises(ValueError, match="distance: expected one of l2, pseudo-huber, lpips, efflite0, got 'l1'"):
        distance("l1", c=0.03)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("uniform", [1.0, 1.0, 1.0]),
        ("snr", [16.0, 1.0, 0.25]),
        ("snr+1", [17.0, 2.0, 1.25]),
        ("truncated-snr", [16.0, 1.0, 1.0]),
        ("karras", [20.0, 5.0, 4.25]),  # snr + 1 / 0.5^2
        ("jump", [4.0, 1.0, (4 / 3) ** 2]),  # s/t is 1/2, 0, 1/4
        ("sqrt-t", [0.5, 1.0, 2**0.5]),
    ],
)
def test_weightings(name: str, expected: list[float]) -> None:
    t, s = torch.tensor([0.25, 1.0, 2.0]), torch.tensor([0.125, 0.0, 0.5])
    torch.testing.assert_close(weighting(name, sigma_data=0.5, power=2)(t, s), torch.tensor(expected))


def test_every_weighting_has_a_closed_form() -> None:
    tested = [name for name, _ in test_weightings.pytestmark[0].args[1]]
    assert tuple(tested) == WEIGHTINGS
    with pytest.raises(ValueError, match=r"weighting: expected one of uniform, snr, .*, got 'edm'"):
        weighting("edm", sigma_data=0.5)


def test_adaptive_weight_is_clipped_and_detached() -> None:
    one, small = torch.tensor(1.0, requires_grad=True), torch.tensor(0.0)
    assert adaptive_weight(one, torch.tensor(0.5), lowest=0, highest=1e4).item() == pytest.approx(1 / 0.5001)
    assert adaptive_weight(one, small, lowest=0.01, highest=10).item() == 10
    assert adaptive_weight(small, one, lowest=0.01, highest=10).item() == pytest.approx(0.01)
    assert not adaptive_weight(one, one, lowest=0, highest=1e4).requires_grad
