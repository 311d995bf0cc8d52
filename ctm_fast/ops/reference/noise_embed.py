"""Noise-level embedding in plain PyTorch."""

import torch
from torch import Tensor


def noise_embed(t: Tensor, s: Tensor | None, freqs: Tensor, scale: float, sin_first: bool) -> Tensor:
    levels = torch.stack((t,) if s is None else (t, s))
    c_noise = scale * levels.log()
    angle = c_noise.unsqueeze(-1) * freqs
    halves = (angle.sin(), angle.cos()) if sin_first else (angle.cos(), angle.sin())
    return torch.cat(halves, dim=-1)
