"""The random levels of a training step, as functions of (seed, step): a resumed run draws what the first would have.

Everything small is drawn on the host by counter-based generators, for the whole batch at once; images of noise come
from :func:`ctm_fast.ops.philox_normal` on the device.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from ctm_fast.diffusion.schedule import Levels, karras_sigmas
from ctm_fast.errors import LevelError

Levels64 = NDArray[np.float64]


class Purpose(IntEnum):
    """What a generator draws: no two purposes share random words."""

    JUMPS = 0
    DSM = 1
    EDM = 2
    FLIPS = 3
    DROPOUT = 4


def generator(seed: int, step: int, purpose: Purpose) -> np.random.Generator:
    """An independent generator for each (seed, step, purpose); seed at least 0, step in 0..2^31 - 1."""
    return np.random.Generator(np.random.Philox(key=[seed, (step << 16) + purpose]))


@dataclass(frozen=True)
class Jumps:
    """Levels t >= u >= s of a batch of jumps, and the solver's way from t to u.

    ``way`` is [k + 1, B]: way[0] = t, way[k] = u, and the k - 1 grid levels between them.
    """

    way: Levels64
    s: Levels64
    k: int

    @property
    def t(self) -> Levels64:
        """Where the jumps start, [B]."""
        return self.way[0]

    @property
    def u(self) -> Levels64:
        """Where the solver arrives, [B]."""
        return self.way[-1]


def draw_solver_steps(max_steps: int, rng: np.random.Generator) -> int:
    """k in 1..max_steps with P(k) proportional to k: one number for the whole batch (CTM, published code)."""
    weights = np.arange(1, max_steps + 1, dtype=np.float64)
    return int(rng.choice(np.arange(1, max_steps + 1), p=weights / weights.sum()))


def draw_jumps(batch: int, points: int, max_steps: int, levels: Levels, *, seed: int, step: int) -> Jumps:
    """Uniform grid indices: i in 0..N-1-k for t, i + k for u, j in i+k..N-1 for s; both ends included.

    Args:
        batch: B.
        points: N, the points of the training grid.
        max_steps: M, the largest number of solver steps; M <= N - 1.
    """
    if not 1 <= max_steps < points:
        raise LevelError(f"max_steps: expected 1 <= max_steps <= points - 1 = {points - 1}, got {max_steps}")
    rng = generator(seed, step, Purpose.JUMPS)
    k = draw_solver_steps(max_steps, rng)
    index_t = rng.integers(0, points - k, size=batch)
    index_s = rng.integers(index_t + k, points)
    grid = karras_sigmas(points, levels)
    return Jumps(way=grid[index_t + np.arange(k + 1)[:, None]], s=grid[index_s], k=k)


def draw_dsm_sigmas(batch: int, levels: Levels, *, seed: int, step: int, uniform_to: float = 0.7) -> Levels64:
    """Half the batch log-normal, half uniform in the schedule's fraction ("halflognormal", published code).

    The first floor(B / 2): ln sigma ~ N(-1.2, 1.2^2). The rest: tau(v), v ~ U(0, ``uniform_to``): the large levels.
    """
    rng = generator(seed, step, Purpose.DSM)
    half = batch // 2
    low = np.exp(-1.2 + 1.2 * rng.standard_normal(half))
    high = levels.at(rng.uniform(0.0, uniform_to, size=batch - half))
    return np.concatenate([low, high])


def draw_edm_sigmas(batch: int, *, seed: int, step: int, p_mean: float = -1.2, p_std: float = 1.2) -> Levels64:
    """EDM's training levels: ln sigma ~ N(p_mean, p_std^2) (arXiv 2206.00364, Table 1)."""
    return np.exp(p_mean + p_std * generator(seed, step, Purpose.EDM).standard_normal(batch))
