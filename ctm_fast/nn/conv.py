"""Linear and convolution layers with Xavier-uniform weights and zero biases, as EDM initialises them."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Resample = Literal["up", "down"]


class Linear(nn.Linear):
    """``nn.Linear`` that computes in the dtype of its input. ``scale`` multiplies the initial weight."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, scale: float = 1.0) -> None:
        super().__init__(in_features, out_features, bias=bias)
        _initialise(self, scale)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.to(x.dtype), _cast(self.bias, x))


class Conv2d(nn.Conv2d):
    """Square convolution that keeps the resolution, after an optional change of it by the 2x2 box filter.

    x [B, in_channels, H, W] -> [B, out_channels, H', W'] with H' = 2H (``"up"``), H/2 (``"down"``) or H.
    ``scale`` multiplies the initial weight.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, *, resample: Resample | None = None, scale: float = 1.0
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2)
        self.resample = resample
        _initialise(self, scale)

    def forward(self, x: Tensor) -> Tensor:
        if self.resample == "up":
            x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
        elif self.resample == "down":
            x = functional.avg_pool2d(x, 2)
        return functional.conv2d(x, self.weight.to(x.dtype), _cast(self.bias, x), padding=self.padding)


def _initialise(layer: nn.Linear | nn.Conv2d, scale: float) -> None:
    nn.init.xavier_uniform_(layer.weight)
    with torch.no_grad():
        layer.weight.mul_(scale)
        if layer.bias is not None:
            layer.bias.zero_()


def _cast(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)
