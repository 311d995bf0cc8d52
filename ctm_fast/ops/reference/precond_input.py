"""Preconditioned input in plain PyTorch."""

import torch
from torch import Tensor


def precond_input(x: Tensor, t: Tensor, sigma_data: float, dtype: torch.dtype) -> Tensor:
    c_in = (t.square() + sigma_data**2).rsqrt()
    return (c_in.view(-1, 1, 1, 1) * x).to(dtype)
