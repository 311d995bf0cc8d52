"""Group normalisation with what surrounds it, in Triton.

Where the pixels of a few whole groups fit in registers, one kernel reads the image once. Else a first kernel takes the
statistics of each channel over tiles of pixels, a second, of a program or two to an image, merges them by group, and a
third reads the image again, the last tile first: what the second level of the cache still holds comes from there.
Sums are over fixed tiles in a fixed order, without atomics: the same bits each time, in any batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ctm_fast.ops.triton._group_norm_silu_backward import group_norm_silu_backward
from ctm_fast.ops.triton._group_tiles import (
    WARPS,
    by_channel,
    by_group,
    members,
    merge_tile,
    merged,
    modulation,
    optional,
    part,
    part_tile,
    tile,
    warps,
    whole_tile,
)
from ctm_fast.ops.triton._launch import wrap_triton

__all__ = ["group_norm_silu", "group_norm_silu_backward"]


@triton.jit
def _store(out, start, offset, z, residual, out_scale, mask, SILU: tl.constexpr):
    y = z * tl.sigmoid(z) if SILU else z
    if residual is not None:
        y += tl.load(residual + start + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + start + offset, (y * out_scale).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _whole(
    x,
    weight,
    bias,
    x_shift,
    scale,
    shift,
    residual,
    out,
    mean,
    rstd,
    eps,
    out_scale,
    channels,
    groups,
    pixels,
    SILU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SET: tl.constexpr,
    PB: tl.constexpr,
    CB: tl.constexpr,
    GB: tl.constexpr,
):
    """A set of whole groups of an image: statistics and output from one reading."""
    sets = tl.cdiv(channels, SET)
    image = (tl.program_id(0) // sets).to(tl.int64)
    number = tl.program_id(0) % sets
    channel, there, start, offset, mask = tile(image, 0, number * SET, SET, pixels, channels, CHANNELS_LAST, PB, CB)
    row = image * channels
    value = tl.load(x + start + offset, mask=mask, other=0.0).to(tl.float32)

    width = channels // groups
    member = members(width, CB, GB)
    count = tl.cast(pixels, tl.float32) * tl.cast(width, tl.float32)
    added = optional(x_shift, row + channel, there)
    total = tl.sum(value, 0) + tl.where(there, tl.cast(pixels, tl.float32) * added, 0.0)
    mean_value = by_group(total, member) / count
    value = tl.where(mask, value - (by_channel(mean_value, member) - added)[None, :], 0.0)
    variance = by_group(tl.sum(value * value, 0), member) / count
    rstd_value = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))

    group = number * (SET // width) + tl.arange(0, GB)
    own = (tl.arange(0, GB) < SET // width) & (group < groups)
    tl.store(mean + image * groups + group, mean_value, mask=own)
    tl.store(rstd + image * groups + group, rstd_value, mask=own)

    gain, add = modulation(weight, bias, scale, shift, row, channel, there)
    gain *= by_channel(rstd_value, member)
    _store(out, start, offset, value * gain[None, :] + add[None, :], residual, out_scale, mask, SILU)


@triton.jit
def _moments(x, partial, channels, pixels, CHANNELS_LAST: tl.constexpr, PB: tl.constexpr, CB: tl.constexpr):
    """Mean and sum of squared deviations of each channel over a tile of pixels; ``partial`` is [B, tiles, 2, C]."""
    image, number, first = part(tl.program_id(0), pixels, channels, PB, CB)
    channel, there, start, offset, mask = tile(image, number * PB, first, CB, pixels, channels, CHANNELS_LAST, PB, CB)
    value = tl.load(x + start + offset, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(value, 0) / tl.minimum(PB, pixels - number * PB).to(tl.float32)
    value = tl.where(mask, value - mean[None, :], 0.0)
    partial += (image * tl.cdiv(pixels, PB) + number) * 2 * channels
    tl.store(partial + channel, mean, mask=there)
    tl.store(partial + channels + channel, tl.sum(value * value, 0), mask=there)


@triton.jit
def _statistics(
    partial,
    weight,
    bias,
    x_shift,
    scale,
    shift,
    mean,
    rstd,
    coefficients,
    eps,
    channels,
    groups,
    pixels,
    PB: tl.constexpr,
    GB: tl.constexpr,
    KB: tl.constexpr,
):
    """Merges what ``_moments`` wrote: M2 = sum of M2_i + n_i (mean_i - mean)^2 (Chan et al., 1979).

    ``coefficients`` [B, 3, C] are (center, gain, add) of z = (x - center) gain + add.
    """
    image, group, own, channel, there = merged(groups, channels, GB, KB)
    tiles = tl.cdiv(pixels, PB)
    partial += image * tiles * 2 * channels
    count = tl.cast(pixels, tl.float32) * tl.cast(channels // groups, tl.float32)
    row = image * channels
    added = optional(x_shift, row + channel, there)
    total = tl.zeros([GB, KB], tl.float32)
    for i in range(tiles):
        size = tl.minimum(PB, pixels - i * PB).to(tl.float32)
        moment = tl.load(partial + tl.cast(i, tl.int64) * 2 * channels + channel, mask=there, other=0.0)
        total += size * (moment + added)
    mean_value = tl.sum(total, 1) / count
    center = mean_value[:, None] - added
    squares = tl.zeros([GB, KB], tl.float32)
    for i in range(tiles):
        size = tl.minimum(PB, pixels - i * PB).to(tl.float32)
        start = partial + tl.cast(i, tl.int64) * 2 * channels
        away = tl.load(start + channel, mask=there, other=0.0) - center
        squares += tl.load(start + channels + channel, mask=there, other=0.0) + size * away * away
    variance = tl.sum(tl.where(there, squares, 0.0), 1) / count
    rstd_value = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    tl.store(mean + image * groups + group, mean_value, mask=own)
    tl.store(rstd + image * groups + group, rstd_value, mask=own)
    gain, add = modulation(weight, bias, scale, shift, row, channel, there)
    coefficients += 3 * row + channel
    tl.store(coefficients, center, mask=there)
    tl.store(coefficients + channels, gain * rstd_value[:, None], mask=there)
    tl.store(coefficients + 2 * channels, add, mask=there)


@triton.jit
def _apply(
    x,
    coefficients,
    residual,
    out,
    out_scale,
    channels,
    pixels,
    SILU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PB: tl.constexpr,
    CB: tl.constexpr,
):
    """The output of a tile."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    image, number, first = part(program, pixels, channels, PB, CB)
    channel, there, start, offset, mask = tile(image, number * PB, first, CB, pixels, channels, CHANNELS_LAST, PB, CB)
    value = tl.load(x + start + offset, mask=mask, other=0.0).to(tl.float32)
    coefficients += 3 * image * channels + channel
    center = tl.load(coefficients, mask=there, other=0.0)
    gain = tl.load(coefficients + channels, mask=there, other=0.0)
    add = tl.load(coefficients + 2 * channels, mask=there, other=0.0)
    _store(
        out, start, offset, (value - center[None, :]) * gain[None, :] + add[None, :], residual, out_scale, mask, SILU
    )


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    x_shift: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    residual: Tensor | None,
    out_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.empty_like(x)
    mean, rstd = (x.new_empty((x.shape[0], groups), dtype=torch.float32) for _ in range(2))
    if out.numel() == 0:
        return out, mean.zero_(), rstd.zero_()
    batch, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    options = {"SILU": silu, "CHANNELS_LAST": not x.is_contiguous()}
    whole = whole_tile(x, groups)
    if whole is not None:
        wrap_triton(_whole)[(batch * triton.cdiv(channels, whole.SET),)](
            x,
            weight,
            bias,
            x_shift,
            scale,
            shift,
            residual,
            out,
            mean,
            rstd,
            eps,
            out_scale,
            channels,
            groups,
            pixels,
            **options,
            **whole._asdict(),
            num_warps=warps(whole),
        )
        return out, mean, rstd
    size, merge = part_tile(x), merge_tile(x, groups)
    tiles = triton.cdiv(pixels, size.PB)
    partial = x.new_empty((batch, tiles, 2, channels), dtype=torch.float32)
    coefficients = x.new_empty((batch, 3, channels), dtype=torch.float32)
    grid = (batch * tiles * triton.cdiv(channels, size.CB),)
    wrap_triton(_moments)[grid](
        x, partial, channels, pixels, CHANNELS_LAST=options["CHANNELS_LAST"], **size._asdict(), num_warps=WARPS
    )
    wrap_triton(_statistics)[(batch * triton.cdiv(groups, merge.GB),)](
        partial,
        weight,
        bias,
        x_shift,
        scale,
        shift,
        mean,
        rstd,
        coefficients,
        eps,
        channels,
        groups,
        pixels,
        PB=size.PB,
        **merge._asdict(),
        num_warps=WARPS,
    )
    wrap_triton(_apply)[grid](
        x,
        coefficients,
        residual,
        out,
        out_scale,
        channels,
        pixels,
        **options,
        **size._asdict(),
        num_warps=WARPS,
    )
    return out, mean, rstd
