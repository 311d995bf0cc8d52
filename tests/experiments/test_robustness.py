"""Jumps with known errors, and the distance that tells what they do."""

import math

import pytest
import torch

from ctm_fast.diffusion.schedule import Levels
from ctm_fast.experiments import robustness
from ctm_fast.experiments.robustness import FaultyJump, four_corners, in_the_world, sliced_distance


def levels(value: float, count: int) -> torch.Tensor:
    return torch.full((count,), value, dtype=torch.float64)


@pytest.mark.parametrize("t", [0.05, 1.0, 40.0])
def test_error_is_as_large_as_it_says(t: float, generator: torch.Generator) -> None:
    world = four_corners()
    x = world.sample(4000, generator, level=t)
    jump, exact = FaultyJump(world, 0.1), FaultyJump(world, 0.0)
    off = jump(x, levels(t, 4000), levels(t / 2, 4000)) - exact(x, levels(t, 4000), levels(t / 2, 4000))
    assert float(off.square().mean().sqrt()) == pytest.approx(0.05, rel=0.25)  # the field's mean square is 1 on average
    assert torch.equal(jump(x, levels(t, 4000), levels(t, 4000)), exact(x, levels(t, 4000), levels(t, 4000)))


def test_sliced_distance_of_a_shift(generator: torch.Generator) -> None:
    points = torch.randn(300, 1, 1, 2, dtype=torch.float64, generator=generator)
    shifted = points[torch.randperm(300, generator=generator)] + torch.tensor([0.3, 0.0])
    assert sliced_distance(points, points.flip(0)) == 0
    assert sliced_distance(points, shifted) == pytest.approx(0.3 * 2 / math.pi, rel=2e-3)


def test_exact_jumps_keep_the_world_and_errors_move_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robustness, "WORLD_NFES", (1, 3))
    monkeypatch.setattr(robustness, "GAMMAS", (0.0, 1.0))
    drifts, floor = in_the_world(400, Levels())
    for gamma in (0.0, 1.0):
        for nfe in (1, 3):
            none, small, large = (drifts[error, gamma, nfe] for error in robustness.ERRORS)
            assert none.rms == 0 and none.distance < 3 * floor
            assert 0.5 * 0.02 < small.rms < large.rms
    assert drifts[0.02, 0.0, 1].rms == drifts[0.02, 1.0, 1].rms  # at one step gamma has no part
    assert drifts[0.02, 0.0, 1].rms == pytest.approx(0.02, rel=0.25)
