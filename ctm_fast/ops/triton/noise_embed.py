"""Noise-level embedding in Triton: one program handles one level and one block of frequencies."""

import triton
import triton.language as tl
from torch import Tensor

from ctm_fast.ops.triton._launch import wrap_triton

_BLOCK = 128
"""Frequencies a program handles: one to each thread of four warps."""


@triton.jit
def _embed(t, s, freqs, out, scale, batch, half, SIN_FIRST: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    level = tl.load(t + row, mask=row < batch, other=1.0)
    if s is not None:
        level = tl.load(s + row - batch, mask=row >= batch, other=level)
    frequency = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = frequency < half
    angle = scale * tl.log(level) * tl.load(freqs + frequency, mask=mask, other=0.0)
    if SIN_FIRST:
        first, second = tl.sin(angle), tl.cos(angle)
    else:
        first, second = tl.cos(angle), tl.sin(angle)
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
