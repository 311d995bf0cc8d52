"""Checks of metadata that every op makes before it dispatches: no value is read, so nothing synchronises."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check(
    name: str,
    tensor: object,
    *,
    like: Tensor | None = None,
    shape: Sequence[int] | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
) -> None:
    """Raise TypeError (not a tensor, dtype) or ValueError (shape, device) that names the argument.

    Args:
        name: the argument's name, for the message.
        like: a tensor whose device, and whose shape if ``shape`` is None, is expected.
        shape: the expected shape.
        dtypes: the accepted dtypes.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected dtype {expected}, got {str(tensor.dtype).removeprefix('torch.')}")
    if like is not None and shape is None:
        shape = like.shape
    if shape is not None and tensor.shape != tuple(shape):
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {tensor.device}")


def check_image(name: str, tensor: object, *, dtypes: Sequence[torch.dtype] = (torch.float32,)) -> None:
    """As :func:`check`, for an image batch [B, C, H, W] on its own."""
    check(name, tensor, dtypes=dtypes)
    assert isinstance(tensor, Tensor)
    if tensor.dim() != 4:
        raise ValueError(f"{name}: expected shape [B, C, H, W], got {list(tensor.shape)}")


def dense(x: Tensor) -> Tensor:
    """``x`` itself if it is contiguous or channels_last, the two formats the kernels read; else a contiguous copy."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def same_format(x: Tensor, like: Tensor) -> Tensor:
    """``x`` in the memory format of ``like``, which is :func:`dense`; a copy only where it differs."""
    if like.is_contiguous():
        return x.contiguous()
    return x.contiguous(memory_format=torch.channels_last)
