"""Inverse problems: every operator meets its measurement, and on Gaussian data the answer is drawn rightly."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ctm_fast.analytic import Gaussian
from ctm_fast.diffusion import karras_sigmas, sampler_sigmas
from ctm_fast.samplers import (
    Colourisation,
    Inpainting,
    Operator,
    SuperResolution,
    from_stroke,
    renoise_levels,
    restore,
)
from tests.worlds import assert_marginal, rotated_gaussian

MASK = torch.zeros(1, 1, 8, 8)
MASK[..., :5] = 1
OPERATORS = [Inpainting(MASK), Colourisation(), SuperResolution(4)]


def noise_from(seed: int) -> Callable[[int, Tensor], Tensor]:
    def noise(i: int, x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=torch.Generator().manual_seed(1000 * seed + i), dtype=x.dtype)

    return noise


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: type(operator).__name__)
def test_projection_is_orthogonal(operator: Operator) -> None:
    """It meets the measurement, moves nothing that already does, and moves along what the operator sees."""
    a, b = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = operator.forward(b)
    moved = operator.project(a, y)
    torch.testing.assert_close(operator.forward(moved), y)
    torch.testing.assert_close(operator.project(moved, y), moved)
    unseen = b - moved  # has measurement 0
    torch.testing.assert_close(((moved - a) * unseen).sum(), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: type(operator).__name__)
def test_restored_images_measure_as_given(operator: Operator, gamma: float) -> None:
    world = Gaussian.isotropic(0.5, (3, 8, 8))
    generator = torch.Generator().manual_seed(0)
    truth = world.sample(3, generator).float()
    y = operator.forward(truth)
    x_T = world.sample(3, generator, level=80.0).float()
    sigmas = sampler_sigmas(4).tolist()
    found = restore(world.jump, x_T, sigmas, operator=operator, measurement=y, noise=noise_from(0), gamma=gamma)
    assert (operator.forward(found) - y).abs().max() < 1e-6 * max(1.0, float(y.abs().max()))
    assert (found - truth).abs().max() > 0.1


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_on_the_way_the_measurement_is_as_noisy_as_the_image(gamma: float) -> None:
    """After step i the known pixels are y + s z + sqrt(t'^2 - s^2) z', each noise by its number; no z at sigma_min."""
    truth = Gaussian.isotropic(0.5, (3, 8, 8)).sample(2, torch.Generator().manual_seed(0))
    operator, noise, sigmas = Inpainting(MASK), noise_from(4), sampler_sigmas(4).tolist()
    seen: list[Tensor] = []
    restore(
        lambda x, t, s: torch.zeros_like(x),
        torch.zeros_like(truth),
        sigmas,
        operator=operator,
        measurement=operator.forward(truth),
        noise=noise,
        gamma=gamma,
        callback=lambda i, x: seen.append(x),
    )
    for i, s in enumerate(renoise_levels(sigmas, gamma)[:-1]):
        z, again = noise(4 + i, truth), noise(i, truth)
        expected = truth + (s * z if gamma < 1 else 0) + (sigmas[i + 1] ** 2 - s**2) ** 0.5 * again
        torch.testing.assert_close(operator.forward(seen[i]), operator.forward(expected))


def test_a_user_operator_serves() -> None:
    """A single linear functional; what is left of an isotropic Gaussian is a Gaussian in the other directions."""

    class Mean:
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1).mean(1)

        def project(self, x: Tensor, y: Tensor) -> Tensor:
            return x + (y - self.forward(x)).view(-1, 1, 1, 1)

    world, n = Gaussian.isotropic(0.5, (1, 2, 2)), 20_000
    x_T = world.sample(n, torch.Generator().manual_seed(0), level=80.0)
    found = restore(
        world.jump,
        x_T,
        karras_sigmas(5).tolist(),
        operator=Mean(),
        measurement=torch.full((n,), 0.3, dtype=torch.float64),
        noise=noise_from(1),
    )
    torch.testing.assert_close(found.flatten(1).mean(1), torch.full((n,), 0.3, dtype=torch.float64))
    basis = torch.linalg.qr(torch.cat([torch.ones(4, 1), torch.eye(4)[:, :3]], 1).double())[0][:, 1:]
    unseen = (found.flatten(1) @ basis).view(n, 1, 1, 3)
    assert_marginal(Gaussian.isotropic((0.25 + 0.002**2) ** 0.5, (1, 1, 3)), unseen, level=0.0)


def test_a_stroke_of_noise_is_a_sample_and_of_little_noise_the_drawing() -> None:
    world, n = rotated_gaussian((1, 2, 2)), 20_000
    drawing = torch.zeros(n, 1, 2, 2, dtype=torch.float64)
    # From sigma_max on, the drawing is forgotten up to v / (v + sigma_max^2) of it.
    x = from_stroke(world.jump, drawing, sampler_sigmas(3).tolist(), noise=noise_from(2), gamma=0.5)
    assert_marginal(world, x, level=0.002)
    little = from_stroke(world.jump, drawing + 0.5, [0.01, 0.002], noise=noise_from(3))
    assert (little - 0.5).abs().max() < 0.06


def test_messages() -> None:
    x, sigmas = torch.zeros(2, 3, 8, 8), [80.0, 0.002]
    with pytest.raises(ValueError, match=r"^measurement: expected shape \[2, 3, 2, 2\], got \[2, 3, 8, 8\]$"):
        restore(_never, x, sigmas, operator=SuperResolution(4), measurement=x, noise=_never)
    with pytest.raises(ValueError, match=r"^mask: expected 0"):
        Inpainting(torch.full((1, 1, 8, 8), 0.5))
    with pytest.raises(ValueError, match=r"^factor: expected a positive integer, got 0$"):
        SuperResolution(0)
    with pytest.raises(ValueError, match=r"^factor: expected a positive integer, got 1\.5$"):
        SuperResolution(1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^weights: expected finite numbers that are not all 0, got \[0, 0, 0\]$"):
        Colourisation((0, 0, 0))
    with pytest.raises(ValueError, match=r"^mask: expected one that broadcasts to \[2, 3, 8, 8\], got \[5, 2, 3, 8"):
        Inpainting(torch.ones(5, 2, 3, 8, 8)).forward(x)
    with pytest.raises(ValueError, match=r"^measurement: expected finite numbers"):
        restore(_never, x, sigmas, operator=Inpainting(torch.ones(8, 8)), measurement=x / 0, noise=_never)
    with pytest.raises(ValueError, match=r"^x: expected sides that are multiples of 3, got \[8, 8\]$"):
        SuperResolution(3).forward(x)
    with pytest.raises(ValueError, match=r"^x: expected 3 channels, got 1$"):
        Colourisation().forward(x[:, :1])
    with pytest.raises(ValueError, match=r"^sigmas: expected strictly decreasing"):
        from_stroke(_never, x, [1.0, 2.0], noise=_never)


def _never(*args: object) -> Tensor:
    raise AssertionError("work was done before the arguments were checked")
