"""The likelihood of images under a denoiser: by the change of variables along its ODE, and a bound beside it.

With v = ln sigma the probability-flow ODE is dx/dv = x - D(x; sigma), and (Song et al., arXiv 2011.13456, Eq. 39)

    log p(x at sigma_min) = log N(x at sigma_max; 0, sigma_max^2 I) + int (n - tr dD/dx) dv

from sigma_min to sigma_max, n being the number of pixels and channels. The trace is exact for small images, else
Hutchinson's estimate with probes e, one for the whole way: the mean of e^T (dD/dx) e (Eq. 40).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ctm_fast.diffusion.adaptive import Progress, solve_adaptive
from ctm_fast.diffusion.schedule import Levels
from ctm_fast.errors import ConfigError
from ctm_fast.evaluation.published_likelihood import BITS, V0, Compat, Time, posterior_noise, residual
from ctm_fast.evaluation.traces import Mode, Probes, draw_probes, quadratic_forms
from ctm_fast.ops import Stream, philox_normal

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]
"""denoise(x, sigma, index) -> D(x; sigma) for the samples ``index`` of the batch, differentiable in x."""

Dequantisation = Literal["uniform", "none"]

_BITS = {"uniform": 7.0, "none": math.log2(127.5)}
_EXACT = 256  # numbers of an image, each a backward pass for every evaluation


@dataclass(frozen=True)
class Likelihood:
    """Of one batch, each [B].

    ``log_prob`` float64 in nats, of the floating-point images; ``bits_per_dim`` of the 8-bit ones; ``probe_error`` the
    standard error of ``bits_per_dim`` over the probes (NaN for one probe, 0 for the exact trace); ``evaluations``
    network evaluations.
    """

    log_prob: Tensor
    bits_per_dim: Tensor
    probe_error: Tensor
    evaluations: Tensor


def dequantise(images: Tensor, seeds: Tensor, *, dequantisation: Dequantisation = "uniform") -> Tensor:
    """8-bit images [B, C, H, W] uint8 as float32 in the unit that the network knows.

    "uniform"    (x + u) / 128 - 1, u uniform in [0, 1) from the sample's seed      bits/dim then bound the 8-bit
    "none"       x / 127.5 - 1                                                     a density at the grid points
    """
    if images.dtype != torch.uint8 or images.dim() != 4:
        raise ConfigError(f"images: expected uint8 [B, C, H, W], got {images.dtype} {list(images.shape)}")
    if dequantisation not in _BITS:
        raise ConfigError(f"dequantisation: expected one of {', '.join(_BITS)}, got {dequantisation!r}")
    if dequantisation == "none":
        return images.float() / 127.5 - 1
    normal = philox_normal(seeds, 0, images.shape[1:], stream=Stream.DEQUANTISE).double()
    uniform = torch.special.ndtr(normal).clamp(max=1 - 2**-17)  # (x + u) / 128 stays below the next step in float32
    return ((images + uniform) / 128 - 1).float()


def bits_per_dim(
    log_prob: Tensor, pixels: int, *, dequantisation: Dequantisation, compat: Compat | None = None
) -> Tensor:
    """-log2 p / n plus what the change of unit to 8-bit values adds: 7 for (x + u) / 128, log2(127.5) for x / 127.5.

    The published formula adds 7 to either.
    """
    return -log_prob / (pixels * math.log(2)) + (BITS if compat else _BITS[dequantisation])


def log_likelihood(
    denoise: Denoise,
    x: Tensor,
    levels: Levels,
    seeds: Tensor,
    *,
    probes: Probes = "rademacher",
    count: int = 1,
    tolerance: float = 1e-5,
    dequantisation: Dequantisation = "uniform",
    mode: Mode = "reverse",
    compat: Compat | None = None,
    callback: Progress | None = None,
) -> Likelihood:
    """The likelihood of images at sigma_min under the ODE of ``denoise``.

    Args:
        denoise: takes x in the dtype of the ``x`` given here; the solver's state is float64.
        x: [B, C, H, W] float32 or float64, as :func:`dequantise` gives it.
        levels: sigma_min and sigma_max of the model.
        seeds: [B] int64, for the probes: the same seeds for two models compare them on common random numbers.
        probes: how the trace is estimated; "exact" takes n derivatives an evaluation, n = C H W at most 256.
        count: probes for each sample.
        tolerance: of the solver, relative and absolute.
        dequantisation: how ``x`` was made, for bits/dim.
        mode: of differentiation; "forward" needs a forward-mode derivative of every op and raises
            NotImplementedError where there is none, see :func:`~ctm_fast.evaluation.traces.quadratic_forms`.
        compat: the published formula instead, from its v0, with its noise, residual and offset 7; see
            ``evaluation/published_likelihood.py``.
        callback: called as callback(t) after each round of steps, t [B] from 0 to 1 the share of the way done.

    Raises ConfigError naming the argument: sizes, a tolerance that is not reached, images that are not finite.
    """
    _check(x, compat)
    if probes not in get_args(Probes):
        raise ConfigError(f"probes: expected one of {', '.join(get_args(Probes))}, got {probes!r}")
    if mode not in get_args(Mode):
        raise ConfigError(f"mode: expected one of {', '.join(get_args(Mode))}, got {mode!r}")
    if dequantisation not in _BITS:
        raise ConfigError(f"dequantisation: expected one of {', '.join(_BITS)}, got {dequantisation!r}")
    if count < 1:
        raise ConfigError(f"count: expected a positive integer, got {count}")
    if seeds.shape != x.shape[:1]:
        raise ConfigError(f"seeds: expected [{len(x)}], one for each image, got {list(seeds.shape)}")
    if not 0 < tolerance < 1:
        raise ConfigError(f"tolerance: expected a number between 0 and 1, got {tolerance}")
    batch, shape = x.shape[0], x.shape[1:]
    n = math.prod(shape)
    if probes == "exact" and n > _EXACT:
        raise ConfigError(f"probes: expected images of at most {_EXACT} numbers for the exact trace, got {n}")
    drawn = draw_probes(seeds, shape, kind=probes, count=count)
    published = Time(levels)
    begin, end = (V0, 1.0) if compat else (math.log(levels.sigma_min), math.log(levels.sigma_max))

    def slope(index: Tensor, y: Tensor, fraction: Tensor) -> Tensor:
        v = begin + fraction * (end - begin)
        sigma, rate = (published.sigma(v), published.rate(v)) if compat else (v.exp(), torch.ones_like(v))
        x_v = y[:, :n].reshape(-1, *shape).to(x.dtype)
        D_x, forms = quadratic_forms(lambda x: denoise(x, sigma.to(x.dtype), index), x_v, drawn[:, index], mode=mode)
        trace = forms.sum(1, keepdim=True) if probes == "exact" else forms
        move = (x_v.double() - D_x.double()).flatten(1)
        return ((end - begin) * rate)[:, None] * torch.cat([move, n - trace], 1)

    x_begin = x
    if compat in ("published", "published-bug"):
        x_begin = x + published.bottom() * posterior_noise(x, seeds)
    scalars = 1 if probes == "exact" else count
    start = torch.cat([x_begin.flatten(1).double(), x.new_zeros(batch, scalars, dtype=torch.float64)], 1)
    solution = solve_adaptive(
        slope, start, 0.0, 1.0, rtol=tolerance, atol=tolerance, scalars=scalars, callback=callback
    )
    each = _prior(solution.y[:, :n], levels)[:, None] + solution.y[:, n:]
    evaluations = solution.evaluations
    if compat in ("published", "published-bug"):
        each = each - _residual(denoise, x, published.residual_level(compat), seeds)[:, None]
        evaluations = evaluations + 1
    bits = bits_per_dim(each, n, dequantisation=dequantisation, compat=compat)
    if probes == "exact":
        error = bits.new_zeros(batch)
    else:
        error = bits.std(1) / math.sqrt(count) if count > 1 else bits.new_full((batch,), math.nan)
    return Likelihood(each.mean(1), bits.mean(1), error, evaluations)


def evidence_bound(
    denoise: Denoise, x: Tensor, levels: Levels, seeds: Tensor, *, draws: int = 10, compat: Compat | None = None
) -> tuple[Tensor, Tensor]:
    """A lower bound on log p(x at sigma_min) of the model's reverse SDE: its estimate and standard error, each [B].

        log p(x) >= E log N(x_T; 0, sigma_max^2 I) - int E[ |D - x_s|^2 / s^2 + 2 (tr dD/dx - n) ] d ln s
                                                            Song et al. (arXiv 2101.09258), Theorem 3, for VE

    x_s is x with noise of the missing variance s^2 - sigma_min^2. ln s is uniform, one draw in each of ``draws`` equal
    parts; the trace by one Rademacher probe a draw. With ``compat`` x has no noise yet, the integral begins at the
    published sigma(v0), and the residual is taken off. Other arguments as for :func:`log_likelihood`.
    """
    _check(x, compat)
    if draws < 2:
        raise ConfigError(f"draws: expected at least 2, got {draws}")
    batch, shape = x.shape[0], x.shape[1:]
    n = math.prod(shape)
    bottom, present = (Time(levels).bottom(), 0.0) if compat else (levels.sigma_min, levels.sigma_min)
    span = math.log(levels.sigma_max / bottom)
    index = torch.arange(batch, device=x.device)
    places = torch.special.ndtr(philox_normal(seeds, 0, (draws,), stream=Stream.BOUND).double())
    probes = draw_probes(seeds, shape, kind="rademacher", count=draws)

    def term(k: int) -> Tensor:
        sigma = bottom * torch.exp((k + places[:, k]) / draws * span)
        x_sigma = _noised(x, sigma, present, seeds, 1 + k)
        D_x, trace = quadratic_forms(lambda x: denoise(x, sigma.to(x.dtype), index), x_sigma, probes[k : k + 1])
        distance = (D_x - x_sigma).flatten(1).double().square().sum(1)
        return distance / sigma**2 + 2 * (trace[:, 0] - n)

    top = torch.full_like(places[:, 0], levels.sigma_max)
    x_T = _noised(x, top, present, seeds, 1 + draws).flatten(1).double()
    each = _prior(x_T, levels)[:, None] - span * torch.stack([term(k) for k in range(draws)], 1)
    bound = each.mean(1)
    if compat in ("published", "published-bug"):
        bound = bound - _residual(denoise, x, Time(levels).residual_level(compat), seeds)
    return bound, each.std(1) / math.sqrt(draws)


def _check(x: Tensor, compat: Compat | None) -> None:
    if x.dim() != 4 or not x.is_floating_point():
        raise ConfigError(f"x: expected float [B, C, H, W], got {x.dtype} {list(x.shape)}")
    if not x.isfinite().all():
        raise ConfigError("x: expected finite images, got NaN or infinity")
    if compat is not None and compat not in get_args(Compat):
        raise ConfigError(f"compat: expected one of {', '.join(get_args(Compat))}, got {compat!r}")


def _prior(x_T: Tensor, levels: Levels) -> Tensor:
    """log N(x_T; 0, sigma_max^2 I), [B] from x_T [B, n]."""
    variance = levels.sigma_max**2
    return -0.5 * (x_T.square().sum(1) / variance + x_T.shape[1] * math.log(2 * math.pi * variance))


@torch.no_grad()
def _residual(denoise: Denoise, x: Tensor, sigma: float, seeds: Tensor) -> Tensor:
    level = x.new_full((len(x),), sigma)
    D_x = denoise(x + sigma * posterior_noise(x, seeds), level, torch.arange(len(x), device=x.device))
    return residual(x, D_x, sigma)


def _noised(x: Tensor, sigma: Tensor, present: float, seeds: Tensor, step: int) -> Tensor:
    """``x``, which has noise of std ``present``, at level ``sigma`` [B]."""
    std = (sigma.square() - present**2).clamp(min=0).sqrt().to(x.dtype)
    noise = philox_normal(seeds, step, x.shape[1:], stream=Stream.BOUND).to(x.dtype)
    return x + std.view(-1, 1, 1, 1) * noise
