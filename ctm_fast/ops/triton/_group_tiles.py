"""What the kernels of group_norm_silu share: tiles [pixels, channels] of an image, and groups of channels in them.

Rows of a tile are contiguous in channels_last, columns in the contiguous format. A row is a run of neighbouring
channels, of one group or of several, so that it is whole 16-byte vectors whatever the width of a group: the group of a
channel is ``channel // width``.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

# Occupancy, to which tests/test_triton_compiles.py holds the kernels (no GPU has run and timed them yet): 32 elements
# of an image to a thread, four 128-bit loads of bfloat16 in flight, need 56 to 104 registers forward and 96 to 144
# backward, where there are two images. That leaves an H100's multiprocessor 16 to 36 warps forward, 8 to 28 backward:
# 32 KiB or more in flight, where 3.35 TB/s times a latency of 0.7 us, over 132 multiprocessors, asks for 18.
WARPS = 4
TILE = 4096
"""Elements of a tile: 32 to each thread of WARPS warps."""

WHOLE_BYTES = 32 * 1024
"""Of an image, the most that a program keeps in registers: 16 warps of bfloat16, the only ones on a multiprocessor."""

WHOLE_LANES = 128
"""The most channels of so large a tile: with 256 the backward kernel spills."""

LANES = 64
"""Channels of a tile that is not of whole groups, in channels_last: one line of 128 bytes of bfloat16."""

COLUMNS = 8
"""And in the contiguous format."""


class Whole(NamedTuple):
    """A tile of all pixels of whole groups: SET channels in CB lanes, GB >= SET / width groups."""

    SET: int
    PB: int
    CB: int
    GB: int


class Part(NamedTuple):
    """A tile of PB pixels of CB channels."""

    PB: int
    CB: int


class Merge(NamedTuple):
    """GB groups of up to KB channels."""

    GB: int
    KB: int


def whole_tile(x: Tensor, groups: int) -> Whole | None:
    """The smallest whole groups that are whole vectors, in channels_last in rows of 32 bytes or more, and more of them
    while the tile is small; None if even the smallest do not fit in registers."""
    channels, pixels = int(x.shape[1]), int(x.shape[2] * x.shape[3])
    width = channels // groups
    vector = 1 if x.is_contiguous() else 16 // x.element_size()
    rows = triton.next_power_of_2(pixels)
    run = min(math.lcm(width, vector), channels)
    while run < channels and (run < 2 * vector or triton.next_power_of_2(2 * run) * rows <= TILE):
        run = min(2 * run, channels)
    lanes = triton.next_power_of_2(run)
    limit = WHOLE_BYTES if lanes <= WHOLE_LANES else WHOLE_BYTES // 2
    if lanes * rows * x.element_size() > limit:
        return None
    return Whole(run, rows, lanes, triton.next_power_of_2(run // width))


def part_tile(x: Tensor) -> Part:
    """TILE elements: whole lines of 128 bytes or more, where the image has them. A column of 2^27 pixels is alone, so
    that offsets in a tile fit in 32 bits."""
    channels, pixels = int(x.shape[1]), int(x.shape[2] * x.shape[3])
    lanes = LANES if not x.is_contiguous() else COLUMNS if pixels < 2**27 else 1
    lanes = min(lanes, triton.next_power_of_2(channels))
    return Part(min(TILE // lanes, triton.next_power_of_2(pixels)), lanes)


def merge_tile(x: Tensor, groups: int) -> Merge:
    """About 256 channels: a few programs to an image."""
    width = triton.next_power_of_2(int(x.shape[1]) // groups)
    return Merge(min(max(1, 256 // width), triton.next_power_of_2(groups)), width)


def warps(whole: Whole) -> int:
    return max(WARPS, WARPS * whole.PB * whole.CB // TILE)


@triton.jit
def tile(
    image,
    first_pixel,
    first_channel,
    run,
    pixels,
    channels,
    CHANNELS_LAST: tl.constexpr,
    PB: tl.constexpr,
    CB: tl.constexpr,
):
    """Channels [CB] of a tile and which there are, where it starts, its offsets [PB, CB] from there and its mask.

    A tile has ``run`` channels; what is left of CB lanes is masked, as is what lies outside the image. The start is a
    64-bit number; offsets in a tile fit in 32, which spares registers.
    """
    pixel = tl.arange(0, PB)
    lane = tl.arange(0, CB)
    channel = first_channel + lane
    there = (lane < run) & (channel < channels)
    start = image * channels * pixels
    if CHANNELS_LAST:
        start += tl.cast(first_pixel, tl.int64) * channels + first_channel
        offset = pixel[:, None] * channels + lane[None, :]
    else:
        start += tl.cast(first_channel, tl.int64) * pixels + first_pixel
        offset = lane[None, :] * pixels + pixel[:, None]
    return channel, there, start, offset, (first_pixel + pixel < pixels)[:, None] & there[None, :]


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
        result = tl.zeros(there.shape, tl.float32)
    else:  # the compiler would go on behind a return
        result = tl.load(values + offset, mask=there, other=0.0)
    return result


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


@triton.jit
def merged(groups, channels, GB: tl.constexpr, KB: tl.constexpr):
    """Image, groups [GB] of a program and which there are, their channels [GB, KB] and which there are."""
    width = channels // groups
    blocks = tl.cdiv(groups, GB)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    group = tl.program_id(0) % blocks * GB + tl.arange(0, GB)
    member = tl.arange(0, KB)
    channel = group[:, None] * width + member[None, :]
    there = (group < groups)[:, None] & (member < width)[None, :]
    return image, group, group < groups, channel, there
