"""The gradient of group_norm_silu in Triton, the same two ways: from one reading of x and grad, or from two.

    dx = rstd (gain g - mean(gain g) - n mean(gain g n))        means over the pixels and channels of a group

n is the normalised x and g the gradient before SiLU, both made again from x and grad; gain = weight (1 + scale).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ctm_fast.ops.triton._group_tiles import (
    WARPS,
    by_channel,
    by_group,
    gradient,
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


@triton.jit
def _whole(
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
    channel, there, start, offset, mask = tile(image, 0, first, SET, pixels, channels, CHANNELS_LAST, PB, CB)
    row = image * channels
    value = tl.load(x + start + offset, mask=mask, other=0.0).to(tl.float32)
    grad_value = tl.load(grad + start + offset, mask=mask, other=0.0).to(tl.float32)

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
        tl.store(dx + start + offset, result.to(dx.dtype.element_ty), mask=mask)


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
    channel, there, start, offset, mask = tile(image, number * PB, first, CB, pixels, channels, CHANNELS_LAST, PB, CB)
    row = image * channels
    value = tl.load(x + start + offset, mask=mask, other=0.0).to(tl.float32)
    grad_value = tl.load(grad + start + offset, mask=mask, other=0.0).to(tl.float32)
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
def _merge(
    partial,
    mean,
    rstd,
    weight,
    bias,
    x_shift,
    scale,
    shift,
    sums,
    coefficients,
    batch,
    channels,
    groups,
    pixels,
    PB: tl.constexpr,
    GB: tl.constexpr,
    KB: tl.constexpr,
):
    """Adds what ``_sums`` wrote: ``sums`` [3, B, C].

    ``coefficients`` [B, 6, C] are center, rstd, gain, add, and the group's means of gain g and of gain g n.
    """
    image, group, own, channel, there = merged(groups, channels, GB, KB)
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
    if coefficients is not None:
        gain, add = modulation(weight, bias, scale, shift, row, channel, there)
        mean_value = tl.load(mean + image * groups + group, mask=own, other=0.0)[:, None]
        rstd_value = tl.load(rstd + image * groups + group, mask=own, other=0.0)[:, None]
        count = tl.cast(pixels, tl.float32) * tl.cast(channels // groups, tl.float32)
        zero = tl.zeros([GB, KB], tl.float32)
        coefficients += 6 * row + channel
        tl.store(coefficients, mean_value - optional(x_shift, row + channel, there), mask=there)
        tl.store(coefficients + channels, zero + rstd_value, mask=there)
        tl.store(coefficients + 2 * channels, gain, mask=there)
        tl.store(coefficients + 3 * channels, add, mask=there)
        tl.store(coefficients + 4 * channels, zero + (tl.sum(gain * g, 1) / count)[:, None], mask=there)
        tl.store(coefficients + 5 * channels, zero + (tl.sum(gain * g_n, 1) / count)[:, None], mask=there)


@triton.jit
def _dx(
    grad,
    x,
    coefficients,
    dx,
    out_scale,
    channels,
    pixels,
    SILU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PB: tl.constexpr,
    CB: tl.constexpr,
):
    """The gradient in x of a tile."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    image, number, first = part(program, pixels, channels, PB, CB)
    channel, there, start, offset, mask = tile(image, number * PB, first, CB, pixels, channels, CHANNELS_LAST, PB, CB)
    value = tl.load(x + start + offset, mask=mask, other=0.0).to(tl.float32)
    grad_value = tl.load(grad + start + offset, mask=mask, other=0.0).to(tl.float32)
    coefficients += 6 * image * channels + channel
    center = tl.load(coefficients, mask=there, other=0.0)
    rstd = tl.load(coefficients + channels, mask=there, other=0.0)
    gain = tl.load(coefficients + 2 * channels, mask=there, other=0.0)
    add = tl.load(coefficients + 3 * channels, mask=there, other=0.0)
    mean_g = tl.load(coefficients + 4 * channels, mask=there, other=0.0)
    mean_g_n = tl.load(coefficients + 5 * channels, mask=there, other=0.0)
    n, g = gradient(value, grad_value, center, rstd, gain, add, out_scale, mask, SILU)
    result = (g * gain[None, :] - mean_g[None, :] - n * mean_g_n[None, :]) * rstd[None, :]
    tl.store(dx + start + offset, result.to(dx.dtype.element_ty), mask=mask)


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
    batch, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    given = (grad, x, mean, rstd, weight, bias, x_shift, scale, shift)
    options = {"SILU": silu, "CHANNELS_LAST": not x.is_contiguous()}
    whole = whole_tile(x, groups)
    if whole is not None:
        wrap_triton(_whole)[(batch * triton.cdiv(channels, whole.SET),)](
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
            num_warps=warps(whole),
        )
        return dx, sums
    size, merge = part_tile(x), merge_tile(x, groups)
    tiles = triton.cdiv(pixels, size.PB)
    partial = x.new_empty((batch, tiles, 3, channels), dtype=torch.float32)
    coefficients = x.new_empty((batch, 6, channels), dtype=torch.float32) if need_x else None
    grid = (batch * tiles * triton.cdiv(channels, size.CB),)
    wrap_triton(_sums)[grid](
        *given, partial, out_scale, channels, groups, pixels, **options, **size._asdict(), num_warps=WARPS
    )
    wrap_triton(_merge)[(batch * triton.cdiv(groups, merge.GB),)](
        partial,
        *given[2:],
        sums,
        coefficients,
        batch,
        channels,
        groups,
        pixels,
        PB=size.PB,
        **merge._asdict(),
        num_warps=WARPS,
    )
    if need_x:
        wrap_triton(_dx)[grid](
            grad,
            x,
            coefficients,
            dx,
            out_scale,
            channels,
            pixels,
            **options,
            **size._asdict(),
            num_warps=WARPS,
        )
    return dx, sums
