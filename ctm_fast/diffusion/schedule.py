"""Karras schedules of noise levels, largest first (EDM, arXiv 2206.00364, Eq. 5)."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ctm_fast.errors import LevelError


@dataclass(frozen=True)
class Levels:
    """The range of noise levels of a model and the curvature of its schedules, in the unit of sigma."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise LevelError(
                "sigma_min, sigma_max: expected 0 < sigma_min < sigma_max, finite, "
                f"got {self.sigma_min}, {self.sigma_max}"
            )
        if not 0 < self.rho < math.inf:
            raise LevelError(f"rho: expected a positive number, got {self.rho}")

    def at(self, fraction: float | NDArray[np.float64]) -> NDArray[np.float64]:
        """tau(v) = (smax^(1/rho) + v (smin^(1/rho) - smax^(1/rho)))^rho for v in [0, 1]: v = 0 is sigma_max."""
        top, bottom = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return np.asarray(top + np.asarray(fraction) * (bottom - top)) ** self.rho


def karras_sigmas(points: int, levels: Levels = Levels()) -> NDArray[np.float64]:
    """``points`` levels from sigma_max to sigma_min, both included: the training grid tau(0), ..., tau(points - 1)."""
    if points < 2:
        raise LevelError(f"points: expected at least 2, got {points}")
    sigmas = levels.at(np.arange(points) / (points - 1))
    sigmas[0], sigmas[-1] = levels.sigma_max, levels.sigma_min  # exactly, so that an end can be recognised
    return sigmas


def sampler_sigmas(steps: int, levels: Levels = Levels()) -> NDArray[np.float64]:
    """The ``steps`` + 1 levels that CTM's samplers jump between, from sigma_max to sigma_min."""
    if steps < 1:
        raise LevelError(f"steps: expected at least 1, got {steps}")
    return karras_sigmas(steps + 1, levels)


def grid_sigmas(indices: Sequence[int], *, points: int, levels: Levels = Levels()) -> NDArray[np.float64]:
    """Levels of the training grid by their index, tau(0) = sigma_max to tau(points - 1) = sigma_min.

    LevelError unless ``indices`` are strictly increasing and in 0..points - 1.
    """
    tau = karras_sigmas(points, levels)
    for index in indices:
        if not 0 <= index < points:
            raise LevelError(f"indices: expected 0..{points - 1}, got {index}")
    if any(after <= before for before, after in itertools.pairwise(indices)):
        raise LevelError(f"indices: expected a strictly increasing list, got {list(indices)}")
    return tau[list(indices)]
