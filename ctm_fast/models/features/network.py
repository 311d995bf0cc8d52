"""What a feature network is, and what is done to its input."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FeatureNetwork = Callable[[Tensor], list[Tensor]]
"""images [B, 3, H, W] float32 in [-1, 1] -> feature maps [B, C_i, H_i, W_i]; an ``nn.Module`` where it has weights.

Normalising and resizing the images is the network's own business.
"""

Shape = tuple[int, int, int]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def freeze(module: nn.Module) -> None:
    """Put ``module`` in eval mode, its parameters without gradients; gradients still flow to its input."""
    module.eval().requires_grad_(False)


def rgb(images: Tensor) -> Tensor:
    """[B, 3, H, W]: three channels as they are, one channel repeated. ValueError for other shapes."""
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images: expected shape [B, 1 or 3, H, W], got {list(images.shape)}")
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def resize(images: Tensor, size: int | None) -> Tensor:
    """[B, C, size, size] by bilinear interpolation (corners not aligned, no antialiasing); None: as they are."""
    if size is None or images.shape[2:] == (size, size):
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)


def check_size(size: int | None) -> int | None:
    """``size`` if it is None or positive, else ValueError."""
    if size is not None and size < 1:
        raise ValueError(f"size: expected None or a positive number of pixels, got {size}")
    return size


class Normalize(nn.Module):
    """((x + 1) / 2 - mean) / std of grey or RGB images x [B, 1 or 3, H, W] in [-1, 1]: [B, 3, H, W]."""

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        half = torch.tensor(std, dtype=torch.float64).reciprocal() / 2
        shift = (0.5 - torch.tensor(mean, dtype=torch.float64)) / torch.tensor(std, dtype=torch.float64)
        self.register_buffer("scale", half.float().view(3, 1, 1), persistent=False)
        self.register_buffer("shift", shift.float().view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return torch.addcmul(self.shift, rgb(images), self.scale)


@torch.no_grad()
def feature_shapes(network: FeatureNetwork, resolution: int, device: torch.device | str = "cpu") -> list[Shape]:
    """(C, H, W) of each map that ``network`` makes of RGB images of ``resolution`` pixels, by asking it once.

    A module is frozen first, so that its batch norms do not learn from the question.

    Raises ValueError naming what it gave where that is not a list of maps [1, C, H, W].
    """
    if isinstance(network, nn.Module):
        freeze(network)
    maps: object = network(torch.zeros(1, 3, resolution, resolution, device=device))
    if not isinstance(maps, list | tuple) or not maps:
        raise ValueError(f"features: expected a list of feature maps, got {type(maps).__name__}")
    for feature in maps:
        if not isinstance(feature, Tensor) or feature.dim() != 4 or feature.shape[0] != 1:
            got = list(feature.shape) if isinstance(feature, Tensor) else type(feature).__name__
            raise ValueError(f"features: expected maps of shape [B, C, H, W], got {got} for a batch of 1")
    return [(feature.shape[1], feature.shape[2], feature.shape[3]) for feature in maps]
