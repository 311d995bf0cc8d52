"""The random levels of a training step, as functions of (seed, step, position in the global batch).

Nothing here depends on how a batch is split over ranks and micro-batches, or on how large it is: each position has four
random words of its own, drawn on the host by counter. So a run that goes on draws what the first would have, and a
slice of the positions draws what the whole batch has there. Images of noise come from
:func:`ctm_fast.ops.philox_normal` on the device.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from ctm_fast.diffusion.schedule import Levels, karras_sigmas
from ctm_fast.errors import LevelError

Levels64 = NDArray[np.float64]
Words = NDArray[np.uint64]

K_STRATEGIES = ("weighted", "uniform", "fixed")
S_STRATEGIES = ("uniform", "smallest")
DSM_LAWS = ("half-lognormal", "lognormal")


class Purpose(IntEnum):
    """What random words are for: no two purposes share any."""

    JUMPS = 0
    DSM = 1
    EDM = 2
    FLIPS = 3
    DROPOUT = 4
    SOLVER_STEPS = 5
    LABELS = 6


def words(seed: int, step: int, purpose: Purpose, positions: slice) -> Words:
    """Four words for each position of slice(start, stop), [stop - start, 4]: a block of Philox4x64 counted by position.

    NumPy keeps them the same from release to release. seed at least 0, step in 0..2^31 - 1.
    """
    start, stop = positions.start, positions.stop
    if positions.step is not None or not 0 <= start <= stop:
        raise ValueError(f"positions: expected slice(start, stop) with 0 <= start <= stop, got {positions}")
    raw = np.random.Philox(key=[seed, (step << 16) + purpose], counter=start).random_raw(4 * (stop - start))
    return raw.reshape(-1, 4)


def uniforms(seed: int, step: int, purpose: Purpose, positions: slice) -> Levels64:
    """:func:`words` as numbers in [0, 1), multiples of 2^-53."""
    return np.ldexp((words(seed, step, purpose, positions) >> np.uint64(11)).astype(np.float64), -53)


def dropout_seed(seed: int, step: int, position: int) -> int:
    """For torch's own generator, which draws the dropout of the micro-batch that starts at ``position``; below 2^32.

    torch's CPU generator keeps only the low 32 bits of a seed, so all three are mixed into those.
    """
    return int(words(seed, step, Purpose.DROPOUT, slice(position, position + 1))[0, 0] >> np.uint64(32))


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


def draw_solver_steps(max_steps: int, *, seed: int, step: int, strategy: str = "weighted", power: float = 1.0) -> int:
    """k in 1..max_steps, one number for the whole batch (CTM, published code).

    Args:
        max_steps: M.
        strategy: ``weighted``: P(k) proportional to k^power; ``uniform``: all alike; ``fixed``: k = M.
    """
    _check_name("k_strategy", strategy, K_STRATEGIES)
    if strategy == "fixed":
        return max_steps
    u = uniforms(seed, step, Purpose.SOLVER_STEPS, slice(0, 1))[0, 0]
    share = np.arange(1, max_steps + 1) / max_steps
    weights = np.cumsum(share**power if strategy == "weighted" else np.ones(max_steps))
    return 1 + int(np.searchsorted(weights, u * weights[-1], side="right"))


def draw_jumps(
    positions: slice,
    points: int,
    max_steps: int,
    levels: Levels,
    *,
    seed: int,
    step: int,
    k_strategy: str = "weighted",
    k_power: float = 1.0,
    s_strategy: str = "uniform",
) -> Jumps:
    """Uniform grid indices: i in 0..N-1-k for t, i + k for u, j in i+k..N-1 for s; both ends included.

    Args:
        positions: slice(start, stop) of the global batch; B = stop - start.
        points: N, the points of the training grid.
        max_steps: M, the largest number of solver steps; M <= N - 1.
        k_strategy, k_power: see :func:`draw_solver_steps`.
        s_strategy: ``uniform``, or ``smallest``: s = sigma_min always, which makes it a consistency model.
    """
    if not 1 <= max_steps < points:
        raise LevelError(f"max_steps: expected 1 <= max_steps <= points - 1 = {points - 1}, got {max_steps}")
    _check_name("s_strategy", s_strategy, S_STRATEGIES)
    k = draw_solver_steps(max_steps, seed=seed, step=step, strategy=k_strategy, power=k_power)
    u = uniforms(seed, step, Purpose.JUMPS, positions)
    index_t = (u[:, 0] * (points - k)).astype(np.int64)
    index_u = index_t + k
    index_s = index_u + (u[:, 1] * (points - index_u)).astype(np.int64)
    if s_strategy == "smallest":
        index_s = np.full_like(index_s, points - 1)
    grid = karras_sigmas(points, levels)
    return Jumps(way=grid[index_t + np.arange(k + 1)[:, None]], s=grid[index_s], k=k)


def draw_dsm_sigmas(
    positions: slice,
    levels: Levels,
    *,
    seed: int,
    step: int,
    law: str = "half-lognormal",
    uniform_to: float = 0.7,
) -> Levels64:
    """The levels of denoising score matching, [B] (CTM, published code).

    Args:
        positions: slice(start, stop) of the global batch; B = stop - start.
        law: ``lognormal``: ln sigma ~ N(-1.2, 1.2^2), EDM's; ``half-lognormal``: so at odd positions, floor(B / 2) of a
            whole batch, and tau(v), v ~ U(0, ``uniform_to``), the large levels, at even ones. (The published code takes
            the first half of each micro-batch: here micro-batches of any size are mixed.)
    """
    _check_name("dsm_law", law, DSM_LAWS)
    u = uniforms(seed, step, Purpose.DSM, positions)
    low = _log_normal(u, -1.2, 1.2)
    if law == "lognormal":
        return low
    odd = np.arange(positions.start, positions.stop) % 2 == 1
    return np.where(odd, low, levels.at(uniform_to * u[:, 2]))


def draw_edm_sigmas(positions: slice, *, seed: int, step: int, p_mean: float = -1.2, p_std: float = 1.2) -> Levels64:
    """EDM's training levels: ln sigma ~ N(p_mean, p_std^2) (arXiv 2206.00364, Table 1)."""
    return _log_normal(uniforms(seed, step, Purpose.EDM, positions), p_mean, p_std)


def draw_flips(positions: slice, *, seed: int, step: int) -> NDArray[np.bool_]:
    """Which images of a batch are mirrored: each with probability 1/2."""
    return uniforms(seed, step, Purpose.FLIPS, positions)[:, 0] < 0.5


def draw_labelled(positions: slice, *, seed: int, step: int, dropout: float) -> NDArray[np.bool_]:
    """Which images of a batch keep their label: each with probability 1 - ``dropout``."""
    return uniforms(seed, step, Purpose.LABELS, positions)[:, 0] >= dropout


def _log_normal(u: Levels64, mean: float, std: float) -> Levels64:
    """exp(mean + std n), n the normal that Box and Muller make of u[:, 0] and u[:, 1] in [0, 1)."""
    normal = np.sqrt(-2 * np.log1p(-u[:, 0])) * np.cos(2 * np.pi * u[:, 1])
    return np.exp(mean + std * normal)


def _check_name(argument: str, name: str, names: tuple[str, ...]) -> None:
    if name not in names:
        raise ValueError(f"{argument}: expected {' or '.join(names)}, got {name!r}")
