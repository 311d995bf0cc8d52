"""Noise-level embedding: sinusoidal features of c_noise, for one level of the network or for both at once."""

import math
from typing import Literal, overload

import torch
from torch import Tensor

from ctm_fast.ops._checks import check
from ctm_fast.ops._library import define, kernel

_SCALES = {"edm": 0.25, "adm": 250.0}
_ORDERS = {"sin_cos": True, "cos_sin": False}

CNoise = Literal["edm", "adm"]
Order = Literal["sin_cos", "cos_sin"]


def noise_frequencies(channels: int, *, endpoint: bool, max_period: float = 10000.0) -> Tensor:
    """The positional table: f_j = max_period^(-j / n), j = 0 ... channels / 2 - 1.

    Args:
        channels: width of the embedding, even.
        endpoint: n = channels / 2 - 1, so that the last frequency is 1 / max_period (DDPM++); else channels / 2 (ADM).
        max_period: ratio of the largest frequency, 1, to the smallest.

    Returns:
        [channels / 2] float32 on the CPU.

    Raises:
        ValueError: ``channels`` is odd or not positive.
    """
    if channels < 2 or channels % 2:
        raise ValueError(f"channels: expected an even number from 2 on, got {channels}")
    half = channels // 2
    steps = max(half - 1, 1) if endpoint else half
    # In float32, in this order, as the published networks were trained: at c_noise = 1000 one ulp of a frequency is
    # visible in the embedding.
    return torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32) / steps)


@overload
def noise_embed(t: Tensor, s: None = None, *, freqs: Tensor, c_noise: CNoise = ..., order: Order = ...) -> Tensor: ...
@overload
def noise_embed(
    t: Tensor, s: Tensor, *, freqs: Tensor, c_noise: CNoise = ..., order: Order = ...
) -> tuple[Tensor, Tensor]: ...
def noise_embed(
    t: Tensor, s: Tensor | None = None, *, freqs: Tensor, c_noise: CNoise = "edm", order: Order = "sin_cos"
) -> Tensor | tuple[Tensor, Tensor]:
    """Features of noise level ``t``, or of ``t`` and ``s`` from one launch.

        [sin(c f_0), ..., sin(c f_n), cos(c f_0), ..., cos(c f_n)]      the halves as ``order`` says
        c = ln(t) / 4  ("edm")      EDM (arXiv 2206.00364), Table 1, c_noise
        c = 250 ln(t)  ("adm")      consistency models (arXiv 2303.01469), the form their ADM network takes

    Args:
        t: [B] float32, 0 < t (not checked: reading a value would synchronise).
        s: [B] float32, 0 < s, the level jumped to; None for a network of one level.
        freqs: [C / 2] float32, from :func:`noise_frequencies`, or 2 pi times a buffer of normals (Fourier features).
        c_noise: "edm" or "adm".
        order: "sin_cos" (DDPM++ and NCSN++, after their swap of halves) or "cos_sin" (ADM).

    Returns:
        [B, C] float32, or the pair of them for (t, s). No gradient flows to the levels or frequencies, outside
        :func:`ctm_fast.ops.use_reference`.

    Raises:
        TypeError: a dtype, ValueError: a shape, a device or a name; both name the argument.
        NotImplementedError: a derivative that the fused kernel does not have.
    """
    check("t", t)
    if t.dim() != 1:
        raise ValueError(f"t: expected shape [B], got {list(t.shape)}")
    if s is not None:
        check("s", s, like=t)
    check("freqs", freqs, like=t, shape=freqs.shape if isinstance(freqs, Tensor) else None)
    if freqs.dim() != 1:
        raise ValueError(f"freqs: expected shape [C / 2], got {list(freqs.shape)}")
    if c_noise not in _SCALES:
        raise ValueError(f"c_noise: expected one of {', '.join(_SCALES)}, got {c_noise!r}")
    if order not in _ORDERS:
        raise ValueError(f"order: expected one of {', '.join(_ORDERS)}, got {order!r}")
    levels = (t,) if s is None else (t, s)
    serve = kernel("noise_embed", t, constants=(*levels, freqs))
    out = serve(
        t.contiguous(),
        None if s is None else s.contiguous(),
        freqs.contiguous(),
        _SCALES[c_noise],
        _ORDERS[order],
    )
    return out[0] if s is None else (out[0], out[1])


def _fake(t: Tensor, s: Tensor | None, freqs: Tensor, scale: float, sin_first: bool) -> Tensor:
    return t.new_empty(1 if s is None else 2, t.shape[0], 2 * freqs.shape[0])


define("noise_embed", "noise_embed", fake=_fake)
