"""The draws of k, t, u, s and of DSM's levels: supports, laws, and that they are functions of (seed, step)."""

import numpy as np
import pytest

from ctm_fast.diffusion.draws import Purpose, draw_dsm_sigmas, draw_edm_sigmas, draw_jumps, draw_solver_steps, generator
from ctm_fast.diffusion.schedule import Levels, karras_sigmas
from ctm_fast.errors import LevelError

LEVELS = Levels()


@pytest.mark.parametrize(("max_steps", "mean"), [(17, 35 / 3), (20, 41 / 3), (39, 79 / 3)])
def test_solver_steps_are_weighted_by_k(max_steps: int, mean: float) -> None:
    rng = np.random.default_rng(0)
    k = np.array([draw_solver_steps(max_steps, rng) for _ in range(20_000)])
    assert k.min() >= 1
    assert k.max() == max_steps
    assert k.mean() == pytest.approx(mean, rel=0.02)
    assert (k == max_steps).mean() == pytest.approx(2 / (max_steps + 1), rel=0.1)


def test_jumps_stay_on_the_grid_and_reach_both_ends() -> None:
    points, max_steps = 18, 17
    grid = karras_sigmas(points, LEVELS)
    seen_s_is_u = seen_s_is_min = False
    for step in range(200):
        jumps = draw_jumps(8, points, max_steps, LEVELS, seed=3, step=step)
        index_t = np.searchsorted(-grid, -jumps.t)
        index_u = np.searchsorted(-grid, -jumps.u)
        index_s = np.searchsorted(-grid, -jumps.s)
        for levels in (jumps.t, jumps.u, jumps.s, *jumps.way):
            assert np.isin(levels, grid).all()
        assert (index_u - index_t == jumps.k).all()
        assert (index_s >= index_u).all()
        assert (index_t >= 0).all()
        assert (index_s < points).all()
        assert jumps.way.shape == (jumps.k + 1, 8)
        assert (np.diff(jumps.way, axis=0) < 0).all()
        seen_s_is_u |= bool((index_s == index_u).any())
        seen_s_is_min |= bool((index_s == points - 1).any())
    assert seen_s_is_u
    assert seen_s_is_min


def test_t_and_s_are_uniform_on_their_ranges() -> None:
    """Given k: i uniform on 0..N-1-k, then j uniform on i+k..N-1 (chi-squared, 99.9 %)."""
    points, batch = 6, 60_000
    jumps = draw_jumps(batch, points, 1, LEVELS, seed=0, step=0)
    grid = karras_sigmas(points, LEVELS)
    index_t, index_s = np.searchsorted(-grid, -jumps.t), np.searchsorted(-grid, -jumps.s)
    expected = batch / 5
    assert ((np.bincount(index_t, minlength=5) - expected) ** 2 / expected).sum() < 18.5
    within = index_s[index_t == 0]
    expected = len(within) / 5
    assert ((np.bincount(within, minlength=6)[1:] - expected) ** 2 / expected).sum() < 18.5


def test_dsm_levels_are_half_log_normal_half_uniform() -> None:
    sigmas = draw_dsm_sigmas(40_001, LEVELS, seed=0, step=0)
    low, high = sigmas[:20_000], sigmas[20_000:]
    assert np.log(low).mean() == pytest.approx(-1.2, abs=0.03)
    assert np.log(low).std() == pytest.approx(1.2, rel=0.02)
    assert high.min() >= LEVELS.at(0.7)
    assert high.max() <= 80
    assert LEVELS.at(0.7) == pytest.approx(0.31828, rel=1e-4)
    fraction = (high ** (1 / 7) - 80 ** (1 / 7)) / (0.002 ** (1 / 7) - 80 ** (1 / 7))
    assert fraction.mean() == pytest.approx(0.35, abs=0.005)


def test_edm_levels() -> None:
    logs = np.log(draw_edm_sigmas(40_000, seed=1, step=2))
    assert logs.mean() == pytest.approx(-1.2, abs=0.03)
    assert logs.std() == pytest.approx(1.2, rel=0.02)


def test_draws_are_functions_of_seed_and_step() -> None:
    first = [draw_jumps(8, 18, 17, LEVELS, seed=1, step=step) for step in (0, 1, 0)]
    assert first[0].way.shape == first[2].way.shape
    assert (first[0].s == first[2].s).all()
    assert not np.array_equal(first[0].s, first[1].s)
    streams = [
        generator(seed, step, Purpose(purpose)).random(4)
        for seed, step, purpose in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    ]
    assert len({tuple(stream) for stream in streams}) == 4


def test_more_solver_steps_than_the_grid_has() -> None:
    with pytest.raises(LevelError, match="max_steps: expected 1 <= max_steps <= points - 1 = 7, got 8"):
        draw_jumps(4, 8, 8, LEVELS, seed=0, step=0)
