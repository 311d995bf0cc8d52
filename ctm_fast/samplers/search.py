"""Which levels and which gamma to sample with at a given number of network evaluations, found by trying them."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ctm_fast.errors import LevelError
from ctm_fast.samplers.gamma import renoise_levels

Sigmas = tuple[float, ...]

Score = Callable[[Sigmas, float], float]
"""score(sigmas, gamma): the lower the better. Equal arguments must give equal scores: the starts and the noise of all
candidates are the same (common random numbers), so that candidates are told apart by less than the noise of a score."""

EXHAUSTIVE = 64
"""Up to so many lists of levels, each of them is tried."""


@dataclass(frozen=True)
class Trial:
    """A candidate and its score; what scores NaN counts as infinitely bad."""

    sigmas: Sigmas
    gamma: float
    score: float


@dataclass(frozen=True)
class Found:
    """For one gamma: the default levels, and the best that were found, which are never worse."""

    default: Trial
    best: Trial


def search_schedules(
    score: Score, default: Sequence[float], grid: Sequence[float], gammas: Sequence[float]
) -> list[Found]:
    """The best levels for each gamma, in the order of ``gammas``.

    The ends of ``default`` stay; its levels between them are chosen from its own and those of ``grid`` that lie inside.
    If there are at most 64 ways, all are tried. Else one level after the other takes the best place between its
    neighbours, from ``default`` on, until no move of a single level helps: a local optimum. Of equals the default, then
    the one tried first, is taken. With no level between the ends gamma changes nothing, and only the first is tried.

    Raises LevelError for levels out of order or a gamma outside [0, 1], ValueError for no gamma.
    """
    if not gammas:
        raise ValueError("gammas: expected at least one, got none")
    start = tuple(map(float, default))
    for gamma in gammas:
        renoise_levels(start, gamma)
    if any(not (math.isfinite(sigma) and sigma > 0) for sigma in grid):
        raise LevelError(f"grid: expected finite, positive levels, got {list(grid)}")
    places = sorted({*start[1:-1], *(float(sigma) for sigma in grid if start[-1] < sigma < start[0])}, reverse=True)
    inner = len(start) - 2
    if inner == 0:
        gammas = gammas[:1]
    exhaustive = math.comb(len(places), inner) <= EXHAUSTIVE
    return [(_exhaustive if exhaustive else _descent)(_Trials(score, gamma), start, places) for gamma in gammas]


class _Trials:
    """The trials of one gamma, each made once."""

    def __init__(self, score: Score, gamma: float) -> None:
        self._score, self._gamma = score, gamma
        self._made: dict[Sigmas, Trial] = {}

    def __call__(self, sigmas: Sigmas) -> Trial:
        if sigmas not in self._made:
            value = float(self._score(sigmas, self._gamma))
            self._made[sigmas] = Trial(sigmas, self._gamma, math.inf if math.isnan(value) else value)
        return self._made[sigmas]


def _exhaustive(trial: _Trials, start: Sigmas, places: list[float]) -> Found:
    default = trial(start)
    ways = itertools.combinations(places, len(start) - 2)
    others = [trial((start[0], *way, start[-1])) for way in ways]
    return Found(default, min([default, *others], key=lambda made: made.score))


def _descent(trial: _Trials, start: Sigmas, places: list[float]) -> Found:
    default = best = trial(start)
    improved = True
    while improved:
        improved = False
        for i in range(1, len(start) - 1):
            above, below = best.sigmas[i - 1], best.sigmas[i + 1]
            moves = [(*best.sigmas[:i], place, *best.sigmas[i + 1 :]) for place in places if below < place < above]
            moved = min([best, *map(trial, moves)], key=lambda made: made.score)
            improved |= moved.score < best.score
            best = moved
    return Found(default, best)
