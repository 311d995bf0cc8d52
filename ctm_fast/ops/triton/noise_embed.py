"""Noise-level embedding in Triton: one program handles one level and one block of frequencies."""

import math

import triton
import triton.language as tl
from torch import Tensor

from ctm_fast.ops.triton._launch import wrap_triton

_BLOCK = 128
"""Frequencies a program handles: one to each thread of four warps."""

_HALF_PI = tl.constexpr(math.pi / 2)
_TWO_OVER_PI = tl.constexpr(2 / math.pi)
_ROUND = tl.constexpr(1.5 * 2**52)  # added to a double, it leaves the nearest integer in the lowest bits


@triton.jit
def _sin_cos(angle):
    """Sine and cosine of |angle| < 2^30, as csrc/common/sin_cos.h: tl.sin keeps a table on the stack."""
    shifted = angle.to(tl.float64) * _TWO_OVER_PI + _ROUND
    quadrant = tl.cast(shifted, tl.int64, bitcast=True).to(tl.int32)
    x = (angle.to(tl.float64) - (shifted - _ROUND) * _HALF_PI).to(tl.float32)
    y = x * x
    s = x + x * y * (-1 / 6 + y * (1 / 120 + y * (-1 / 5040 + y * (1 / 362880))))
    c = 1 + y * (-1 / 2 + y * (1 / 24 + y * (-1 / 720 + y * (1 / 40320))))
    odd = quadrant & 1 != 0
    sine = tl.where(odd, c, s)
    cosine = tl.where(odd, s, c)
    return tl.where(quadrant & 2 != 0, -sine, sine), tl.where((quadrant + 1) & 2 != 0, -cosine, cosine)


@triton.jit
def _embed(t, s, freqs, out, scale, batch, half, SIN_FIRST: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    level = tl.load(t + row, mask=row < batch, other=1.0)
    if s is not None:
        level = tl.load(s + row - batch, mask=row >= batch, other=level)
    frequency = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = frequency < half
    angle = scale * tl.log(level) * tl.load(freqs + frequency, mask=mask, other=0.0)
    second, first = _sin_cos(angle)
    if SIN_FIRST:
        first, second = second, first
    start = out + row.to(tl.int64) * 2 * half
    tl.store(start + frequency, first, mask=mask)
    tl.store(start + half + frequency, second, mask=mask)


def noise_embed(t: Tensor, s: Tensor | None, freqs: Tensor, scale: float, sin_first: bool) -> Tensor:
    levels, batch, half = 1 if s is None else 2, t.shape[0], freqs.shape[0]
    out = t.new_empty(levels, batch, 2 * half)
    if out.numel() == 0:
        return out
    wrap_triton(_embed)[(levels * batch, triton.cdiv(half, _BLOCK))](
        t, s, freqs, out, scale, batch, half, SIN_FIRST=sin_first, BLOCK=_BLOCK
    )
    return out
