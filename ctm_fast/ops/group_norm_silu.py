"""Group normalisation with what surrounds it in a U-Net's block: shifts by the noise level, SiLU, residual."""

from typing import Any

import torch
from torch import Tensor

from ctm_fast.ops._checks import FLOATS, check, check_image, dense, same_format
from ctm_fast.ops._library import define, kernel, no_second_derivative


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int,
    eps: float = 1e-6,
    x_shift: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
    residual: Tensor | None = None,
    out_scale: float = 1.0,
) -> Tensor:
    """Normalise groups of channels, modulate, activate, and add a residual, in one pass over the image.

        n = (x + x_shift - mean) / sqrt(variance + eps)     over the pixels and channels of a group (arXiv 1803.08494)
        z = (n weight + bias) (1 + scale) + shift           FiLM (arXiv 1709.07871), as ADM takes its noise level
        y = (silu(z) + residual) out_scale                  silu(z) = z / (1 + exp(-z)), or z

    Args:
        x: [B, C, H, W] float32, bfloat16 or float16, contiguous or channels_last (anything else is copied).
        weight, bias: [C] float32.
        groups: a divisor of C.
        eps: added to the variance, which is the biased one, in float32.
        x_shift: [B, C] float32, added before the statistics are taken, as DDPM++ takes its noise level.
        scale, shift: [B, C] float32.
        silu: whether to activate.
        residual: like ``x``.
        out_scale: sqrt(1/2) where the residual stream keeps its variance.

    Returns:
        y like ``x``, in its dtype and memory format. Differentiable once in every tensor; twice, and in forward mode,
        only under :func:`ctm_fast.ops.use_reference`.

    Raises:
        TypeError: a dtype, ValueError: a shape, a device or a number; both name the argument.
        NotImplementedError: a derivative that the fused kernel does not have.
    """
    check_image("x", x, dtypes=FLOATS)
    batch, channels = x.shape[:2]
    check("weight", weight, like=x, shape=(channels,))
    check("bias", bias, like=x, shape=(channels,))
    if groups < 1 or channels % groups:
        raise ValueError(f"groups: expected a divisor of {channels} channels, got {groups}")
    if not eps > 0:
        raise ValueError(f"eps: expected a positive number, got {eps}")
    per_sample = {"x_shift": x_shift, "scale": scale, "shift": shift}
    for name, value in per_sample.items():
        if value is not None:
            check(name, value, like=x, shape=(batch, channels))
    if residual is not None:
        check("residual", residual, like=x, dtypes=(x.dtype,))
    serve = kernel("group_norm_silu", x, weight, bias, *per_sample.values(), residual)
    x = dense(x)
    x_shift, scale, shift = (None if value is None else value.contiguous() for value in per_sample.values())
    residual = None if residual is None else same_format(residual, x)
    args = (x_shift, scale, shift, silu, residual, out_scale)
    return serve(x, weight.contiguous(), bias.contiguous(), groups, eps, *args)[0]


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    x_shift: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    residual: Tensor | None,
    out_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty((x.shape[0], groups), dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x), mean, rstd


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    x_shift: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    out_scale: float,
    need_x: bool,
) -> tuple[Tensor, Tensor]:
    sums = x.new_empty((3, *x.shape[:2]), dtype=torch.float32)
    return torch.empty_like(x) if need_x else x.new_empty(0), sums


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, ctx.groups, _, x_shift, scale, shift, ctx.silu, _, ctx.out_scale = inputs
    _, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, mean, rstd, weight, bias, x_shift, scale, shift)


def _backward(ops: Any, ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 11
    x, mean, rstd, weight, bias, x_shift, scale, shift = ctx.saved_tensors
    need_x, need_weight, need_bias, _, _, need_x_shift, need_scale, need_shift, _, need_residual, _ = (
        ctx.needs_input_grad
    )
    grad = same_format(grad, x)
    dx, sums = ops.group_norm_silu_backward(
        grad, x, mean, rstd, weight, bias, ctx.groups, x_shift, scale, shift, ctx.silu, ctx.out_scale, need_x
    )
    g, g_n, n = sums.unbind(0)
    factor = 1 if scale is None else 1 + scale
    dx_shift = None
    if need_x_shift:
        gain = weight * factor
        pixels = x.shape[2] * x.shape[3]
        mean_g = _group_mean(gain * g, ctx.groups, pixels)
        mean_g_n = _group_mean(gain * g_n, ctx.groups, pixels)
        dx_shift = _per_channel(rstd, gain.shape[-1]) * (gain * g - pixels * mean_g - mean_g_n * n)
    return (
        dx if need_x else None,
        (factor * g_n).sum(0) if need_weight else None,
        (factor * g).sum(0) if need_bias else None,
        None,
        None,
        dx_shift,
        weight * g_n + bias * g if need_scale else None,
        g.clone() if need_shift else None,
        None,
        grad * ctx.out_scale if need_residual else None,
        None,
    )


def _per_channel(values: Tensor, channels: int) -> Tensor:
    """[B, groups] -> [B, C]"""
    return values.repeat_interleave(channels // values.shape[1], 1)


def _group_mean(sums: Tensor, groups: int, pixels: int) -> Tensor:
    """Sums over pixels [B, C] -> mean over the pixels and channels of each group [B, C]."""
    batch, channels = sums.shape
    grouped = sums.view(batch, groups, channels // groups).sum(2) / (channels // groups * pixels)
    return _per_channel(grouped, channels)


define("group_norm_silu", "group_norm_silu", fake=_fake, setup_context=_setup_context, backward=_backward)
define(
    "group_norm_silu",
    "group_norm_silu_backward",
    fake=_fake_backward,
    backward=no_second_derivative("group_norm_silu"),
)
