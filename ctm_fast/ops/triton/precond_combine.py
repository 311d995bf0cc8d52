"""Preconditioned skip/output combination in Triton: one program handles one block of one image."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ctm_fast.ops.triton._launch import BLOCK, wrap_triton


@triton.jit
def coefficients(t, s, sigma_data):
    """Factors (a, b) of G_x = a x + b F_x; (t - s) / t keeps the digits that 1 - s / t loses where s is close to t."""
    variance = t * t + sigma_data * sigma_data
    step = tl.div_rn(t - s, t)  # `/` is approximate on a GPU: t / t need not be 1
    c_skip = sigma_data * sigma_data / variance
    c_out = t * sigma_data / tl.sqrt(variance)
    return tl.div_rn(s, t) + step * c_skip, step * c_out


@triton.jit
def _forward(x, F_x, t, s, out, sigma_data, size, BLOCK: tl.constexpr):
    image = tl.program_id(0)
    a, b = coefficients(tl.load(t + image), tl.load(s + image), sigma_data)
    within = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = within < size
    offset = image.to(tl.int64) * size + within
    x_value = tl.load(x + offset, mask=mask)
    F_value = tl.load(F_x + offset, mask=mask).to(tl.float32)
    tl.store(out + offset, a * x_value + b * F_value, mask=mask)


@triton.jit
def _backward(
    grad, t, s, grad_x, grad_F, sigma_data, size, NEED_X: tl.constexpr, NEED_F: tl.constexpr, BLOCK: tl.constexpr
):
    image = tl.program_id(0)
    a, b = coefficients(tl.load(t + image), tl.load(s + image), sigma_data)
    within = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = within < size
    offset = image.to(tl.int64) * size + within
    value = tl.load(grad + offset, mask=mask)
    if NEED_X:
        tl.store(grad_x + offset, a * value, mask=mask)
    if NEED_F:
        tl.store(grad_F + offset, (b * value).to(grad_F.dtype.element_ty), mask=mask)


def precond_combine(x: Tensor, F_x: Tensor, t: Tensor, s: Tensor, sigma_data: float) -> Tensor:
    out = torch.empty_like(x)
    if out.numel() == 0:
        return out
    size = x[0].numel()
    wrap_triton(_forward)[(x.shape[0], triton.cdiv(size, BLOCK))](x, F_x, t, s, out, sigma_data, size, BLOCK=BLOCK)
    return out


def precond_combine_backward(
    grad: Tensor, t: Tensor, s: Tensor, sigma_data: float, F_dtype: torch.dtype, need_x: bool, need_F: bool
) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty_like(grad) if need_x else grad.new_empty(0)
    grad_F = torch.empty_like(grad, dtype=F_dtype) if need_F else grad.new_empty(0, dtype=F_dtype)
    if grad.numel() == 0 or not (need_x or need_F):
        return grad_x, grad_F
    size = grad[0].numel()
    wrap_triton(_backward)[(grad.shape[0], triton.cdiv(size, BLOCK))](
        grad, t, s, grad_x, grad_F, sigma_data, size, NEED_X=need_x, NEED_F=need_F, BLOCK=BLOCK
    )
    return grad_x, grad_F
