"""The draws of k, t, u, s and DSM's levels: supports, laws, and that they are functions of (seed, step, position)."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctm_fast.diffusion.draws import (
    Purpose,
    draw_dsm_sigmas,
    draw_edm_sigmas,
    draw_flips,
    draw_jumps,
    draw_solver_steps,
    dropout_seed,
    uniforms,
    words,
)
from ctm_fast.diffusion.schedule import Levels, karras_sigmas
from ctm_fast.errors import LevelError

LEVELS = Levels()


@pytest.mark.parametrize("power", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("max_steps", [17, 20, 39])
def test_solver_steps_are_weighted_by_k(max_steps: int, power: float) -> None:
    """Chi-squared over all k, beyond which one seed in 10^4 falls (Wilson and Hilferty)."""
    n = 10_000
    k = [draw_solver_steps(max_steps, seed=power.is_integer(), step=step, power=power) for step in range(n)]
    weights = np.arange(1, max_steps + 1) ** power
    expected = n * weights / weights.sum()
    found = np.bincount(k, minlength=max_steps + 1)[1:]
    freedom = max_steps - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
    assert ((found - expected) ** 2 / expected).sum() < limit
    if power == 1:
        assert np.mean(k) == pytest.approx((2 * max_steps + 1) / 3, rel=0.02)


def test_other_strategies_for_k() -> None:
    k = np.array([draw_solver_steps(5, seed=0, step=step, strategy="uniform") for step in range(5_000)])
    assert ((np.bincount(k, minlength=6)[1:] - 1000) ** 2 / 1000).sum() < 23.5
    assert {draw_solver_steps(5, seed=0, step=step, strategy="fixed") for step in range(20)} == {5}
    assert draw_solver_steps(1, seed=0, step=0) == 1


def test_jumps_stay_on_the_grid_and_reach_both_ends() -> None:
    points, max_steps = 18, 17
    grid = karras_sigmas(points, LEVELS)
    seen_s_is_u = seen_s_is_min = False
    for step in range(200):
        jumps = draw_jumps(slice(0, 8), points, max_steps, LEVELS, seed=3, step=step)
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
    jumps = draw_jumps(slice(0, batch), points, 1, LEVELS, seed=0, step=0)
    grid = karras_sigmas(points, LEVELS)
    index_t, index_s = np.searchsorted(-grid, -jumps.t), np.searchsorted(-grid, -jumps.s)
    expected = batch / 5
    assert ((np.bincount(index_t, minlength=5) - expected) ** 2 / expected).sum() < 18.5
    within = index_s[index_t == 0]
    expected = len(within) / 5
    assert ((np.bincount(within, minlength=6)[1:] - expected) ** 2 / expected).sum() < 18.5


def test_s_can_be_the_smallest_level() -> None:
    uniform, smallest = (
        draw_jumps(slice(0, 64), 18, 5, LEVELS, seed=0, step=7, s_strategy=strategy)
        for strategy in ("uniform", "smallest")
    )
    assert (smallest.s == LEVELS.sigma_min).all()
    assert not (uniform.s == LEVELS.sigma_min).all()
    assert (smallest.way == uniform.way).all()


def test_dsm_levels_are_half_log_normal_half_uniform() -> None:
    sigmas = draw_dsm_sigmas(slice(0, 40_001), LEVELS, seed=0, step=0)
    low, high = sigmas[1::2], sigmas[::2]
    assert len(low) == 20_000
    assert np.log(low).mean() == pytest.approx(-1.2, abs=0.03)
    assert np.log(low).std() == pytest.approx(1.2, rel=0.02)
    assert high.min() >= LEVELS.at(0.7)
    assert high.max() <= 80
    assert LEVELS.at(0.7) == pytest.approx(0.31828, rel=1e-4)
    fraction = (high ** (1 / 7) - 80 ** (1 / 7)) / (0.002 ** (1 / 7) - 80 ** (1 / 7))
    assert fraction.mean() == pytest.approx(0.35, abs=0.005)
    assert np.quantile(fraction, [0.1, 0.5, 0.9]) == pytest.approx([0.07, 0.35, 0.63], abs=0.01)


def test_dsm_levels_can_be_edms() -> None:
    logs = np.log(draw_dsm_sigmas(slice(0, 40_000), LEVELS, seed=0, step=0, law="lognormal"))
    assert logs[::2].mean() == pytest.approx(-1.2, abs=0.03)
    assert logs.std() == pytest.approx(1.2, rel=0.02)


def test_edm_levels() -> None:
    logs = np.log(draw_edm_sigmas(slice(0, 40_000), seed=1, step=2))
    assert logs.mean() == pytest.approx(-1.2, abs=0.03)
    assert logs.std() == pytest.approx(1.2, rel=0.02)
    standard = (logs + 1.2) / 1.2
    quantiles = np.quantile(standard, [0.0228, 0.1587, 0.8413, 0.9772])
    assert quantiles == pytest.approx([-2, -1, 1, 2], abs=0.06)


def test_flips_are_half() -> None:
    flips = draw_flips(slice(0, 10_000), seed=0, step=0)
    assert flips.mean() == pytest.approx(0.5, abs=0.02)
    assert not np.array_equal(flips[:100], draw_flips(slice(0, 100), seed=0, step=1))


def draws(positions: slice, seed: int, step: int) -> list[np.ndarray]:
    """Everything that is drawn on the host for some positions, batch last."""
    jumps = draw_jumps(positions, 18, 17, LEVELS, seed=seed, step=step)
    return [
        jumps.way,
        jumps.s,
        draw_dsm_sigmas(positions, LEVELS, seed=seed, step=step),
        draw_edm_sigmas(positions, seed=seed, step=step),
        draw_flips(positions, seed=seed, step=step),
        words(seed, step, Purpose.JUMPS, positions).T,
    ]


@given(
    cuts=st.lists(st.integers(0, 40), max_size=6),
    batch=st.integers(1, 40),
    seed=st.integers(0, 2**31 - 1),
    step=st.integers(0, 2**31 - 1),
)
def test_any_split_draws_what_the_batch_draws(cuts: list[int], batch: int, seed: int, step: int) -> None:
    """Bit for bit; and so does a larger batch, at the positions that both have."""
    ends = sorted({0, batch, *(min(cut, batch) for cut in cuts)})
    parts = [draws(slice(*pair), seed, step) for pair in itertools.pairwise(ends)]
    whole, larger = (draws(slice(0, size), seed, step) for size in (batch, batch + 3))
    for index, expected in enumerate(whole):
        assert np.array_equal(np.concatenate([part[index] for part in parts], axis=-1), expected)
        assert np.array_equal(larger[index][..., :batch], expected)


def test_words_are_those_of_philox() -> None:
    """One after another, as NumPy's stream has them; the last line holds them to one release."""
    expected = np.random.Philox(key=[5, (3 << 16) + Purpose.DSM]).random_raw(40).reshape(10, 4)
    assert np.array_equal(words(5, 3, Purpose.DSM, slice(0, 10)), expected)
    assert np.array_equal(words(5, 3, Purpose.DSM, slice(7, 10)), expected[7:])
    assert np.array_equal(uniforms(5, 3, Purpose.DSM, slice(0, 10)), (expected >> np.uint64(11)) / 2**53)
    assert expected[0].tolist() == [
        10869155004145191308,
        13664016573048663817,
        15894749544374430246,
        9293285963841042891,
    ]


