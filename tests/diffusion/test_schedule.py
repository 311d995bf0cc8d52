"""Schedules against the published grids; errors of levels."""

import numpy as np
import pytest

from ctm_fast.diffusion.schedule import Levels, karras_sigmas, sampler_sigmas
from ctm_fast.errors import LevelError
from tests.golden import Golden


@pytest.mark.parametrize("name", ["cifar/grids.npz", "imagenet/grids.npz"])
def test_grids_of_the_published_code(name: str) -> None:
    golden = Golden(name)
    np.testing.assert_allclose(karras_sigmas(golden.meta["N"]), golden.arrays["tau"], rtol=1e-5)
    for steps in (1, 2, 4, 18):
        expected = golden.arrays[f"sampler_{steps}"][:-1]  # a 0 trails, which only Euler samplers use
        np.testing.assert_allclose(sampler_sigmas(steps), expected, rtol=1e-5)


def test_ends_are_exact() -> None:
    sigmas = karras_sigmas(40)
    assert sigmas[0] == 80.0
    assert sigmas[-1] == 0.002


def test_another_rho() -> None:
    """rho = 1 is a straight line."""
    np.testing.assert_allclose(karras_sigmas(5, Levels(1.0, 5.0, rho=1.0)), [5, 4, 3, 2, 1])


@pytest.mark.parametrize("levels", [(0.0, 80.0, 7.0), (80.0, 0.002, 7.0), (0.002, 80.0, 0.0), (-1.0, 80.0, 7.0)])
def test_levels_out_of_order(levels: tuple[float, float, float]) -> None:
    with pytest.raises(LevelError, match="expected"):
        Levels(*levels)


def test_too_few_points() -> None:
    with pytest.raises(LevelError, match="points: expected at least 2, got 1"):
        karras_sigmas(1)
    with pytest.raises(LevelError, match="steps: expected at least 1, got 0"):
        sampler_sigmas(0)
