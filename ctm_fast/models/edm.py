"""The EDM denoiser: a teacher, or any diffusion model with EDM's preconditioning."""

import torch
from torch import Tensor, nn

from ctm_fast.models.unet import UNet
from ctm_fast.ops import precond_combine, precond_input


class EDMDenoiser(nn.Module):
    """D(x; sigma) = c_skip x + c_out F_theta(c_in x; sigma), EDM (arXiv 2206.00364) Eq. 7.

    Args:
        net: F_theta, without an s-branch.
        sigma_data: standard deviation of the data.
        dtype: what the network computes in; the preconditioning stays in float32.
    """

    def __init__(self, net: UNet, sigma_data: float = 0.5, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if net.s_branch:
            raise ValueError("net: expected a network without an s-branch, got one with; use CTM")
        self.net = net
        self.sigma_data = sigma_data
        self.dtype = dtype

    def denoise(
        self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        """D_x [B, C, H, W] float32 from x [B, C, H, W] float32 at level ``sigma`` [B] float32.

        ``labels``: class indices [B] or one-hot [B, label_dim], zeros for no class; ``augment_labels``
        [B, augment_dim]: how training images were augmented, None for images as they are.
        """
        x_in = precond_input(x, sigma, sigma_data=self.sigma_data, dtype=self.dtype)
        F_x = self.net(x_in, sigma, None, labels, augment_labels)
        return precond_combine(x, F_x, sigma, torch.zeros_like(sigma), sigma_data=self.sigma_data)

    def forward(
        self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        return self.denoise(x, sigma, labels, augment_labels)
