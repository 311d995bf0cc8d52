"""Softmax attention over the pixels of an image, from the qkv convolution's output to the projection's input."""

from typing import Any

import torch
from torch import Tensor

from ctm_fast.ops._checks import FLOATS, check_image
from ctm_fast.ops._library import define, kernel, no_second_derivative
from ctm_fast.ops.reference.attention import attention_sdpa


def attention(qkv: Tensor, *, heads: int) -> Tensor:
    """Every pixel attends to every pixel of its image, in each head.

        o = softmax(q k^T / sqrt(D)) v          Vaswani et al. (arXiv 1706.03762), Eq. 1

    Args:
        qkv: [B, 3 C, H, W] float32, bfloat16 or float16, the 1x1 convolution's output, three-major: all of q, all of
            k, all of v, each head by head. Read in place in channels_last, as a network computes; else copied.
        heads: a divisor of C; D = C / heads.

    Returns:
        [B, C, H, W] in the dtype of ``qkv``, head by head, channels_last. Differentiable once; twice, and in forward
        mode, only under :func:`ctm_fast.ops.use_reference`.

    Raises:
        TypeError: a dtype, ValueError: a shape or a number; both name the argument.
        NotImplementedError: a derivative that the fused kernel does not have.
    """
    check_image("qkv", qkv, dtypes=FLOATS)
    channels, rest = divmod(qkv.shape[1], 3)
    if rest or not channels:
        raise ValueError(f"qkv: expected shape [B, 3 C, H, W], got {list(qkv.shape)}")
    if heads < 1 or channels % heads:
        raise ValueError(f"heads: expected a divisor of {channels} channels, got {heads}")
    tokens = qkv.shape[2] * qkv.shape[3]
    serve = kernel("attention", qkv, case=f"{tokens}x{channels // heads}")
    return serve(qkv.contiguous(memory_format=torch.channels_last), heads)[0]


def _fake(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = qkv.shape
    out = qkv.new_empty((batch, height, width, channels // 3)).permute(0, 3, 1, 2)
    return out, qkv.new_empty((batch, heads, height * width), dtype=torch.float32)


def _fake_backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, heads: int) -> Tensor:
    return torch.empty_like(qkv)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.heads = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, *output)


def _backward(ops: Any, ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, None]:
    if grad is None:
        return None, None
    qkv, out, lse = ctx.saved_tensors
    grad = grad.contiguous(memory_format=torch.channels_last)
    return ops.attention_backward(grad, qkv, out, lse, ctx.heads), None


define(
    "attention",
    "attention",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    cells=("reference", "sdpa", "triton"),
    sdpa=attention_sdpa,
)
define(
    "attention",
    "attention_backward",
    fake=_fake_backward,
    backward=no_second_derivative("attention"),
    cells=("reference", "triton"),
)
