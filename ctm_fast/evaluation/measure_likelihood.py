"""The likelihood of a set of 8-bit images under a model, image by image, as arrays."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ctm_fast.diffusion.schedule import Levels
from ctm_fast.errors import ConfigError
from ctm_fast.evaluation.likelihood import (
    Dequantisation,
    bits_per_dim,
    dequantise,
    evidence_bound,
    log_likelihood,
)
from ctm_fast.evaluation.published_likelihood import Compat
from ctm_fast.evaluation.traces import Probes

Denoise = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""denoise(x, sigma, labels) -> D(x; sigma), as ``EDMDenoiser.denoise`` and ``CTM.denoise`` are."""

Progress = Callable[[float], None]
"""progress(images): how many are done, an image on its way counting in part."""


@dataclass(frozen=True)
class Settings:
    """How a likelihood is measured; equal settings and images give equal random numbers for any model.

    ``probe_count`` probes for each image, ``draws`` of the bound; ``batch`` changes rounding alone, which in a float32
    network decides now and then about a step, and so changes the result by less than the tolerance. Others as for
    :func:`~ctm_fast.evaluation.likelihood.log_likelihood`. ConfigError for a batch, a probe_count or a seed out of
    range.
    """

    probes: Probes = "rademacher"
    probe_count: int = 1
    tolerance: float = 1e-5
    dequantisation: Dequantisation = "uniform"
    compat: Compat | None = None
    draws: int = 10
    seed: int = 0
    batch: int = 64

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ConfigError(f"batch: expected a positive integer, got {self.batch}")
        if self.probe_count < 1:
            raise ConfigError(f"probe_count: expected a positive integer, got {self.probe_count}")
        if not 0 <= self.seed < 2**31:
            raise ConfigError(f"seed: expected 0 to {2**31 - 1}, got {self.seed}")


@dataclass(frozen=True)
class ImageBits:
    """Of each image, [N] float64: bits per dimension and their error over probes (NaN for one, 0 for none); the bound
    in bits, of what the reverse SDE gives (the ODE's likelihood too where the score is exact), and an upper estimate of
    its error over draws, which are stratified; network evaluations of the ODE."""

    bits_per_dim: NDArray[np.float64]
    probe_error: NDArray[np.float64]
    bound: NDArray[np.float64]
    bound_error: NDArray[np.float64]
    evaluations: NDArray[np.float64]


def image_seeds(seed: int, index: NDArray[np.int64]) -> Tensor:
    """[N] int64: a stream for each image of the data set by its ``index`` below 2^32, another one for another seed."""
    return torch.from_numpy((np.int64(seed) << 32) + index)


def measure_likelihood(
    denoise: Denoise,
    images: Tensor,
    labels: Tensor | None,
    index: NDArray[np.int64],
    levels: Levels,
    settings: Settings,
    *,
    device: torch.device,
    progress: Progress | None = None,
) -> ImageBits:
    """The likelihood of images [N, C, H, W] uint8, and the bound beside it.

    Args:
        labels: [N] int64 for a conditional model, else None.
        index: [N], the places of the images in their data set: random numbers belong to them.
        device: where the model is; a batch at a time goes there.

    Raises ConfigError as ``log_likelihood`` does, before the model is called.
    """
    n = math.prod(images.shape[1:])
    seeds = image_seeds(settings.seed, index)
    columns: list[list[Tensor]] = [[] for _ in fields(ImageBits)]
    for start in range(0, len(images), settings.batch):
        batch = slice(start, start + settings.batch)
        at = seeds[batch].to(device)
        x = dequantise(images[batch].to(device), at, dequantisation=settings.dequantisation)
        classes = None if labels is None else labels[batch].to(device)
        model = _of_each(denoise, classes)
        found = log_likelihood(
            model,
            x,
            levels,
            at,
            probes=settings.probes,
            count=settings.probe_count,
            tolerance=settings.tolerance,
            dequantisation=settings.dequantisation,
            compat=settings.compat,
            callback=None if progress is None else _reports(progress, start),
        )
        bound, error = evidence_bound(model, x, levels, at, draws=settings.draws, compat=settings.compat)
        bits = bits_per_dim(bound, n, dequantisation=settings.dequantisation, compat=settings.compat)
        row = (found.bits_per_dim, found.probe_error, bits, error / (n * math.log(2)), found.evaluations)
        for column, values in zip(columns, row, strict=True):
            column.append(values.double().cpu())
    return ImageBits(*(torch.cat(column).numpy() for column in columns))


def mean_and_error(values: NDArray[np.float64]) -> tuple[float, float]:
    """The mean of [N] and its standard error; NaN for one image."""
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), error


def paired_difference(one: ImageBits, other: ImageBits) -> tuple[float, float]:
    """Mean and standard error of bits/dim of ``one`` minus ``other``, image by image: what both share falls out."""
    return mean_and_error(one.bits_per_dim - other.bits_per_dim)


def error_of_probes(probe_error: NDArray[np.float64]) -> float:
    """The share of the mean's standard error that more probes would take away; NaN where one probe was drawn."""
    return math.sqrt(float(np.square(probe_error).sum())) / len(probe_error)


def _of_each(denoise: Denoise, labels: Tensor | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda x, sigma, index: denoise(x, sigma, None if labels is None else labels[index])


def _reports(progress: Progress, before: int) -> Callable[[Tensor], None]:
    return lambda t: progress(before + float(t.sum()))
