"""Editing and inverse problems with a CTM: images that agree with a measurement, or start from a drawing."""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ctm_fast.samplers._levels import full
from ctm_fast.samplers.gamma import Callback, Jump, Noise, gamma_sample, renoise_levels, renoise_with


class Operator(Protocol):
    """A linear measurement y = A x of images x [B, C, H, W], with what completes it."""

    def forward(self, x: Tensor) -> Tensor:
        """A x."""
        ...

    def project(self, x: Tensor, y: Tensor) -> Tensor:
        """The image nearest to ``x`` that measures as ``y``: x + A^+ (y - A x)."""
        ...


class Inpainting:
    """The pixels where ``mask`` is 1.

    The mask is of [1, 1, H, W] or any shape that broadcasts, 0 or 1 everywhere, on the images' device.
    """

    def __init__(self, mask: Tensor) -> None:
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError("mask: expected 0 (unknown) and 1 (known) only, got other values")
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        """The known pixels, 0 elsewhere: like x."""
        if torch.broadcast_shapes(x.shape, self.mask.shape) != x.shape:
            raise ValueError(f"mask: expected one that broadcasts to {list(x.shape)}, got {list(self.mask.shape)}")
        return x * self.mask

    def project(self, x: Tensor, y: Tensor) -> Tensor:
        """``x`` with the known pixels of ``y``."""
        return torch.where(self.mask == 1, y, x)


class Colourisation:
    """The luminance .2989 R + .587 G + .114 B (ITU-R BT.601) of RGB images, as [B, 1, H, W]."""

    def __init__(self, weights: Sequence[float] = (0.2989, 0.587, 0.114)) -> None:
        self.weights = tuple(weights)
        if not all(map(math.isfinite, self.weights)) or not any(self.weights):
            raise ValueError(f"weights: expected finite numbers that are not all 0, got {list(self.weights)}")

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> the luminance [B, 1, H, W]."""
        return (x * self._direction(x)).sum(1, keepdim=True)

    def project(self, x: Tensor, y: Tensor) -> Tensor:
        """``x`` moved along the grey axis to luminance ``y``; its colours stay."""
        direction = self._direction(x)
        return x + direction / direction.square().sum() * (y - self.forward(x))

    def _direction(self, x: Tensor) -> Tensor:
        if x.shape[1] != len(self.weights):
            raise ValueError(f"x: expected {len(self.weights)} channels, got {x.shape[1]}")
        return x.new_tensor(self.weights).view(1, -1, 1, 1)


class SuperResolution:
    """The means of ``factor`` x ``factor`` blocks, as [B, C, H / factor, W / factor]."""

    def __init__(self, factor: int) -> None:
        if not isinstance(factor, int) or factor < 1:
            raise ValueError(f"factor: expected a positive integer, got {factor}")
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """The mean of each block."""
        if x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(f"x: expected sides that are multiples of {self.factor}, got {list(x.shape[2:])}")
        return functional.avg_pool2d(x, self.factor)

    def project(self, x: Tensor, y: Tensor) -> Tensor:
        """``x`` with each block shifted to its mean in ``y``; what is within the block stays."""
        return x + functional.interpolate(y - self.forward(x), scale_factor=float(self.factor), mode="nearest")


def restore(
    jump: Jump,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    operator: Operator,
    measurement: Tensor,
    noise: Noise,
    gamma: float = 1.0,
    callback: Callback | None = None,
) -> Tensor:
    """Images that the operator measures as ``measurement``: NFE len(sigmas) - 1 (CTM, arXiv 2310.02279, Appendix).

    gamma-sampling in which every image, after its jump to s, is replaced by the nearest one whose measurement is the
    given one as it would be at level s: y + s A z. At sigma_min, where the last jump ends, it is y itself.

    Args:
        jump: jump(x, t, s), levels [B].
        x: [B, C, H, W] float32 at level sigmas[0], for instance noise of that standard deviation.
        sigmas, gamma, callback: as for :func:`ctm_fast.samplers.gamma_sample`.
        operator: :class:`Inpainting`, :class:`Colourisation`, :class:`SuperResolution`, or one of the caller's.
        measurement: what ``operator.forward`` gives for the image sought.
        noise: ``noise(i, x)`` draws N(0, I) like x; step i of n uses i for the re-noising and n + i for z.

    Returns:
        [B, C, H, W] with operator.forward(x) = measurement to rounding.
    """
    levels = renoise_levels(sigmas, gamma)
    expected = operator.forward(x).shape
    if measurement.shape != expected:
        raise ValueError(f"measurement: expected shape {list(expected)}, got {list(measurement.shape)}")
    if not measurement.isfinite().all():
        raise ValueError("measurement: expected finite numbers, got others")
    steps = len(levels)
    for i, (t, s, t_next) in enumerate(zip(sigmas[:-1], levels, sigmas[1:], strict=True)):
        x = jump(x, full(x, t), full(x, s))
        known = measurement if s == sigmas[-1] else measurement + s * operator.forward(noise(steps + i, x))
        x = operator.project(x, known)
        if s < t_next:
            x = x + ((t_next - s) * (t_next + s)) ** 0.5 * noise(i, x)
        if callback is not None:
            callback(i, x)
    return x


def from_stroke(
    jump: Jump,
    reference: Tensor,
    sigmas: Sequence[float],
    *,
    noise: Noise,
    gamma: float = 0.0,
    callback: Callback | None = None,
) -> Tensor:
    """SDEdit (arXiv 2108.01073): noise up to sigmas[0] on a drawing, then gamma-sampling; NFE len(sigmas) - 1.

    The higher sigmas[0], the freer the image. ``noise(i, x)`` draws that of re-noising i, and at i = -1 the first.
    """
    levels = renoise_levels(sigmas, gamma)  # an error before any noise is drawn
    x = reference + sigmas[0] * noise(-1, reference)
    renoise = renoise_with(jump, noise) if levels != list(sigmas[1:]) else None
    return gamma_sample(jump, x, sigmas, gamma=gamma, jump_renoise=renoise, callback=callback)
