"""Distances between two batches of images, one number per sample."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ctm_fast.losses.perceptual import efflite0, lpips

Distance = Callable[[Tensor, Tensor], Tensor]
DISTANCES = ("l2", "pseudo-huber")
"""Those that need no weights."""
PERCEPTUAL_DISTANCES = ("lpips", "efflite0")
ALL_DISTANCES = DISTANCES + PERCEPTUAL_DISTANCES


def mean_squared(a: Tensor, b: Tensor) -> Tensor:
    """[B]: the mean over pixels of (a - b)^2, for a, b [B, C, H, W]."""
    return (a - b).square().flatten(1).mean(1)


def pseudo_huber(a: Tensor, b: Tensor, *, c: float) -> Tensor:
    """[B]: sqrt(|a - b|^2 + c^2) - c with the Euclidean norm over pixels (arXiv 2310.14189, Eq. 7)."""
    squared = (a - b).square().flatten(1).sum(1)
    return torch.sqrt(squared + c**2) - c


def distance(
    name: str,
    *,
    c: float,
    size: int | None = 224,
    vgg16: str | Path | None = None,
    lpips_heads: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> Distance:
    """The distance called ``name``, one of ``DISTANCES`` and ``PERCEPTUAL_DISTANCES``.

    Args:
        name: what it is called in configurations and logs; no other ever stands in for it.
        c: pseudo-Huber's width.
        size: what the perceptual ones resize images to; None: they stay as they are.
        vgg16, lpips_heads: LPIPS' files, see :func:`ctm_fast.losses.perceptual.lpips`.
        device: where the perceptual ones compute.

    Raises ValueError for another name, ConfigError or CheckpointError naming the extra or the file that is missing.
    """
    if name == "l2":
        return mean_squared
    if name == "pseudo-huber":
        return partial(pseudo_huber, c=c)
    if name == "lpips":
        return lpips(vgg16, lpips_heads, size=size).to(device)
    if name == "efflite0":
        return efflite0(size=size).to(device)
    raise ValueError(f"distance: expected one of {', '.join(DISTANCES + PERCEPTUAL_DISTANCES)}, got {name!r}")
