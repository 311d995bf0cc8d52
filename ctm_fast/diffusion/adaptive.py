"""An adaptive solver whose step is each sample's own: an easy sample does not wait for a hard one.

Dormand and Prince's pair of orders 5 and 4 (J. Comput. Appl. Math. 6, 1980); the last slope of a step is the first of
the next.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ctm_fast.errors import ConfigError

Slope = Callable[[Tensor, Tensor, Tensor], Tensor]
"""slope(index, y, t) -> dy/dt [A, M] for y [A, M] and t [A], the samples ``index`` [A] of the batch."""

Progress = Callable[[Tensor], None]
"""callback(t): where each sample [B] is, after each round of steps."""

_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
_SAFETY, _SHRINK, _GROW = 0.9, 0.2, 10.0


class Solution(NamedTuple):
    """``y`` [B, M] at t_end, and ``evaluations`` [B] int64: slopes taken, those of refused steps among them."""

    y: Tensor
    evaluations: Tensor


def solve_adaptive(
    slope: Slope,
    y: Tensor,
    t_begin: float,
    t_end: float,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    scalars: int = 0,
    max_steps: int = 10_000,
    callback: Progress | None = None,
) -> Solution:
    """Solve dy/dt = slope from ``t_begin`` to ``t_end`` (above it), each sample with steps of its own.

    A step is kept if |error| <= 1, where each number's error is taken over atol + rtol max(|y|, |y'|), and |.| is the
    root mean square of all numbers but the last ``scalars``, or the largest of those, whichever is greater.

    Args:
        y: [B, M] float64 at t_begin.
        rtol, atol: tolerances of a step.
        scalars: how many of the last numbers stand for themselves, so that a large M does not drown them.
        max_steps: steps of a sample, kept or not, before it is given up.
        callback: called as callback(t) after each round, t [B].

    Raises:
        ConfigError: a tolerance that is not positive, a sample that is not finite, or one that takes too many steps.
    """
    for name, tolerance in (("rtol", rtol), ("atol", atol)):
        if not 0 < tolerance < 1:
            raise ConfigError(f"{name}: expected a number between 0 and 1, got {tolerance}")
    batch = y.shape[0]
    y = y.double().clone()
    t = y.new_full((batch,), t_begin)
    h = y.new_full((batch,), 0.01 * (t_end - t_begin))
    active = torch.arange(batch, device=y.device)
    first = slope(active, y, t) if batch else y.clone()
    evaluations = torch.ones(batch, dtype=torch.int64, device=y.device)
    for _ in range(max_steps):
        if not len(active):
            return Solution(y, evaluations)
        y_now, t_now = y[active], t[active]
        last = t_now + h[active] >= t_end
        step = torch.where(last, t_end - t_now, h[active])
        slopes = [first[active]]
        for node, weights in zip(_NODES, _STAGES, strict=True):
            ahead = y_now + step[:, None] * _combine(weights, slopes)
            slopes.append(slope(active, ahead, t_now + node * step))
        evaluations[active] += len(_STAGES)
        scale = atol + rtol * torch.maximum(y_now.abs(), ahead.abs())
        error = _norm(step[:, None] * _combine(_ERROR, slopes) / scale, scalars)
        if not error.isfinite().all():
            bad = int(active[~error.isfinite()][0])
            raise ConfigError(f"denoise: expected finite values along the ODE, got others for sample {bad}")
        kept = error <= 1
        factor = (_SAFETY * error.clamp(min=1e-10) ** -0.2).clamp(_SHRINK, _GROW)
        h[active] = step * torch.where(kept, factor, factor.clamp(max=1.0))
        moved = active[kept]
        y[moved], first[moved] = ahead[kept], slopes[-1][kept]
        t[moved] = torch.where(last, y.new_tensor(t_end), t_now + step)[kept]
        active = active[~(kept & last)]
        if callback is not None:
            callback(t)
    raise ConfigError(
        f"rtol, atol: expected tolerances that {max_steps} steps reach, got {rtol}, {atol}, "
        f"unfinished for {len(active)} of {batch} samples"
    )


def _combine(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    total = weights[0] * slopes[0]
    for weight, slope in zip(weights[1:], slopes[1:], strict=True):
        if weight:
            total = total + weight * slope
    return total


def _norm(ratio: Tensor, scalars: int) -> Tensor:
    image, rest = ratio.split((ratio.shape[1] - scalars, scalars), dim=1)
    norm = image.square().mean(1).sqrt()
    return torch.maximum(norm, rest.abs().amax(1)) if scalars else norm
