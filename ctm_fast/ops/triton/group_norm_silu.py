"""Group normalisation with what surrounds it, in Triton.

Where the pixels of a few whole groups fit in registers, one kernel reads the image once. Else a first kernel takes the
statistics of each channel over tiles of pixels, a second, of a program or two to an image, merges them by group, and a
third reads the image again, the last tile first: what the second level of the cache still holds comes from there.
Sums are over fixed tiles in a fixed order, without atomics: the same bits each time, in any batch.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ctm_fast.ops.triton._group_tiles import (
    by_channel,
    by_group,
    gradient,
    members,
    modulation,
    optional,
    part,
    part_tile,
    tile,
    whole_tile,
)
from ctm_fast.ops.triton._launch import wrap_triton

PER_THREAD = 64
"""Elements of a tile to a thread of the forward kernels, half of that of the backward ones, which hold two images: less
than 128 registers a thread, 512 threads or more to a multiprocessor."""

WARPS = 4
"""And twice or four times as many, where the smallest whole groups need them."""


@triton.jit
def _store(out, offset, z, residual, out_scale, mask, SILU: tl.constexpr):
    y = z * tl.sigmoid(z) if SILU else z
    if residual is not None:
        y += tl.load(residual + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + offset, (y * out_scale).to(out.dtype.element_ty), mask=mask)


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
    channel, there, offset, mask = tile(0, number * SET, SET, pixels, channels, CHANNELS_LAST, PB, CB)
    offset += image * channels * pixels
    row = image * channels
    value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)

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
    _store(out, offset, value * gain[None, :] + add[None, :], residual, out_scale, mask, SILU)


@triton.jit
def _moments(x, partial, channels, pixels, CHANNELS_LAST: tl.constexpr, PB: tl.constexpr, CB: tl.constexpr):
    """Mean and sum of squared deviations of each channel over a tile of pixels; ``partial`` is [B, tiles, 2, C]."""
    image, number, first = part(tl.program_id(0), pixels, channels, PB, CB)
    channel, there, offset, mask = tile(number * PB, first, CB, pixels, channels, CHANNELS_LAST, PB, CB)
    value = tl.load(x + image * channels * pixels + offset, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(value, 0) / tl.minimum(PB, pixels - number * PB).to(tl.float32)
    value = tl.where(mask, value - mean[None, :], 0.0)
    partial += (image * tl.cdiv(pixels, PB) + number) * 2 * channels
    tl.store(partial + channel, mean, mask=there)
    tl.store(partial + channels + channel, tl.sum(value * value, 0), mask=there)


@triton.jit
def _members_of(groups, channels, GB: tl.constexpr, KB: tl.constexpr):
    """Image, groups [GB] of a program and which there are, their channels [GB, KB] and which there are."""
    width = channels // groups
    blocks = tl.cdiv(groups, GB)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    group = tl.program_id(0) % blocks * GB + tl.arange(0, GB)
    member = tl.arange(0, KB)
    channel = group[:, None] * width + member[None, :]
    there = (group < groups)[:, None] & (member < width)[None, :]
    return image, group, group < groups, channel, there


@triton.jit
def _statistics(
    partial, x_shift, mean, rstd, eps, channels, groups, pixels, PB: tl.constexpr, GB: tl.constexpr, KB: tl.constexpr
):
    """Merges what ``_moments`` wrote: M2 = sum of M2_i + n_i (mean_i - mean)^2 (Chan et al., 1979)."""
    image, group, own, channel, there = _members_of(groups, channels, GB, KB)
    tiles = tl.cdiv(pixels, PB)
    partial += image * tiles * 2 * channels
    count = tl.cast(pixels, tl.float32) * tl.cast(channels // groups, tl.float32)
    added = optional(x_shift, image * channels + channel, there)
    total = tl.zeros([GB, KB], tl.float32)
    for i in range(tiles):
        size = tl.minimum(PB, pixels - i * PB).to(tl.float32)
        moment = tl.load(partial + tl.cast(i, tl.int64) * 2 * channels + channel, mask=there, other=0.0)
        total += size * (moment + added)
    mean_value = tl.sum(total, 1) / count
    squares = tl.zeros([GB, KB], tl.float32)
    for i in range(tiles):
        size = tl.minimum(PB, pixels - i * PB).to(tl.float32)
        start = partial + tl.cast(i, tl.int64) * 2 * channels
        away = tl.load(start + channel, mask=there, other=0.0) + added - mean_value[:, None]
        squares += tl.load(start + channels + channel, mask=there, other=0.0) + size * away * away
    variance = tl.sum(tl.where(there, squares, 0.0), 1) / count
    tl.store(mean + image * groups + group, mean_value, mask=own)
    tl.store(rstd + image * groups + group, tl.div_rn(1.0, tl.sqrt_rn(variance + eps)), mask=own)


@triton.jit
def _apply(
    x,
    mean,
    rstd,
    weight,
    bias,
    x_shift,
    scale,
    shift,
    residual,
    out,
    out_scale,
    channels,
    groups,
    pixels,
    SILU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PB: tl.constexpr,
    CB: tl.constexpr,
):
    """The output of a tile."""
    last = tl.num_programs(0) - 1
    image, number, first = part(last - tl.program_id(0), pixels, channels, PB, CB)
    channel, there, offset, mask = tile(number * PB, first, CB, pixels, channels, CHANNELS_LAST, PB, CB)
    offset += image * channels * pixels
    row = image * channels
    value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    group = image * groups + channel // (channels // groups)
    center = tl.load(mean + group, mask=there, other=0.0) - optional(x_shift, row + channel, there)
    gain, add = modulation(weight, bias, scale, shift, row, channel, there)
    gain *= tl.load(rstd + group, mask=there, other=0.0)
    z = (value - center[None, :]) * gain[None, :] + add[None, :]
    _store(out, offset, z, residual, out_scale, mask, SILU)


@triton.jit
def _whole_backward(
    grad,
    x,
    mean,
    rstd,
    weight,
    bias,
    x_shift,
    scale,
    shift,
    dx,
    sums,
    out_scale,
    batch,
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
    """A set of whole groups of an image: sums and, unless ``dx`` is None, the gradient in x from one reading."""
    sets = tl.cdiv(channels, SET)
    image = (tl.program_id(0) // sets).to(tl.int64)
    first = tl.program_id(0) % sets * SET
    channel, there, offset, mask = tile(0, first, SET, pixels, channels, CHANNELS_LAST, PB, CB)
    offset += image * channels * pixels
    row = image * channels
    value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    grad_value = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32)

    width = channels // groups
    group = image * groups + channel // width
    center = tl.load(mean + group, mask=there, other=0.0) - optional(x_shift, row + channel, there)
    rstd_value = tl.load(rstd + group, mask=there, other=0.0)
    gain, add = modulation(weight, bias, scale, shift, row, channel, there)
    n, g = gradient(value, grad_value, center, rstd_value, gain, add, out_scale, mask, SILU)
    sum_g, sum_g_n = tl.sum(g, 0), tl.sum(g * n, 0)
    plane = tl.cast(batch, tl.int64) * channels
    tl.store(sums + row + channel, sum_g, mask=there)
    tl.store(sums + plane + row + channel, sum_g_n, mask=there)
    tl.store(sums + 2 * plane + row + channel, tl.sum(n, 0), mask=there)
    if dx is not None:
        member = members(width, CB, GB)
        count = tl.cast(pixels, tl.float32) * tl.cast(width, tl.float32)
        mean_g = by_channel(by_group(gain * sum_g, member) / count, member)
        mean_g_n = by_channel(by_group(gain * sum_g_n, member) / count, member)
        result = (g * gain[None, :] - mean_g[None, :] - n * mean_g_n[None, :]) * rstd_value[None, :]
        tl.store(dx + offset, result.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def _sums(
    grad,
    x,
    mean,
    rstd,
    weight,
    bias,
    x_shift,
    scale,
    shift,
    partial,
    out_scale,
    channels,
    groups,
    pixels,
    SILU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PB: tl.constexpr,
    CB: tl.constexpr,
):
    """Sums of g, g n and n of each channel over a tile of pixels; ``partial`` is [B, tiles, 3, C]."""
    image, number, first = part(tl.program_id(0), pixels, channels, PB, CB)
    channel, there, offset, mask = tile(number * PB, first, CB, pixels, channels, CHANNELS_LAST, PB, CB)
    offset += image * channels * pixels
    row = image * channels
    value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    grad_value = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32)
    group = image * groups + channel // (channels // groups)
    center = tl.load(mean + group, mask=there, other=0.0) - optional(x_shift, row + channel, there)
    rstd_value = tl.load(rstd + group, mask=there, other=0.0)
    gain, add = modulation(weight, bias, scale, shift, row, channel, there)
    n, g = gradient(value, grad_value, center, rstd_value, gain, add, out_scale, mask, SILU)
    partial += (image * tl.cdiv(pixels, PB) + number) * 3 * channels
    tl.store(partial + channel, tl.sum(g, 0), mask=there)
    tl.store(partial + channels + channel, tl.sum(g * n, 0), mask=there)
    tl.store(partial + 2 * channels + channel, tl.sum(n, 0), mask=there)


@triton.jit
def _group_sums(
    partial,
    weight,
    scale,
    sums,
    means,
    batch,
    channels,
    groups,
    pixels,
    PB: tl.constexpr,
    GB: tl.constexpr,
    KB: tl.constexpr,
):
    """Adds what ``_sums`` wrote: ``sums`` [3, B, C], and ``means`` [2, B, groups] of gain g and gain g n."""
    image, group, own, channel, there = _members_of(groups, channels, GB, KB)
    tiles = tl.cdiv(pixels, PB)
    partial += image * tiles * 3 * channels
    g = tl.zeros([GB, KB], tl.float32)
    g_n = tl.zeros([GB, KB], tl.float32)
    n = tl.zeros([GB, KB], tl.float32)
    for i in range(tiles):
        start = partial + tl.cast(i, tl.int64) * 3 * channels
        g += tl.load(start + channel, mask=there, other=0.0)
        g_n += tl.load(start + channels + channel, mask=there, other=0.0)
        n += tl.load(start + 2 * channels + channel, mask=there, other=0.0)
    row = image * channels
    plane = tl.cast(batch, tl.int64) * channels
    tl.store(sums + row + channel, g, mask=there)
    tl.store(sums + plane + row + channel, g_n, mask=there)
    tl.store(sums + 2 * plane + row + channel, n, mask=there)
    gain = tl.load(weight + channel, mask=there, other=0.0) * (1 + optional(scale, row + channel, there))
    count = tl.cast(pixels, tl.float32) * tl.cast(channels // groups, tl.float32)
    means += image * groups + group
    tl.store(means, tl.sum(gain * g, 1) / count, mask=own)
    tl.store(means + tl.cast(batch, tl.int64) * groups, tl.sum(gain * g_n, 1) / count, mask=own)


@triton.jit
def _dx(
    grad,
    x,
    mean,
    rstd,
    weight,
    bias,
    x_shift,
    scale,
    shift,
    means,
    dx,
    out_scale,
    batch,
    channels,
    groups,
    pixels,
    SILU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PB: tl.constexpr,
    CB: tl.constexpr,
):
    """The gradient in x of a tile."""
    last = tl.num_programs(0) - 1
    image, number, first = part(last - tl.program_id(0), pixels, channels, PB, CB)
    channel, there, offset, mask = tile(number * PB, first, CB, pixels, channels, CHANNELS_LAST, PB, CB)
    offset += image * channels * pixels
    row = image * channels
    value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    grad_value = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32)
    group = image * groups + channel // (channels // groups)
    center = tl.load(mean + group, mask=there, other=0.0) - optional(x_shift, row + channel, there)
    rstd_value = tl.load(rstd + group, mask=there, other=0.0)
    gain, add = modulation(weight, bias, scale, shift, row, channel, there)
    n, g = gradient(value, grad_value, center, rstd_value, gain, add, out_scale, mask, SILU)
    mean_g = tl.load(means + group, mask=there, other=0.0)
    mean_g_n = tl.load(means + tl.cast(batch, tl.int64) * groups + group, mask=there, other=0.0)
    result = (g * gain[None, :] - mean_g[None, :] - n * mean_g_n[None, :]) * rstd_value[None, :]
    tl.store(dx + offset, result.to(dx.dtype.element_ty), mask=mask)


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
    batch, channels, pixels = x.shape[0], int(x.shape[1]), int(x.shape[2] * x.shape[3])
    channels_last = not x.is_contiguous()
    options = {"SILU": silu, "CHANNELS_LAST": channels_last}
    vector = 16 // x.element_size() if channels_last else 1
    whole = whole_tile(channels, channels // groups, pixels, vector, 2 * WARPS * 32 * PER_THREAD)
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
            num_warps=_warps(whole.PB * whole.CB, PER_THREAD),
        )
        return out, mean, rstd
    tile_size = part_tile(channels, pixels, channels_last, WARPS * 32 * PER_THREAD)
    tiles = triton.cdiv(pixels, tile_size.PB)
    partial = x.new_empty((batch, tiles, 2, channels), dtype=torch.float32)
    grid = (batch * tiles * triton.cdiv(channels, tile_size.CB),)
    merge = _merge(channels, groups)
    wrap_triton(_moments)[grid](
        x, partial, channels, pixels, CHANNELS_LAST=channels_last, **tile_size._asdict(), num_warps=WARPS
    )
    wrap_triton(_statistics)[(batch * triton.cdiv(groups, merge["GB"]),)](
        partial, x_shift, mean, rstd, eps, channels, groups, pixels, PB=tile_size.PB, **merge
    )
    wrap_triton(_apply)[grid](
        x,
        mean,
        rstd,
        weight,
        bias,
        x_shift,
        scale,
        shift,
        residual,
        out,
        out_scale,
        channels,
        groups,
        pixels,
        **options,
        **tile_size._asdict(),
        num_warps=WARPS,
    )
    return out, mean, rstd


def group_norm_silu_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    x_shift: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    out_scale: float,
    need_x: bool,
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x) if need_x else x.new_empty(0)
    sums = x.new_empty((3, *x.shape[:2]), dtype=torch.float32)
    if x.numel() == 0:
        return dx, sums.zero_()
    batch, channels, pixels = x.shape[0], int(x.shape[1]), int(x.shape[2] * x.shape[3])
    channels_last = not x.is_contiguous()
    given = (grad, x, mean, rstd, weight, bias, x_shift, scale, shift)
    options = {"SILU": silu, "CHANNELS_LAST": channels_last}
    per_thread = PER_THREAD // 2
    vector = 16 // x.element_size() if channels_last else 1
    whole = whole_tile(channels, channels // groups, pixels, vector, 4 * WARPS * 32 * per_thread)
    if whole is not None:
        wrap_triton(_whole_backward)[(batch * triton.cdiv(channels, whole.SET),)](
            *given,
            dx if need_x else None,
            sums,
            out_scale,
            batch,
            channels,
            groups,
            pixels,
            **options,
            **whole._asdict(),
            num_warps=_warps(whole.PB * whole.CB, per_thread),
        )
        return dx, sums
    tile_size = part_tile(channels, pixels, channels_last, WARPS * 32 * per_thread)
    tiles = triton.cdiv(pixels, tile_size.PB)
    partial = x.new_empty((batch, tiles, 3, channels), dtype=torch.float32)
    means = x.new_empty((2, batch, groups), dtype=torch.float32)
    grid = (batch * tiles * triton.cdiv(channels, tile_size.CB),)
    merge = _merge(channels, groups)
    wrap_triton(_sums)[grid](
        *given, partial, out_scale, channels, groups, pixels, **options, **tile_size._asdict(), num_warps=WARPS
    )
    wrap_triton(_group_sums)[(batch * triton.cdiv(groups, merge["GB"]),)](
        partial, weight, scale, sums, means, batch, channels, groups, pixels, PB=tile_size.PB, **merge
    )
    if need_x:
        wrap_triton(_dx)[grid](
            *given, means, dx, out_scale, batch, channels, groups, pixels, **options, **tile_size._asdict(),
            num_warps=WARPS,
        )
    return dx, sums


def _warps(size: int, per_thread: int) -> int:
    return max(WARPS, size // (32 * per_thread))


def _merge(channels: int, groups: int) -> dict[str, int]:
    """Groups and their channels to a program of the kernels between: about 1024 channels."""
    width = triton.next_power_of_2(channels // groups)
    return {"GB": min(max(1, 1024 // width), triton.next_power_of_2(groups)), "KB": width}
