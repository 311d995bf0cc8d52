"""EDM's samplers for a denoiser, deterministic and stochastic (EDM, arXiv 2206.00364, Alg. 1 and 2)."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ctm_fast.diffusion.ode import Denoise, euler_step, heun_step
from ctm_fast.errors import LevelError
from ctm_fast.samplers._levels import check_sigmas, full
from ctm_fast.samplers.gamma import Callback, Noise


@dataclass(frozen=True)
class Churn:
    """How much noise EDM's stochastic sampler adds before each step (Alg. 2).

        sigma^ = sigma + min(amount / steps, sqrt(2) - 1) sigma        where lowest <= sigma <= highest
        x^ = x + sqrt(sigma^2^ - sigma^2) inflation N(0, I)

    Args:
        amount: S_churn; 0 is deterministic.
        lowest, highest: S_tmin and S_tmax, the levels at which noise is added.
        inflation: S_noise, standard deviation of the noise.

    LevelError for a number out of range.
    """

    amount: float
    lowest: float = 0.0
    highest: float = math.inf
    inflation: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.amount < math.inf and 0 <= self.inflation < math.inf):
            raise LevelError(
                f"amount, inflation: expected finite numbers from 0 on, got {self.amount}, {self.inflation}"
            )
        if not 0 <= self.lowest <= self.highest:
            raise LevelError(f"lowest, highest: expected 0 <= lowest <= highest, got {self.lowest}, {self.highest}")

    def level(self, sigma: float, steps: int) -> float:
        """sigma^, the level to add noise up to before a step from ``sigma``."""
        if not self.lowest <= sigma <= self.highest:
            return sigma
        return sigma * (1 + min(self.amount / steps, math.sqrt(2) - 1))


def heun_sample(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    churn: Churn | None = None,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Heun steps down ``sigmas``, then an Euler step to 0: NFE 2 len(sigmas) - 1.

    Args:
        denoise: denoise(x, sigma), levels [B].
        x: [B, C, H, W] float32 at level sigmas[0].
        sigmas: positive, strictly decreasing (LevelError if not).
        churn: noise added before each step; None for none.
        noise: ``noise(i, x)`` draws that of step i; needed with ``churn``.
        callback: called as callback(i, x) after step i.

    Returns:
        [B, C, H, W] at level 0; nothing is clamped.
    """
    check_sigmas(sigmas)
    return _sample(heun_step, denoise, x, sigmas, churn, noise, callback)


def euler_sample(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    churn: Churn | None = None,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Euler steps down ``sigmas`` and to 0: NFE len(sigmas). As :func:`heun_sample`; one level is enough."""
    check_sigmas(sigmas, least=1)
    return _sample(euler_step, denoise, x, sigmas, churn, noise, callback)


def _sample(
    step: Callable[[Denoise, Tensor, Tensor, Tensor], Tensor],
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    churn: Churn | None,
    noise: Noise | None,
    callback: Callback | None,
) -> Tensor:
    if churn is not None and noise is None:
        raise ValueError("noise: expected a callable with churn, got None")
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise((*sigmas, 0.0))):
        if churn is not None and noise is not None:
            level = churn.level(sigma, len(sigmas))
            std = math.sqrt((level - sigma) * (level + sigma)) * churn.inflation
            x, sigma = x + std * noise(i, x), level
        take = step if sigma_next > 0 else euler_step
        x = take(denoise, x, full(x, sigma), full(x, sigma_next))
        if callback is not None:
            callback(i, x)
    return x
