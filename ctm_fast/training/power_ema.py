"""Power-function averages of a trajectory, and any of them from snapshots of others (EDM2, arXiv 2312.02696).

The profile of an average of exponent gamma at time t is p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1) for tau in
[0, t] (Eq. 121): how much of the weights at time tau is in it. Its width sigma_rel is the standard deviation of
tau / t.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ctm_fast.errors import ConfigError

WIDEST = 12**-0.5
"""sigma_rel of gamma = 0, the mean over the whole trajectory."""


@dataclass(frozen=True)
class Profile:
    """A power-function average of width ``sigma_rel`` after ``step`` steps."""

    step: int
    sigma_rel: float


def gamma_of(sigma_rel: float) -> float:
    """The exponent gamma >= 0 of a width, the inverse of :func:`sigma_rel_of`: Eq. 126, Algorithm 2.

    Raises ConfigError unless 0 < sigma_rel < :data:`WIDEST`.
    """
    if not 0 < sigma_rel < WIDEST:
        raise ConfigError(f"ema: expected a width sigma_rel above 0 and below {WIDEST:.4f}, got {sigma_rel}")
    square = sigma_rel**-2
    # (gamma + 2)^2 (gamma + 3) = (gamma + 1) / sigma_rel^2
    return float(np.roots([1, 7, 16 - square, 12 - square]).real.max())


def sigma_rel_of(gamma: float) -> float:
    """The width of an exponent: (gamma + 1)^(1/2) (gamma + 2)^(-1) (gamma + 3)^(-1/2), Eq. 123."""
    return ((gamma + 1) / (gamma + 3)) ** 0.5 / (gamma + 2)


def inner_products(a: Sequence[Profile], b: Sequence[Profile]) -> NDArray[np.float64]:
    """The integral over tau of p_i p_j for each profile i of ``a`` and j of ``b``: Eq. 151."""
    t_a, gamma_a = (column[:, None] for column in _columns(a))
    t_b, gamma_b = (column[None, :] for column in _columns(b))
    ratio = (t_a / t_b) ** np.where(t_a < t_b, gamma_b, -gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) * ratio / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))


def solve_weights(known: Sequence[Profile], wanted: Profile) -> tuple[NDArray[np.float64], float]:
    """Weights x of the averages ``known`` whose sum comes closest to ``wanted``, and how close that is.

    Least squares over profiles, Algorithm 3, with the sum of x held at 1, so that what training leaves alone comes out
    as it is (the published code scales them to that sum afterwards). The second value is
    ||sum_i x_i p_i - p|| / ||p||, norms over tau.
    """
    A = inner_products(known, known)
    b = inner_products(known, [wanted])[:, 0]
    (square,) = inner_products([wanted], [wanted])[0]
    scale = 1 / np.sqrt(np.diag(A))  # profiles of norm 1: early snapshots have far larger ones
    ones = np.append(scale, 0.0)
    system = np.block([[scale[:, None] * A * scale, ones[:-1, None]], [ones]])
    solution = np.linalg.lstsq(system, np.append(scale * b, 1.0), rcond=None)[0]  # singular if one is there twice
    x = scale * solution[:-1]
    return x, float(np.sqrt(max(0.0, square - 2 * x @ b + x @ A @ x) / square))


def _columns(profiles: Sequence[Profile]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    steps = np.array([profile.step for profile in profiles], dtype=np.float64)
    return steps, np.array([gamma_of(profile.sigma_rel) for profile in profiles])
