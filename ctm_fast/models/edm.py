"""The EDM denoiser: a teacher, or any diffusion model with EDM's preconditioning."""

import torch
from torch import Tensor, nn

from ctm_fast.models.song_unet import SongUNet
from ctm_fast.ops import precond_combine, precond_input


class EDMDenoiser(nn.Module):
    """D(x; sigma) = c_skip x + c_out F_theta(c_in x; sigma), EDM (arXiv 2206.00364) Eq. 7.

    Args:
        net: F_theta, without an s-branch.
        sigma_data: standard deviation of the data.
        dtype: what the network computes in; the preconditioning stays in float32.
    """

    def __init__(self, net: SongUNet, sigma_data: float = 0.5, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if net.s_branch:
            raise ValueError("net: expected a network without an s-branch, got one with; use CTM")
        self.net = net
        self.sigma_data = sigma_data
        self.dtype = dtype

    def denoise(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """D_x [B, C, H, W] float32 from x [B, C, H, W] float32 at level ``sigma`` [B] float32."""
        F_x = self.net(precond_input(x, sigma, sigma_data=self.sigma_data, dtype=self.dtype), sigma, None, labels)
        return precond_combine(x, F_x, sigma, torch.zeros_like(sigma), sigma_data=self.sigma_data)

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.denoise(x, sigma, labels)
