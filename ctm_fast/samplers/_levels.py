"""Levels that are Python numbers: checked before any work, then spread over the batch."""

import itertools
import math
from collections.abc import Sequence

from torch import Tensor

from ctm_fast.errors import LevelError


def check_sigmas(sigmas: Sequence[float], *, least: int = 2) -> None:
    """Raise LevelError unless ``sigmas`` holds ``least`` or more finite, positive, strictly decreasing numbers."""
    if len(sigmas) < least:
        raise LevelError(f"sigmas: expected at least {least} level{'s' * (least > 1)}, got {len(sigmas)}")
    for sigma in sigmas:
        _check_positive("sigmas", sigma)
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        if sigma_next >= sigma:
            raise LevelError(f"sigmas: expected strictly decreasing levels, got {sigma} then {sigma_next} at {i}")


def check_jumps(jumps: Sequence[tuple[float, float]]) -> None:
    """Raise LevelError unless each (t, s) has 0 < s <= t, finite, and the next t is at or above s."""
    if not jumps:
        raise LevelError("jumps: expected at least one (t, s), got none")
    for t, s in jumps:
        _check_positive("jumps", t)
        _check_positive("jumps", s)
        if s > t:
            raise LevelError(f"jumps: expected (t, s) with s <= t, got ({t}, {s})")
    for i, ((_, s), (t_next, _)) in enumerate(itertools.pairwise(jumps)):
        if t_next < s:
            raise LevelError(f"jumps: expected to go on at or above the level reached, got {s} then {t_next} at {i}")


def _check_positive(name: str, level: float) -> None:
    if not (math.isfinite(level) and level > 0):
        raise LevelError(f"{name}: expected finite, positive levels, got {level}")


def full(x: Tensor, level: float) -> Tensor:
    """[B] tensor of one level on the device of x."""
    return x.new_full((x.shape[0],), float(level))
