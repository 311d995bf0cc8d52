"""Denoising score matching with EDM's weight."""

from torch import Tensor

from ctm_fast.losses.weighting import weighting


def dsm_loss(D_x: Tensor, x0: Tensor, sigma: Tensor, *, sigma_data: float) -> Tensor:
    """[B]: (sigma^2 + sd^2) / (sigma sd)^2 times the mean squared error of the denoiser, per sample.

    EDM (arXiv 2206.00364) Table 1; exactly 1 in expectation where F_x = 0 and the data has variance sigma_data^2.
    D_x, x0 [B, C, H, W] float32; sigma [B] float32.
    """
    weight = weighting("karras", sigma_data=sigma_data)(sigma, sigma)
    return weight * (D_x - x0).square().flatten(1).mean(1)
