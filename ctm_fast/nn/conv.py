"""Linear and convolution layers, and the changes of resolution before them."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ctm_fast.ops import conv3x3

Resample = Literal["up", "down"]
Init = Literal["xavier", "uniform"]

BOX = (1, 1)
"""Taps of the resampling filter of DDPM++ and ADM: nearest neighbour up, the mean of 2x2 pixels down."""
BILINEAR = (1, 3, 3, 1)
"""Taps of NCSN++'s: bilinear, with zeros beyond the border."""


def initialise(layer: nn.Linear | nn.Conv2d, init: Init, scale: float = 1.0) -> None:
    """Draw weight and bias anew, and multiply both by ``scale``.

    ``xavier``: Xavier-uniform weights, zero biases (EDM's DDPM++ and NCSN++); ``uniform``: both in +-1 / sqrt(fan in),
    as PyTorch does by itself (ADM: Kaiming-uniform with gain sqrt(1/3)).
    """
    with torch.no_grad():
        if init == "xavier":
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                layer.bias.zero_()
        else:
            layer.reset_parameters()
        layer.weight.mul_(scale)
        if layer.bias is not None:
            layer.bias.mul_(scale)


class Linear(nn.Linear):
    """``nn.Linear`` that computes in the dtype of its input; ``init`` and ``scale`` as :func:`initialise` has them."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = True, init: Init = "xavier", scale: float = 1.0
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        initialise(self, init, scale)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.to(x.dtype), _cast(self.bias, x))


class Resampler(nn.Module):
    """Twice or half the resolution by a separable filter, channel by channel; borders are padded with zeros.

    x [B, C, H, W] -> [B, C, 2 H, 2 W] (``"up"``) or [B, C, H / 2, W / 2] (``"down"``), in its dtype and memory format.
    ``taps`` are those of one direction, before they are divided by their sum.
    """

    kernel: Tensor

    def __init__(self, direction: Resample, taps: tuple[int, ...] = BOX) -> None:
        super().__init__()
        self.direction = direction
        self.taps = taps
        self.register_buffer("kernel", resample_kernel(taps), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        up = self.direction == "up"
        if self.taps == BOX:
            return functional.interpolate(x, scale_factor=2.0, mode="nearest") if up else functional.avg_pool2d(x, 2)
        channels, padding = x.shape[1], (len(self.taps) - 1) // 2
        kernel = self.kernel.to(x.dtype).expand(channels, -1, -1, -1)
        if up:
            return functional.conv_transpose2d(x, 4 * kernel, stride=2, padding=padding, groups=channels)
        return functional.conv2d(x, kernel, stride=2, padding=padding, groups=channels)


class Conv2d(nn.Conv2d):
    """Square convolution that keeps the resolution, after an optional change of it.

    x [B, in_channels, H, W] -> [B, out_channels, H', W'] with H' = 2 H (``"up"``), H / 2 (``"down"``) or H.
    ``taps`` as in :class:`Resampler`; ``init`` and ``scale`` as in :func:`initialise`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        resample: Resample | None = None,
        taps: tuple[int, ...] = BOX,
        init: Init = "xavier",
        scale: float = 1.0,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2)
        self.resampler = None if resample is None else Resampler(resample, taps)
        initialise(self, init, scale)

    def forward(self, x: Tensor) -> Tensor:
        if self.resampler is not None:
            x = self.resampler(x)
        weight, bias = self.weight.to(x.dtype), _cast(self.bias, x)
        if self.kernel_size == (3, 3):
            return conv3x3(x, weight, bias)
        return functional.conv2d(x, weight, bias, padding=self.padding)


class DownConv2d(nn.Conv2d):
    """3x3 convolution, then half the resolution: the two of NCSN++'s image pyramid, fused as EDM fuses them.

    Zeros are padded once, before the convolution and for both; the bias is added last. So it differs at the border
    from a convolution and a :class:`Resampler`.
    x [B, in_channels, H, W] -> [B, out_channels, H / 2, W / 2]
    """

    kernel: Tensor

    def __init__(self, in_channels: int, out_channels: int, *, taps: tuple[int, ...]) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1 + (len(taps) - 1) // 2)
        self.taps = taps
        self.register_buffer("kernel", resample_kernel(taps), persistent=False)
        initialise(self, "xavier")

    def forward(self, x: Tensor) -> Tensor:
        x = functional.conv2d(x, self.weight.to(x.dtype), padding=self.padding)
        kernel = self.kernel.to(x.dtype).expand(self.out_channels, -1, -1, -1)
        return functional.conv2d(x, kernel, _cast(self.bias, x), stride=2, groups=self.out_channels)


def resample_kernel(taps: tuple[int, ...]) -> Tensor:
    """The filter of two directions, of sum 1: [1, 1, n, n] float32, the ``resample_filter`` of published files."""
    row = torch.tensor(taps, dtype=torch.float32)
    return (row.outer(row) / row.sum().square())[None, None]


def _cast(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)
