"""Exponential moving averages of parameters."""

import torch
from torch import nn


@torch.no_grad()
def update_ema(average: nn.Module, model: nn.Module, rate: float) -> None:
    """average <- rate * average + (1 - rate) * model, for every parameter (no bias correction)."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - rate)
