"""Within-class variance ratios of images whose ratio is known."""

import math

import pytest
import torch

from ctm_fast.evaluation.class_variance import within_class_variance_ratio


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_variance_ratio_is_the_scale_squared() -> None:
    real = draw(60, 1, 3, 3)
    labels = torch.arange(60) % 3
    offsets = 100.0 * labels[:, None, None, None]  # variance between classes does not count
    generated = 0.5 * real + offsets
    assert within_class_variance_ratio(generated, labels, real - offsets, labels) == pytest.approx(0.25, rel=1e-9)


def test_variance_ratio_of_class_means_is_zero() -> None:
    labels = torch.arange(20) % 2
    means = torch.randn(2, 1, 3, 3)[labels]
    assert within_class_variance_ratio(means, labels, draw(20, 1, 3, 3), labels) == pytest.approx(0, abs=1e-12)


def test_variance_ratio_is_unbiased_and_weighs_classes_alike() -> None:
    """Variances of 2 images: (a - b)^2 / 2; classes of different size and number on the two sides."""
    generated = torch.tensor([0.0, 2.0, 0.0, 4.0])[:, None, None, None]
    real = torch.tensor([0.0, 1.0, 2.0, 0.0, 1.0, 7.0, 8.0])[:, None, None, None]
    ratio = within_class_variance_ratio(
        generated, torch.tensor([0, 0, 1, 1]), real, torch.tensor([0, 0, 0, 1, 1, 2, 2])
    )
    assert ratio == pytest.approx(((2 + 8) / 2) / ((1 + 0.5) / 2))


@pytest.mark.parametrize(
    ("labels", "real_labels", "message"),
    [
        ([0, 0, 3, 3], [0, 0, 3, 1], "real: expected at least two images of class 3, got 1"),
        ([0, 0], [0, 0, 0, 0], r"labels of generated: expected \[4\], got \[2\]"),
    ],
)
def test_refused(labels: list[int], real_labels: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        within_class_variance_ratio(
            torch.zeros(4, 1), torch.tensor(labels), torch.zeros(4, 1), torch.tensor(real_labels)
        )


def test_not_a_number_is_not_hidden() -> None:
    images = draw(10, 1, 2, 2)
    broken = images.clone()
    broken[0, 0, 0, 0] = math.nan
    labels = torch.zeros(10, dtype=torch.int64)
    assert math.isnan(within_class_variance_ratio(broken, labels, images, labels))
