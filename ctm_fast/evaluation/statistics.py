"""Frechet distances and variances of sets of images, in float64.

A Frechet distance between finite sets is biased upwards, the more so the smaller they are: report it beside
:func:`half_half_floor`, the distance that real data have from themselves. In pixel space it is not an FID.
"""

import torch
from torch import Tensor


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and unbiased covariance [D, D] (over n - 1), both float64, of features [n, D].

    Raises ValueError where features are not [n, D] with n of at least 2.
    """
    if features.dim() != 2 or len(features) < 2:
        raise ValueError(f"features: expected [n, D] with n at least 2, got {list(features.shape)}")
    features = features.double()
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def frechet_distance(mean_1: Tensor, cov_1: Tensor, mean_2: Tensor, cov_2: Tensor) -> float:
    """Squared Frechet (2-Wasserstein) distance between two Gaussians.

        |mean_1 - mean_2|^2 + tr(cov_1) + tr(cov_2) - 2 tr((cov_1^1/2 cov_2 cov_1^1/2)^1/2)
                                                        Dowson and Landau 1982; Heusel et al. (arXiv 1706.08500), Eq. 6

    The product is symmetric, so that two eigendecompositions give the trace where others take the square root of
    cov_1 cov_2, which is not. Covariances may be singular.

    Args:
        mean_1, mean_2: [D].
        cov_1, cov_2: [D, D], symmetric, positive semi-definite.

    Raises:
        ValueError: shapes that do not fit.
    """
    d = mean_1.shape[0] if mean_1.dim() == 1 else -1
    for name, tensor, shape in (
        ("mean_1", mean_1, (d,)),
        ("cov_1", cov_1, (d, d)),
        ("mean_2", mean_2, (d,)),
        ("cov_2", cov_2, (d, d)),
    ):
        if tensor.shape != shape:
            expected = "[D]" if d < 0 else str(list(shape))
            raise ValueError(f"{name}: expected {expected}, got {list(tensor.shape)}")
    mean_1, cov_1, mean_2, cov_2 = (tensor.double() for tensor in (mean_1, cov_1, mean_2, cov_2))
    values, vectors = torch.linalg.eigh(cov_1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = torch.linalg.eigvalsh(root @ cov_2 @ root).clamp(min=0)
    return float((mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * product.sqrt().sum())


def pixel_frechet(images_a: Tensor, images_b: Tensor) -> float:
    """Frechet distance between two sets of float images [n, C, H, W] in [-1, 1], their pixels being the features.

    Raises TypeError for images that are not floating point, ValueError for fewer than two images or other shapes.
    """
    return frechet_distance(*moments(_pixels("images_a", images_a)), *moments(_pixels("images_b", images_b)))


def half_half_floor(images: Tensor, seed: int) -> float:
    """:func:`pixel_frechet` between two random halves of ``images`` [n, C, H, W]: how near samples can be told to come.

    The halves have n / 2 images each; a comparison of more images has a lower floor.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).to(images.device)
    half = len(images) // 2
    return pixel_frechet(images[order[:half]], images[order[half:]])


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
    pixels = _pixels(name, images)
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels of {name}: expected [{len(images)}], got {list(labels.shape)}")
    variances = []
    for label in classes:
        members = pixels[labels == label]
        if len(members) < 2:
            raise ValueError(f"{name}: expected at least two images of class {label}, got {len(members)}")
        variances.append(members.var(0).mean())
    return float(torch.stack(variances).mean())


def _pixels(name: str, images: Tensor) -> Tensor:
    if not images.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {images.dtype}")
    return images.flatten(1).double()
