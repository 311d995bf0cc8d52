"""What the kernels of group_norm_silu share: tiles [pixels, channels] of an image, and groups of channels in them.

Rows of a tile are contiguous in channels_last, columns in the contiguous format. A row is a run of neighbouring
channels, of one group or of several, so that it is whole 16-byte vectors whatever the width of a group: the group of a
channel is ``channel // width``.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl

SMALL = 4096
"""Elements below which a tile takes more channels: 32 to a thread of four warps, 64 bytes of bfloat16 in flight each;
eight programs of 64 registers a thread fill a multiprocessor of an H100 and have 64 KiB in flight, twice what 3.35 TB/s
times the latency of 0.7 us asks of each of 132."""

LANES = 64
"""Channels of a tile that is not of whole groups, in channels_last: one line of 128 bytes of bfloat16."""

COLUMNS = 8
"""And in the contiguous format."""


class Whole(NamedTuple):
    """A tile of all pixels of whole groups: ``SET`` channels in ``CB`` lanes, ``GB`` >= SET / width groups."""

    SET: int
    PB: int
    CB: int
    GB: int


class Part(NamedTuple):
    """A tile of ``PB`` pixels of ``CB`` channels."""

    PB: int
    CB: int


def whole_tile(channels: int, width: int, pixels: int, vector: int, limit: int) -> Whole | None:
    """The smallest whole groups that are whole vectors of ``vector`` channels in rows of 32 bytes or more, and more of
    them while the tile is small; None if that is more than ``limit`` elements."""
    rows = triton.next_power_of_2(pixels)
    run = min(math.lcm(width, vector), channels)
    while run < channels and (run < 2 * vector or triton.next_power_of_2(2 * run) * rows <= SMALL):
        run = min(2 * run, channels)
    lanes = triton.next_power_of_2(run)
    if lanes * rows > limit:
        return None
    return Whole(run, rows, lanes, triton.next_power_of_2(run // width))


def part_tile(channels: int, pixels: int, channels_last: bool, size: int) -> Part:
    """About ``size`` elements: whole lines of 128 bytes or more, where the image has them."""
    lanes = min(LANES if channels_last else COLUMNS, triton.next_power_of_2(channels))
    return Part(min(size // lanes, triton.next_power_of_2(pixels)), lanes)


@triton.jit
def tile(
    first_pixel, first_channel, run, pixels, channels, CHANNELS_LAST: tl.constexpr, PB: tl.constexpr, CB: tl.constexpr
):
    """Channels [CB] and which there are, offsets [PB, CB] in the image and which elements there are.

    A tile has ``run`` channels; what is left of CB lanes is masked, as is what lies outside the image.
    """
    pixel = first_pixel + tl.arange(0, PB)
    lane = tl.arange(0, CB)
    channel = first_channel + lane
    there = (lane < run) & (channel < channels)
    if CHANNELS_LAST:
        offset = pixel.to(tl.int64)[:, None] * channels + channel[None, :]
    else:
        offset = channel.to(tl.int64)[None, :] * pixels + pixel[:, None]
    return channel, there, offset, (pixel < pixels)[:, None] & there[None, :]


@triton.jit
def part(program, pixels, channels, PB: tl.constexpr, CB: tl.constexpr):
    """Of a program of a grid over (image, tile of pixels, run of channels): image, tile, first channel."""
    runs = tl.cdiv(channels, CB)
    tiles = tl.cdiv(pixels, PB)
    return (program // (runs * tiles)).to(tl.int64), program // runs % tiles, program % runs * CB


@triton.jit
def members(width, CB: tl.constexpr, GB: tl.constexpr):
    """Whether a channel is of a group [CB, GB], for a tile of whole groups."""
    return (tl.arange(0, CB) // width)[:, None] == tl.arange(0, GB)[None, :]


@triton.jit
def by_group(values, member):
    """Sums over the channels of each group: [CB] -> [GB]."""
    return tl.sum(tl.where(member, values[:, None], 0.0), 0)


@triton.jit
def by_channel(values, member):
    """The value of each channel's group: [GB] -> [CB]."""
    return tl.sum(tl.where(member, values[None, :], 0.0), 1)


@triton.jit
def optional(values, offset, there):
    """``values[offset]``, zero where there are none."""
    if values is None:
        return tl.zeros(there.shape, tl.float32)
    return tl.load(values + offset, mask=there, other=0.0)


@triton.jit
def modulation(weight, bias, scale, shift, row, channel, there):
    """(gain, offset) of z = n gain + offset, [CB]; ``row`` is where the sample's values start in [B, C]."""
    factor = 1 + optional(scale, row + channel, there)
    gain = tl.load(weight + channel, mask=there, other=0.0) * factor
    offset = tl.load(bias + channel, mask=there, other=0.0) * factor
    return gain, offset + optional(shift, row + channel, there)


@triton.jit
def gradient(x, grad, center, rstd, gain, offset, out_scale, mask, SILU: tl.constexpr):
    """(n, g) [PB, CB]: the normalised x, and the gradient before SiLU; zero outside the image."""
    n = tl.where(mask, (x - center[None, :]) * rstd[None, :], 0.0)
    g = grad * out_scale
    if SILU:
        z = n * gain[None, :] + offset[None, :]
        sigmoid = tl.sigmoid(z)
        g = g * sigmoid * (1 + z * (1 - sigmoid))
    return n, g
