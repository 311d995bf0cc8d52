"""The consistency trajectory model: one network that jumps along the ODE and denoises."""

import torch
from torch import Tensor, nn

from ctm_fast.models.unet import UNet
from ctm_fast.ops import gamma_step, precond_combine, precond_input


class CTM(nn.Module):
    """G_theta(x, t, s), CTM (arXiv 2310.02279) Sec. 3.

        g(x, t, s) = c_skip(t) x + c_out(t) F_theta(c_in(t) x; t, s)
        G(x, t, s) = (s / t) x + (1 - s / t) g(x, t, s)
        D(x, t)    = g(x, t, t)

    x is [B, C, H, W] float32, levels are [B] float32 with 0 <= s <= t and 0 < t, in the unit of sigma (standard
    deviations of the noise), and ``labels`` class indices [B] or one-hot [B, label_dim]. Results are like x.

    Args:
        net: F_theta, with an s-branch.
        sigma_data: standard deviation of the data.
        dtype: what the network computes in; the preconditioning stays in float32.
    """

    def __init__(self, net: UNet, sigma_data: float = 0.5, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if not net.s_branch:
            raise ValueError("net: expected a network with an s-branch, got one without; use EDMDenoiser")
        self.net = net
        self.sigma_data = sigma_data
        self.dtype = dtype

    def raw(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None) -> Tensor:
        """F_x, the output of the network for c_in(t) x."""
        return self.net(precond_input(x, t, sigma_data=self.sigma_data, dtype=self.dtype), t, s, labels)

    def jump(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None) -> Tensor:
        """G(x, t, s): from level ``t`` to level ``s`` along the ODE."""
        return precond_combine(x, self.raw(x, t, s, labels), t, s, sigma_data=self.sigma_data)

    def inner(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None) -> Tensor:
        """g(x, t, s): what the jump approaches as s goes to 0 at fixed conditioning."""
        return precond_combine(x, self.raw(x, t, s, labels), t, torch.zeros_like(s), sigma_data=self.sigma_data)

    def denoise(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """D(x, sigma) = g(x, sigma, sigma), the model's estimate of E[x0 | x]; the score is (D - x) / sigma^2."""
        return self.inner(x, sigma, sigma, labels)

    def jump_renoise(
        self, x: Tensor, t: Tensor, s: Tensor, t_next: Tensor, seeds: Tensor, step: int, labels: Tensor | None = None
    ) -> Tensor:
        """G(x, t, s), then noise of std sqrt((t_next - s)(t_next + s)) up to level ``t_next``, in one pass.

        The noise of sample b is the stream of its seed (``seeds`` [B] int64) at ``step``; see
        :func:`ctm_fast.ops.gamma_step`.
        """
        F_x = self.raw(x, t, s, labels)
        return gamma_step(x, F_x, t, s, t_next, seeds, step, sigma_data=self.sigma_data)

    def forward(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.jump(x, t, s, labels)
