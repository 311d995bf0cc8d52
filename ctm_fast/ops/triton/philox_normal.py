"""Counter-based normal noise in Triton: one Philox block gives four neighbours, one program makes BLOCK elements."""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ctm_fast.ops.triton._launch import BLOCK, wrap_triton

_TWO_PI = tl.constexpr(2 * math.pi)
_SQRT_HALF = tl.constexpr(0x3F3504F3)  # the bits of sqrt(1/2)
# ln 2 and pi / 2 in two parts, the first short enough for its products with small integers to be exact.
_LN2_HIGH = tl.constexpr(float.fromhex("0x1.62e4p-1"))
_LN2_LOW = tl.constexpr(float.fromhex("0x1.7f7d1cp-20"))
_HALF_PI_HIGH = tl.constexpr(float.fromhex("0x1.921fap+0"))
_HALF_PI_LOW = tl.constexpr(float.fromhex("0x1.54442ep-20"))


@triton.jit
def philox_block(seed, step, stream, block):
    """Words 0 to 3 of each of the blocks e >> 2, int64 [N]."""
    low = block.to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    # cast, not .to: Inductor passes an integer that is 1 as a constant, whatever do_not_specialize says.
    return tl.philox(seed, low, high, zero + tl.cast(step, tl.uint32), zero + tl.cast(stream, tl.uint32))


@triton.jit
def _four(a0, a1, a2, a3):
    """[N], [N], [N], [N] -> [N, 4]."""
    return tl.join(tl.join(a0, a2), tl.join(a1, a3)).reshape(a0.shape[0], 4)


@triton.jit
def _log(u):
    """ln(u) of positive normal numbers, as csrc/common/philox.h: no branch, no table."""
    bits = tl.cast(u, tl.int32, bitcast=True) - _SQRT_HALF
    e = (bits >> 23).to(tl.float32)
    f = tl.cast((bits & 0x007FFFFF) + _SQRT_HALF, tl.float32, bitcast=True) - 1.0
    p = f * -0.07634497433900833 + 0.1276157796382904
    p = p * f - 0.13160182535648346
    p = p * f + 0.14201757311820984
    p = p * f - 0.16623356938362122
    p = p * f + 0.20001226663589478
    p = p * f - 0.2500081956386566
    p = p * f + 0.3333333134651184
    square = f * f
    return ((square * f * p + e * _LN2_LOW) - 0.5 * square + f) + e * _LN2_HIGH


@triton.jit
def _sin_cos(theta):
    """Sine and cosine of 0 <= theta <= 2 pi, as csrc/common/philox.h: tl.sin keeps a table on the stack."""
    quarter = (theta * 0.6366197723675814 + 0.5).to(tl.int32)
    q = quarter.to(tl.float32)
    r = (theta - q * _HALF_PI_HIGH) - q * _HALF_PI_LOW
    square = r * r
    s = square * -0.00019517235341481864 + 0.008332177996635437
    s = s * square - 0.16666655242443085
    s = r + r * square * s
    c = square * 2.4438379114144482e-05 - 0.0013887366512790322
    c = c * square + 0.04166664555668831
    c = (1.0 - 0.5 * square) + square * square * c
    odd = quarter & 1 != 0
    sine = tl.where(odd, c, s)
    cosine = tl.where(odd, s, c)
    return tl.where(quarter & 2 != 0, -sine, sine), tl.where((quarter + 1) & 2 != 0, -cosine, cosine)


@triton.jit
def _box_muller(r0, r1):
    u0 = ((r0 >> 8).to(tl.int32).to(tl.float32) + 0.5) * 5.9604644775390625e-8
    u1 = ((r1 >> 8).to(tl.int32).to(tl.float32) + 0.5) * 5.9604644775390625e-8
    radius = tl.sqrt_rn(-2.0 * _log(u0))
    # The definition rounds theta. The minimum, which is theta, keeps the product out of a fused multiply-add.
    sine, cosine = _sin_cos(tl.minimum(u1 * _TWO_PI, _TWO_PI))
    return radius * cosine, radius * sine


@triton.jit
def normal_block(seed, step, stream, block):
    """The normals [N, 4] of the blocks e >> 2, int64 [N]."""
    r0, r1, r2, r3 = philox_block(seed, step, stream, block)
    n0, n1 = _box_muller(r0, r1)
    n2, n3 = _box_muller(r2, r3)
    return _four(n0, n1, n2, n3)


@triton.jit
def blocks(channels, pixels, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr):
    """The blocks [BLOCK / 4] of this program, their elements' offsets [BLOCK / 4, 4] in the image, and the mask.

    In channels_last neighbouring threads take neighbouring channels of the same four pixels, where a block does not
    straddle two channels: together they then write whole lines.
    """
    index = tl.program_id(1).to(tl.int64) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    grouped = CHANNELS_LAST and pixels % 4 == 0
    block = index % channels * (pixels // 4) + index // channels if grouped else index
    element = block[:, None] * 4 + tl.arange(0, 4)[None, :]
    mask = (index[:, None] * 4 + tl.arange(0, 4)[None, :]) < channels * pixels
    offset = element % pixels * channels + element // pixels if CHANNELS_LAST else element
    return block, offset, mask


@triton.jit(do_not_specialize=["step", "stream"])
def _words(seeds, out, step, stream, size, BLOCK: tl.constexpr):
    image = tl.program_id(0)
    block, offset, mask = blocks(1, size, False, BLOCK)
    r0, r1, r2, r3 = philox_block(tl.load(seeds + image), step, stream, block)
    words = _four(r0, r1, r2, r3)
    tl.store(out + image.to(tl.int64) * size + offset, words.to(tl.int64), mask=mask)


@triton.jit(do_not_specialize=["step", "stream"])
def _normal(seeds, out, step, stream, channels, pixels, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr):
    image = tl.program_id(0)
    block, offset, mask = blocks(channels, pixels, CHANNELS_LAST, BLOCK)
    normal = normal_block(tl.load(seeds + image), step, stream, block)
    tl.store(out + image.to(tl.int64) * channels * pixels + offset, normal, mask=mask)


def philox_words(seeds: Tensor, step: int, shape: Sequence[int], stream: int) -> Tensor:
    out = seeds.new_empty((seeds.shape[0], *shape))
    if out.numel() == 0:
        return out
    size = math.prod(shape)
    wrap_triton(_words)[(seeds.shape[0], triton.cdiv(size, BLOCK))](seeds, out, step, stream, size, BLOCK=BLOCK)
    return out


def philox_normal(seeds: Tensor, step: int, shape: Sequence[int], stream: int, channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty((seeds.shape[0], *shape), dtype=torch.float32, device=seeds.device, memory_format=layout)
    if out.numel() == 0:
        return out
    size = math.prod(shape)
    channels = shape[0] if channels_last else 1
    wrap_triton(_normal)[(seeds.shape[0], triton.cdiv(size, BLOCK))](
        seeds, out, step, stream, channels, size // channels, CHANNELS_LAST=channels_last, BLOCK=BLOCK
    )
    return out
