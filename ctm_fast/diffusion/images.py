"""Images between the two forms they have: uint8 in 0..255 outside, float in [-1, 1] inside."""

import torch
from torch import Tensor


def to_float(images: Tensor) -> Tensor:
    """uint8 images of any shape as float32 in [-1, 1]: x / 127.5 - 1. Raises TypeError for another dtype."""
    if images.dtype != torch.uint8:
        raise TypeError(f"images: expected uint8, got {images.dtype}")
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Float images of any shape in [-1, 1] as uint8: 127.5 x + 127.5, rounded to nearest and clamped to 0..255.

    The inverse of :func:`to_float` on all 256 values. Raises TypeError for images that are not floating point.
    """
    if not images.is_floating_point():
        raise TypeError(f"images: expected a floating-point dtype, got {images.dtype}")
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
