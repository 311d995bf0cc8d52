"""Fidelity and diversity apart: by which samples lie within the nearest neighbours' balls around others."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ctm_fast.evaluation.feature_table import Rows

_ROWS, _COLUMNS = 1024, 4096  # of a tile of distances: 32 MiB


@dataclass(frozen=True)
class Neighbours:
    """Precision, recall, density and coverage; all but the density are at most 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def neighbours(real: Tensor | Rows, generated: Tensor | Rows, *, k: int = 3) -> Neighbours:
    """Four shares, by the balls around each sample that reach to its k-th nearest neighbour in its own set.

        precision   generated samples within a real ball             Kynkaanniemi et al. (arXiv 1904.06991), Eq. 1 and 2
        recall      real samples within a generated ball
        density     real balls around a generated sample, over k     Naeem et al. (arXiv 2002.09797), Eq. 4
        coverage    real balls with a generated sample within                                        Eq. 5

    Distances are Euclidean, in float64, a tile of them at a time: 64 MiB beside the features, whatever their number.
    A sphere belongs to its ball.

    Args:
        real, generated: [n, D], [m, D], more than k each.

    Raises:
        ValueError: shapes that do not fit, or too few samples.
    """
    fits = real.dim() == generated.dim() == 2 and real.shape[1] == generated.shape[1]
    if not fits or k < 1 or min(len(real), len(generated)) <= k:
        raise ValueError(
            f"features: expected [n, D] and [m, D] of more than k = {k} samples, "
            f"got {list(real.shape)} and {list(generated.shape)}"
        )
    centre = _mean(real)
    real_radius, generated_radius = (_radius(features, centre, k) for features in (real, generated))
    in_real = torch.zeros(len(generated), dtype=torch.int64, device=real.device)
    in_generated = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    covered = torch.zeros_like(in_generated)
    for rows, columns, distance in _tiles(real, generated, centre):
        within = distance <= real_radius[rows, None]
        in_real[columns] += within.sum(0)
        covered[rows] |= within.any(1)
        in_generated[rows] |= (distance <= generated_radius[columns]).any(1)
    return Neighbours(
        precision=float((in_real > 0).double().mean()),
        recall=float(in_generated.double().mean()),
        density=float(in_real.double().mean() / k),
        coverage=float(covered.double().mean()),
    )


def _mean(features: Tensor | Rows) -> Tensor:
    total = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
    for chunk in features.split(_COLUMNS):
        total += chunk.double().sum(0)
    return total / len(features)


def _radius(features: Tensor | Rows, centre: Tensor, k: int) -> Tensor:
    """[n] squared distance of each to its k-th nearest neighbour, itself not counted."""
    nearest = torch.full((len(features), k), torch.inf, dtype=torch.float64, device=features.device)
    for rows, columns, distance in _tiles(features, features, centre):
        itself = torch.arange(rows.start, rows.stop, device=features.device)[:, None] == torch.arange(
            columns.start, columns.stop, device=features.device
        )
        candidates = torch.cat([nearest[rows], distance.masked_fill_(itself, torch.inf)], 1)
        nearest[rows] = candidates.topk(k, largest=False).values
    return nearest.max(1).values


def _tiles(x: Tensor | Rows, y: Tensor | Rows, centre: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Squared distances between ``x[rows]`` and ``y[columns]``.

    |x - y|^2 = |x|^2 + |y|^2 - 2 x . y, with the origin moved into the data: features that are positive lie far from 0.
    """
    for left in range(0, len(y), _COLUMNS):
        columns = slice(left, min(left + _COLUMNS, len(y)))
        b = y[columns].double() - centre
        b_norm = b.square().sum(1)
        for top in range(0, len(x), _ROWS):
            rows = slice(top, min(top + _ROWS, len(x)))
            a = x[rows].double() - centre
            distance = torch.addmm(a.square().sum(1)[:, None] + b_norm, a, b.T, alpha=-2)
            yield rows, columns, distance.clamp_(min=0)
