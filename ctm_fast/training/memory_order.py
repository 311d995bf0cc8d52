"""Tensors as fused elementwise kernels go through them: this rank's part of each, in the order of memory."""

import torch
from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor (what FSDP makes of parameters); any other tensor as it is. Shares its memory."""
    to_local = getattr(tensor, "to_local", None)  # by its method: importing the class takes half a second
    return tensor if to_local is None else to_local()


def in_memory_order(tensor: Tensor) -> Tensor:
    """:func:`local`, contiguous and on the same memory: a dense tensor of other strides as its elements lie.

    PyTorch's fused kernels copy what is not contiguous, there and back, on a CPU.
    """
    shard = local(tensor)
    return shard if shard.is_contiguous() else shard.as_strided((shard.numel(),), (1,))


def in_order_of(like: Tensor, tensor: Tensor) -> Tensor:
    """:func:`in_memory_order` of ``tensor`` if it has the strides of ``like``, else of a copy that has."""
    shard, wanted = local(tensor), local(like)
    return in_memory_order(shard if shard.stride() == wanted.stride() else torch.empty_like(wanted).copy_(shard))
