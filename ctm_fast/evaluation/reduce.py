"""What the ranks of a distributed run tell one another; alone, nothing is done."""

import torch.distributed as dist
from torch import Tensor, nn


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """``tensor`` summed over all ranks, in place."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def take_first_ranks(module: nn.Module) -> None:
    """Give ``module`` the weights that it has on rank 0: training need not end alike on two GPUs."""
    if dist.is_available() and dist.is_initialized():
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, 0)
