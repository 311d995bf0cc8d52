"""Perceptual distances: how far apart two images lie in the feature maps of a frozen network."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ctm_fast.errors import ConfigError
from ctm_fast.models.features import VGG16, EfficientNetLite0, FeatureNetwork, freeze
from ctm_fast.models.features.efficientnet_lite0 import PERCEPTUAL
from ctm_fast.models.features.vgg16 import CHANNELS
from ctm_fast.models.features.weights import package_file, read_weights

_EPS = 1e-10


class PerceptualDistance(nn.Module):
    """d(a, b) [B] of images [B, 1 or 3, H, W] in [-1, 1], computed in float32, also under autocast.

        d(a, b) = sum_l mean_hw sum_c w_lc (f_lc(a) - f_lc(b))^2,   f_l = F_l / (|F_l| + 1e-10)

    with F_l the network's maps and | . | their norm over channels (LPIPS, arXiv 1801.03924, Eq. 1). Where ``b`` needs
    no gradient, its maps are not kept.

    Args:
        network: frozen here if it is a module, see :data:`ctm_fast.models.features.FeatureNetwork`.
        weights: w_l [C_l] for each map; None: one over the number of maps, so that d is at most 4.
    """

    def __init__(self, network: FeatureNetwork, weights: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self.network = network
        self.maps = None if weights is None else len(weights)
        for index, weight in enumerate(weights or []):
            self.register_buffer(f"weight{index}", weight.detach().float().view(-1, 1, 1), persistent=False)
        freeze(self)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if a.shape != b.shape:
            raise ValueError(f"b: expected the shape {list(a.shape)} of a, got {list(b.shape)}")
        with torch.autocast(a.device.type, enabled=False):
            maps_a, maps_b = self.network(a.float()), self.network(b.float())
            if self.maps is not None and len(maps_a) != self.maps:
                raise ValueError(f"network: expected {self.maps} maps, one for each weight, got {len(maps_a)}")
            terms = []
            for index, (map_a, map_b) in enumerate(zip(maps_a, maps_b, strict=True)):
                squared = (unit(map_a) - unit(map_b)).square()
                if self.maps is None:
                    terms.append(squared.sum(1).mean((1, 2)) / len(maps_a))
                else:
                    terms.append((squared * getattr(self, f"weight{index}")).sum(1).mean((1, 2)))
            return torch.stack(terms).sum(0)


def unit(feature: Tensor) -> Tensor:
    """A map [B, C, H, W] over its norm over channels; where all channels are 0, so are value and gradient's direction.

    vector_norm has the subgradient 0 there, where a square root of a sum would give NaN.
    """
    return feature / (torch.linalg.vector_norm(feature, dim=1, keepdim=True) + _EPS)


def lpips(vgg16: str | Path | None, heads: str | Path | None = None, *, size: int | None = 224) -> PerceptualDistance:
    """LPIPS as CTM uses it: VGG16 with average pooling, the learned weights of version 0.1.

    Args:
        vgg16: torchvision's ``vgg16-397923af.pth``, see :class:`ctm_fast.models.features.VGG16`.
        heads: ``vgg.pth`` of lpips 0.1.4; None: that of the installed package ``lpips``, which is not imported.
        size: images are resized to it; None: they stay as they are.

    Raises ConfigError or CheckpointError naming the file that is missing or does not fit.
    """
    if vgg16 is None:
        raise ConfigError("lpips: expected the path of torchvision's vgg16-397923af.pth, got none")
    if heads is None:
        heads = package_file("lpips", "weights/v0.1/vgg.pth", "give the path of lpips 0.1.4's weights/v0.1/vgg.pth")
    names = [f"lin{index}.model.1.weight" for index in range(len(CHANNELS))]
    tensors = read_weights(heads, {name: (1, width, 1, 1) for name, width in zip(names, CHANNELS, strict=True)})
    return PerceptualDistance(VGG16(vgg16, size=size), [tensors[name].flatten() for name in names])


def efflite0(*, size: int | None = 224) -> PerceptualDistance:
    """The mean over six maps of EfficientNet-Lite0: stem and blocks 0, 2, 4, 10, 15. It has no learned weights.

    Not LPIPS, and not comparable with its values. ConfigError naming the extra where the weights are not installed.
    """
    return PerceptualDistance(EfficientNetLite0(PERCEPTUAL, size=size))
