"""Sums over the ranks of a distributed run."""

import torch.distributed as dist
from torch import Tensor


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """``tensor`` summed over all ranks, in place; as it is where no process group is set up."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor
