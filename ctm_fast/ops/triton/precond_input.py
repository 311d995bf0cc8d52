"""Preconditioned input in Triton: one program handles one block of one image."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ctm_fast.ops.triton._launch import BLOCK, wrap_triton


@triton.jit
def _scale(x, t, out, sigma_data, size, BLOCK: tl.constexpr):
    image = tl.program_id(0)
    level = tl.load(t + image)
    c_in = tl.rsqrt(level * level + sigma_data * sigma_data)
    within = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = within < size
    offset = image.to(tl.int64) * size + within
    value = tl.load(x + offset, mask=mask).to(tl.float32)
    tl.store(out + offset, (c_in * value).to(out.dtype.element_ty), mask=mask)


def precond_input(x: Tensor, t: Tensor, sigma_data: float, dtype: torch.dtype) -> Tensor:
    out = torch.empty_like(x, dtype=dtype)
    if out.numel() == 0:
        return out
    size = x[0].numel()
    wrap_triton(_scale)[(x.shape[0], triton.cdiv(size, BLOCK))](x, t, out, sigma_data, size, BLOCK=BLOCK)
    return out
