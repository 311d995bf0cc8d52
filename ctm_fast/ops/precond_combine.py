"""Preconditioned skip/output combination: the raw network output becomes the jump G(x, t, s)."""

from typing import Any

import torch
from torch import Tensor

from ctm_fast.ops._checks import FLOATS, check, check_image, dense, same_format
from ctm_fast.ops._library import define, kernel


def precond_combine(x: Tensor, F_x: Tensor, t: Tensor, s: Tensor, *, sigma_data: float = 0.5) -> Tensor:
    """Jump from noise level ``t`` to ``s``; ``s = 0`` gives the EDM denoiser D(x; t), ``s = t`` gives ``x``.

        g_x = c_skip(t) x + c_out(t) F_x         EDM (arXiv 2206.00364), Eq. 7 and Table 1
        G_x = (s / t) x + (1 - s / t) g_x        CTM (arXiv 2310.02279), Sec. 3

    Args:
        x: [B, C, H, W] float32, the noisy image, contiguous or channels_last (anything else is copied).
        F_x: [B, C, H, W] float32, bfloat16 or float16, the raw output of the network.
        t, s: [B] float32, 0 <= s <= t and 0 < t (not checked: reading a value would synchronise).
        sigma_data: standard deviation of the data.

    Returns:
        G_x [B, C, H, W] float32 in the memory format of ``x``, differentiable in ``x`` and ``F_x``, any number of
        times; not in ``t`` and ``s``, nor in forward mode, outside :func:`ctm_fast.ops.use_reference`.

    Raises:
        TypeError: a dtype, ValueError: a shape or device; both name the argument.
        NotImplementedError: a derivative that the fused kernel does not have.
    """
    check_image("x", x)
    check("F_x", F_x, like=x, dtypes=FLOATS)
    check("t", t, like=x, shape=x.shape[:1])
    check("s", s, like=x, shape=x.shape[:1])
    serve = kernel("precond_combine", x, F_x, constants=(t, s))
    x = dense(x)
    return serve(x, same_format(F_x, x), t.contiguous(), s.contiguous(), sigma_data)


def _fake(x: Tensor, F_x: Tensor, t: Tensor, s: Tensor, sigma_data: float) -> Tensor:
    return torch.empty_like(x)


def _fake_backward(
    grad: Tensor, t: Tensor, s: Tensor, sigma_data: float, F_dtype: torch.dtype, need_x: bool, need_F: bool
) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty_like(grad) if need_x else grad.new_empty(0)
    grad_F = torch.empty_like(grad, dtype=F_dtype) if need_F else grad.new_empty(0, dtype=F_dtype)
    return grad_x, grad_F


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, F_x, t, s, ctx.sigma_data = inputs
    ctx.F_dtype = F_x.dtype
    ctx.save_for_backward(t, s)


def _backward(ops: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    t, s = ctx.saved_tensors
    need_x, need_F = ctx.needs_input_grad[:2]
    grad_x, grad_F = ops.precond_combine_backward(dense(grad), t, s, ctx.sigma_data, ctx.F_dtype, need_x, need_F)
    return grad_x if need_x else None, grad_F if need_F else None, None, None, None


def _setup_context_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, t, s, ctx.sigma_data, _, ctx.need_x, ctx.need_F = inputs
    ctx.save_for_backward(t, s)


def _double_backward(ops: Any, ctx: Any, grad_x: Tensor, grad_F: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient is linear in ``grad``: (a grad, b grad). Its transpose is the combination itself."""
    t, s = ctx.saved_tensors
    x = dense(grad_x) if ctx.need_x else torch.zeros_like(dense(grad_F), dtype=torch.float32)
    F_x = same_format(grad_F, x) if ctx.need_F else torch.zeros_like(x)
    return ops.precond_combine(x, F_x, t, s, ctx.sigma_data), None, None, None, None, None, None


define("precond_combine", "precond_combine", fake=_fake, setup_context=_setup_context, backward=_backward)
define(
    "precond_combine",
    "precond_combine_backward",
    fake=_fake_backward,
    setup_context=_setup_context_backward,
    backward=_double_backward,
)
