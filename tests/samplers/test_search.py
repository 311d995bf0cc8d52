"""The search of schedules: on data whose best schedule is known, and where a search can go wrong."""

import itertools
import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from ctm_fast.analytic import Gaussian, GaussianMixture
from ctm_fast.diffusion.schedule import Levels, karras_sigmas, sampler_sigmas
from ctm_fast.errors import LevelError
from ctm_fast.evaluation.frechet import frechet_distance
from ctm_fast.evaluation.moments import moments
from ctm_fast.samplers import gamma_sample, renoise_levels, renoise_with, search_schedules
from ctm_fast.samplers.search import Sigmas

LEVELS = Levels(0.02, 10.0)
GAMMAS = [0.0, 0.5, 1.0]


def gaussian(mean: float, variance: float) -> Gaussian:
    return Gaussian(
        torch.full((2,), mean, dtype=torch.float64), variance * torch.eye(2, dtype=torch.float64), (2, 1, 1)
    )


class World:
    """Data of two Gaussians, and a jump that is one Euler step of their ODE: the longer, the worse."""

    def __init__(self, seed: int, samples: int = 1024) -> None:
        self.mixture = GaussianMixture([0.3, 0.7], [gaussian(-0.6, 0.05), gaussian(0.5, 0.1)])
        generator = torch.Generator().manual_seed(seed)
        self.x_T = LEVELS.sigma_max * torch.randn(samples, 2, 1, 1, generator=generator)
        self.noise = [torch.randn(samples, 2, 1, 1, generator=generator) for _ in range(8)]
        self.data = moments(self.mixture.sample(20_000, generator, level=LEVELS.sigma_min).flatten(1))
        self.scored: Counter[tuple[Sigmas, float]] = Counter()

    def jump(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        ratio = (s / t).view(-1, 1, 1, 1)
        return ratio * x + (1 - ratio) * self.mixture.denoise(x, t)

    def score(self, sigmas: Sigmas, gamma: float) -> float:
        self.scored[sigmas, gamma] += 1
        renoise = renoise_with(self.jump, lambda i, x: self.noise[i])
        x = gamma_sample(self.jump, self.x_T, sigmas, gamma=gamma, jump_renoise=renoise)
        return frechet_distance(*moments(x.flatten(1)), *self.data)


@pytest.mark.parametrize(("nfe", "points"), [(2, 12), (3, 7), (3, 14)])  # the last is too many to try all
@pytest.mark.parametrize("seed", [0, 1])
def test_finds_what_brute_force_finds(nfe: int, points: int, seed: int) -> None:
    world = World(seed)
    default = sampler_sigmas(nfe, LEVELS).tolist()
    grid = karras_sigmas(points, LEVELS).tolist()
    found = search_schedules(world.score, default, grid, GAMMAS)
    tried = len(world.scored)
    assert set(world.scored.values()) == {1}  # nothing is scored twice
    places = sorted({*grid[1:-1], *default[1:-1]}, reverse=True)
    ways = list(itertools.combinations(places, nfe - 1))
    assert (tried < len(ways) * len(GAMMAS)) == (len(ways) > 64)
    for gamma, entry in zip(GAMMAS, found, strict=True):
        assert entry.default.sigmas == tuple(default)
        assert entry.default.gamma == entry.best.gamma == gamma
        assert entry.default.score == world.score(tuple(default), gamma)
        scores = {way: world.score((default[0], *way, default[-1]), gamma) for way in ways}
        assert entry.best.score == min(scores.values())
        assert entry.best.sigmas[1:-1] == min(scores, key=lambda way: scores[way])
        assert entry.best.score < 0.9 * entry.default.score  # there was something to be found


def variance_after(sigmas: Sigmas, gamma: float, variance: float) -> float:
    """Of gamma-sampling by Euler jumps for data N(0, variance), from the true variance at sigmas[0] on, exactly."""
    v = variance + sigmas[0] ** 2
    jumps = zip(sigmas[:-1], renoise_levels(sigmas, gamma), [*sigmas[1:-1], 0.0], strict=True)
    for t, s, after in jumps:
        v *= (1 + (s - t) * t / (variance + t**2)) ** 2
        v += max(after**2 - s**2, 0.0)
    return v


@pytest.mark.parametrize("nfe", [2, 3])
def test_finds_the_optimum_of_a_gaussian(nfe: int) -> None:
    """Whose score is a formula, (sqrt(v) - sqrt(v_true))^2, the Frechet distance of centred Gaussians."""

    def score(sigmas: Sigmas, gamma: float) -> float:
        true = math.sqrt(0.25 + LEVELS.sigma_min**2)
        return (math.sqrt(variance_after(sigmas, gamma, 0.25)) - true) ** 2

    default, grid = sampler_sigmas(nfe, LEVELS).tolist(), karras_sigmas(9, LEVELS).tolist()
    best = [entry.best.score for entry in search_schedules(score, default, grid, GAMMAS)]
    for gamma, found in zip(GAMMAS, best, strict=True):
        ways = itertools.combinations(sorted({*grid[1:-1], *default[1:-1]}, reverse=True), nfe - 1)
        assert found == min(score((default[0], *way, default[-1]), gamma) for way in ways)


def test_common_noise_tells_schedules_apart_that_fresh_noise_does_not() -> None:
    """The scores' differences hardly vary with the noise that all share, while the scores do."""
    near, far = (10.0, 0.9, 0.02), (10.0, 0.8, 0.02)
    scores = torch.tensor([[World(seed, 256).score(way, 1.0) for way in (near, far)] for seed in range(12)])
    difference = (scores[:, 0] - scores[:, 1]).std()
    apart = (scores[:, 0] - scores[:, 1].roll(1)).std()
    assert difference < 0.3 * apart


def known(sigmas: Sigmas, gamma: float) -> float:
    """Least, by far, at the levels 4, 2 and 0.5 and gamma 0.5."""
    target = (10.0, 4.0, 2.0, 0.5, 0.02)
    return sum((a - b) ** 2 for a, b in zip(sigmas, target, strict=True)) + (gamma - 0.5) ** 2


def test_descent_arrives() -> None:
    grid = [0.1 * i for i in range(1, 100)]
    grid[39], grid[19], grid[4] = 4.0, 2.0, 0.5
    trials = 0

    def score(sigmas: Sigmas, gamma: float) -> float:
        nonlocal trials
        trials += 1
        return known(sigmas, gamma)

    found = search_schedules(score, [10.0, 9.0, 8.0, 7.0, 0.02], grid, [0.5])[0]
    assert found.best.sigmas == (10.0, 4.0, 2.0, 0.5, 0.02)
    assert found.best.score == 0
    assert trials < 3000  # of 156,849


def test_default_wins_a_tie() -> None:
    found = search_schedules(lambda sigmas, gamma: 1.0, [10.0, 3.0, 0.02], [5.0, 1.0], [0.0, 1.0])
    assert [entry.best for entry in found] == [entry.default for entry in found]


def test_nan_is_never_best() -> None:
    def score(sigmas: Sigmas, gamma: float) -> float:
        return 2.0 if sigmas[1] == 1.0 else math.nan

    assert search_schedules(score, [10.0, 3.0, 0.02], [5.0, 1.0], [0.0])[0].best.sigmas == (10.0, 1.0, 0.02)


def test_one_jump_leaves_nothing_to_search() -> None:
    made = []

    def score(sigmas: Sigmas, gamma: float) -> float:
        made.append((sigmas, gamma))
        return 0.0

    search_schedules(score, [10.0, 0.02], [5.0, 1.0], [0.0, 0.5, 1.0])
    assert made == [((10.0, 0.02), 0.0)]


@pytest.mark.parametrize(
    ("default", "grid", "gammas", "error", "text"),
    [
        ([1.0], [], [0.0], LevelError, "sigmas: "),
        ([1.0, 2.0], [], [0.0], LevelError, "sigmas: "),
        ([2.0, math.nan], [], [0.0], LevelError, "sigmas: "),
        ([2.0, 1.0], [math.nan], [0.0], LevelError, "grid: "),
        ([2.0, 1.0], [-1.0], [0.0], LevelError, "grid: "),
        ([2.0, 1.0], [], [1.5], LevelError, "gamma: "),
        ([2.0, 1.0], [], [], ValueError, "gammas: "),
    ],
)
def test_refused(
    default: list[float], grid: list[float], gammas: list[float], error: type[Exception], text: str
) -> None:
    def score(sigmas: Sigmas, gamma: float) -> float:
        raise AssertionError("scored before the check")

    with pytest.raises(error, match=text):
        search_schedules(score, default, grid, gammas)
