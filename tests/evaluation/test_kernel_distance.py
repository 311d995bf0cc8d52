"""The kernel distance against its closed form of Gaussians, and torchmetrics."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctm_fast.evaluation import kernel_distance as module
from ctm_fast.evaluation.kernel_distance import kernel_distance

D = 4


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class World:
    """N(mean, cov) in D dimensions."""

    def __init__(self, seed: int, shift: float) -> None:
        self.mean = 0.3 * draw(D, seed=seed) + shift
        self.root = draw(D, D, seed=seed + 1) / 2
        self.cov = self.root @ self.root.T

    def sample(self, n: int, seed: int) -> Tensor:
        return self.mean + draw(n, D, seed=seed) @ self.root.T


def expected_kernel(a: World, b: World) -> float:
    """E (x . y / D + 1)^3 of independent x, y, by the first three moments of z = x . y.

    E z   = a . b
    E z^2 = tr((A + a a^T) (B + b b^T))
    E z^3 = E over y of (a . y)^3 + 3 (a . y) (y^T A y), given which z is N(a . y, y^T A y)
          = m^3 + 3 m a^T B a + 3 (m (b^T A b + tr A B) + 2 a^T B A b),   m = a . b
    """
    m = a.mean @ b.mean
    second = torch.trace((a.cov + torch.outer(a.mean, a.mean)) @ (b.cov + torch.outer(b.mean, b.mean)))
    third = (
        m**3
        + 3 * m * (a.mean @ b.cov @ a.mean)
        + 3 * (m * (b.mean @ a.cov @ b.mean + torch.trace(a.cov @ b.cov)) + 2 * a.mean @ b.cov @ a.cov @ b.mean)
    )
    return float(third / D**3 + 3 * second / D**2 + 3 * m / D + 1)


def exact(a: World, b: World) -> float:
    return expected_kernel(a, a) + expected_kernel(b, b) - 2 * expected_kernel(a, b)


REAL, GENERATED = World(1, 0.0), World(11, 0.4)


def test_the_closed_form_is_the_kernels_mean() -> None:
    """Independent pairs, 5 standard errors: else the test below would compare two errors."""
    x, y = REAL.sample(400_000, 1), GENERATED.sample(400_000, 2)
    kernel = ((x * y).sum(1) / D + 1) ** 3
    assert abs(float(kernel.mean()) - expected_kernel(REAL, GENERATED)) < 5 * float(kernel.std()) / 400_000**0.5


@pytest.mark.parametrize("block_size", [10, 100])
def test_it_is_unbiased_and_its_error_is_right(block_size: int) -> None:
    """40 distances of 1,000 samples: their mean within 4 standard errors, their spread as each says on its own."""
    found = [
        kernel_distance(REAL.sample(1000, 2 * i), GENERATED.sample(1000, 2 * i + 1), block_size=block_size)
        for i in range(100, 140)
    ]
    values = np.array([one.value for one in found])
    assert abs(values.mean() - exact(REAL, GENERATED)) < 4 * values.std() / 40**0.5
    said = np.mean([one.standard_error for one in found])
    assert values.std() == pytest.approx(said, rel=0.4)


def test_a_sample_is_no_pair_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: with the diagonal, over m^2, small blocks are far from the closed form."""

    def biased(x: Tensor, y: Tensor) -> Tensor:
        return module._kernel(x, x).mean() + module._kernel(y, y).mean() - 2 * module._kernel(x, y).mean()

    x, y = REAL.sample(20_000, 1), GENERATED.sample(20_000, 2)
    truth = exact(REAL, GENERATED)
    right = kernel_distance(x, y, block_size=10)
    assert abs(right.value - truth) < 4 * right.standard_error
    monkeypatch.setattr(module, "_unbiased", biased)
    wrong = kernel_distance(x, y, block_size=10)
    assert abs(wrong.value - truth) > 10 * wrong.standard_error


def test_the_same_world_is_at_zero() -> None:
    found = kernel_distance(REAL.sample(20_000, 1), REAL.sample(10_000, 2))
    assert abs(found.value) < 4 * found.standard_error
    assert (found.blocks, found.block_size) == (10, 1000)


class Flat(nn.Module):
    """Features that torchmetrics takes."""

    num_features = D

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).double()


def test_one_block_is_torchmetrics() -> None:
    """Its subsets of all samples are one block."""
    image = pytest.importorskip("torchmetrics.image.kid", reason="the distance to compare with is torchmetrics'")
    x, y = REAL.sample(50, 1), GENERATED.sample(50, 2)
    metric = image.KernelInceptionDistance(feature=Flat(), subsets=1, subset_size=50)
    metric.update(x.view(50, 1, 2, 2), real=True)
    metric.update(y.view(50, 1, 2, 2), real=False)
    assert float(module._unbiased(x, y)) == pytest.approx(float(metric.compute()[0]), rel=1e-5)


def test_blocks_are_of_the_index() -> None:
    """The same samples in the same blocks, each in one block, whatever their features."""
    blocks = module._blocks(105, 10, 0)
    assert len(blocks) == 10
    assert len(torch.cat(blocks).unique()) == 100
    assert torch.equal(torch.cat(blocks), torch.cat(module._blocks(105, 10, 0)))
    assert not torch.equal(torch.cat(blocks), torch.cat(module._blocks(105, 10, 1)))
    x, y = REAL.sample(200, 1), GENERATED.sample(300, 2)
    found = kernel_distance(x, y)
    assert (found.blocks, found.block_size) == (10, 20)
    assert kernel_distance(x.float().double(), y) != found
    assert replace(kernel_distance(x, y)) == found


@pytest.mark.parametrize(
    ("n", "m", "d", "size"), [(19, 100, D, 10), (100, 19, D, 10), (100, 100, 3, 10), (50, 50, D, 1)]
)
def test_refused(n: int, m: int, d: int, size: int) -> None:
    with pytest.raises(
        ValueError, match=rf"of 20 samples or more in blocks of 2 or more, got \[{n}, 4\] and \[{m}, {d}\]"
    ):
        kernel_distance(torch.zeros(n, D), torch.zeros(m, d), block_size=size)
