"""The frozen random projector of a projected discriminator (arXiv 2111.01007): features mixed by chance."""

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from ctm_fast.models.features.network import Shape


class RandomProjector(nn.Module):
    """Feature maps of one backbone to maps of known widths, by convolutions that are drawn once and never trained.

    A pyramid's maps, each half the size of the one before, are used as they are. Those of a transformer, n maps all of
    one size, are first given the widths C / 2^(n-1), ..., C / 2, C and 2^(n-2), ..., 2, 1, 1/2 times their size. Then
    1x1 convolutions to width * (1, 2, 4, ...) (cross-channel mixing), and from the coarsest map up (cross-scale mixing)

        y_i = upsample2(conv1x1(y_{i+1} + lateral_i))        bilinear, corners aligned; halves the width, but for y_0

    The published code convolves after the interpolation: the same function, as the interpolation's weights sum to 1, at
    four times the cost. All are of PyTorch's default initialisation, from its CPU generator.

    Args:
        shapes: (C, H, W) of the backbone's maps, finest first.
        width: of the finest map.

    The weights are buffers: in the state dict, so that a run that goes on keeps its projector, and out of reach of any
    optimizer or ``requires_grad_``.
    """

    def __init__(self, shapes: Sequence[Shape], *, width: int) -> None:
        super().__init__()
        count = len(shapes)
        channels, height, breadth = shapes[0]
        inputs = [shape[0] for shape in shapes]
        self.reassemble = nn.ModuleList()
        if _are_tokens(shapes):
            divisors = [2**index for index in reversed(range(count))]
            self.reassemble.extend(_reassemble(channels, divisor) for divisor in divisors)
            inputs = [channels // divisor for divisor in divisors]
            height, breadth = height * divisors[0] // 2, breadth * divisors[0] // 2
        lateral = [width * 2**index for index in range(count)]
        mixed = [max(w // 2, width) for w in lateral]
        self.lateral = nn.ModuleList(nn.Conv2d(c, w, 1) for c, w in zip(inputs, lateral, strict=True))
        self.mix = nn.ModuleList(nn.Conv2d(w, m, 1) for w, m in zip(lateral, mixed, strict=True))
        self.shapes: list[Shape] = [(m, 2 * height >> i, 2 * breadth >> i) for i, m in enumerate(mixed)]
        """(C, H, W) of the maps that it gives, finest first."""
        _to_buffers(self)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        if self.reassemble:
            maps = [module(feature) for module, feature in zip(self.reassemble, maps, strict=True)]
        lateral = [conv(feature) for conv, feature in zip(self.lateral, maps, strict=True)]
        projected: list[Tensor] = []
        for side, mix in zip(reversed(lateral), reversed(self.mix), strict=True):
            mixed = mix(side + projected[-1] if projected else side)
            projected.append(F.interpolate(mixed, scale_factor=2, mode="bilinear", align_corners=True))
        return projected[::-1]


def _are_tokens(shapes: Sequence[Shape]) -> bool:
    """False for a pyramid, True for a transformer's maps; ValueError for any other."""
    sizes = [shape[1:] for shape in shapes]
    if all(finer == (2 * coarser[0], 2 * coarser[1]) for finer, coarser in pairwise(sizes)):
        return False
    channels, height, width = shapes[0]
    if len(set(shapes)) == 1 and channels % 2 ** (len(shapes) - 1) == height % 2 == width % 2 == 0:
        return True
    raise ValueError(
        "features: expected maps each half the size of the one before, or n maps of one even size and of a multiple of "
        f"2^(n-1) channels, got {[list(shape) for shape in shapes]}"
    )


def _reassemble(channels: int, divisor: int) -> nn.Module:
    """A 1x1 convolution to channels / divisor, then divisor / 2 times the size."""
    width = channels // divisor
    first = nn.Conv2d(channels, width, 1)
    if divisor == 1:
        return nn.Sequential(first, nn.Conv2d(width, width, 3, stride=2, padding=1))
    if divisor == 2:
        return nn.Sequential(first)
    return nn.Sequential(first, nn.ConvTranspose2d(width, width, divisor // 2, stride=divisor // 2))


def _to_buffers(module: nn.Module) -> None:
    """Turn every parameter into a buffer of the same name."""
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            delattr(owner, name)
            owner.register_buffer(name, parameter.detach())
