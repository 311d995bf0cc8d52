"""DiffAugment (arXiv 2006.10738): the same differentiable distortions of what the discriminator is shown.

A sample's draws are a function of (seed, step, stream) alone, so they depend on neither rank nor micro-batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ctm_fast.ops import philox_words

SHIFT = 0.125
"""Largest translation, over the size."""
HOLE = 0.2
"""Side of the cutout, over the size."""


@dataclass(frozen=True)
class AugmentDraws:
    """What is done to each sample of a batch.

    brightness in [-1/2, 1/2), saturation in [0, 2), contrast in [1/2, 3/2): [B] float32. shift [B, 2] int64: rows and
    columns that the picture moves down and right. hole [B, 2] int64: row and column of the cutout's centre.
    """

    brightness: Tensor
    saturation: Tensor
    contrast: Tensor
    shift: Tensor
    hole: Tensor


def pixels(fraction: float, size: int) -> int:
    """``fraction`` of ``size``, rounded half up: 4 and 6 pixels of 32, 8 and 13 of 64 for shift and hole."""
    return int(fraction * size + 0.5)


def draw_augment(seeds: Tensor, step: int, height: int, width: int, *, stream: int) -> AugmentDraws:
    """Uniform draws for images of height x width pixels.

    Args:
        seeds: [B] int64, one for each sample: the run's seed and its global index (see ``ops.philox_words``).
        step: of training.
        stream: no two uses of a (seed, step) share one.
    """
    words = philox_words(seeds, step, (7,), stream=stream)
    brightness, saturation, contrast = ((words[:, :3] >> 8).float() * 2.0**-24).unbind(1)
    places = []
    for word, (fraction, size) in zip(
        words[:, 3:].unbind(1), [(SHIFT, height), (SHIFT, width), (HOLE, height), (HOLE, width)], strict=True
    ):
        reach = pixels(fraction, size)
        if fraction == SHIFT:
            places.append(_integers(word, 2 * reach + 1) - reach)
        else:  # an even hole may be centred on the lower edge as on the upper, so that both are covered alike
            places.append(_integers(word, size + 1 - reach % 2))
    return AugmentDraws(
        brightness - 0.5, 2 * saturation, contrast + 0.5, torch.stack(places[:2], 1), torch.stack(places[2:], 1)
    )


def _integers(words: Tensor, count: int) -> Tensor:
    """32-bit words to 0..count-1; in integers, as float32 would round the largest word up to ``count``."""
    return (words * count) >> 32


def diff_augment(x: Tensor, draws: AugmentDraws) -> Tensor:
    """Brightness, saturation, contrast, translation and cutout of x [B, C, H, W] in [-1, 1], in this order.

        x + b;   m + s (x - m), m the mean over channels;   m + c (x - m), m the mean over the image

    What a translation uncovers and what is cut out is 0. Differentiable in x; the result is not clamped.
    """
    if x.dim() != 4 or len(x) != len(draws.brightness):
        raise ValueError(f"x: expected shape [{len(draws.brightness)}, C, H, W], got {list(x.shape)}")
    brightness, saturation, contrast = (
        value.to(x.dtype).view(-1, 1, 1, 1) for value in (draws.brightness, draws.saturation, draws.contrast)
    )
    x = x + brightness
    grey = x.mean(1, keepdim=True)
    x = grey + saturation * (x - grey)
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + contrast * (x - mean)
    return _translate_and_cut(x, draws)


def _translate_and_cut(x: Tensor, draws: AugmentDraws) -> Tensor:
    """One gather and one mask: rounding-free, and backward adds each gradient once."""
    height, width = x.shape[2:]
    rows, columns = (torch.arange(size, device=x.device) for size in (height, width))
    source_rows, source_columns = rows - draws.shift[:, :1], columns - draws.shift[:, 1:]  # [B, H], [B, W]
    keep = _inside(source_rows, height).unsqueeze(2) & _inside(source_columns, width).unsqueeze(1)
    hole_rows, hole_columns = _covered(rows, draws.hole[:, :1], height), _covered(columns, draws.hole[:, 1:], width)
    keep &= ~(hole_rows.unsqueeze(2) & hole_columns.unsqueeze(1))
    index = source_rows.clamp(0, height - 1).unsqueeze(2) * width + source_columns.clamp(0, width - 1).unsqueeze(1)
    moved = x.flatten(2).gather(2, index.flatten(1).unsqueeze(1).expand(-1, x.shape[1], -1)).view_as(x)
    return moved * keep.unsqueeze(1)


def _inside(index: Tensor, size: int) -> Tensor:
    return (index >= 0) & (index < size)


def _covered(index: Tensor, centre: Tensor, size: int) -> Tensor:
    """Whether a row or column lies in a hole around ``centre`` [B, 1]."""
    side = pixels(HOLE, size)
    return _inside(index - centre + side // 2, side)
