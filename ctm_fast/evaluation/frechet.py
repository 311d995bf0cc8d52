"""The Frechet distance between two sets of features, or of images by their pixels.

Between finite sets it is biased upwards, the more so the smaller they are: report it beside the distance that real data
have from themselves. It is an FID only of the TensorFlow Inception's features.
"""

import torch
from torch import Tensor

from ctm_fast.evaluation.moments import moments


def frechet_distance(mean_1: Tensor, cov_1: Tensor, mean_2: Tensor, cov_2: Tensor) -> float:
    """Squared Frechet (2-Wasserstein) distance between two Gaussians.

        |mean_1 - mean_2|^2 + tr(cov_1) + tr(cov_2) - 2 tr((cov_1 cov_2)^1/2)
                                                        Dowson and Landau 1982; Heusel et al. (arXiv 1706.08500), Eq. 6

    The last trace is the sum of the singular values of cov_1^1/2 cov_2^1/2. Of singular covariances, as too few samples
    give, the square root of the product would make of a rounding error 1e-16 one of 1e-8; eigenvalues that are zero
    but for rounding are taken to be zero.

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
    total = (mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace()
    root_1 = _root(cov_1)
    del cov_1  # of 2,048 features each matrix is 34 MB, and the decomposition wants three more
    product = root_1.T @ _root(cov_2)
    del cov_2, root_1
    return float(total - 2 * torch.linalg.svdvals(product).sum())


def numerical_rank(covariance: Tensor) -> int:
    """How many eigenvalues of a covariance [D, D] are not zero within rounding; fewer than D after too few samples."""
    values = torch.linalg.eigvalsh(covariance.double())
    return int((values > _zero(values)).sum())


def pixel_frechet(images_a: Tensor, images_b: Tensor) -> float:
    """Frechet distance between two sets of float images [n, C, H, W] in [-1, 1], their pixels being the features.

    Raises TypeError for images that are not floating point, ValueError for fewer than two images or other shapes.
    """
    return frechet_distance(
        *moments(pixel_features("images_a", images_a)), *moments(pixel_features("images_b", images_b))
    )


def half_half_floor(images: Tensor, seed: int) -> float:
    """:func:`pixel_frechet` between two random halves of ``images`` [n, C, H, W]: how near samples can be told to come.

    The halves have n / 2 images each; a comparison of more images has a lower floor.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).to(images.device)
    half = len(images) // 2
    return pixel_frechet(images[order[:half]], images[order[half:]])


def _root(cov: Tensor) -> Tensor:
    """[D, rank], R with R R^T = cov."""
    values, vectors = torch.linalg.eigh(cov)
    kept = values > _zero(values)
    if not kept.all():
        vectors, values = vectors[:, kept], values[kept]
    return vectors.mul_(values.sqrt())  # in place: of 2,048 features each copy is 34 MB


def _zero(values: Tensor) -> Tensor:
    """What an eigenvalue of ``values`` that is zero may have become."""
    return values.abs().max() * len(values) * torch.finfo(values.dtype).eps


def pixel_features(name: str, images: Tensor) -> Tensor:
    """Float images as features [n, C H W]. TypeError, naming ``name``, for images that are not floating point."""
    if not images.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {images.dtype}")
    return images.flatten(1)
