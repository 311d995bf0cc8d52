"""Frechet distances against closed forms, SciPy and torchmetrics."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctm_fast.evaluation.frechet import frechet_distance, half_half_floor, numerical_rank, pixel_frechet
from ctm_fast.evaluation.moments import Moments, moments


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(d: int, seed: int, rank: int | None = None) -> torch.Tensor:
    root = draw(d, rank or d, seed=seed)
    return root @ root.T


def test_frechet_of_gaussians_in_one_dimension() -> None:
    """(m1 - m2)^2 + (s1 - s2)^2."""
    one = torch.ones(1)
    assert frechet_distance(3 * one, 4 * one[None], -one, 9 * one[None]) == pytest.approx(16 + 1, abs=1e-12)


def test_frechet_of_commuting_covariances() -> None:
    """Both diagonal in one rotated basis: the sum of (s1 - s2)^2 over it."""
    basis, _ = torch.linalg.qr(draw(5, 5))
    s1, s2 = draw(5, seed=1).abs(), draw(5, seed=2).abs()
    covs = [(basis * s.square()) @ basis.T for s in (s1, s2)]
    mean = torch.zeros(5)
    expected = float((s1 - s2).square().sum())
    assert frechet_distance(mean, covs[0], mean, covs[1]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("rank", [6, 3])
def test_frechet_is_scipys(rank):
    """Covariances that do not commute, of full rank and singular."""
    linalg = pytest.importorskip("scipy.linalg", reason="the square root to compare with is SciPy's")
    mean_1, mean_2 = draw(6, seed=3), draw(6, seed=4)
    cov_1, cov_2 = covariance(6, 5, rank), covariance(6, 6)
    root = np.trace(linalg.sqrtm((cov_1 @ cov_2).numpy())).real
    expected = float((mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace()) - 2 * root
    assert frechet_distance(mean_1, cov_1, mean_2, cov_2) == pytest.approx(expected, rel=1e-6)


def test_frechet_is_symmetric_and_zero_to_itself() -> None:
    mean_1, mean_2, cov_1, cov_2 = draw(6, seed=3), draw(6, seed=4), covariance(6, 5, 2), covariance(6, 6)
    there, back = frechet_distance(mean_1, cov_1, mean_2, cov_2), frechet_distance(mean_2, cov_2, mean_1, cov_1)
    assert there == pytest.approx(back, rel=1e-6)
    assert frechet_distance(mean_1, cov_1, mean_1, cov_1) == pytest.approx(0, abs=1e-6)


def test_pixel_frechet_of_a_shift() -> None:
    images = draw(50, 3, 4, 4).float()
    assert pixel_frechet(images, images + 0.5) == pytest.approx(48 * 0.25, rel=1e-5)
    assert pixel_frechet(images, 3 * images) == pytest.approx(
        float(images.double().flatten(1).var(0).sum() * 4 + images.double().mean(0).square().sum() * 4), rel=1e-6
    )


def test_half_half_floor_is_of_disjoint_halves_and_of_its_seed() -> None:
    images = torch.cat([torch.zeros(20, 1, 2, 2), torch.ones(20, 1, 2, 2)])
    floors = [half_half_floor(images, seed) for seed in range(20)]
    assert floors == [half_half_floor(images, seed) for seed in range(20)]
    assert len({round(floor, 12) for floor in floors}) > 3
    assert max(floors) < 1  # the unshuffled halves are 4 apart
    # Two images, one in each half: disjoint halves have a variance only if there are two in each.
    with pytest.raises(ValueError, match="n at least 2"):
        half_half_floor(images[:2], 0)


def test_half_half_floor_of_a_gaussian() -> None:
    """Two halves of n draws of N(0, I): 2 d / n from the means, d (d + 1) / (2 n) from the covariances."""
    d, n = 16, 2000
    floor = np.mean([half_half_floor(draw(2 * n, 1, 4, 4, seed=seed), seed) for seed in range(40)])
    assert floor == pytest.approx(2 * d / n + d * (d + 1) / (2 * n), rel=0.06)


@pytest.mark.parametrize("n", [200, 40])
def test_frechet_is_scipys_of_features(n: int) -> None:
    """To 1e-8 of the distance where the covariances are regular (n = 200 of 64 dimensions).

    Where they are singular SciPy's own root of the product is good to 1e-6 or so; there the square root of the smaller
    Gram matrix, of the samples, says what is right.
    """
    linalg = pytest.importorskip("scipy.linalg", reason="the square root to compare with is SciPy's")
    real, generated = draw(n, 64, seed=7), draw(n, 64, seed=8) * 1.3 + 0.1
    (mean_1, cov_1), (mean_2, cov_2) = moments(real), moments(generated)
    outer = float((mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace())
    root = np.trace(linalg.sqrtm((cov_1 @ cov_2).numpy())).real
    found = frechet_distance(mean_1, cov_1, mean_2, cov_2)
    assert found == pytest.approx(outer - 2 * root, rel=1e-8 if n > 64 else 1e-4)
    gram = (real - mean_1) @ (generated - mean_2).T / (n - 1)  # its nuclear norm is the trace of the root
    assert found == pytest.approx(outer - 2 * float(torch.linalg.svdvals(gram).sum()), rel=1e-11)


@pytest.mark.parametrize(("n", "m"), [(500, 500), (40, 40), (40, 500)])
def test_order_and_batches_change_no_distance(n: int, m: int) -> None:
    """By 1e-11 of it, of regular and of singular covariances: the streamed sums differ in their last bits.

    Rounding's eigenvalues of a singular covariance, 1e-16, would count as 1e-8 beside a regular one.
    """
    real, generated = draw(n, 64, seed=7) + 5, draw(m, 64, seed=8) * 1.3 + 5
    expected = frechet_distance(*moments(real), *moments(generated))
    for seed, size in ((0, 1), (1, 7), (2, 400)):
        shuffled = real[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]
        streamed = Moments(64)
        for batch in shuffled.split(size):
            streamed.update(batch)
        found = frechet_distance(streamed.mean, streamed.covariance(), *moments(generated))
        assert found == pytest.approx(expected, rel=1e-11)


class Flat(nn.Module):
    """Features that torchmetrics takes: 12 pixels as they are."""

    num_features = 12

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).double()


def test_frechet_is_torchmetrics() -> None:
    """Its FID of the same features; torchmetrics sums squares, which costs it digits."""
    image = pytest.importorskip("torchmetrics.image.fid", reason="the distance to compare with is torchmetrics'")
    real, generated = draw(300, 3, 2, 2, seed=1), draw(200, 3, 2, 2, seed=2) * 0.7 + 0.2
    metric = image.FrechetInceptionDistance(feature=Flat(), input_img_size=(3, 2, 2), normalize=False)
    metric.set_dtype(torch.float64)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    assert pixel_frechet(real, generated) == pytest.approx(float(metric.compute()), rel=1e-8)


def test_the_covariance_is_over_n_minus_1() -> None:
    """Planted fault: over n the distance is another, by more than the tests above allow."""
    real, generated = draw(40, 6, seed=3), 2 * draw(40, 6, seed=4)
    (mean_1, cov_1), (mean_2, cov_2) = moments(real), moments(generated)
    right = frechet_distance(mean_1, cov_1, mean_2, cov_2)
    wrong = frechet_distance(mean_1, cov_1 * 39 / 40, mean_2, cov_2 * 39 / 40)
    expected = np.cov(real.numpy(), rowvar=False), np.cov(generated.numpy(), rowvar=False)
    assert right == pytest.approx(
        frechet_distance(mean_1, *map(torch.tensor, (expected[0], mean_2.numpy(), expected[1])))
    )
    assert abs(wrong / right - 1) > 1e-3


def test_numerical_rank_is_what_the_samples_give() -> None:
    assert numerical_rank(moments(draw(10, 64))[1]) == 9
    assert numerical_rank(moments(draw(100, 64))[1]) == 64


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: frechet_distance(torch.zeros(2), torch.eye(2), torch.zeros(3), torch.eye(3)),
            ValueError,
            r"mean_2: expected \[2\], got \[3\]",
        ),
        (
            lambda: frechet_distance(torch.zeros(2), torch.eye(3), torch.zeros(2), torch.eye(2)),
            ValueError,
            r"cov_1: expected \[2, 2\], got \[3, 3\]",
        ),
        (
            lambda: pixel_frechet(torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2, dtype=torch.uint8)),
            TypeError,
            "images_b: expected a floating-point dtype, got torch.uint8",
        ),
    ],
)
def test_refused(call: Callable[[], float], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_not_a_number_is_not_hidden() -> None:
    images = draw(10, 1, 2, 2)
    broken = images.clone()
    broken[0, 0, 0, 0] = math.nan
    for pair in ((broken, images), (images, broken)):
        with pytest.raises(torch.linalg.LinAlgError):
            pixel_frechet(*pair)
