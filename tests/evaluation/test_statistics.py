"""Moments, Frechet distances and variance ratios against closed forms and SciPy."""

import math

import numpy as np
import pytest
import torch

from ctm_fast.evaluation.statistics import (
    frechet_distance,
    half_half_floor,
    moments,
    pixel_frechet,
    within_class_variance_ratio,
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(d: int, seed: int, rank: int | None = None) -> torch.Tensor:
    root = draw(d, rank or d, seed=seed)
    return root @ root.T


def test_moments_are_numpys():
    features = draw(9, 4).float()
    mean, cov = moments(features)
    assert mean.dtype == cov.dtype == torch.float64
    np.testing.assert_allclose(mean, features.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(features.double().numpy(), rowvar=False), rtol=1e-12)


def test_moments_keep_small_variances_beside_large_means():
    features = (draw(2000, 3) + 4096).float()
    np.testing.assert_allclose(moments(features)[1], np.cov(features.double().numpy(), rowvar=False), rtol=1e-9)


def test_frechet_of_gaussians_in_one_dimension():
    """(m1 - m2)^2 + (s1 - s2)^2."""
    one = torch.ones(1)
    assert frechet_distance(3 * one, 4 * one[None], -one, 9 * one[None]) == pytest.approx(16 + 1, abs=1e-12)


def test_frechet_of_commuting_covariances():
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


def test_frechet_is_symmetric_and_zero_to_itself():
    mean_1, mean_2, cov_1, cov_2 = draw(6, seed=3), draw(6, seed=4), covariance(6, 5, 2), covariance(6, 6)
    there, back = frechet_distance(mean_1, cov_1, mean_2, cov_2), frechet_distance(mean_2, cov_2, mean_1, cov_1)
    assert there == pytest.approx(back, rel=1e-6)
    assert frechet_distance(mean_1, cov_1, mean_1, cov_1) == pytest.approx(0, abs=1e-6)


def test_pixel_frechet_of_a_shift():
    images = draw(50, 3, 4, 4).float()
    assert pixel_frechet(images, images + 0.5) == pytest.approx(48 * 0.25, rel=1e-5)
    assert pixel_frechet(images, 3 * images) == pytest.approx(
        float(images.double().flatten(1).var(0).sum() * 4 + images.double().mean(0).square().sum() * 4), rel=1e-6
    )


def test_half_half_floor_is_of_disjoint_halves_and_of_its_seed():
    images = torch.cat([torch.zeros(20, 1, 2, 2), torch.ones(20, 1, 2, 2)])
    floors = [half_half_floor(images, seed) for seed in range(20)]
    assert floors == [half_half_floor(images, seed) for seed in range(20)]
    assert len({round(floor, 12) for floor in floors}) > 3
    assert max(floors) < 1  # the unshuffled halves are 4 apart
    # Two images, one in each half: disjoint halves have a variance only if there are two in each.
    with pytest.raises(ValueError, match="n at least 2"):
        half_half_floor(images[:2], 0)


def test_half_half_floor_of_a_gaussian():
    """Two halves of n draws of N(0, I): 2 d / n from the means, d (d + 1) / (2 n) from the covariances."""
    d, n = 16, 2000
    floor = np.mean([half_half_floor(draw(2 * n, 1, 4, 4, seed=seed), seed) for seed in range(40)])
    assert floor == pytest.approx(2 * d / n + d * (d + 1) / (2 * n), rel=0.06)


def test_variance_ratio_is_the_scale_squared():
    real = draw(60, 1, 3, 3)
    labels = torch.arange(60) % 3
    offsets = 100.0 * labels[:, None, None, None]  # variance between classes does not count
    generated = 0.5 * real + offsets
    assert within_class_variance_ratio(generated, labels, real - offsets, labels) == pytest.approx(0.25, rel=1e-9)


def test_variance_ratio_of_class_means_is_zero():
    labels = torch.arange(20) % 2
    means = torch.randn(2, 1, 3, 3)[labels]
    assert within_class_variance_ratio(means, labels, draw(20, 1, 3, 3), labels) == pytest.approx(0, abs=1e-12)


def test_variance_ratio_is_unbiased_and_weighs_classes_alike():
    """Variances of 2 images: (a - b)^2 / 2; classes of different size and number on the two sides."""
    generated = torch.tensor([0.0, 2.0, 0.0, 4.0])[:, None, None, None]
    real = torch.tensor([0.0, 1.0, 2.0, 0.0, 1.0, 7.0, 8.0])[:, None, None, None]
    ratio = within_class_variance_ratio(
        generated, torch.tensor([0, 0, 1, 1]), real, torch.tensor([0, 0, 0, 1, 1, 2, 2])
    )
    assert ratio == pytest.approx(((2 + 8) / 2) / ((1 + 0.5) / 2))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: moments(torch.zeros(1, 3)), ValueError, r"features: expected \[n, D\] .*, got \[1, 3\]"),
        (lambda: moments(torch.zeros(4)), ValueError, "features"),
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
        (
            lambda: within_class_variance_ratio(
                torch.zeros(4, 1), torch.tensor([0, 0, 3, 3]), torch.zeros(4, 1), torch.tensor([0, 0, 3, 1])
            ),
            ValueError,
            "real: expected at least two images of class 3, got 1",
        ),
        (
            lambda: within_class_variance_ratio(
                torch.zeros(4, 1), torch.tensor([0, 0]), torch.zeros(4, 1), torch.tensor([0, 0, 0, 0])
            ),
            ValueError,
            r"labels of generated: expected \[4\], got \[2\]",
        ),
    ],
)
def test_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_not_a_number_is_not_hidden():
    images = draw(10, 1, 2, 2)
    broken = images.clone()
    broken[0, 0, 0, 0] = math.nan
    labels = torch.zeros(10, dtype=torch.int64)
    assert math.isnan(within_class_variance_ratio(broken, labels, images, labels))
    with pytest.raises(torch.linalg.LinAlgError):
        pixel_frechet(broken, images)
    with pytest.raises(torch.linalg.LinAlgError):
        pixel_frechet(images, broken)
