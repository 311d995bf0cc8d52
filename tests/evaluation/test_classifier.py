"""The classifier is good enough to judge samples, repeatable, and disturbs nothing."""

import pytest
import torch

from ctm_fast.data import load_dataset
from ctm_fast.diffusion.images import to_float
from ctm_fast.evaluation.classifier import accuracy, train_classifier


@pytest.fixture(scope="module")
def digits():
    data = load_dataset("digits", resolution=8, labels=True)
    return to_float(data.images), data.labels


def test_digits_are_told_apart(digits):
    images, labels = digits
    module, held_out = train_classifier(images, labels, num_classes=10, seed=0)
    assert held_out >= 0.97
    assert accuracy(module, images, labels) >= held_out - 0.01
    assert accuracy(module, images, (labels + 1) % 10) < 0.03
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_the_images_held_out_are_not_trained_on():
    """Noise with labels that mean nothing: what was trained on is known by heart, the rest guessed."""
    images = torch.randn(100, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(100) % 10
    module, held_out = train_classifier(images, labels, num_classes=10, seed=0, steps=200)
    assert accuracy(module, images, labels) > 0.75
    assert held_out < 0.4


def test_repeatable_and_of_its_seed(digits):
    images, labels = digits
    first, again, other = (
        train_classifier(images, labels, num_classes=10, seed=seed, steps=5)[0](images[:8]) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_global_random_state_is_left_alone(digits):
    images, labels = digits
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    train_classifier(images, labels, num_classes=10, seed=0, steps=2)
    assert torch.equal(torch.rand(3), expected)


def test_trains_under_no_grad_and_on_odd_sizes_and_colour():
    images = torch.rand(20, 3, 5, 7)
    with torch.no_grad():
        module, held_out = train_classifier(images, torch.arange(20) % 4, num_classes=4, seed=0, steps=2)
    assert module(images).shape == (20, 4)
    assert 0 <= held_out <= 1


def test_accuracy_counts_over_chunks():
    logits = torch.eye(4)[[0, 1, 2, 3, 0]].reshape(5, 4, 1, 1)
    labels = torch.tensor([0, 1, 2, 0, 0])
    assert accuracy(torch.nn.Flatten(), logits, labels, batch_size=2) == 0.8


@pytest.mark.parametrize(
    ("images", "labels", "error", "message"),
    [
        (
            torch.zeros(4, 1, 8, 8, dtype=torch.uint8),
            torch.zeros(4).long(),
            TypeError,
            "images: expected torch.float32",
        ),
        (torch.zeros(4, 1, 8, 8), torch.zeros(4), TypeError, "labels: expected torch.int64, got torch.float32"),
        (torch.zeros(4, 1, 8, 8), torch.zeros(3).long(), ValueError, r"labels: expected \[4\], got \[3\]"),
        (torch.zeros(4, 8, 8), torch.zeros(4).long(), ValueError, r"images: expected \[n, C, H, W\]"),
    ],
)
def test_refused(images, labels, error, message):
    with pytest.raises(error, match=message):
        train_classifier(images, labels, num_classes=10, seed=0, steps=1)
