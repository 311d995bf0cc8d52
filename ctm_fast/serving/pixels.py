"""Images in the forms that a caller may ask for."""

import torch
from PIL import Image
from torch import Tensor

from ctm_fast.diffusion.images import to_uint8


def to_pixels(x: Tensor) -> Tensor:
    """[B, C, H, W] floats, clamped to [-1, 1], as [B, H, W, C] uint8, rounded, on the same device."""
    return to_uint8(x).permute(0, 2, 3, 1).contiguous()


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """[B, H, W, C] uint8 on the CPU, C 1 or 3, as pictures of PIL."""
    assert pixels.dtype == torch.uint8
    return [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in pixels.numpy()]
