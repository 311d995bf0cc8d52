"""Softmax attention over the pixels of an image, in plain PyTorch, as a formula and by PyTorch's own fused kernels."""

import torch
from torch import Tensor
from torch.nn import functional


def split(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views q, k, v [B, heads, N, D] of a channels_last qkv [B, 3 heads D, H, W]."""
    batch, channels, height, width = qkv.shape
    tokens = qkv.permute(0, 2, 3, 1).view(batch, height * width, 3, heads, channels // (3 * heads))
    q, k, v = tokens.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def merge(out: Tensor, height: int, width: int) -> Tensor:
    """[B, heads, N, D] -> [B, heads D, H, W] in channels_last; without a copy if the memory is [B, N, heads, D]."""
    batch, heads, _, size = out.shape
    return out.transpose(1, 2).contiguous().view(batch, height, width, heads * size).permute(0, 3, 1, 2)


def attention(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """The output, and the logarithm of the softmax's denominator [B, heads, N] float32."""
    q, k, v = (part.float() for part in split(qkv, heads))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    out = scores.softmax(-1) @ v
    return merge(out.to(qkv.dtype), *qkv.shape[2:]), scores.logsumexp(-1)


def attention_backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, heads: int) -> Tensor:
    """The gradient in qkv, like it, from the output and the logarithm of the softmax's denominator."""
    q, k, v = (part.float() for part in split(qkv, heads))
    batch, _, height, width = qkv.shape
    scale = q.shape[-1] ** -0.5

    def tokens(image: Tensor) -> Tensor:
        return image.float().permute(0, 2, 3, 1).reshape(batch, height * width, heads, -1).transpose(1, 2)

    d_out = tokens(grad)
    weights = (q @ k.transpose(-1, -2) * scale - lse[..., None]).exp()
    d_scores = weights * (d_out @ v.transpose(-1, -2) - (d_out * tokens(out)).sum(-1, keepdim=True)) * scale
    parts = torch.stack([d_scores @ k, d_scores.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ d_out])
    d_qkv = parts.permute(1, 3, 0, 2, 4).reshape(batch, height, width, -1).permute(0, 3, 1, 2)
    return d_qkv.to(qkv.dtype)


def attention_sdpa(qkv: Tensor, heads: int) -> tuple[Tensor, None]:
    """By ``scaled_dot_product_attention``, which keeps what its gradient needs to itself."""
    out = functional.scaled_dot_product_attention(*split(qkv, heads))
    return merge(out, *qkv.shape[2:]), None
