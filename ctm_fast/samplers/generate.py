"""From seeds to images: the start x_T, and the sampler that fits the model."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ctm_fast.diffusion.schedule import Levels, karras_sigmas, sampler_sigmas
from ctm_fast.models import CTM, EDMDenoiser
from ctm_fast.ops import Stream, philox_normal
from ctm_fast.samplers.gamma import JumpRenoise, Noise, gamma_sample, renoise_with
from ctm_fast.samplers.heun import euler_sample, heun_sample


def initial_noise(seeds: Tensor, shape: Sequence[int], levels: Levels) -> Tensor:
    """x_T = sigma_max N(0, I): [B, *shape] float32; row b depends on seeds[b] alone."""
    return levels.sigma_max * philox_normal(seeds, 0, shape, stream=Stream.X_T)


def evaluations(model: CTM | EDMDenoiser, steps: int) -> int:
    """NFE: how often :func:`generate` evaluates the network for one sample."""
    return steps if isinstance(model, CTM) or steps == 1 else 2 * steps - 1


@torch.no_grad()
def generate(
    model: CTM | EDMDenoiser,
    levels: Levels,
    seeds: Tensor,
    labels: Tensor | None = None,
    *,
    steps: int = 1,
    gamma: float = 0.0,
    noise: Noise | None = None,
) -> Tensor:
    """[B, C, H, W] float32 images, not clamped.

    A CTM makes ``steps`` jumps of gamma-sampling; an EDM denoiser is sampled by EDM's Heun solver at ``steps`` levels
    (2 steps - 1 evaluations), or, at one step, by a single Euler step, which gives the mean of the data.

    Args:
        seeds: [B] int64, one stream of noise each.
        labels: [B] class indices for a conditional model, else None.
        gamma: of gamma-sampling; not used by an EDM denoiser.
        noise: ``noise(i, x)`` takes the place of the seeds' own noise at the i-th re-noising.
    """
    net = model.net
    x_T = initial_noise(seeds, (net.img_channels, net.img_resolution, net.img_resolution), levels)
    renoise = seeds if noise is None else noise
    return generate_from(model, levels, x_T, labels, steps=steps, gamma=gamma, renoise=renoise)


@torch.no_grad()
def generate_from(
    model: CTM | EDMDenoiser,
    levels: Levels,
    x_T: Tensor,
    labels: Tensor | None = None,
    *,
    steps: int = 1,
    gamma: float = 0.0,
    renoise: Tensor | Noise | None = None,
) -> Tensor:
    """As :func:`generate`, from ``x_T`` [B, C, H, W] float32 at level sigma_max.

    ``renoise``: what gamma-sampling adds: that of seeds [B] int64, or ``noise(i, x)``; needed for a gamma above 0.
    """
    if isinstance(model, CTM):

        def jump(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
            return model.jump(x, t, s, labels)

        jump_renoise: JumpRenoise | None = None
        if isinstance(renoise, Tensor):
            seeds = renoise

            def jump_renoise(x: Tensor, t: Tensor, s: Tensor, t_next: Tensor, i: int) -> Tensor:
                return model.jump_renoise(x, t, s, t_next, seeds, i, labels)

        elif renoise is not None:
            jump_renoise = renoise_with(jump, renoise)
        sigmas = sampler_sigmas(steps, levels).tolist()
        return gamma_sample(jump, x_T, sigmas, gamma=gamma, jump_renoise=jump_renoise)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return model.denoise(x, sigma, labels)

    if steps == 1:
        return euler_sample(denoise, x_T, [levels.sigma_max])
    return heun_sample(denoise, x_T, karras_sigmas(steps, levels).tolist())
