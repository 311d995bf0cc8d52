"""Distances between two batches of images, one number per sample."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]
DISTANCES = ("l2", "pseudo-huber")


def mean_squared(a: Tensor, b: Tensor) -> Tensor:
    """[B]: the mean over pixels of (a - b)^2, for a, b [B, C, H, W]."""
    return (a - b).square().flatten(1).mean(1)


def pseudo_huber(a: Tensor, b: Tensor, *, c: float) -> Tensor:
    """[B]: sqrt(|a - b|^2 + c^2) - c with the Euclidean norm over pixels (arXiv 2310.14189, Eq. 7)."""
    squared = (a - b).square().flatten(1).sum(1)
    return torch.sqrt(squared + c**2) - c


def distance(name: str, *, c: float) -> Distance:
    """The distance called ``name`` (one of ``DISTANCES``); ``c`` is pseudo-Huber's width. ValueError for another."""
    if name == "l2":
        return mean_squared
    if name == "pseudo-huber":
        return partial(pseudo_huber, c=c)
    raise ValueError(f"distance: expected one of {', '.join(DISTANCES)}, got {name!r}")
