"""How much the images of one class vary: whether a conditional model makes more than one image of each."""

import torch
from torch import Tensor

from ctm_fast.evaluation.frechet import pixel_features


def within_class_variance_ratio(generated: Tensor, labels: Tensor, real: Tensor, real_labels: Tensor) -> float:
    """Variance within a class of generated images over that of real ones; at 0 each class is one image.

    Each side is the mean over classes and pixels of the unbiased variance within a class; the classes are those of
    ``labels``, all of equal weight.

    Args:
        generated, real: [n, C, H, W], [m, C, H, W], floating point, in the same unit.
        labels, real_labels: [n], [m] integers.

    Raises:
        TypeError: images that are not floating point.
        ValueError: a class with fewer than two images on either side, or labels of another length.
    """
    classes = labels.unique().tolist()
    return _within_class_variance("generated", generated, labels, classes) / _within_class_variance(
        "real", real, real_labels, classes
    )


def _within_class_variance(name: str, images: Tensor, labels: Tensor, classes: list[int]) -> float:
    pixels = pixel_features(name, images).double()
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels of {name}: expected [{len(images)}], got {list(labels.shape)}")
    variances = []
    for label in classes:
        members = pixels[labels == label]
        if len(members) < 2:
            raise ValueError(f"{name}: expected at least two images of class {label}, got {len(members)}")
        variances.append(members.var(0).mean())
    return float(torch.stack(variances).mean())
