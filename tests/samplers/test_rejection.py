"""Rejection by a classifier: exact counts, the best of each class, whatever the batch."""

import math

import pytest
import torch
from torch import Tensor

from ctm_fast.samplers import rejection_sample


def sample(seeds: list[int], labels: list[int]) -> Tensor:
    values = [float(seed * 7919 % 101 + 1000 * label) for seed, label in zip(seeds, labels, strict=True)]
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)


def log_prob(images: Tensor, labels: Tensor) -> Tensor:
    return -((images[:, 0, 0, 0] - 1000 * labels) - 50).abs()


@pytest.mark.parametrize("batch", [1, 7, 64, 1000])
def test_the_best_of_each_class_are_kept(batch: int) -> None:
    counts = {3: 10, 1: 4}
    kept = rejection_sample(sample, log_prob, counts, oversampling=0.5, first_seed=5, batch=batch)
    assert kept.labels == [3] * 10 + [1] * 4
    assert kept.images.shape == (14, 1, 2, 2)
    for label, count, seeds in ((3, 10, range(5, 20)), (1, 4, range(20, 26))):
        values = {seed: -abs(seed * 7919 % 101 - 50) for seed in seeds}
        expected = sorted(values, key=lambda seed: (-values[seed], seed))[:count]
        mine = [index for index, other in enumerate(kept.labels) if other == label]
        assert [kept.seeds[index] for index in mine] == expected
        assert [kept.log_probs[index] for index in mine] == [values[seed] for seed in expected]
        assert torch.equal(kept.images[mine], sample(expected, [label] * count))


def test_without_oversampling_every_image_is_kept() -> None:
    kept = rejection_sample(sample, log_prob, {0: 5}, oversampling=0.0)
    assert sorted(kept.seeds) == list(range(5))


def test_messages() -> None:
    def never(*args: object) -> Tensor:
        raise AssertionError("an image was made before the arguments were checked")

    for arguments, message in (
        ({"counts": {}}, "counts: expected at least one class"),
        ({"counts": {1: 0}}, r"counts: expected integers in 1\.\.10000000, got 0 for class 1"),
        ({"counts": {1: 2.5}}, r"counts: .* got 2\.5 for class 1"),
        ({"counts": {1: 10**15}}, "counts: .* got 1000000000000000 for class 1"),
        ({"counts": {1: 2}, "oversampling": -0.5}, r"oversampling: expected a number in 0\.\.1000, got -0\.5"),
        ({"counts": {1: 2}, "oversampling": math.nan}, "oversampling: expected a number"),
        ({"counts": {1: 2}, "oversampling": 1e300}, "oversampling: expected a number"),
        ({"counts": {1: 2}, "first_seed": -1}, "first_seed: expected a seed from 0 on, got -1"),
        ({"counts": {1: 2}, "batch": 0}, "batch: expected a positive integer"),
    ):
        with pytest.raises(ValueError, match=message):
            rejection_sample(never, never, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"log_prob: expected \[2\], one number an image, got \[2, 1\]"):
        rejection_sample(sample, lambda images, labels: images[:, :1, 0, 0], {2: 1})
    with pytest.raises(ValueError, match="log_prob: expected numbers, got NaN for seed 0 of class 2"):
        rejection_sample(sample, lambda images, labels: images[:, 0, 0, 0] * math.nan, {2: 1})
