"""Preconditioned input: the noisy image scaled to unit variance and cast to the network's dtype, in one pass."""

from typing import Any

import torch
from torch import Tensor

from ctm_fast.ops._checks import FLOATS, check, check_image, dense
from ctm_fast.ops._library import define, kernel


def precond_input(x: Tensor, t: Tensor, *, sigma_data: float = 0.5, dtype: torch.dtype | None = None) -> Tensor:
    """What the network sees of ``x`` at noise level ``t``.

        c_in(t) x,   c_in(t) = 1 / sqrt(t^2 + sigma_data^2)        EDM (arXiv 2206.00364), Eq. 7 and Table 1

    Args:
        x: [B, C, H, W] float32, the noisy image, contiguous or channels_last (anything else is copied).
        t: [B] float32, 0 <= t (not checked: reading a value would synchronise).
        sigma_data: standard deviation of the data.
        dtype: the network's, float32, bfloat16 or float16; None for that of ``x``.

    Returns:
        [B, C, H, W] of ``dtype`` in the memory format of ``x``, differentiable in ``x`` any number of times; not in
        ``t``, nor in forward mode, outside :func:`ctm_fast.ops.use_reference`.

    Raises:
        TypeError: a dtype, ValueError: a shape or device; both name the argument.
        NotImplementedError: a derivative that the fused kernel does not have.
    """
    check_image("x", x)
    check("t", t, like=x, shape=x.shape[:1])
    dtype = x.dtype if dtype is None else dtype
    if dtype not in FLOATS:
        raise TypeError(f"dtype: expected torch.float32, torch.bfloat16 or torch.float16, got {dtype}")
    serve = kernel("precond_input", x, constants=(t,))
    return serve(dense(x), t.contiguous(), sigma_data, dtype)


def _fake(x: Tensor, t: Tensor, sigma_data: float, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, t, ctx.sigma_data, _ = inputs
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(t)


def _backward(ops: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The op is linear and diagonal in ``x``: it is its own transpose, with the two dtypes exchanged."""
    (t,) = ctx.saved_tensors
    return ops.precond_input(dense(grad), t, ctx.sigma_data, ctx.x_dtype), None, None, None


define("precond_input", "precond_input", fake=_fake, setup_context=_setup_context, backward=_backward)
