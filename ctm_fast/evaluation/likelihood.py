"""The likelihood of images under a denoiser: by the change of variables along its ODE, and a bound beside it.

With v = ln sigma the probability-flow ODE is dx/dv = x - D(x; sigma), and (Song et al., arXiv 2011.13456, Eq. 39)

    log p(x at sigma_min) = log N(x at sigma_max; 0, sigma_max^2 I) + int (n - tr dD/dx) dv

from sigma_min to sigma_max, n being the number of pixels and channels. The trace is exact for small images, else
Hutchinson's estimate with probes e, one for the whole way: the mean of e^T (dD/dx) e (Eq. 40), by reverse mode.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ctm_fast.diffusion.adaptive import solve_adaptive
from ctm_fast.diffusion.schedule import Levels
from ctm_fast.errors import ConfigError
from ctm_fast.ops import Stream, philox_normal

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]
"""denoise(x, sigma, index) -> D(x; sigma) for the samples ``index`` of the batch, differentiable in x."""

Probes = Literal["rademacher", "gaussian", "exact"]
Dequantisation = Literal["uniform", "none"]

_BITS = {"uniform": 7.0, "none": math.log2(127.5)}


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


def bits_per_dim(log_prob: Tensor, pixels: int, *, dequantisation: Dequantisation) -> Tensor:
    """-log2 p / n plus what the change of unit to 8-bit values adds: 7 for (x + u) / 128, log2(127.5) for x / 127.5."""
    return -log_prob / (pixels * math.log(2)) + _BITS[dequantisation]


def draw_probes(seeds: Tensor, shape: Sequence[int], *, kind: Probes, count: int) -> Tensor:
    """[K, B, n] float64: K probes for each sample, functions of its seed alone; unit vectors for "exact"."""
    n = math.prod(shape)
    if kind == "exact":
        unit = torch.eye(n, dtype=torch.float64, device=seeds.device)
        return unit[:, None, :].expand(n, len(seeds), n)
    draws = [philox_normal(seeds, k, shape, stream=Stream.PROBE).flatten(1).double() for k in range(count)]
    probes = torch.stack(draws)
    return probes if kind == "gaussian" else torch.where(probes < 0, -1.0, 1.0).double()


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
) -> Likelihood:
    """The likelihood of images at sigma_min under the ODE of ``denoise``.

    Args:
        denoise: takes x in the dtype of the ``x`` given here; the solver's state is float64.
        x: [B, C, H, W] float32 or float64, as :func:`dequantise` gives it.
        levels: sigma_min and sigma_max of the model.
        seeds: [B] int64, for the probes: the same seeds for two models compare them on common random numbers.
        probes: how the trace is estimated; "exact" takes n backward passes, n = C H W at most 256.
        count: probes for each sample.
        tolerance: of the solver, relative and absolute.
        dequantisation: how ``x`` was made, for bits/dim.

    Raises ConfigError naming the argument: sizes, a tolerance that is not reached, images that are not finite.
    """
    if probes not in get_args(Probes):
        raise ConfigError(f"probes: expected one of {', '.join(get_args(Probes))}, got {probes!r}")
    if dequantisation not in _BITS:
        raise ConfigError(f"dequantisation: expected one of {', '.join(_BITS)}, got {dequantisation!r}")
    if count < 1:
        raise ConfigError(f"count: expected a positive integer, got {count}")
    if x.dim() != 4 or not x.is_floating_point():
        raise ConfigError(f"x: expected float [B, C, H, W], got {x.dtype} {list(x.shape)}")
    if not x.isfinite().all():
        raise ConfigError("x: expected finite images, got NaN or infinity")
    batch, shape = x.shape[0], x.shape[1:]
    n = math.prod(shape)
    if probes == "exact" and n > 256:
        raise ConfigError(f"probes: expected images of at most 256 numbers for the exact trace, got {n}")
    drawn = draw_probes(seeds, shape, kind=probes, count=count)
    directions = len(drawn)

    def slope(index: Tensor, y: Tensor, v: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = y[:, :n].reshape(-1, *shape).to(x.dtype).requires_grad_()
            D_x = denoise(leaf, v.exp().to(x.dtype), index)
            traces = []
            for k in range(directions):
                probe = drawn[k, index]
                (pulled,) = torch.autograd.grad(
                    D_x, leaf, probe.view(leaf.shape).to(D_x.dtype), retain_graph=k + 1 < directions
                )
                traces.append((pulled.flatten(1).double() * probe).sum(1))
        trace = torch.stack(traces, 1)
        if probes == "exact":
            trace = trace.sum(1, keepdim=True)
        return torch.cat([y[:, :n] - D_x.detach().flatten(1).double(), n - trace], 1)

    scalars = 1 if probes == "exact" else count
    start = torch.cat([x.flatten(1).double(), x.new_zeros(batch, scalars, dtype=torch.float64)], 1)
    solution = solve_adaptive(
        slope,
        start,
        math.log(levels.sigma_min),
        math.log(levels.sigma_max),
        rtol=tolerance,
        atol=tolerance,
        scalars=scalars,
    )
    x_T, change = solution.y[:, :n], solution.y[:, n:]
    prior = -0.5 * (x_T.square().sum(1) / levels.sigma_max**2 + n * math.log(2 * math.pi * levels.sigma_max**2))
    each = prior[:, None] + change
    bits = bits_per_dim(each, n, dequantisation=dequantisation)
    if probes == "exact":
        error = bits.new_zeros(batch)
    else:
        error = bits.std(1) / math.sqrt(count) if count > 1 else bits.new_full((batch,), math.nan)
    return Likelihood(each.mean(1), bits.mean(1), error, solution.evaluations)


def evidence_bound(
    denoise: Denoise, x: Tensor, levels: Levels, seeds: Tensor, *, draws: int = 10
) -> tuple[Tensor, Tensor]:
    """A lower bound on log p(x at sigma_min) of the model's reverse SDE: its estimate and standard error, each [B].

        log p(x) >= E log N(x_T; 0, sigma_max^2 I) - int E[ |D - x_s|^2 / s^2 + 2 (tr dD/dx - n) ] d ln s
                                                            Song et al. (arXiv 2101.09258), Theorem 3, for VE

    x_s is x with noise of the missing variance s^2 - sigma_min^2. ln s is uniform, one draw in each of ``draws`` equal
    parts; the trace by one Rademacher probe a draw. Arguments as for :func:`log_likelihood`.
    """
    if draws < 2:
        raise ConfigError(f"draws: expected at least 2, got {draws}")
    batch, shape = x.shape[0], x.shape[1:]
    n = math.prod(shape)
    span = math.log(levels.sigma_max / levels.sigma_min)
    index = torch.arange(batch, device=x.device)
    places = torch.special.ndtr(philox_normal(seeds, 0, (draws,), stream=Stream.BOUND).double())
    probes = draw_probes(seeds, shape, kind="rademacher", count=draws)
    terms = []
    for k in range(draws):
        sigma = levels.sigma_min * torch.exp((k + places[:, k]) / draws * span)
        x_sigma = _noised(x, sigma, levels, seeds, 1 + k).requires_grad_()
        with torch.enable_grad():
            D_x = denoise(x_sigma, sigma.to(x.dtype), index)
            probe = probes[k].view(x.shape).to(D_x.dtype)
            (pulled,) = torch.autograd.grad(D_x, x_sigma, probe)
        trace = (pulled * probe).flatten(1).double().sum(1)
        distance = (D_x.detach() - x_sigma.detach()).flatten(1).double().square().sum(1)
        terms.append(distance / sigma**2 + 2 * (trace - n))
    top = torch.full_like(places[:, 0], levels.sigma_max)
    x_T = _noised(x, top, levels, seeds, 1 + draws).flatten(1).double()
    prior = -0.5 * (x_T.square().sum(1) / levels.sigma_max**2 + n * math.log(2 * math.pi * levels.sigma_max**2))
    each = prior[:, None] - span * torch.stack(terms, 1)
    return each.mean(1), each.std(1) / math.sqrt(draws)


def _noised(x: Tensor, sigma: Tensor, levels: Levels, seeds: Tensor, step: int) -> Tensor:
    """``x``, which is at sigma_min, at level ``sigma`` [B]."""
    std = (sigma.square() - levels.sigma_min**2).clamp(min=0).sqrt().to(x.dtype)
    noise = philox_normal(seeds, step, x.shape[1:], stream=Stream.BOUND).to(x.dtype)
    return x + std.view(-1, 1, 1, 1) * noise
