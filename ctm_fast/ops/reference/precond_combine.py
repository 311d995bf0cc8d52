"""Preconditioned skip/output combination in plain PyTorch."""

import torch
from torch import Tensor


def coefficients(t: Tensor, s: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """[B, 1, 1, 1] factors (a, b) of G_x = a x + b F_x. Shared by the forward pass, its gradient and gamma_step.

    1 - s / t is computed as (t - s) / t, which keeps its digits where s is close to t.
    """
    variance = t.square() + sigma_data**2
    c_skip = sigma_data**2 / variance
    c_out = t * sigma_data * variance.rsqrt()
    step = (t - s) / t
    a = s / t + step * c_skip
    b = step * c_out
    return a.view(-1, 1, 1, 1), b.view(-1, 1, 1, 1)


def precond_combine(x: Tensor, F_x: Tensor, t: Tensor, s: Tensor, sigma_data: float) -> Tensor:
    a, b = coefficients(t, s, sigma_data)
    return a * x + b * F_x.float()


def precond_combine_backward(
    grad: Tensor, t: Tensor, s: Tensor, sigma_data: float, F_dtype: torch.dtype, need_x: bool, need_F: bool
) -> tuple[Tensor, Tensor]:
    a, b = coefficients(t, s, sigma_data)
    grad_x = a * grad if need_x else grad.new_empty(0)
    grad_F = (b * grad).to(F_dtype) if need_F else grad.new_empty(0, dtype=F_dtype)
    return grad_x, grad_F
