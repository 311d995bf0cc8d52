"""Jump and re-noising in Triton: one pass over the image, the noise made in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ctm_fast.ops.triton._launch import BLOCK, wrap_triton
from ctm_fast.ops.triton.philox_normal import blocks, normal_block
from ctm_fast.ops.triton.precond_combine import coefficients


@triton.jit(do_not_specialize=["step", "stream"])
def _forward(
    x,
    F_x,
    t,
    s,
    t_next,
    seeds,
    out,
    step,
    stream,
    sigma_data,
    channels,
    pixels,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0)
    s_value = tl.load(s + image)
    top = tl.load(t_next + image)
    a, b = coefficients(tl.load(t + image), s_value, sigma_data)
    std = tl.sqrt_rn((top - s_value) * (top + s_value))
    block, within, mask = blocks(channels, pixels, CHANNELS_LAST, BLOCK)
    offset = image.to(tl.int64) * channels * pixels + within
    jump = a * tl.load(x + offset, mask=mask) + b * tl.load(F_x + offset, mask=mask).to(tl.float32)
    noise = normal_block(tl.load(seeds + image), step, stream, block)
    tl.store(out + offset, jump + std * noise, mask=mask)


def gamma_step(
    x: Tensor,
    F_x: Tensor,
    t: Tensor,
    s: Tensor,
    t_next: Tensor,
    seeds: Tensor,
    step: int,
    stream: int,
    sigma_data: float,
) -> Tensor:
    out = torch.empty_like(x)
    if out.numel() == 0:
        return out
    batch, channels, height, width = x.shape
    wrap_triton(_forward)[(batch, triton.cdiv(x[0].numel(), BLOCK))](
        x,
        F_x,
        t,
        s,
        t_next,
        seeds,
        out,
        step,
        stream,
        sigma_data,
        channels,
        height * width,
        CHANNELS_LAST=not x.is_contiguous(),
        BLOCK=BLOCK,
    )
    return out
