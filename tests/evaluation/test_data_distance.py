"""The distance of samples from data that schedules are chosen by."""

import pytest
import torch
from torch import Tensor

from ctm_fast.data import load_dataset
from ctm_fast.diffusion.images import to_float
from ctm_fast.evaluation import data_distance
from ctm_fast.evaluation.data_distance import DataDistance
from ctm_fast.evaluation.frechet import pixel_frechet


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    dataset = load_dataset("digits", resolution=8, labels=True)
    assert dataset.labels is not None
    return to_float(dataset.images), dataset.labels


@pytest.fixture(params=["labels", "pixels"])
def distance(
    request: pytest.FixtureRequest, digits: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> DataDistance:
    images, labels = digits
    train = data_distance.train_classifier
    monkeypatch.setattr(data_distance, "train_classifier", lambda *args, **options: train(*args, **options, steps=60))
    return DataDistance(images[:900], labels[:900] if request.param == "labels" else None, num_classes=10, seed=0)


def test_data_are_nearer_than_anything_else(distance: DataDistance, digits: tuple[Tensor, Tensor]) -> None:
    images, _ = digits
    unseen = images[900:]
    noise = 0.5 * torch.randn(unseen.shape, generator=torch.Generator().manual_seed(0))
    near = distance(unseen)
    assert abs(distance(images[:900])) < 1e-6 * distance(noise)
    assert near < distance(unseen + 0.5 * noise) < distance(unseen + noise)
    assert near < 0.2 * distance(unseen.mean(0).expand_as(unseen))  # one image again and again


def test_without_labels_it_is_that_of_pixels(digits: tuple[Tensor, Tensor]) -> None:
    images, _ = digits
    distance = DataDistance(images[:900], None, num_classes=0, seed=0)
    assert distance.name == "Frechet distance of pixels"
    assert distance(images[900:]) == pytest.approx(pixel_frechet(images[900:], images[:900]), rel=1e-9)
    large = images.repeat_interleave(2, 2).repeat_interleave(2, 3)  # whose means of 2x2 pixels are the images again
    of_large = DataDistance(large[:900], None, num_classes=0, seed=0)
    assert of_large(large[900:]) == pytest.approx(distance(images[900:]), rel=1e-6)
