"""Levels that are Python numbers: checked before any work, then spread over the batch."""

import itertools
import math
from collections.abc import Sequence

from torch import Tensor

from ctm_fast.errors import LevelError


def check_sigmas(sigmas: Sequence[float]) -> None:
    """Raise LevelError unless ``sigmas`` holds at least two finite, positive, strictly decreasing numbers."""
    if len(sigmas) < 2:
        raise LevelError(f"sigmas: expected at least 2 levels, got {len(sigmas)}")
    for sigma in sigmas:
        if not (math.isfinite(sigma) and sigma > 0):
            raise LevelError(f"sigmas: expected finite, positive levels, got {sigma}")
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        if sigma_next >= sigma:
            raise LevelError(f"sigmas: expected strictly decreasing levels, got {sigma} then {sigma_next} at {i}")


def full(x: Tensor, level: float) -> Tensor:
    """[B] tensor of one level on the device of x."""
    return x.new_full((x.shape[0],), float(level))
