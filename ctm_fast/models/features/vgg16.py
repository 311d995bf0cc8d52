"""VGG16's convolutions with average pooling, the network behind LPIPS as CTM uses it (arXiv 1409.1556, 1801.03924)."""

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from ctm_fast.models.features.network import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Normalize,
    check_size,
    freeze,
    resize,
)
from ctm_fast.models.features.weights import read_weights

CHANNELS = (64, 128, 256, 512, 512)
"""Of the maps, at 1, 1/2, 1/4, 1/8 and 1/16 of the size."""
_DEPTHS = (2, 2, 3, 3, 3)


def _places() -> list[list[int]]:
    """Where the convolutions of each group stand in torchvision's ``features``: each before a ReLU, groups pooled."""
    places, place = [], 0
    for depth in _DEPTHS:
        places.append([place + 2 * index for index in range(depth)])
        place += 2 * depth + 1
    return places


class VGG16(nn.Module):
    """Maps after relu1_2, 2_2, 3_3, 4_3 and 5_3 of images [B, 1 or 3, H, W] float32 in [-1, 1]; frozen.

    Pooling is the 2x2 average in place of the maximum (the published CTM's LPIPS).

    Args:
        path: torchvision's ``vgg16-397923af.pth``, or a file of its ``features.*`` alone (56 MiB).
        size: images are resized to it; None: they stay as they are, 16 pixels or more.

    Raises CheckpointError naming the file where it does not hold those weights.
    """

    def __init__(self, path: str | Path, *, size: int | None = 224) -> None:
        super().__init__()
        self.size = check_size(size)
        self.normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD)
        widths = [3, *(width for width, depth in zip(CHANNELS, _DEPTHS, strict=True) for _ in range(depth))]
        places = [place for group in _places() for place in group]
        self.features = nn.ModuleDict(
            {
                str(place): nn.Conv2d(inputs, outputs, 3, padding=1)
                for place, inputs, outputs in zip(places, widths[:-1], widths[1:], strict=True)
            }
        )
        shapes = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        self.load_state_dict(read_weights(path, shapes, unused=("classifier.",)))
        freeze(self)

    def forward(self, images: Tensor) -> list[Tensor]:
        h = resize(self.normalize(images), self.size)
        if min(h.shape[2:]) < 16:
            raise ValueError(f"images: expected 16 pixels or more on each side, got {list(h.shape)}")
        maps = []
        for index, group in enumerate(_places()):
            if index:
                h = F.avg_pool2d(h, 2)
            for place in group:
                h = F.relu(self.features[str(place)](h))
            maps.append(h)
        return maps
