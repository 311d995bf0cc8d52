"""Grids of samples on fixed seeds, the same throughout a run."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ctm_fast.diffusion.images import to_uint8
from ctm_fast.models import CTM, EDMDenoiser
from ctm_fast.pictures import image_grid, save_png
from ctm_fast.samplers import generate
from ctm_fast.training.config import RunConfig

TEACHER_STEPS = 18
"""Levels of the teacher's Heun solver: 35 evaluations (EDM, arXiv 2206.00364)."""

_COLUMNS, _ROWS, _BATCH = 10, 8, 250


def samples(
    model: CTM | EDMDenoiser, config: RunConfig, count: int, *, steps: int, gamma: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """``count`` uint8 images [count, C, H, W] of seeds 0, 1, ... and their labels, the classes in turn (or None)."""
    device = model.net.out_conv.weight.device
    seeds = torch.arange(count, device=device)
    labels = seeds % model.net.label_dim if model.net.label_dim else None
    training = model.training
    model.eval()
    images = [
        generate(
            model,
            config.levels,
            seeds[i : i + _BATCH],
            None if labels is None else labels[i : i + _BATCH],
            steps=steps,
            gamma=gamma,
        )
        for i in range(0, count, _BATCH)
    ]
    model.train(training)
    return to_uint8(torch.cat(images)), labels


def grid_steps(model: CTM | EDMDenoiser) -> tuple[int, ...]:
    """The steps of the grids that are kept: one and two of a CTM, a full solve of a teacher."""
    return (1, 2) if isinstance(model, CTM) else (TEACHER_STEPS,)


def natural_steps(model: CTM | EDMDenoiser) -> int:
    """One jump of a CTM, a full solve of a teacher."""
    return 1 if isinstance(model, CTM) else TEACHER_STEPS


def sample_grid(model: CTM | EDMDenoiser, config: RunConfig, *, steps: int) -> Image.Image:
    """Samples of fixed seeds, a column per class where there are ten."""
    images, _ = samples(model, config, _COLUMNS * _ROWS, steps=steps)
    return image_grid(images.permute(0, 2, 3, 1).cpu().numpy(), columns=_COLUMNS, scale=_scale(images))


def save_comparison(teacher: EDMDenoiser, student: CTM, config: RunConfig, path: Path) -> None:
    """The teacher's samples on the left, the one-step student's of the same seeds on the right."""
    sides = [samples(model, config, _COLUMNS * _ROWS, steps=natural_steps(model))[0] for model in (teacher, student)]
    gap = torch.full_like(sides[0][:_ROWS], 255)
    rows = [side.unflatten(0, (_ROWS, _COLUMNS)) for side in sides]
    images = torch.cat([rows[0], gap[:, None], rows[1]], dim=1).flatten(0, 1)
    picture = image_grid(images.permute(0, 2, 3, 1).cpu().numpy(), columns=2 * _COLUMNS + 1, scale=_scale(images))
    save_png(picture, path)


def _scale(images: Tensor) -> int:
    return max(1, 32 // images.shape[-1])
