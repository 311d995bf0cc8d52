"""How far sets of images are from data: one number to choose among samplers by."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctm_fast.evaluation.classifier import train_classifier
from ctm_fast.evaluation.frechet import frechet_distance
from ctm_fast.evaluation.moments import moments

_SIDE = 8
"""Pixels: larger images are averaged to so many before they are compared pixel by pixel."""


class DataDistance:
    """Frechet distance between images and data: of the features of a small classifier, or, without labels, of pixels.

    The features are the means over pixels of the last feature maps of :func:`train_classifier`, trained on the data;
    64 of them, so that a thousand images give a covariance of full rank. It is biased upwards by few images: compare
    numbers of as many images alone.

    Args:
        images: [n, C, H, W] float32 in [-1, 1], the data; H and W at least 4 with labels.
        labels: [n] int64 in 0..num_classes - 1, or None.
        seed: of the classifier.

    Raises ValueError for fewer than two images, and what :func:`train_classifier` raises.
    """

    def __init__(self, images: Tensor, labels: Tensor | None, *, num_classes: int, seed: int) -> None:
        self._features = None if labels is None else _features(images, labels, num_classes, seed)
        self._data = moments(self._of(images))

    @property
    def name(self) -> str:
        """What it measures."""
        return "Frechet distance of " + ("pixels" if self._features is None else "a small classifier's features")

    def __call__(self, images: Tensor) -> float:
        """The distance of float images [m, C, H, W] in [-1, 1], m at least 2."""
        return frechet_distance(*moments(self._of(images)), *self._data)

    @torch.no_grad()
    def _of(self, images: Tensor) -> Tensor:
        if self._features is None:
            small = F.adaptive_avg_pool2d(images, _SIDE) if images.shape[-1] > _SIDE else images
            return small.flatten(1)
        return torch.cat([self._features(part).mean((2, 3)) for part in images.split(1024)])


def _features(images: Tensor, labels: Tensor, num_classes: int, seed: int) -> nn.Module:
    """The classifier without the last two layers, which flatten and judge."""
    module, _ = train_classifier(images, labels, num_classes=num_classes, seed=seed)
    assert isinstance(module, nn.Sequential)
    return module[:-2]