def test_dropout_seeds() -> None:
    seeds = [dropout_seed(seed, step, position) for seed in (0, 1) for step in (0, 1) for position in (0, 1, 4)]
    assert len(set(seeds)) == 12
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_draws_are_functions_of_seed_and_step() -> None:
    first = [draw_jumps(slice(0, 8), 18, 17, LEVELS, seed=1, step=step) for step in (0, 1, 0)]
    assert first[0].way.shape == first[2].way.shape
    assert (first[0].s == first[2].s).all()
    assert not np.array_equal(first[0].s, first[1].s)
    streams = [
        uniforms(seed, step, Purpose(purpose), slice(0, 1))[0]
        for seed, step, purpose in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    ]
    assert len({tuple(stream) for stream in streams}) == 4


def test_more_solver_steps_than_the_grid_has() -> None:
    with pytest.raises(LevelError, match="max_steps: expected 1 <= max_steps <= points - 1 = 7, got 8"):
        draw_jumps(slice(0, 4), 8, 8, LEVELS, seed=0, step=0)


def test_names_that_there_are_not() -> None:
    for arguments, message in (
        ({"k_strategy": "linear"}, "k_strategy: expected weighted or uniform or fixed, got 'linear'"),
        ({"s_strategy": "zero"}, "s_strategy: expected uniform or smallest, got 'zero'"),
    ):
        with pytest.raises(ValueError, match=message):
            draw_jumps(slice(0, 4), 8, 7, LEVELS, seed=0, step=0, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dsm_law: expected half-lognormal or lognormal, got 'normal'"):
        draw_dsm_sigmas(slice(0, 4), LEVELS, seed=0, step=0, law="normal")


@pytest.mark.parametrize("positions", [slice(0, 8, 2), slice(-1, 4), slice(5, 4)])
def test_positions_that_are_no_range(positions: slice) -> None:
    with pytest.raises(ValueError, match=r"positions: expected slice\(start, stop\) with 0 <= start <= stop"):
        words(0, 0, Purpose.JUMPS, positions)
