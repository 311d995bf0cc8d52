"""3x3 convolution on the CPU with a quarter of the products: Winograd's minimal filtering."""

from typing import Any

import torch
from torch import Tensor

from ctm_fast.ops._checks import FLOATS, check, check_image
from ctm_fast.ops._library import define, kernel, serving
from ctm_fast.ops.reference import conv3x3 as reference

CHANNELS = 16
"""What the kernel's input and output channels are a multiple of."""
FEWEST_TILES = 64
"""Tiles of 4x4 outputs from which it pays to transform the weights anew in each call (measured, 32 to 512 channels)."""


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The 3x3 convolution (cross-correlation) of stride 1 that keeps the resolution; zeros beyond the border.

        y[b, k, i, j] = bias[k] + sum_{c, u, v} weight[k, c, u, v] x[b, c, i + u - 1, j + v - 1]

    The kernel computes it by F(4x4, 3x3) of Lavin & Gray (arXiv 1509.09308), in float32, for channels_last images on a
    CPU whose channels are multiples of 16. It loses about twice what PyTorch's convolution loses by rounding, in the
    gradient of the weights three to five times; and as 16 pixels are computed at once, a pixel that is not finite, or
    far larger than its neighbours, is felt by all of them. PyTorch's own convolution serves all else: under autocast,
    in exported programs, and images too few to be worth the transform of the weights. See :func:`conv3x3_packed` for
    weights that stay.

    Args:
        x: [B, C, H, W] float32, bfloat16 or float16.
        weight: [K, C, 3, 3] in the dtype of ``x``.
        bias: [K] in the dtype of ``x``.

    Returns:
        [B, K, H, W] in the dtype of ``x``, channels_last where ``x`` is. Differentiable in every tensor, any number of
        times; in forward mode only under :func:`ctm_fast.ops.use_reference`.

    Raises:
        TypeError: a dtype, ValueError: a shape or a device; both name the argument.
        NotImplementedError: a derivative that the fused kernel does not have.
    """
    check_image("x", x, dtypes=FLOATS)
    outputs = weight.shape[0] if isinstance(weight, Tensor) and weight.dim() else 0
    check("weight", weight, like=x, shape=(outputs, x.shape[1], 3, 3), dtypes=(x.dtype,))
    if bias is not None:
        check("bias", bias, like=x, shape=(outputs,), dtypes=(x.dtype,))
    # An exported program holds the weights as they are, and transforming them at each of its calls would not pay.
    if x.is_cuda or torch.compiler.is_exporting() or not _suits(x, outputs):
        return reference.conv3x3(x, weight, bias)
    serve = kernel("conv3x3", x, weight, bias, case="few tiles" if _tiles(x) < FEWEST_TILES else None)
    return serve(x, weight, None if bias is None else bias.contiguous())


def conv3x3_pack(weight: Tensor) -> Tensor:
    """``weight`` [K, C, 3, 3] float32 on the CPU as :func:`conv3x3_packed` takes it: [36, C, K], four times as large.

    G g G^T of each filter g, in the kernel's own order; it is of no use to anything else, and has no gradient.
    Raises TypeError or ValueError that names the argument.
    """
    outputs, inputs = weight.shape[:2] if isinstance(weight, Tensor) and weight.dim() == 4 else (0, 0)
    check("weight", weight, shape=(outputs, inputs, 3, 3))
    if not fits(inputs, outputs, weight.dtype):
        raise ValueError(f"weight: expected multiples of {CHANNELS} channels, got {inputs} in and {outputs} out")
    return kernel("conv3x3_pack", weight)(weight.detach())


def conv3x3_packed(x: Tensor, packed: Tensor, bias: Tensor | None = None, *, lanes: int = 0) -> Tensor:
    """:func:`conv3x3` with weights from :func:`conv3x3_pack`, at any number of images; it has no gradient.

    An image's result does not depend on the batch it is in: not in a bit.

    Args:
        x: [B, C, H, W] float32 on the CPU; copied where it is not channels_last.
        packed: [36, C, K] float32.
        bias: [K] float32.
        lanes: floats in a vector, 4, 8 or 16, for tests; 0: the widest that there are.

    Returns:
        [B, K, H, W] float32, channels_last.

    Raises:
        TypeError: a dtype, ValueError: a shape or a device; both name the argument.
        NotImplementedError: a gradient is asked for.
    """
    check_image("x", x)
    outputs = packed.shape[-1] if isinstance(packed, Tensor) and packed.dim() else 0
    check("packed", packed, like=x, shape=(36, x.shape[1], outputs))
    if bias is not None:
        check("bias", bias, like=x, shape=(outputs,))
    serve = kernel("conv3x3_packed", x, packed, bias)
    if torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in (x, packed, bias)):
        raise NotImplementedError("conv3x3_packed: there is no gradient; call it under torch.no_grad(), or conv3x3")
    x = x.contiguous(memory_format=torch.channels_last)
    return serve(x, packed.contiguous(), None if bias is None else bias.contiguous(), lanes)


def fits(inputs: int, outputs: int, dtype: torch.dtype) -> bool:
    """Whether the kernel takes a convolution from ``inputs`` to ``outputs`` channels in ``dtype``, on a CPU."""
    return dtype == torch.float32 and inputs > 0 and inputs % CHANNELS == 0 and outputs > 0 and outputs % CHANNELS == 0


def packing_pays(inputs: int, outputs: int, dtype: torch.dtype) -> bool:
    """Whether :func:`conv3x3_packed` is what to convolve with here, on the CPU: it fits, and a fused kernel serves."""
    return fits(inputs, outputs, dtype) and serving("conv3x3_packed", "cpu") != "reference"


def _suits(x: Tensor, outputs: int) -> bool:
    if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        return False
    return fits(x.shape[1], outputs, x.dtype) and x.is_contiguous(memory_format=torch.channels_last)


def _tiles(x: Tensor) -> int:
    batch, _, height, width = x.shape
    return batch * -(-height // reference.TILE) * -(-width // reference.TILE)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _channels_last(x, weight.shape[0])


def _fake_pack(weight: Tensor) -> Tensor:
    return weight.new_empty((36, weight.shape[1], weight.shape[0]))


def _fake_packed(x: Tensor, packed: Tensor, bias: Tensor | None, lanes: int) -> Tensor:
    return _channels_last(x, packed.shape[2])


def _channels_last(x: Tensor, outputs: int) -> Tensor:
    batch, _, height, width = x.shape
    return x.new_empty((batch, height, width, outputs)).permute(0, 3, 1, 2)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ops: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad
    grad = grad.contiguous(memory_format=torch.channels_last)
    dx = ops.conv3x3(grad, _transposed(weight), None) if need_x else None
    dweight = ops.conv3x3_weight_grad(grad, x, 0) if need_weight else None
    return dx, dweight, grad.sum((0, 2, 3)) if need_bias else None


def _transposed(weight: Tensor) -> Tensor:
    """The weights of the convolution's transpose."""
    return weight.flip(2, 3).transpose(0, 1)


def _fake_weight_grad(grad: Tensor, x: Tensor, lanes: int) -> Tensor:
    return grad.new_empty((grad.shape[1], 3, 3, x.shape[1])).permute(0, 3, 1, 2)


def _setup_weight_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _weight_grad_backward(ops: Any, ctx: Any, weight: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    """It is linear in both: a convolution of each with the gradient that comes for the weights."""
    grad, x = ctx.saved_tensors
    need_grad, need_x, _ = ctx.needs_input_grad
    d_grad = ops.conv3x3(x, weight, None) if need_grad else None
    return d_grad, ops.conv3x3(grad, _transposed(weight), None) if need_x else None, None


define(
    "conv3x3",
    "conv3x3",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    cells=("reference", "cpp"),
)
define(
    "conv3x3",
    "conv3x3_weight_grad",
    fake=_fake_weight_grad,
    setup_context=_setup_weight_grad,
    backward=_weight_grad_backward,
    cells=("reference", "cpp"),
)
define("conv3x3", "conv3x3_pack", fake=_fake_pack, cells=("reference", "cpp"))
define("conv3x3", "conv3x3_packed", fake=_fake_packed, cells=("reference", "cpp"))
