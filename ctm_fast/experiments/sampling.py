"""Samples by sampler and number of network evaluations, from the same noise for every model."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ctm_fast.diffusion.images import to_uint8
from ctm_fast.diffusion.schedule import Levels, karras_sigmas
from ctm_fast.models import CTM, EDMDenoiser
from ctm_fast.samplers import dpm_solver_sample, euler_sample, generate, heun_sample, initial_noise

Solver = Literal["Heun", "Euler", "DPM-Solver++"]
BATCH = 250
Draw = Callable[[Tensor, Tensor | None], Tensor]


def jump_samples(model: CTM, levels: Levels, count: int, *, nfe: int, gamma: float = 0.0) -> tuple[Tensor, Tensor]:
    """Images uint8 [count, C, H, W] of seeds 0, 1, ... by ``nfe`` jumps of gamma-sampling, and their labels [count]."""

    def draw(seeds: Tensor, labels: Tensor | None) -> Tensor:
        return generate(model, levels, seeds, labels, steps=nfe, gamma=gamma)

    return _batches(model, count, draw)


def solver_samples(
    model: CTM | EDMDenoiser, levels: Levels, count: int, solver: Solver, *, nfe: int
) -> tuple[Tensor, Tensor]:
    """As :func:`jump_samples`, along the ODE of the model's denoiser.

    Heun's levels are EDM's, sigma_max to sigma_min and 0; those of the others go from sigma_max to 0 in ``nfe`` steps,
    without sigma_min.

    ValueError for a number of evaluations that the solver cannot make: Heun's is odd, DPM-Solver++'s 2 or more.
    """
    if nfe < 1 or (solver == "Heun" and (nfe < 3 or nfe % 2 == 0)) or (solver == "DPM-Solver++" and nfe < 2):
        raise ValueError(f"nfe: expected a number of evaluations of {solver}, got {nfe}")

    def draw(seeds: Tensor, labels: Tensor | None) -> Tensor:
        net = model.net
        x_T = initial_noise(seeds, (net.img_channels, net.img_resolution, net.img_resolution), levels)

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            return model.denoise(x, sigma, labels)

        if solver == "Heun":
            return heun_sample(denoise, x_T, karras_sigmas((nfe + 1) // 2, levels).tolist())
        # The step to 0 from sigma_min, which hardly moves, would cost few-step solvers one of their evaluations.
        sample = euler_sample if solver == "Euler" else dpm_solver_sample
        return sample(denoise, x_T, karras_sigmas(nfe + 1, levels)[:-1].tolist())

    return _batches(model, count, draw)


@torch.no_grad()
def _batches(model: CTM | EDMDenoiser, count: int, draw: Draw) -> tuple[Tensor, Tensor]:
    seeds = torch.arange(count, device=model.net.out_conv.weight.device)
    classes = seeds % max(1, model.net.label_dim)
    images = [
        draw(seeds[i : i + BATCH], classes[i : i + BATCH] if model.net.label_dim else None)
        for i in range(0, count, BATCH)
    ]
    return to_uint8(torch.cat(images)), classes
