"""From seeds to images: the start x_T, and the sampler that fits the model."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ctm_fast.diffusion.schedule import Levels, karras_sigmas, sampler_sigmas
from ctm_fast.models import CTM, EDMDenoiser
from ctm_fast.ops import Stream, philox_normal
from ctm_fast.samplers.gamma import JumpRenoise, Noise, gamma_sample, renoise_with
from ctm_fast.samplers.guidance import guided
from ctm_fast.samplers.heun import euler_sample, heun_sample


def initial_noise(seeds: Tensor, shape: Sequence[int], levels: Levels) -> Tensor:
    """x_T = sigma_max N(0, I): [B, *shape] float32; row b depends on seeds[b] alone."""
    return levels.sigma_max * philox_normal(seeds, 0, shape, stream=Stream.X_T)


def generation_sigmas(model: CTM | EDMDenoiser, steps: int, levels: Levels) -> list[float]:
    """The levels that :func:`generate` goes through in ``steps`` steps; LevelError for less than one."""
    if isinstance(model, CTM):
        return sampler_sigmas(steps, levels).tolist()
    return [levels.sigma_max] if steps == 1 else karras_sigmas(steps, levels).tolist()


def evaluations(
    model: CTM | EDMDenoiser, steps: int = 1, *, sigmas: Sequence[float] | None = None, guidance: float | None = None
) -> int:
    """NFE: how often :func:`generate`, given the same, evaluates the network for one sample."""
    if sigmas is not None:
        steps = len(sigmas) - 1 if isinstance(model, CTM) else len(sigmas)
    once = steps if isinstance(model, CTM) or steps == 1 else 2 * steps - 1
    return once if guidance is None else 2 * once


@torch.no_grad()
def generate(
    model: CTM | EDMDenoiser,
    levels: Levels,
    seeds: Tensor,
    labels: Tensor | None = None,
    *,
    steps: int = 1,
    gamma: float = 0.0,
    sigmas: Sequence[float] | None = None,
    guidance: float | None = None,
    noise: Noise | None = None,
) -> Tensor:
    """[B, C, H, W] float32 images, not clamped.

    A CTM makes ``steps`` jumps of gamma-sampling; an EDM denoiser is sampled by EDM's Heun solver at ``steps`` levels
    (2 steps - 1 evaluations), or, at one step, by a single Euler step, which gives the mean of the data.

    Args:
        seeds: [B] int64, one stream of noise each.
        labels: [B] class indices for a conditional model, else None.
        gamma: of gamma-sampling; not used by an EDM denoiser.
        sigmas: levels in place of those of ``steps``, largest first: x_T is drawn at the first; a CTM ends at the last,
            the solvers take one more step from there to 0. LevelError unless positive and strictly decreasing.
        guidance: weight of classifier-free guidance, for a model trained with label dropout: every evaluation is made
            with and without the label. None, or 1 at twice the cost, for none.
        noise: ``noise(i, x)`` takes the place of the seeds' own noise at the i-th re-noising.
    """
    net = model.net
    sigmas = generation_sigmas(model, steps, levels) if sigmas is None else sigmas
    shape = (net.img_channels, net.img_resolution, net.img_resolution)
    x_T = sigmas[0] * philox_normal(seeds, 0, shape, stream=Stream.X_T)
    renoise = seeds if noise is None else noise
    return generate_from(model, x_T, sigmas, labels, gamma=gamma, guidance=guidance, renoise=renoise)


@torch.no_grad()
def generate_from(
    model: CTM | EDMDenoiser,
    x_T: Tensor,
    sigmas: Sequence[float],
    labels: Tensor | None = None,
    *,
    gamma: float = 0.0,
    guidance: float | None = None,
    renoise: Tensor | Noise | None = None,
) -> Tensor:
    """As :func:`generate`, from ``x_T`` [B, C, H, W] float32 at the first of ``sigmas``.

    ``renoise``: what gamma-sampling adds: that of seeds [B] int64, or ``noise(i, x)``; needed for a gamma above 0.
    """

    def labelled(evaluate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        strong = partial(evaluate, labels=labels)
        if guidance is None:
            return strong
        no_class = x_T.new_zeros(len(x_T), model.net.label_dim)
        return guided(strong, partial(evaluate, labels=no_class), scale=guidance)

    if isinstance(model, CTM):
        jump = labelled(model.jump)
        jump_renoise: JumpRenoise | None = None
        if isinstance(renoise, Tensor):
            seeds = renoise

            def own_noise(i: int, x: Tensor) -> Tensor:
                return philox_normal(seeds, i, x.shape[1:], stream=Stream.RENOISE)

            def at_once(x: Tensor, t: Tensor, s: Tensor, t_next: Tensor, i: int) -> Tensor:
                return model.jump_renoise(x, t, s, t_next, seeds, i, labels)

            # One pass makes jump and noise, where both are the model's own.
            jump_renoise = at_once if guidance is None else renoise_with(jump, own_noise)
        elif renoise is not None:
            jump_renoise = renoise_with(jump, renoise)
        return gamma_sample(jump, x_T, sigmas, gamma=gamma, jump_renoise=jump_renoise)
    denoise = labelled(model.denoise)
    return euler_sample(denoise, x_T, sigmas) if len(sigmas) == 1 else heun_sample(denoise, x_T, sigmas)
