"""Group normalisation with what surrounds it in a U-Net's block, in plain PyTorch."""

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn import functional


def group_norm_silu(
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
    """The output, and mean and reciprocal standard deviation [B, groups] of each group."""
    h = x.float()
    if x_shift is not None:
        h = h + x_shift[:, :, None, None]
    batch, channels, height, width = x.shape
    if batch == 0:  # which PyTorch's op refuses
        h = h * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)
        mean = rstd = h.new_empty((0, groups))
    else:
        if forward_ad.unpack_dual(h).tangent is not None:
            h = h.contiguous()  # the op's own forward-mode derivative takes no channels_last
        elif not h.is_contiguous() and h.stride(0) != channels * height * width:
            # A batch of one may have any stride there; the op refuses it.
            h = h.clone(memory_format=torch.channels_last)
        h, mean, rstd = torch.native_group_norm(h, weight, bias, batch, channels, height * width, groups, eps)
    if scale is not None:
        h = h * (1 + scale[:, :, None, None])
    if shift is not None:
        h = h + shift[:, :, None, None]
    if silu:
        h = functional.silu(h)
    if residual is not None:
        h = h + residual.float()
    if out_scale != 1:
        h = h * out_scale
    return h.to(x.dtype), mean.view(batch, groups), rstd.view(batch, groups)


def group_norm_silu_backward(
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
    """The gradient in x, and the sums over pixels of g, g n and n [3, B, C]: n is the normalised x, g the gradient
    before SiLU. Every other gradient follows from the sums."""
    batch, channels, height, width = x.shape
    h = x.float()
    if x_shift is not None:
        h = h + x_shift[:, :, None, None]
    grouped = h.reshape(batch, groups, channels // groups, height, width)
    normal = ((grouped - mean[:, :, None, None, None]) * rstd[:, :, None, None, None]).reshape(h.shape)
    gain = weight.expand(batch, channels) if scale is None else weight * (1 + scale)
    offset = bias.expand(batch, channels) if scale is None else bias * (1 + scale)
    if shift is not None:
        offset = offset + shift
    g = grad.float() * out_scale
    if silu:
        z = normal * gain[:, :, None, None] + offset[:, :, None, None]
        sigmoid = torch.sigmoid(z)
        g = g * sigmoid * (1 + z * (1 - sigmoid))
    sums = torch.stack([g.sum((2, 3)), (g * normal).sum((2, 3)), normal.sum((2, 3))])
    if not need_x:
        return x.new_empty(0), sums
    size = channels // groups * height * width

    def group_mean(values: Tensor) -> Tensor:
        """[B, C] sums over pixels -> [B, C, 1, 1] mean over the pixels and channels of each group."""
        means = values.reshape(batch, groups, -1).sum(2) / size
        return means.repeat_interleave(channels // groups, 1)[:, :, None, None]

    dx = g * gain[:, :, None, None] - group_mean(gain * sums[0]) - normal * group_mean(gain * sums[1])
    dx = dx * rstd.repeat_interleave(channels // groups, 1)[:, :, None, None]
    return dx.to(x.dtype), sums
